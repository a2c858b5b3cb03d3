"""Gradients through calibration: of ranges in closed form, and of groups that have no spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import ranges, statistics
from quantjax.ranges import Target
from tests.ranges.cases import ASYMMETRIC, RULES, SYMMETRIC

TARGETS = pytest.mark.parametrize(
    "target", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"]
)
W = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
ZEROS, EQUAL, SPARSE = 1, 2, 3
W[:, ZEROS], W[:, EQUAL], W[1:, SPARSE] = 0.0, 0.5, 0.0


def width(w: jax.Array, rule: ranges.RangeRule, target: Target) -> jax.Array:
    """How wide the range of each column is."""
    seen = statistics.of_tensor(w, (1, w.shape[1]), with_values=True)
    found = ranges.derive(rule, seen, target)
    return (found.high - found.low).reshape(-1)


@TARGETS
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_none_is_nan_and_no_spread_has_that_of_the_whole_range(rule, target):
    slope = lambda rule: jax.jit(jax.jacrev(lambda w: width(w, rule, target)))(W)  # noqa: E731
    found, whole = slope(rule), slope(ranges.MIN_MAX)
    assert np.isfinite(found).all()
    if rule.name in ("sigma(3)", "aciq_gaussian"):
        assert np.abs(found[0]).max() > 0.0
        assert_array_equal(found[ZEROS], whole[ZEROS])
    if rule.name == "sigma(3)":
        assert_array_equal(found[EQUAL], whole[EQUAL])


@TARGETS
@pytest.mark.parametrize(
    "rule",
    [ranges.MIN_MAX, ranges.sigma(1.0), ranges.ACIQ_GAUSSIAN, ranges.SAWB, ranges.LSQ],
    ids=lambda rule: rule.name,
)
def test_they_are_those_of_finite_differences(rule, target):
    w = np.float64(W[:, [0, 4]])
    found = jax.jacrev(lambda w: width(w, rule, target))(jnp.asarray(w, jnp.float32))
    for row in (0, 7, int(w[:, 0].argmax())):
        step = np.zeros_like(w)
        step[row, 0] = 1e-3
        above, below = (width(jnp.float32(w + s), rule, target) for s in (step, -step))
        want = (np.float64(above) - np.float64(below)) / 2e-3
        assert_allclose(found[:, row, 0], want, atol=2e-3)


@pytest.mark.parametrize("rule", [ranges.sigma(3.0), ranges.ACIQ_GAUSSIAN, ranges.SAWB])
def test_a_dead_channel_takes_part_in_training(rule):
    """One NaN in one step, and all weights behind it were lost."""
    f, x = lambda p, x: x @ p["w"], jnp.asarray(np.random.default_rng(1).normal(size=(4, 32)))
    x, params = x.astype(jnp.float32), {"w": jnp.asarray(W)}
    plan = qj.plan(qj.uniform_policy(weight_bits=4, activation_bits=None), qj.sites(f, params, x))

    def loss(params):
        qstate = qj.calibrate(plan, {}, params, rule=rule)
        return jnp.sum(qj.fake_quantize(f, plan)(qstate, params, x) ** 2)

    value, slope = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert np.isfinite(slope["w"]).all()
    assert np.abs(np.delete(slope["w"], ZEROS, axis=1)).max(axis=0).min() > 0.0
