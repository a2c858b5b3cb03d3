"""A choice by index: under vmap over the index, each lane by its own branch and no other."""

import collections
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import ranges, statistics
from quantjax.ranges import lanes
from quantjax.ranges.lanes import choose

KINDS = 3


def picked(index, x, y):
    """Three branches, of several results each, that share some operands."""
    return choose(
        index,
        [
            lambda: (x + 1.0, jnp.int32(1)),
            lambda: (x * y, jnp.int32(2)),
            lambda: (jnp.sin(y), jnp.int32(3)),
        ],
        apart=KINDS,
    )


def wanted(index, x, y):
    some = [x + 1.0, x * y, np.sin(y)]
    return some[index]


@given(st.lists(st.integers(0, KINDS - 1), min_size=1, max_size=12), st.integers(0, 99))
def test_lanes_are_each_alone(indices, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, len(indices))).astype(np.float32)
    got, kinds = jax.vmap(picked)(jnp.asarray(indices, jnp.int32), x, y)
    assert_allclose(got, [wanted(*lane) for lane in zip(indices, x, y, strict=True)], rtol=1e-6)
    assert_array_equal(kinds, np.asarray(indices) + 1)


AXES = [(0, 0, 0), (0, None, 0), (0, 0, None), (0, None, None), (None, 0, 0), (None, 0, None)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("inner", AXES, ids=str)
@pytest.mark.parametrize("outer", AXES, ids=str)
def test_any_nesting_of_vmaps_is_a_loop(outer, inner):
    rng = np.random.default_rng(0)
    sizes = (4, 5)
    batched = [tuple(axis == 0 for axis in axes) for axes in zip(outer, inner, strict=True)]
    shapes = [tuple(n for n, some in zip(sizes, by, strict=True) if some) for by in batched]
    index = jnp.asarray(rng.integers(0, KINDS, shapes[0]), jnp.int32)
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes[1:])
    got, _ = jax.jit(jax.vmap(jax.vmap(picked, inner), outer))(index, x, y)
    for place in np.ndindex(sizes):
        own = [tuple(k for k, some in zip(place, by, strict=True) if some) for by in batched]
        lane = [np.asarray(array)[at] for array, at in zip((index, x, y), own, strict=True)]
        assert_allclose(got[place], wanted(*lane), rtol=1e-6)


def test_other_axes_than_the_first_are_moved():
    x, y = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    index = jnp.asarray([0, 1, 2, 1], jnp.int32)
    got = jax.vmap(lambda *lane: picked(*lane)[0], (0, 1, 1), 1)(index, x, y)
    for lane in range(4):
        assert_allclose(got[:, lane], wanted(int(index[lane]), x[:, lane], y[:, lane]), rtol=1e-6)


def test_no_lanes_are_none():
    got, kinds = jax.vmap(picked)(jnp.zeros(0, jnp.int32), jnp.zeros((0, 2)), jnp.zeros((0, 2)))
    assert got.shape == (0, 2)
    assert kinds.shape == (0,)


def test_each_branch_runs_for_its_own_lanes():
    """A switch under vmap would call all branches for all of them."""
    calls: collections.Counter[int] = collections.Counter()

    def counted(kind, x):
        def call(_):
            calls[kind] += 1

        jax.debug.callback(call, x)
        return x + kind

    def one(index, x):
        return choose(index, [lambda k=k: counted(k, x) for k in range(KINDS)], apart=KINDS)

    indices = [2, 0, 2, 2, 0, 2, 2]
    got = jax.vmap(one)(jnp.asarray(indices, jnp.int32), jnp.zeros(7, jnp.float32))
    jax.effects_barrier()
    assert_array_equal(got, indices)
    together = math.ceil(7 / KINDS)
    assert calls == {k: math.ceil(indices.count(k) / together) * together for k in (0, 2)}


def test_lanes_with_much_data_are_taken_one_at_a_time(monkeypatch):
    monkeypatch.setattr(lanes, "AT_ONCE", 8)
    x, y = np.random.default_rng(0).normal(size=(2, 9, 8)).astype(np.float32)
    index = np.arange(9) % KINDS
    program = jax.jit(jax.vmap(picked))
    got, _ = program(index, x, y)
    assert_allclose(got, [wanted(*lane) for lane in zip(index, x, y, strict=True)], rtol=1e-6)
    assert "tensor<1x8xf32>" in program.lower(index, x, y).as_text()


