"""TWN's threshold and scale, TTQ's starting point, against float64 models and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import errors
from quantjax.affine import Fault
from quantjax.arithmetic import Arithmetic
from quantjax.estimators import STRAIGHT_THROUGH
from quantjax.formats import POWER_OF_TWO, integer
from quantjax.formats.ternary import TERNARY, ternary
from quantjax.ranges.ternary import TTQ, TWN, ttq
from quantjax.simulation import apply
from tests.oracles.groups import by_group

SHAPE, GROUPS = (6, 8), ((1, 1), (1, 8), (6, 1), (3, 8), (6, 2))
LEARNED, TWO = ternary(learned=True), jnp.float32(2)
RULES = ((TWN, TERNARY), (TWN, LEARNED), (TTQ, LEARNED))
EACH = pytest.mark.parametrize(("rule", "format"), RULES, ids=lambda v: v.name)


@functools.cache
def fitting(rule, format, groups):
    return jax.jit(lambda w, bits: rule.fit(w, groups, format, bits))


def weights(seed: int = 0, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("groups", GROUPS)
def test_twn_is_the_papers_rule(groups):
    w = weights()
    got = fitting(TWN, TERNARY, groups)(w, TWO)
    assert set(got.theta) == {"threshold"}
    assert got.scale.shape == got.theta["threshold"].shape == groups
    y = np.asarray(apply(jnp.asarray(w), got, Arithmetic(TERNARY)))
    for (home, entries), (_, quantized) in zip(
        by_group(np.float64(w), groups), by_group(y, groups), strict=True
    ):
        delta = 0.7 * np.abs(entries).mean()
        alpha = np.abs(entries[np.abs(entries) > delta]).mean()
        assert_allclose(got.scale[home], alpha, rtol=1e-6)
        assert_allclose(got.theta["threshold"][home], delta / alpha, rtol=1e-6)
        want = alpha * np.where(np.abs(entries) > delta, np.sign(entries), 0.0)
        assert_allclose(quantized, want, rtol=1e-6)
    assert (got.theta["threshold"] < 1).all()
    assert_array_equal(apply(jnp.asarray(y), got, Arithmetic(TERNARY)), y)


@pytest.mark.parametrize(
    ("draw", "limit"),
    [("normal", 1.01), ("uniform", 1.02), ("laplace", 1.08)],
)
def test_twn_is_close_to_the_best_threshold_and_scale(draw, limit):
    w = getattr(np.random.default_rng(4), draw)(size=4096)
    w = (w - 0.5 if draw == "uniform" else w).astype(np.float32)
    got = fitting(TWN, TERNARY, (1,))(w, TWO)
    y = np.asarray(apply(jnp.asarray(w), got, Arithmetic(TERNARY)), np.float64)
    error = ((np.float64(w) - y) ** 2).sum()
    # Given the k largest magnitudes, the best scale is their mean: ‖w‖² - (Σ|w|)² / k is left.
    sums = np.cumsum(np.sort(np.abs(np.float64(w)))[::-1])
    best = (np.float64(w) ** 2).sum() - (sums**2 / np.arange(1, len(w) + 1)).max()
    assert best <= error <= limit * best


def test_twns_scale_is_the_best_for_its_threshold():
    w = weights(5)
    got = fitting(TWN, TERNARY, (6, 2))(w, TWO)

    def error(factor):
        moved = got._replace(
            scale=got.scale * factor, theta={"threshold": got.theta["threshold"] / factor}
        )
        y = np.float64(apply(jnp.asarray(w), moved, Arithmetic(TERNARY)))
        return np.array([(e**2).sum() for _, e in by_group(np.float64(w) - y, (6, 2))])

    for factor in (0.95, 1.05):
        assert (error(1.0) < error(factor)).all()


def test_twn_starts_learned_levels_at_one():
    w = weights(6)
    fixed, learned = (fitting(TWN, format, (1, 8))(w, TWO) for format in (TERNARY, LEARNED))
    assert_array_equal(learned.theta["positive"], np.ones((1, 8)))
    assert_array_equal(learned.theta["negative"], np.ones((1, 8)))
    got = apply(jnp.asarray(w), learned, Arithmetic(LEARNED))
    assert_array_equal(got, apply(jnp.asarray(w), fixed, Arithmetic(TERNARY)))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("t", [0.05, 0.4])
def test_ttq_starts_at_the_means_of_its_regions(groups, t):
    w = weights(7)
    got = fitting(ttq(threshold=t), LEARNED, groups)(w, TWO)
    for home, entries in by_group(np.float64(w), groups):
        scale = np.abs(entries).max()
        assert got.scale[home] == np.float32(scale)
        assert_allclose(got.theta["threshold"][home], t, rtol=1e-6)
        regions = [entries[entries > t * scale] / scale, -entries[entries < -t * scale] / scale]
        means = [region.mean() if len(region) else None for region in regions]
        positive, negative = means[0] or means[1], means[1] or means[0]
        assert_allclose(got.theta["positive"][home], positive, rtol=1e-6)
        assert_allclose(got.theta["negative"][home], negative, rtol=1e-6)


def test_ttq_starts_where_gradients_of_the_levels_vanish():
    w = jnp.asarray(weights(8))
    got = fitting(TTQ, LEARNED, (1, 8))(w, TWO)

    def error(theta):
        arithmetic = Arithmetic(LEARNED, estimator=STRAIGHT_THROUGH)
        return ((w - apply(w, got._replace(theta=theta), arithmetic)) ** 2).sum()

    gradient = jax.grad(error)(got.theta)
    moved = jax.grad(error)(got.theta | {"positive": 1.1 * got.theta["positive"]})
    assert np.abs(gradient["positive"]).max() < 1e-4
    assert np.abs(gradient["negative"]).max() < 1e-4
    assert (moved["positive"] > 0.01).all()


def test_ttqs_empty_regions():
    w = jnp.array([[1.0, 0.5, 0.02], [-1.0, -0.2, 0.04], [0.0, 0.0, 0.0], [-2.0, 1.0, 0.5]])
    got = TTQ.fit(w, (4, 1), LEARNED, TWO)
    assert_allclose(got.theta["positive"][:, 0], [0.75, 0.6, 1.0, 0.375])
    assert_allclose(got.theta["negative"][:, 0], [0.75, 0.6, 1.0, 1.0])
    assert_allclose(got.theta["threshold"][:, 0], [0.05, 0.05, 0.0, 0.05])
    assert got.scale[:, 0].tolist() == [1, 1, 1, 2]
    y = apply(w, got, Arithmetic(LEARNED))
    assert_allclose(y, [[0.75, 0.75, 0], [-0.6, -0.6, 0], [0, 0, 0], [-2, 0.75, 0.75]], rtol=1e-6)


@EACH
def test_the_same_under_any_trace(rule, format):
    w = jnp.asarray(np.stack([weights(seed) for seed in range(3)]))
    bits = jnp.array([2.0, 0.0, 2.0])
    fit = lambda w, bits: rule.fit(w, (6, 2), format, bits)  # noqa: E731
    many = jax.jit(jax.vmap(fit))(w, bits)
    for i in range(3):
        for one in (fit(w[i], bits[i]), fitting(rule, format, (6, 2))(w[i], bits[i])):
            jax.tree.map(lambda a, b, i=i: assert_allclose(a[i], b, rtol=5e-7), many, one)
    # One compiled program for all widths.
    program = fitting(rule, format, (6, 2))
    jax.tree.map(assert_array_equal, program(w[0], TWO), program(w[0], jnp.float32(2)))
    assert_array_equal(many.scale[1], np.ones((6, 2)))


@EACH
def test_rescaling_by_a_power_of_two_moves_the_scale_alone(rule, format):
    w, program = weights(9), fitting(rule, format, (3, 8))
    one, other = program(w, TWO), program(w * np.float32(2.0**-20), TWO)
    assert_array_equal(other.scale, one.scale * np.float32(2.0**-20))
    jax.tree.map(assert_array_equal, other.theta, one.theta)


@EACH
def test_zero_one_element_and_broken_groups(rule, format):
    w = jnp.array([[0.0, 0.0], [3.0, -3.0], [jnp.nan, 1.0], [jnp.inf, 1.0]])
    got = rule.fit(w, (4, 1), format, TWO)
    assert_array_equal(got.scale, [[1.0], [3.0], [np.nan], [np.nan]])
    assert got.zero_point[2:].tolist() == [[float(Fault.NOT_FINITE)]] * 2
    assert got.zero_point[:2].tolist() == [[0.0], [0.0]]
    assert got.theta["threshold"][0].tolist() == [0.0]
    assert all(np.isfinite(array[:2]).all() for array in got.theta.values())
    assert_array_equal(apply(w, got, Arithmetic(format))[:2], w[:2])
    single = rule.fit(jnp.array([-0.37]), (1,), format, TWO)
    assert_array_equal(apply(jnp.array([-0.37]), single, Arithmetic(format)), np.float32([-0.37]))
    wrong = rule.fit(w[:2], (2, 1), format, jnp.float32(3))
    assert (wrong.zero_point == Fault.BITS_OUTSIDE_FORMAT).all()


def test_sums_that_overflow_are_said():
    got = TWN.fit(jnp.full((4,), 3e38), (1,), TERNARY, TWO)
    assert np.isnan(got.scale).all()
    assert (got.zero_point == Fault.NOT_FINITE).all()


@pytest.mark.parametrize("rule", [TWN, TTQ], ids=lambda rule: rule.name)
def test_a_scale_rule_moves_threshold_and_levels_with_it(rule):
    w = jnp.asarray(weights(10))
    real, power = (
        rule.fit(w, (1, 8), ternary(learned=True, scale_rule=scale_rule), TWO)
        for scale_rule in (LEARNED.scale_rule, POWER_OF_TWO)
    )
    mantissa, _ = np.frexp(power.scale)
    assert (mantissa == 0.5).all()
    for qparams in (real, power):
        # The threshold is the same in units of the tensor.
        delta = qparams.theta["threshold"] * qparams.scale
        assert_allclose(delta, real.theta["threshold"] * real.scale, rtol=1e-6)
    if rule is TTQ:
        got = apply(w, power, Arithmetic(LEARNED))
        assert_allclose(got, apply(w, real, Arithmetic(LEARNED)), rtol=1e-6)


@pytest.mark.parametrize("rule", [TWN, TTQ], ids=lambda rule: rule.name)
def test_formats_without_a_threshold_are_refused(rule):
    with pytest.raises(errors.FormatError, match="no threshold"):
        rule.fit(jnp.ones((2, 2)), (1, 1), integer(max_bits=2), TWO)


def test_ttq_needs_levels_to_learn():
    with pytest.raises(errors.FormatError, match="cannot be learned"):
        TTQ.fit(jnp.ones((2, 2)), (1, 1), TERNARY, TWO)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_thresholds_that_leave_nothing_are_refused(threshold):
    with pytest.raises(errors.QuantizerError, match="times the maximum"):
        ttq(threshold=threshold)


def test_rules_are_values():
    assert ttq() == TTQ
    assert ttq(threshold=0.1) == ttq(threshold=0.1)
    assert ttq(threshold=0.1).name == "ttq(0.1)"
    assert (TTQ.name, TWN.name) == ("ttq", "twn")
