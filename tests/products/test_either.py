"""A choice between two forms of a product, and what grids over it hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax.products.either import either
from tests.models import Case, normal, ready

AXES = [(0, 0, 0), (0, None, 0), (0, None, None), (None, 0, 0), (None, None, 0)]


def picked(chosen, x, tree):
    yes = lambda x, tree: x + tree["a"]  # noqa: E731
    return either(chosen, yes, lambda x, tree: x * tree["a"] + tree["b"], x, tree)


def wanted(chosen, x, a):
    return x + a if chosen else x * a


@pytest.mark.parametrize("lanes", [[True] * 4, [False] * 4, [True, False, False, True]], ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_lanes_are_each_alone(axes, lanes):
    shapes = [(4, 3) if axis == 0 else (3,) for axis in axes[1:]]
    x, a = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in shapes)
    chosen = jnp.asarray(lanes if axes[0] == 0 else lanes[1])
    tree = {"a": a, "b": jnp.zeros(())}
    got = jax.jit(jax.vmap(picked, (*axes[:2], {"a": axes[2], "b": None})))(chosen, x, tree)
    for lane in range(4):
        own = [v[lane] if axis == 0 else v for v, axis in zip((chosen, x, a), axes, strict=True)]
        assert_allclose(got[lane], wanted(*own), rtol=1e-6)


def test_any_nesting_of_vmaps():
    rng = np.random.default_rng(1)
    chosen, x = rng.random((2, 4)) < 0.5, rng.normal(size=(2, 3)).astype(np.float32)
    tree = {"a": rng.normal(size=(4, 3)).astype(np.float32), "b": jnp.zeros(())}
    inner = jax.vmap(picked, (0, None, {"a": 0, "b": None}))
    got = jax.jit(jax.vmap(inner, (0, 0, None)))(chosen, x, tree)
    for place in np.ndindex(2, 4):
        assert_allclose(
            got[place], wanted(chosen[place], x[place[0]], tree["a"][place[1]]), rtol=1e-6
        )


def test_other_axes_than_the_first():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    tree = {"a": jnp.ones(3), "b": jnp.float32(5.0)}
    got = jax.vmap(picked, (0, 1, None), 1)(jnp.array([True, False]), x, tree)
    assert_array_equal(got, np.stack([x[:, 0] + 1.0, x[:, 1] + 5.0], axis=1))


def long_sums(p, x):
    for w in p:
        x = jax.nn.relu(x @ w)
    return x


@pytest.fixture(scope="module")
def grid():
    """Layers whose sums are longer than float32 holds in the worst case."""
    weights = [normal(seed, 600, 600) / 24.0 for seed in range(2)]
    case = Case(long_sums, weights, normal(9, 3, 600))
    plan, state, _ = ready(case, qj.uniform_policy())
    assert {entry.sizing.block < 600 for entry in plan.quantized} == {True}

    def cell(bits, params, x):
        qstate = qj.calibrate(plan, state, params, activation_bits=bits)
        return qj.fake_quantize(long_sums, plan)(qstate, params, x)

    return case, cell, jnp.arange(0.0, 9.0).at[1].set(2.0)


def test_a_grid_over_widths_repeats_no_weight(grid):
    """It did for each cell, 32 MiB of a model of 3."""
    case, cell, widths = grid
    cells = jax.jit(jax.vmap(cell, (0, None, None)))
    compiled = cells.lower(widths, case.params, case.x).compile()
    weights = sum(w.nbytes for w in case.params)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * weights


def test_cells_of_floats_and_of_codes_are_each_alone(grid):
    case, cell, widths = grid
    together = jax.jit(jax.vmap(cell, (0, None, None)))(widths, case.params, case.x)
    alone = jax.jit(cell)
    for bits, found in zip(widths, together, strict=True):
        assert_allclose(found, alone(bits, case.params, case.x), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_grid_are_those_of_each_cell(grid):
    case, cell, widths = grid
    loss = lambda params, bits: jnp.sum(cell(bits, params, case.x) ** 2)  # noqa: E731
    total = lambda params: jnp.sum(jax.vmap(functools.partial(loss, params))(widths[3:6]))  # noqa: E731
    got = jax.jit(jax.grad(total))(case.params)
    each = [jax.jit(jax.grad(loss))(case.params, bits) for bits in widths[3:6]]
    for index, leaf in enumerate(got):
        want = sum(one[index] for one in each)
        assert_allclose(leaf, want, rtol=1e-3, atol=1e-3 * float(jnp.abs(want).max()))
