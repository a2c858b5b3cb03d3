"""Ternary formats: thresholds, learned levels and their gradients, codes, laws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import errors
from quantjax.affine import QParams
from quantjax.arithmetic import Arithmetic
from quantjax.estimators import CLIPPED, STRAIGHT_THROUGH
from quantjax.formats.base import Law
from quantjax.formats.scales import POWER_OF_TWO
from quantjax.formats.ternary import TERNARY, TernaryFormat, ternary
from quantjax.granularity import expand
from quantjax.rounding import CEIL, FLOOR, HALF_AWAY, HALF_EVEN, STOCHASTIC
from quantjax.simulation import apply

ZERO, TWO = jnp.float32(0), jnp.float32(2)
LEARNED = ternary(learned=True)
SHAPE, GROUPS = (6, 8), ((1, 1), (1, 8), (6, 1), (3, 8), (6, 2))
BOTH = pytest.mark.parametrize("format", [TERNARY, LEARNED], ids=lambda f: f.name)


def model(x: np.ndarray, scale: np.ndarray, theta: dict[str, np.ndarray]) -> np.ndarray:
    """Entry by entry, in float64; the quotient is rounded to float32 as the library's is."""
    groups, out = np.shape(scale), np.zeros(np.shape(x))
    for index in np.ndindex(x.shape):
        home = tuple(i * g // n for i, g, n in zip(index, groups, x.shape, strict=True))
        quotient = np.float32(np.float64(x[index]) / np.float64(scale[home]))
        if quotient > theta["threshold"][home]:
            out[index] = np.float64(scale[home]) * theta["positive"][home]
        elif quotient < -theta["threshold"][home]:
            out[index] = -np.float64(scale[home]) * theta["negative"][home]
    return out


@functools.cache
def program(format: TernaryFormat, rounding=HALF_EVEN, estimator=STRAIGHT_THROUGH):
    def run(x, scale, theta, bits=TWO):
        qparams = QParams(scale, jnp.zeros_like(scale), bits, theta)
        return apply(x, qparams, Arithmetic(format, rounding, estimator))

    return jax.jit(run)


def parameters(groups: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A scale and a theta whose threshold lies below the levels."""
    generator = np.random.default_rng(seed)
    draw = lambda low, high: generator.uniform(low, high, groups).astype(np.float32)  # noqa: E731
    theta = {"threshold": draw(0, 0.3), "negative": draw(0.3, 2), "positive": draw(0.3, 2)}
    return draw(0.1, 4), theta


def tensor(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


@pytest.mark.parametrize("groups", GROUPS)
def test_values_are_those_of_the_float64_model(groups):
    x, (scale, theta) = tensor(), parameters(groups)
    got = program(LEARNED)(x, scale, theta)
    assert_array_equal(got, np.float32(model(x, scale, theta)))
    # Levels that are not learned are 1, whatever else is there.
    ones = {name: np.ones(groups) for name in ("negative", "positive")}
    want = np.float32(model(x, scale, theta | ones))
    assert_array_equal(program(TERNARY)(x, scale, {"threshold": theta["threshold"]}), want)
    assert_array_equal(program(TERNARY)(x, scale, theta), want)


@BOTH
def test_without_theta_it_is_the_nearest_of_three(format):
    x = jnp.array([-jnp.inf, -2.0, -0.6, -0.5, -0.4, 0.0, 0.3, 0.5, 0.501, 7.0, jnp.inf, jnp.nan])
    want = [-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, np.nan]
    for rounding in (HALF_EVEN, HALF_AWAY):
        assert_array_equal(format.snap(x, ZERO, TWO, rounding).level, want)
    low, high = format.level_range(TWO)
    assert (float(low), float(high)) == (-1, 1)


def test_the_threshold_itself_is_zero():
    theta = {"threshold": jnp.float32(0.3)}
    border = np.float32(0.3)
    above = np.nextafter(border, np.float32(1))
    x = jnp.array([border, above, -border, -above])
    assert TERNARY.snap(x, ZERO, TWO, HALF_EVEN, theta).level.tolist() == [0, 1, 0, -1]
    # TWN gives an all-zero group the threshold 0.
    nothing = {"threshold": jnp.float32(0)}
    level = TERNARY.snap(jnp.array([0.0, -0.0, 1e-30]), ZERO, TWO, HALF_EVEN, nothing).level
    assert level.tolist() == [0, 0, 1]


@given(
    x=npst.arrays(np.float32, SHAPE, elements=st.floats(-4, 4, width=32)),
    seed=st.integers(0, 2**30),
    exponent=st.integers(-20, 20),
)
def test_laws(x, seed, exponent):
    x = np.where(np.abs(x) < 2.0**-60, np.float32(0), x)
    scale, theta = parameters((6, 2), seed)
    factor = np.float32(2.0**exponent)
    for format in (LEARNED, TERNARY):
        y = np.asarray(program(format)(x, scale, theta))
        # Levels that are exactly at the threshold or nearer to zero aside, which theta has none of.
        assert_array_equal(program(format)(y, scale, theta), y)
        more = np.asarray(program(format)(x + np.float32(0.25), scale, theta))
        assert (more >= y).all()
        assert (y[x == 0] == 0).all()
        assert_array_equal(program(format)(x * factor, scale * factor, theta), y * factor)
    assert_array_equal(program(TERNARY)(-x, scale, theta), -y)


def test_laws_that_are_not_declared_have_counterexamples():
    # 0.2 is nearer to 0 than to 1.
    theta = {"threshold": jnp.float32(0.1)}
    assert float(TERNARY.snap(jnp.float32(0.2), ZERO, TWO, HALF_EVEN, theta).level) == 1
    assert Law.NEAREST not in TERNARY.laws | LEARNED.laws
    # A level below the threshold is taken for zero; different levels are not odd.
    theta = {
        "threshold": jnp.float32(0.5),
        "negative": jnp.float32(2),
        "positive": jnp.float32(0.3),
    }
    twice = [0.9]
    for _ in range(2):
        twice.append(float(LEARNED.snap(jnp.float32(twice[-1]), ZERO, TWO, HALF_EVEN, theta).level))
    assert twice == [0.9, float(np.float32(0.3)), 0]
    assert float(LEARNED.snap(jnp.float32(-0.9), ZERO, TWO, HALF_EVEN, theta).level) == -2
    assert not {Law.IDEMPOTENT, Law.ODD, Law.INTEGER} & LEARNED.laws
    assert {Law.IDEMPOTENT, Law.ODD, Law.INTEGER, Law.ROUND_TRIP} <= TERNARY.laws


@BOTH
def test_codes(format):
    theta = {"threshold": jnp.full((1,), 0.1), "negative": jnp.full((1,), 0.7)}
    theta |= {"positive": jnp.full((1,), 0.2)}
    codes = jnp.array([-1, 0, 1], jnp.int8)
    for given_theta in ((), theta):
        levels = format.decode(codes, TWO, given_theta)
        back = format.encode(levels, TWO, given_theta)
        assert back.dtype == format.storage_dtype == jnp.int8
        assert_array_equal(back, codes)
        assert np.isnan(format.decode(jnp.int8([-2]), TWO, given_theta)).all()
    want = [-0.7, 0, 0.2] if format.learned else [-1, 0, 1]
    assert_allclose(levels, want, rtol=1e-6)
    assert format.encode(jnp.array([jnp.nan]), TWO).tolist() == [0]
    assert format.code_bits == 2


@pytest.mark.parametrize("signs", list(itertools.product((-1.0, 1.0), repeat=2)))
def test_codes_hold_their_level_whatever_sign_was_learned(signs):
    theta = {"threshold": jnp.full((1,), 0.1), "negative": jnp.full((1,), signs[0] * 0.3)}
    theta |= {"positive": jnp.full((1,), signs[1] * 0.5)}
    levels = LEARNED.snap(jnp.array([-1.0, 0.0, 1.0]), ZERO, TWO, HALF_EVEN, theta).level
    codes = LEARNED.encode(levels, TWO, theta)
    assert codes.tolist() == [-1, 0, 1]
    assert_array_equal(LEARNED.decode(codes, TWO, theta), levels)


@pytest.mark.parametrize("groups", GROUPS)
def test_the_gradient_of_a_level_is_the_sum_over_its_entries(groups):
    x, (scale, theta) = tensor(), parameters(groups)
    weight = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)

    def loss(theta, scale):
        return (weight * program(LEARNED)(x, scale, theta)).sum()

    got = jax.grad(loss)(theta, scale)
    spread = {name: np.asarray(expand(jnp.asarray(a), SHAPE)) for name, a in theta.items()}
    wide = np.asarray(expand(jnp.asarray(scale), SHAPE), np.float64)
    scaled = (x / np.float32(wide)) + np.zeros(SHAPE)
    by_entry = {
        "positive": wide * weight * (scaled > spread["threshold"]),
        "negative": -wide * weight * (scaled < -spread["threshold"]),
        "threshold": np.zeros(SHAPE),
    }
    for name, entries in by_entry.items():
        want = np.zeros(groups)
        for index in np.ndindex(SHAPE):
            home = tuple(i * g // n for i, g, n in zip(index, groups, SHAPE, strict=True))
            want[home] += entries[index]
        assert_allclose(got[name], want, rtol=1e-5, atol=1e-5)


def test_codes_can_be_decoded_with_a_gradient():
    codes = jnp.array([1, 1, 0, -1, -1, -1], jnp.int8)
    theta = {name: jnp.full((1,), 0.5) for name in ("threshold", "negative", "positive")}
    gradient = jax.grad(lambda theta: LEARNED.decode(codes, TWO, theta).sum())(theta)
    assert {name: float(array[0]) for name, array in gradient.items()} == {
        "threshold": 0.0,
        "negative": -3.0,
        "positive": 2.0,
    }


def test_gradients_stop_beyond_the_cell_of_a_level_unless_they_pass_everywhere():
    theta = {"threshold": jnp.full((1,), 0.2), "negative": jnp.full((1,), 1.0)}
    theta |= {"positive": jnp.full((1,), 0.5)}
    one = jnp.ones((1,))
    # The cells end at 0.5 + (0.5 - 0.2) and at 1 + (1 - 0.2).
    x = jnp.array([-1.9, -1.7, -0.3, 0.1, 0.4, 0.7, 0.9])
    for estimator, want in ((CLIPPED, [0, 1, 1, 1, 1, 1, 0]), (STRAIGHT_THROUGH, [1] * 7)):
        run = program(LEARNED, estimator=estimator)
        got = jax.grad(lambda x, run=run: run(x, one, theta).sum())(x)
        assert got.tolist() == want
    level, unclipped = LEARNED.snap(x, ZERO, TWO, HALF_EVEN, theta)
    assert_allclose(unclipped, [-1.9, -1.0, -1.0, 0.0, 0.5, 0.5, 0.9])
    assert_allclose(level, [-1.0, -1.0, -1.0, 0.0, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("value", [-1.5, -0.75, -0.2, 0.0, 0.4, 1.0, 3.0])
def test_stochastic_rounding_is_unbiased_between_the_levels(value):
    size = 20_000
    rounding = STOCHASTIC.given(STOCHASTIC.noise(jax.random.key(1), (size,)))
    x = jnp.full(size, value)
    ones = np.asarray(TERNARY.snap(x, ZERO, TWO, rounding).level)
    assert abs(np.abs(ones).mean() - min(abs(value), 1)) < 0.015
    assert (np.sign(ones) * np.sign(value) >= 0).all()
    theta = {"threshold": jnp.full((1,), 0.9), "negative": jnp.full((1,), 2.0)}
    theta |= {"positive": jnp.full((1,), 0.5)}
    learned = np.asarray(LEARNED.snap(x, ZERO, TWO, rounding, theta).level)
    assert abs(learned.mean() - np.clip(value, -2, 0.5)) < 0.03


def test_floor_and_ceil_go_to_the_neighbour():
    x = jnp.array([-1.5, -1.0, -0.3, 0.0, 0.3, 1.0, 1.5, jnp.nan])
    assert_array_equal(TERNARY.snap(x, ZERO, TWO, FLOOR).level, [-1, -1, -1, 0, 0, 1, 1, np.nan])
    assert_array_equal(TERNARY.snap(x, ZERO, TWO, CEIL).level, [-1, -1, 0, 0, 1, 1, 1, np.nan])


@BOTH
def test_the_same_under_any_trace(format):
    x, cells = tensor(), [parameters((1, 8), seed) for seed in range(3)]
    bits = jnp.array([2.0, 0.0, 2.0])
    run = program(format)
    scale, theta = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cells)
    many = jax.jit(jax.vmap(lambda s, t, b: run(x, s, t, b)))(scale, theta, bits)
    for i, cell in enumerate(cells):
        assert_array_equal(many[i], run(x, *cell, bits[i]))
        with jax.disable_jit():
            assert_array_equal(many[i], run(x, *cell, bits[i]))
    assert_array_equal(many[1], x)


@BOTH
def test_ranges_and_steps(format):
    _, theta = parameters((1, 8))
    low, high = format.level_range(TWO, theta)
    if format.learned:
        assert_array_equal(low, -theta["negative"])
        assert_array_equal(high, theta["positive"])
    else:
        assert (float(low), float(high)) == (-1, 1)
    for given_theta in ((), theta):
        assert float(format.steps(TWO, symmetric=True, theta=given_theta)) == 1
        assert float(format.steps(TWO, symmetric=False, theta=given_theta)) == 2
    at = jnp.array([-1.0, 0.0, 1.0, 1.5, 2.0, 3.0, jnp.nan])
    assert format.valid_bits(at).tolist() == [False, True, False, False, True, False, False]
    assert format.largest_centered_code(symmetric=True) == (None if format.learned else 1)


def test_all_of_theta_goes_where_the_scale_goes():
    _, theta = parameters((1, 2))
    got = LEARNED.map_groups(theta, lambda array: array + 1)
    jax.tree.map(lambda a, b: assert_array_equal(a, b + 1), got, theta)
    assert LEARNED.map_groups((), lambda array: array + 1) == ()


@pytest.mark.parametrize("settings", [{"max_bits": 3}, {"max_bits": 1}, {"signed": False}])
def test_containers_that_cannot_exist(settings):
    with pytest.raises(errors.FormatError, match="signed and have 2 bits"):
        TernaryFormat(**settings)


def test_formats_are_values():
    assert ternary() == TERNARY
    assert hash(ternary(learned=True)) == hash(LEARNED)
    assert TERNARY != LEARNED
    assert TERNARY.name == TERNARY.label(2) == "ternary"
    assert LEARNED.name == "ternary-learned"
    assert ternary(scale_rule=POWER_OF_TWO).name == "ternary-pow2"
    assert not TERNARY.has_zero_point
