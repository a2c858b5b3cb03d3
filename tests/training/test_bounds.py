"""Bounds hold in floating point, whatever the update; what is inside passes bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from quantjax import errors
from quantjax.training import by_part, keep_between, keep_positive
from tests import models
from tests.refused import refused
from tests.training import cases

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
POSITIVE = st.floats(2.0**-100, 2.0**100, width=32)
UNIT = st.floats(-1.0, 1.0, width=32)


def updated(tx, tree, updates):
    return tx.update(updates, tx.init(tree), tree)[0]


@given(scale=POSITIVE, update=FLOATS, fraction=st.sampled_from([0.01, 0.5, 0.9, 0.999]))
@example(scale=1.2e-38, update=-1.0, fraction=0.5)
def test_no_step_takes_more_than_the_fraction(scale, update, fraction):
    before = cases.qparams(np.float32(scale))
    updates = before._replace(scale=jnp.float32(update), zero_point=jnp.float32(-9.0))
    limited = updated(keep_positive(fraction), before, updates)
    after = np.float32(optax.apply_updates(before, limited).scale)
    floor = np.float32(fraction) * np.float32(scale)
    assert after >= floor or after == np.float32(scale)
    assert after > 0.0
    assert float(limited.zero_point) == -9.0
    if np.float32(scale) + np.float32(update) > 1.001 * floor + 1e-37:
        assert float(limited.scale) == np.float32(update)


@given(
    value=UNIT,
    update=st.floats(-3.0, 3.0, width=32),
    low=st.floats(-1.0, 0.0, width=32),
    high=st.floats(2.0**-7, 1.0, width=32),
)
def test_bounds_hold_to_the_last_place(value, update, low, high):
    before = cases.qparams(1.0, alpha=value)
    updates = cases.qparams(7.0, alpha=update)
    limited = updated(keep_between(low, high, names=("alpha",)), before, updates)
    after = float(optax.apply_updates(before, limited).theta["alpha"])
    assert low <= after <= high
    wanted = np.float32(value) + np.float32(update)
    assert after == pytest.approx(float(np.clip(wanted, low, high)), abs=1e-6)
    if low <= wanted <= high:
        assert float(limited.theta["alpha"]) == update
    assert float(limited.scale) == 7.0


def test_a_bound_that_rounding_would_miss():
    """p + (t - p) is not always t in floating point: this is such a case."""
    draw = np.random.default_rng(0)
    values, bounds = (draw.uniform(0.1, 1.0, 4000).astype(np.float32) for _ in range(2))
    assert (values + (bounds - values) > bounds).any()
    before = cases.qparams(np.ones(4000), alpha=values)

    def limit(value, high):
        return updated(
            keep_between(0.0, high, names=("alpha",)),
            cases.qparams(1.0, alpha=value),
            cases.qparams(1.0, alpha=2.0),
        ).theta["alpha"]

    after = before.theta["alpha"] + jax.vmap(limit)(values, bounds)
    assert (after <= bounds).all()
    assert (after >= bounds - np.float32(2e-7)).all()


def test_scales_halve_at_most_over_many_steps():
    """A gradient that never ends: the scale goes down by halves and stays a normal number."""
    tree = cases.qparams([[1.0, 3.0]])
    optimizer = optax.chain(optax.sgd(1e6), keep_positive())
    state = optimizer.init(tree)
    move = jax.jit(lambda tree, state: cases.step(optimizer, cases.ones_like(tree), tree, state))
    halved, state = move(tree, state)
    assert_array_equal(halved.scale, tree.scale / 2)
    for _ in range(150):
        tree, state = move(tree, state)
    assert (tree.scale >= np.finfo(np.float32).smallest_normal).all()
    assert (tree.scale < 1e-37).all()


def test_only_scales_and_named_entries_are_touched():
    tree = {"kernel": jnp.ones(2)}, cases.qstate(clip=1.0, alpha=1.0)
    updates = jax.tree.map(lambda leaf: jnp.full_like(leaf, -10.0), tree)
    after = updated(keep_positive(0.5, names=("clip",)), tree, updates)
    weight = after[1]["a"]["weight"]
    assert_array_equal(weight.scale, [[-0.5, -1.0]])
    assert_array_equal(weight.theta["clip"], [[-0.5, -0.5]])
    rest = after[0]["kernel"], weight.zero_point, weight.bits, weight.theta["alpha"]
    assert all((leaf == -10.0).all() for leaf in rest)
    between = updated(keep_between(0.25, 2.0, names=("alpha",)), tree, updates)
    assert_array_equal(between[1]["a"]["weight"].theta["alpha"], [[-0.75, -0.75]])
    assert (between[1]["a"]["weight"].scale == -10.0).all()


def test_inside_by_part():
    qstate = cases.qstate(clip=1.0, alpha=0.25)
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 10.0), qstate)
    optimizer = by_part(
        scale=optax.chain(optax.sgd(1.0), keep_positive(0.25)),
        theta={
            "clip": optax.chain(optax.sgd(1.0), keep_positive(0.5, names=("clip",))),
            "alpha": optax.chain(optax.sgd(1.0), keep_between(0.125, 0.5, names=("alpha",))),
        },
    )
    after, _ = cases.step(optimizer, gradient, qstate)
    assert_array_equal(after["a"]["weight"].scale, [[0.25, 0.5]])
    assert_array_equal(after["a"]["weight"].theta["clip"], [[0.5, 0.5]])
    assert_array_equal(after["a"]["weight"].theta["alpha"], [[0.125, 0.125]])
    assert_array_equal(after["a"]["activation"].zero_point, qstate["a"]["activation"].zero_point)


def test_bounds_may_be_traced():
    tree = cases.qparams(1.0, alpha=0.5)
    updates = jax.tree.map(lambda leaf: jnp.full_like(leaf, -10.0), tree)
    fractions = jnp.array([0.25, 0.5, 0.75])
    scales = jax.vmap(lambda f: updated(keep_positive(f), tree, updates).scale)(fractions)
    assert_array_equal(scales, fractions - 1.0)
    lows = jnp.array([0.0, 0.25])

    def limit(low):
        return updated(keep_between(low, 1.0, names=("alpha",)), tree, updates)

    assert_array_equal(jax.jit(jax.vmap(limit))(lows).theta["alpha"], lows - 0.5)


def test_what_is_broken_already_stays():
    tree = cases.qparams([[-1.0, np.nan, 1.0]])
    after = updated(keep_positive(), tree, tree._replace(scale=jnp.full((1, 3), -4.0)))
    assert_array_equal(after.scale, [[-4.0, -4.0, -0.5]])
    nan = updated(keep_positive(), tree, tree._replace(scale=jnp.full((1, 3), jnp.nan)))
    assert np.isnan(nan.scale).all()


def test_outside_is_brought_in():
    tree = cases.qparams([[1.0, 1.0]], alpha=[[3.0, -3.0]])
    still = jax.tree.map(jnp.zeros_like, tree)
    after = updated(keep_between(-1.0, 2.0, names=("alpha",)), tree, still)
    models.assert_same_bits(after.theta["alpha"], jnp.array([[-1.0, 2.0]]))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_fractions_are_checked(fraction):
    with refused(errors.TrainingError, f"a fraction of {fraction:g}", "fraction=0.5"):
        keep_positive(fraction)


def test_mistakes_are_refused():
    with refused(errors.TrainingError, "bounds from 2 to 1", "keep_between(1, 2"):
        keep_between(2.0, 1.0, names=("alpha",))
    with refused(errors.TrainingError, "there is no scale to bound"):
        keep_positive().init({"kernel": jnp.ones(2)})
    with refused(errors.TrainingError, "there is no beta to bound", "alpha"):
        keep_between(0.0, 1.0, names=("alpha", "beta")).init(cases.qparams(1.0, alpha=0.5))
    with refused(errors.TrainingError, "to bound"):
        keep_between(0.0, 1.0, names=()).init(cases.qparams(1.0))
    with refused(errors.TrainingError, "without params"):
        keep_positive().update(cases.qparams(1.0), optax.EmptyState())