def test_gradients_are_those_of_a_switch():
    def by_switch(index, x, y):
        return lax.switch(index, [lambda: x + 1.0, lambda: x * y, lambda: jnp.sin(y)])

    index = jnp.arange(6, dtype=jnp.int32) % KINDS
    x, y = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    for mapped in (
        lambda f: jax.vmap(jax.grad(f, (1, 2)))(index, x, y),
        lambda f: jax.grad(lambda x, y: jax.vmap(f)(index, x, y).sum(), (0, 1))(x, y),
        lambda f: jax.grad(lambda x: jax.checkpoint(f)(index[1], x, y[1]))(x[1]),
        lambda f: jax.jvp(lambda x, y: jax.vmap(f)(index, x, y), (x, y), (y, x)),
        lambda f: jax.vmap(lambda *lane: jax.hessian(f, (1, 2))(*lane))(index, x, y),
    ):
        got = mapped(lambda *lane: picked(*lane)[0])
        for one, other in zip(
            jax.tree.leaves(got), jax.tree.leaves(mapped(by_switch)), strict=True
        ):
            assert_allclose(one, other, rtol=1e-6)


def test_branches_that_were_not_chosen_have_no_gradient():
    """Neither has what they make of 0 any: infinity times nothing."""

    def one(index, x):
        return choose(index, [lambda: jnp.log(x), lambda: 3.0 * x], apart=2)

    assert float(jax.grad(one, 1)(jnp.int32(1), jnp.float32(0))) == 3.0
    got = jax.vmap(jax.grad(one, 1))(jnp.asarray([1, 0], jnp.int32), jnp.asarray([0.0, 2.0]))
    assert_array_equal(got, [3.0, 0.5])


def test_branches_have_to_be_alike():
    with pytest.raises(TypeError, match="branches return"):
        choose(jnp.int32(0), [lambda: jnp.zeros(2), lambda: (jnp.zeros(2),)], apart=2)
    with pytest.raises(TypeError):
        choose(jnp.int32(0), [lambda: jnp.zeros(2), lambda: jnp.zeros(3)], apart=2)


def test_rules_that_close_over_a_lane_are_that_lanes():
    """A rule is a function of the caller's, and knows of the caller's arrays."""
    seen = statistics.of_tensor(jnp.asarray([-1.0, 4.0]), (1,), with_values=True)
    target = ranges.Target(qj.integer(), False, jnp.float32(8))

    def one(index, share):
        def shared(statistics, target):
            low, high = statistics.extremes
            return ranges.Range(share * low, share * high, statistics.batches > 0)

        rule = qj.RangeRule("shared", shared, reads_distribution=True)
        found = ranges.derive(ranges.stack([rule, ranges.MSE])[index], seen, target)
        return found.high[0]

    shares = jnp.asarray([0.5, 0.25, 0.5, 0.125])
    got = jax.vmap(one)(jnp.asarray([0, 0, 1, 0], jnp.int32), shares)
    assert_array_equal(got[jnp.asarray([0, 1, 3])], [2.0, 1.0, 0.5])
    assert_array_equal(got[2], ranges.derive(ranges.MSE, seen, target).high[0])


def test_fits_of_a_stack_are_each_alone():
    fits = [ranges.MIN_MAX, ranges.MSE, ranges.LEAST_SQUARES, ranges.ADMM, ranges.HQO_SCALE]
    quantizer = qj.Quantizer(
        format=qj.integer(), bits=8, symmetric=True, granularity=qj.PerChannel(-1)
    )
    weights = jnp.asarray(np.random.default_rng(0).laplace(size=(16, 4)), jnp.float32)
    stacked = ranges.stack(fits)

    def one(index, bits):
        return quantizer.qparams_of(weights, bits, scale_shape=(1, 4), rule=stacked[index])

    index, bits = jnp.meshgrid(jnp.arange(len(fits)), jnp.asarray([3.0, 8.0]), indexing="ij")
    got = jax.jit(jax.vmap(one))(index.ravel(), bits.ravel())
    for lane, (i, b) in enumerate(zip(index.ravel(), bits.ravel(), strict=True)):
        alone = jax.jit(one)(i, b)
        jax.tree.map(lambda a, w, lane=lane: assert_array_equal(a[lane], w), got, alone)


