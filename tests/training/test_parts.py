"""Each part of a qstate moves by its own transformation, and nothing else moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.training import Part, by_part, keep_positive, parts_of
from tests import models
from tests.refused import refused
from tests.training import cases


def moved(before, after):
    """Names of the fields and entries that changed, over all QParams."""
    changed = set()
    for site, operands in before.items():
        for key, old in operands.items():
            new = after[site][key]
            changed |= {
                field
                for field in ("scale", "zero_point", "bits")
                if not np.array_equal(getattr(old, field), getattr(new, field))
            }
            entries = dict(old.theta or {})
            changed |= {n for n in entries if not np.array_equal(entries[n], new.theta[n])}
    return changed


CASES = [
    ({"scale": optax.sgd(0.1)}, {"scale"}),
    ({"zero_point": optax.sgd(0.1)}, {"zero_point"}),
    ({"scale": optax.sgd(0.1), "zero_point": optax.sgd(0.2)}, {"scale", "zero_point"}),
    ({"theta": optax.sgd(0.1)}, {"clip", "alpha"}),
    ({"theta": {"clip": optax.sgd(0.1)}}, {"clip"}),
    ({"theta": {"clip": optax.sgd(0.1), "alpha": optax.sgd(0.3)}}, {"clip", "alpha"}),
    ({}, set()),
]


@pytest.mark.parametrize(("named", "expected"), CASES)
def test_only_what_is_named_moves(named, expected):
    qstate = cases.qstate(clip=2.0, alpha=0.25)
    after, _ = cases.step(by_part(**named), cases.ones_like(qstate), qstate)
    assert moved(qstate, after) == expected
    assert jax.tree.structure(after) == jax.tree.structure(qstate)


def test_widths_never_move():
    qstate = cases.qstate(clip=2.0)
    every = optax.sgd(1.0)
    optimizer = by_part(scale=every, zero_point=every, theta=every, weights=every)
    after, _ = cases.step(optimizer, cases.ones_like(qstate), qstate)
    assert moved(qstate, after) == {"scale", "zero_point", "clip"}


@given(
    rates=st.tuples(*[st.floats(0.01, 1.0)] * 4),
    decay=st.floats(0.0, 0.5),
    seed=st.integers(0, 99),
)
def test_updates_by_an_independent_model(rates, decay, seed):
    """Plain descent with rates of their own, and decay for clips alone."""
    rates = np.float32(rates)
    qstate = cases.qstate(clip=3.0, alpha=0.5)
    params = {"kernel": models.normal(seed, 2, 3)}
    draw = np.random.default_rng(seed)
    gradient = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), (params, qstate)
    )
    optimizer = by_part(
        weights=optax.sgd(rates[0]),
        scale=optax.sgd(rates[1]),
        zero_point=optax.sgd(rates[2]),
        theta={"clip": optax.chain(optax.add_decayed_weights(decay), optax.sgd(rates[3]))},
    )
    (kernels, after), _ = cases.step(optimizer, gradient, (params, qstate))

    def descend(p, g, rate):
        return np.float64(p) - np.float64(rate) * np.float64(g)

    assert_allclose(
        kernels["kernel"], descend(params["kernel"], gradient[0]["kernel"], rates[0]), atol=1e-5
    )
    for site, operands in qstate.items():
        for key, old in operands.items():
            g, new = gradient[1][site][key], after[site][key]
            assert_allclose(new.scale, descend(old.scale, g.scale, rates[1]), atol=1e-5)
            assert_allclose(
                new.zero_point, descend(old.zero_point, g.zero_point, rates[2]), atol=1e-5
            )
            assert_array_equal(new.bits, old.bits)
            if old.theta:
                decayed = np.float64(g.theta["clip"]) + decay * np.float64(old.theta["clip"])
                expected = descend(old.theta["clip"], decayed, rates[3])
                assert_allclose(new.theta["clip"], expected, atol=1e-5)
                assert_array_equal(new.theta["alpha"], old.theta["alpha"])


def test_parameters_stay_unless_they_have_a_transformation():
    tree = {"kernel": jnp.ones((2, 2))}, cases.qstate()
    (kernels, _), _ = cases.step(by_part(scale=optax.sgd(0.1)), cases.ones_like(tree), tree)
    assert_array_equal(kernels["kernel"], tree[0]["kernel"])


def test_inside_another_partition():
    """The usual nesting of optax: what is masked outside is masked inside."""
    tree = {"kernel": jnp.ones((2, 2))}, cases.qstate(clip=2.0)
    optimizer = optax.partition(
        {
            "weights": optax.sgd(0.5),
            "quantizers": by_part(scale=optax.sgd(0.25), theta={"clip": optax.sgd(0.125)}),
        },
        ("weights", "quantizers"),
    )
    (kernels, after), _ = cases.step(optimizer, cases.ones_like(tree), tree)
    assert_array_equal(kernels["kernel"], jnp.full((2, 2), 0.5))
    assert moved(tree[1], after) == {"scale", "clip"}
    assert_array_equal(after["a"]["weight"].scale, [[0.75, 1.75]])
    assert_array_equal(after["a"]["weight"].theta["clip"], [[1.875, 1.875]])


def test_state_of_each_group_is_its_own():
    """Momentum of scales, none of zero points; jitted, over steps."""
    qstate = cases.qstate()
    optimizer = by_part(scale=optax.sgd(0.5, momentum=0.5), zero_point=optax.sgd(0.5))
    state, tree = optimizer.init(qstate), qstate
    move = jax.jit(lambda tree, state: cases.step(optimizer, cases.ones_like(tree), tree, state))
    for _ in range(3):
        tree, state = move(tree, state)
    # Velocities 1, 1.5, 1.75 against 1, 1, 1.
    assert_array_equal(tree["b"]["weight"].scale, [[4.0 - 0.5 * 4.25]])
    assert_array_equal(tree["b"]["weight"].zero_point, [[-1.5]])


def test_rates_may_be_traced():
    qstate, rates = cases.qstate(), jnp.array([0.0, 0.25, 0.5])

    def scales(rate):
        after, _ = cases.step(by_part(scale=optax.sgd(rate)), cases.ones_like(qstate), qstate)
        return after["b"]["weight"].scale[0, 0]

    assert_array_equal(jax.vmap(scales)(rates), 4.0 - rates)


def test_parts_are_masks():
    params, qstate = {"kernel": jnp.ones((2, 2))}, cases.qstate(clip=2.0)
    parts = parts_of((params, qstate))
    assert parts[0]["kernel"] is Part.PARAMETER
    assert parts[1]["a"]["weight"] == qj.QParams(
        Part.SCALE, Part.ZERO_POINT, Part.BITS, {"clip": Part.THETA}
    )
    mask = jax.tree.map(lambda part: part is Part.ZERO_POINT, parts_of(qstate))
    masked = optax.chain(
        optax.masked(optax.sgd(1.0), mask),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda is_in: not is_in, mask)),
    )
    after, _ = cases.step(masked, cases.ones_like(qstate), qstate)
    assert moved(qstate, after) == {"zero_point"}


def test_a_mask_fits_a_tree_with_parameters():
    tree = {"kernel": jnp.ones((2, 2))}, cases.qstate(clip=2.0)
    mask = jax.tree.map(lambda part: part is Part.SCALE, parts_of(tree))
    optimizer = optax.masked(optax.set_to_zero(), mask)
    updates, _ = optimizer.update(cases.ones_like(tree), optimizer.init(tree), tree)
    assert_array_equal(updates[0]["kernel"], jnp.ones((2, 2)))
    weight = updates[1]["a"]["weight"]
    assert not np.any(weight.scale)
    assert np.all(weight.zero_point)


def test_what_has_an_init_and_an_update_is_an_optimizer():
    qstate = cases.qstate()
    optimizer = by_part(scale=optax.MultiSteps(optax.sgd(0.1), 1))
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps so
        after, _ = cases.step(optimizer, cases.ones_like(qstate), qstate)
    assert moved(qstate, after) == {"scale"}


def test_a_rate_is_no_optimizer():
    with refused(errors.ArgumentError, "scale is a float", "optax.sgd"):
        by_part(scale=1e-3)
    with refused(errors.ArgumentError, "theta/clip is None", "optax.sgd"):
        by_part(theta={"clip": None})


def test_training_learns_scales_of_a_model():
    """The loss falls where scales alone are learned, and parameters are those from before."""
    case = models.dense()
    ready = models.ready(case, qj.uniform_policy(weight_bits=3, activation_bits=3))
    quantized, target = qj.fake_quantize(case.f, ready.plan), case.f(case.params, case.x)

    def loss(tree):
        return jnp.mean((quantized(tree[1], tree[0], case.x) - target) ** 2)

    optimizer = by_part(scale=optax.chain(optax.sgd(0.005), keep_positive()))
    tree = case.params, ready.qstate
    state, first = optimizer.init(tree), loss(tree)
    move = jax.jit(lambda tree, state: cases.step(optimizer, jax.grad(loss)(tree), tree, state))
    for _ in range(20):
        tree, state = move(tree, state)
    assert loss(tree) < 0.9 * first
    models.assert_same_bits(tree[0], case.params)
    assert moved(ready.qstate, tree[1]) == {"scale"}


def test_mistakes_are_refused():
    with refused(errors.TrainingError, "no QParams in the tree", "init(qstate)"):
        by_part(scale=optax.sgd(0.1)).init({"kernel": jnp.ones(2)})
    with refused(errors.TrainingError, "no theta has an entry clipp", "there are alpha, clip"):
        by_part(theta={"clipp": optax.sgd(0.1)}).init(cases.qstate(clip=1.0, alpha=0.5))
    with refused(errors.TrainingError, "no theta has an entry clip", "there are none"):
        by_part(theta={"clip": optax.sgd(0.1)}).init(cases.qstate())
