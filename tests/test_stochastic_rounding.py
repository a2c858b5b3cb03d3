"""Stochastic rounding: unbiased at every width, and nothing but the neighbours.

Where the noise is counted out (all 2^23 values of it), probabilities are exact; where it is drawn,
the mean of N draws lies within four standard deviations of the value.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import Rounding, integer
from quantjax.rounding import FLOOR, HALF_EVEN, STOCHASTIC

N = 100_000
SIGMAS = 4.0
ZERO_POINT = 1.0
WIDTHS = range(1, 9)
FRACTIONS = np.array([0.001, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.96875, 0.999])
RESOLUTION = 2**23
EVERY_NOISE = (np.arange(RESOLUTION, dtype=np.float32) + np.float32(0.5)) / np.float32(RESOLUTION)
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])

# What stochastic rounding is not: the sum is rounded to float32 before its floor is taken.
SUM_AND_FLOOR = Rounding("sum_and_floor", lambda x, noise: jnp.floor(x + noise), False, True)


class Cells(NamedTuple):
    """A value in each interval tried of each width: one row for each."""

    bits: np.ndarray
    scaled: np.ndarray  # float32: value minus zero point
    below: np.ndarray
    above: np.ndarray

    @property
    def value(self) -> np.ndarray:
        """What the mean should be; float64."""
        return np.float64(self.scaled) + ZERO_POINT

    @property
    def variance(self) -> np.ndarray:
        """Of one draw, which is one of two values."""
        return (self.value - self.below) * (self.above - self.value)


def intervals(bits: int, signed: bool) -> list[tuple[int, int]]:
    """First, middle and last pair of neighbours of a width."""
    if bits == 1:
        return [(-1, 1) if signed else (0, 1)]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    middle = (low + high) // 2
    return sorted({(low, low + 1), (middle, middle + 1), (high - 1, high)})


def cells(signed: bool) -> Cells:
    """Every width, interval and fraction."""
    rows = [
        (bits, np.float32(below + part * (above - below) - ZERO_POINT), below, above)
        for bits in WIDTHS
        for below, above in intervals(bits, signed)
        for part in FRACTIONS
    ]
    bits, *numbers = map(np.array, zip(*rows, strict=True))
    return Cells(bits.astype(np.float32), *numbers)


def moments(rounding: Rounding, signed: bool, rows: Cells) -> tuple[np.ndarray, ...]:
    """Of N draws for each row, through one program for all widths: mean, lowest, highest level."""
    format = integer(max_bits=8, signed=signed)

    def draw(row):
        key, scaled, bits = row
        noise = rounding.noise(key, (N,))
        values = jnp.full(N, scaled)
        levels = format.snap(values, jnp.float32(ZERO_POINT), bits, rounding.given(noise)).level
        low, high = jnp.min(levels), jnp.max(levels)
        # Distances from the lowest are 0 or at most 2, and their sum an exact integer.
        return low, high, jnp.sum(levels - low), jnp.all((levels == low) | (levels == high))

    keys = jax.random.split(jax.random.key(2015), len(rows.bits))
    arrays = keys, jnp.asarray(rows.scaled), jnp.asarray(rows.bits)
    low, high, total, two = (np.asarray(a) for a in jax.jit(lambda a: lax.map(draw, a))(arrays))
    assert two.all()
    return np.float64(low) + np.float64(total) / N, low, high


def deviations(mean: np.ndarray, rows: Cells) -> np.ndarray:
    """How many standard deviations a mean lies from its value."""
    return np.abs(mean - rows.value) / np.sqrt(rows.variance / N)


@SIGNS
def test_unbiased_at_every_width_and_only_the_neighbours_occur(signed):
    rows = cells(signed)
    mean, low, high = moments(STOCHASTIC, signed, rows)
    assert deviations(mean, rows).max() < SIGMAS
    # Each fraction is rare at most a thousandth: both neighbours occur in N draws.
    assert_array_equal(low, rows.below)
    assert_array_equal(high, rows.above)


@pytest.mark.parametrize("rounding", [HALF_EVEN, FLOOR], ids=lambda r: r.name)
def test_other_roundings_are_biased(rounding):
    rows = cells(False)
    mean, _, _ = moments(rounding, False, rows)
    far = deviations(mean, rows) > SIGMAS
    half = np.isclose(rows.value - rows.below, 0.5)
    assert far[~half].mean() > 0.9


@SIGNS
@pytest.mark.parametrize("noise", [EVERY_NOISE[0], np.float32(0.5), EVERY_NOISE[-1]])
def test_levels_never_move(signed, noise):
    format = integer(max_bits=8, signed=signed)

    @jax.jit
    def snap(scaled, bits):
        given = STOCHASTIC.given(jnp.full(scaled.shape, noise))
        return format.snap(scaled, jnp.float32(0), bits, given).level

    for bits in WIDTHS:
        low, high = map(int, format.level_range(jnp.float32(bits)))
        levels = [-1, 1] if bits == 1 and signed else range(low, high + 1)
        padded = np.resize(np.array(levels, np.float32), 256)  # one shape, so one program
        assert_array_equal(snap(padded, np.float32(bits)), padded)


INTEGERS = np.float32([0, 1, -1, 255, -256, 2**22, 2**23 + 1, -(2**23) - 1, 2**24 - 1, 2**30, 3e38])


@pytest.mark.parametrize("noise", [EVERY_NOISE[0], EVERY_NOISE[-1]])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_integers_stay_whatever_the_noise(noise, transform):
    got = transform(STOCHASTIC.apply)(jnp.asarray(INTEGERS), jnp.full(INTEGERS.shape, noise))
    assert_array_equal(got, INTEGERS)


def test_integers_that_the_sum_and_floor_moves():
    odd = jnp.full(RESOLUTION, 2.0**23 + 1)
    moved = np.asarray(SUM_AND_FLOOR.given(jnp.asarray(EVERY_NOISE)).apply(odd) != odd)
    assert moved.mean() == 0.5  # half of the time it is another integer
    assert_array_equal(STOCHASTIC.given(jnp.asarray(EVERY_NOISE)).apply(odd), odd)


@jax.jit
def _ups(value, noise):
    """How often a value goes up, and whether it goes anywhere but to its neighbours."""
    got = STOCHASTIC.given(noise).apply(jnp.full(noise.shape, value))
    up, down = got == jnp.floor(value) + 1.0, got == jnp.floor(value)
    return jnp.sum(up, dtype=jnp.int32), jnp.all(up | down)


def up_probability(value: np.float32) -> float:
    """Over all of the noise, which is equally likely."""
    count, only_neighbours = _ups(value, EVERY_NOISE)
    assert only_neighbours
    return int(count) / RESOLUTION


@pytest.mark.parametrize(
    "value", [1.25, -1.25, 7.1, -7.1, 127.999, 1000.3, 2.0**20 + 0.125, 2.0**22 + 0.5, 1.0000001]
)
def test_from_one_on_the_probability_is_exact(value):
    value = np.float32(value)
    assert up_probability(value) == np.float64(value) - np.floor(np.float64(value))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.75, 1e-3, 1e-6, -0.1, -1e-3, 1e-7, 3e-8, -1e-9])
def test_below_one_the_probability_is_that_of_23_bits(value):
    value = np.float32(value)
    fraction = np.float64(value) - np.floor(np.float64(value))
    assert abs(up_probability(value) - fraction) < 2.0**-23


def test_the_error_below_one_has_no_direction():
    # The first binade whose numbers lie between those of the noise.
    values = np.random.default_rng(0).uniform(2.0**-4, 2.0**-3, 16).astype(np.float32)
    excess = np.array([up_probability(value) - np.float64(value) for value in values])
    assert excess.min() < 0 < excess.max()
    assert abs(excess.mean()) < 2.0**-25


def test_the_fraction_of_large_values_is_kept():
    value = np.float32(2.0**22 + 0.5)
    assert up_probability(value) == 0.5
    # The sum is a multiple of 1/2 there, and goes up for three quarters of the noise.
    summed = SUM_AND_FLOOR.given(jnp.asarray(EVERY_NOISE)).apply(jnp.full(RESOLUTION, value))
    assert np.mean(np.asarray(summed) > value) == pytest.approx(0.75, abs=1e-6)


def test_the_noise_is_uniform_and_centred():
    noise = np.asarray(STOCHASTIC.noise(jax.random.key(7), (N,)))
    assert noise.dtype == np.float32
    steps = np.float64(noise) * RESOLUTION
    assert_array_equal(steps % 1, 0.5)  # centres of the 2^23 intervals of [0, 1)
    assert 0 < noise.min() < noise.max() < 1
    counts = np.bincount((noise * 16).astype(int), minlength=16)
    deviation = np.sqrt(N * (1 / 16) * (15 / 16))
    assert np.abs(counts - N / 16).max() < SIGMAS * deviation
    lowest_bits = steps.astype(int) % 2  # the last of the 23 bits is as random as the first
    assert abs(lowest_bits.sum() - N / 2) < SIGMAS * np.sqrt(N) / 2


VALUES = np.linspace(-3, 3, 64, dtype=np.float32)


def drawn(key: jax.Array) -> jax.Array:
    """One draw for each of some values."""
    noise = STOCHASTIC.noise(key, VALUES.shape)
    return STOCHASTIC.given(noise).apply(jnp.asarray(VALUES))


def test_the_key_decides():
    first, again, other = (drawn(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_array_equal(first, again)
    assert (first != other).any()
    # No value has its neighbour's noise.
    same = STOCHASTIC.given(STOCHASTIC.noise(jax.random.key(0), (64,))).apply(jnp.full(64, 0.5))
    assert set(same.tolist()) == {0.0, 1.0}


def test_eager_jit_vmap_and_map_draw_the_same():
    keys = jax.random.split(jax.random.key(3), 4)
    one_by_one = [drawn(key) for key in keys]
    assert_array_equal([jax.jit(drawn)(key) for key in keys], one_by_one)
    assert_array_equal(jax.vmap(drawn)(keys), one_by_one)
    assert_array_equal(lax.map(drawn, keys), one_by_one)


@SIGNS
def test_one_noise_under_every_width_alone_or_vmapped(signed):
    format = integer(max_bits=8, signed=signed)
    given = STOCHASTIC.given(STOCHASTIC.noise(jax.random.key(5), VALUES.shape))
    bits = jnp.arange(1.0, 9.0)

    def snap(bits):
        return format.snap(jnp.asarray(VALUES), jnp.float32(0), bits, given).level

    together = jax.jit(jax.vmap(snap))(bits)
    assert_array_equal(together, [snap(width) for width in bits])


@SIGNS
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_nan_and_infinities(signed, transform, bits):
    format = integer(max_bits=8, signed=signed)
    special = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    for noise in (EVERY_NOISE[0], EVERY_NOISE[-1]):
        given = STOCHASTIC.given(jnp.full(3, noise))
        assert_array_equal(transform(given.apply)(special), [np.nan, np.inf, -np.inf])
        snap = transform(lambda x, b, given=given: format.snap(x, jnp.float32(0), b, given).level)
        low, high = format.level_range(jnp.float32(bits))
        assert_array_equal(snap(special, jnp.float32(bits)), [np.nan, high, low])


def test_values_out_of_range_saturate():
    given = STOCHASTIC.given(jnp.full(4, EVERY_NOISE[0]))
    x = jnp.array([-9.5, -8.1, 7.1, 99.5])
    level, unclipped = integer().snap(x, jnp.float32(0), jnp.float32(4), given)
    assert level.tolist() == [-8, -8, 7, 7]
    assert unclipped.tolist() == [-9, -8, 8, 100]