def test_operands_may_be_empty():
    for axes in ((0, None), (0, 0)):
        x = jnp.zeros((3, 0) if axes[1] == 0 else 0)
        index = jnp.arange(3, dtype=jnp.int32) % 2
        got = jax.vmap(lambda i, x: choose(i, [lambda: x, lambda: 2.0 * x], apart=2), axes)(
            index, x
        )
        assert got.shape == (3, 0)


def test_an_index_at_two_levels_runs_each_branch_for_its_own():
    calls: collections.Counter[int] = collections.Counter()

    def counted(kind, x):
        jax.debug.callback(lambda _: calls.update([kind]), x)
        return x + kind

    def one(index, x):
        return choose(index, [lambda k=k: counted(k, x) for k in range(KINDS)], apart=KINDS)

    index = jnp.asarray([[2, 0, 2], [0, 0, 2]], jnp.int32)
    got = jax.vmap(jax.vmap(one))(index, jnp.zeros((2, 3)))
    jax.effects_barrier()
    assert_array_equal(got, index)
    assert calls[1] == 0


def test_collectives_are_of_all_lanes():
    """Whatever branch they are in, as in a switch."""

    def one(by, index, x):
        return by(index, [lambda: lax.psum(x, "lanes"), lambda: 2.0 * x])

    x = jnp.asarray([1.0, 2.0, 4.0])
    for index in (jnp.int32(0), jnp.asarray([0, 1, 0], jnp.int32)):
        axes = (0 if index.ndim else None, 0)
        got, want = (
            jax.vmap(lambda i, x, by=by: one(by, i, x), axes, axis_name="lanes")(index, x)
            for by in (lambda *a: choose(*a, apart=2), lax.switch)
        )
        assert_array_equal(got, want)


def test_a_symbolic_number_of_lanes_can_be_exported():
    n, m = jax.export.symbolic_shape("n, m")
    index = jax.ShapeDtypeStruct((n,), jnp.int32)
    for shape, axes in (((n,), 0), ((m,), None)):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        grid = jax.jit(jax.vmap(picked, (0, axes, axes)))
        exported = jax.export.export(grid)(index, x, x)
        lanes_of = jnp.arange(5, dtype=jnp.int32) % KINDS, jnp.arange(5.0), jnp.ones(5)
        for got, want in zip(exported.call(*lanes_of), grid(*lanes_of), strict=True):
            assert_allclose(got, want, rtol=1e-6)


def test_no_trace_outlives_its_function():
    with jax.checking_leaks():
        x = jnp.arange(4.0)
        got, _ = jax.jit(jax.vmap(picked))(jnp.arange(4, dtype=jnp.int32) % KINDS, x, x)
    assert got.shape == (4,)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("chosen", [0, 2, 3])
def test_derivatives_pass_rules_that_have_none(chosen):
    """Searches count and sort; a stack is differentiated by the rule that was chosen."""
    rules = [ranges.MIN_MAX, ranges.percentile(0.99), ranges.MSE, ranges.KL_TENSORRT]
    stacked = ranges.stack(rules)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    quantizer = qj.Quantizer(
        format=qj.integer(), bits=4, symmetric=True, granularity=qj.PerTensor()
    )

    def scale(rule, w):
        return quantizer.qparams_of(w, jnp.float32(4), scale_shape=(1, 1), rule=rule).scale.sum()

    by_index = lambda w: scale(stacked[jnp.int32(chosen)], w)  # noqa: E731
    alone = lambda w: scale(rules[chosen], w)  # noqa: E731
    got, want = (jax.jit(jax.grad(by))(weights) for by in (by_index, alone))
    assert_array_equal(got, want)
    along = jnp.ones_like(weights)
    got, want = (jax.jvp(by, (weights,), (along,))[1] for by in (by_index, alone))
    assert_array_equal(got, want)
