"""Additive powers of two, against the integers that have one bit of a kind and the paper's sets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.formats import POWER_OF_TWO, Law, apot
from quantjax.formats.apot import magnitudes
from quantjax.rounding import FLOOR, HALF_AWAY, HALF_EVEN, ROUNDINGS
from tests.oracles import codebooks as oracle
from tests.refused import refused

ZERO = jnp.float32(0)
EIGHT = {True: apot(max_bits=8), False: apot(max_bits=8, signed=False)}
WIDTHS = {True: range(2, 9), False: range(1, 9)}
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def wanted(bits: int, *, signed: bool) -> np.ndarray:
    """Float32 levels of a width by the oracle."""
    half = oracle.apot_magnitudes(bits - signed)
    return np.float32(np.concatenate([-half[:0:-1], half]) if signed else half)


@functools.cache
def program(signed: bool, rounding):
    """Levels, snapped values and codes there and back: one program for all widths."""
    format = EIGHT[signed]

    def run(bits, x):
        snapped = format.snap(x, ZERO, bits, rounding)
        codes = format.encode(snapped.level, bits)
        return format.levels(bits), *snapped, codes, format.decode(codes, bits)

    return jax.jit(run)


@pytest.mark.parametrize("bits", range(1, 9))
def test_magnitudes_are_the_integers_with_at_most_one_bit_of_each_kind(bits):
    got = magnitudes(bits)
    assert_array_equal(got, oracle.apot_magnitudes(bits))
    assert len(set(got)) == 2**bits
    assert got[0] == 0.0
    assert got[-1] == 1.0


def test_the_published_set_of_four_bits():
    # Section 2.2: p0 of {0, 1, 1/4, 1/16} and p1 of {0, 1/2, 1/8, 1/32}, here in units of 1/32.
    sums = [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48]
    assert sorted(a + b for a in (0, 32, 8, 2) for b in (0, 16, 4, 1)) == sums
    four = jnp.float32(4)
    unsigned = apot(max_bits=4, signed=False).levels(four)
    assert_array_equal(unsigned, np.float32(np.array(sums) / 48))
    # A sign and three bits: the authors' program has {0, 1/2, 1/4, 1/16} and {0, 1/8}.
    half = [0, 1, 2, 3, 4, 6, 8, 10]
    assert sorted(a + b for a in (0, 8, 4, 1) for b in (0, 2)) == half
    signed = np.float32(np.array([*(-v for v in half[:0:-1]), *half, half[-1]]) / 10)
    assert_array_equal(apot(max_bits=4).levels(four), signed)


def test_other_widths_of_the_authors_program():
    """2, 5 and 6 magnitude bits, in units of the smallest power."""
    sets = {
        2: [(0, 4, 2, 1)],
        5: [(0, 64, 16, 2), (0, 32, 8, 1), (0, 4)],
        6: [(0, 256, 32, 4), (0, 128, 16, 2), (0, 64, 8, 1)],
    }
    for bits, terms in sets.items():
        sums = np.array([0])
        for term in terms:
            sums = np.add.outer(sums, np.array(term)).ravel()
        assert_array_equal(magnitudes(bits), np.sort(sums) / sums.max())


@SIGNS
def test_levels_of_every_width_traced(signed):
    format = EIGHT[signed]
    run = jax.jit(jax.vmap(lambda bits: (format.levels(bits), *format.level_range(bits))))
    widths = list(WIDTHS[signed])
    tables, low, high = run(jnp.float32(widths))
    for row, bits in zip(np.asarray(tables), widths, strict=True):
        want = wanted(bits, signed=signed)
        assert len(want) == 2**bits - signed
        assert_array_equal(row[: len(want)], want)
        assert_array_equal(row[len(want) :], np.ones(256 - len(want)))
    assert_array_equal(low, np.full(len(widths), -1.0 if signed else 0.0))
    assert_array_equal(high, np.ones(len(widths)))


@pytest.mark.parametrize("max_bits", [2, 3, 5, 7])
@SIGNS
def test_a_width_has_the_same_levels_in_every_container(max_bits, signed):
    small = apot(max_bits=max_bits, signed=signed)
    for bits in WIDTHS[signed]:
        if bits <= max_bits:
            want = EIGHT[signed].levels(jnp.float32(bits))[: 2**max_bits]
            assert_array_equal(small.levels(jnp.float32(bits)), want)


@pytest.mark.thinned(3)
@SIGNS
@pytest.mark.parametrize("rounding", [HALF_EVEN, HALF_AWAY, FLOOR], ids=lambda r: r.name)
@given(bits=st.integers(1, 8), seed=st.integers(0, 10**6))
@example(bits=2, seed=0)
@example(bits=8, seed=0)
def test_snap_equals_comparing_with_all_levels(signed, rounding, bits, seed):
    bits = max(bits, 1 + signed)
    levels = wanted(bits, signed=signed)
    x = values_near(levels, seed)
    _, level, unclipped, codes, decoded = program(signed, rounding)(jnp.float32(bits), x)
    index = oracle.snap(x, levels, rounding.name)
    assert_array_equal(level, levels[index])
    assert_array_equal(codes, index)
    assert_array_equal(decoded, level)
    outside = (x < levels[0]) | (x > levels[-1])
    assert_array_equal(unclipped, np.where(outside, x, level))


def values_near(levels: np.ndarray, seed: int) -> np.ndarray:
    """Levels, midpoints and their neighbours, anything between, and what lies outside."""
    draw = np.random.default_rng(seed)
    place = draw.integers(0, len(levels) - 1, size=16)
    low, high = np.float64(levels[place]), np.float64(levels[place + 1])
    middle = np.float32((low + high) / 2)
    sides = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
    anywhere = draw.uniform(-1.2, 1.2, size=32).astype(np.float32)
    x = np.concatenate([levels[place], middle, *sides, anywhere, np.float32([-7.0, 7.0])])
    return np.where(np.abs(x) < 2.0**-28, np.float32(0), x)


@SIGNS
def test_levels_stay_and_come_back_as_codes(signed):
    run = program(signed, HALF_EVEN)
    for bits in WIDTHS[signed]:
        levels = wanted(bits, signed=signed)
        x = np.resize(levels, 256)
        _, level, unclipped, codes, decoded = run(jnp.float32(bits), x)
        assert_array_equal(level, x)
        assert_array_equal(unclipped, x)
        assert_array_equal(decoded, x)
        assert_array_equal(codes, np.resize(np.arange(len(levels)), 256))
        assert codes.dtype == jnp.uint8


def test_every_rounding_keeps_zero_and_signed_levels_are_odd():
    key = jax.random.key(0)
    x = jnp.float32([0.0, 0.0])
    for rounding in ROUNDINGS:
        given_key = {"key": key} if rounding.is_random else {}
        y = qj.fake_quant(x, 1.0, format=EIGHT[True], bits=5, rounding=rounding, **given_key)
        assert_array_equal(y, x)
    x = values_near(wanted(5, signed=True), 3)
    run = program(True, HALF_AWAY)
    assert_array_equal(run(jnp.float32(5), -x)[1], -run(jnp.float32(5), x)[1])


def test_small_values_are_kept_better_than_by_integers():
    """What the levels are for: near zero they are dense, at the end they are sparse."""
    levels = wanted(4, signed=True)
    gaps = np.diff(levels[levels >= 0])
    assert gaps[0] < 1 / 7 < gaps[-1]
    x = np.random.default_rng(0).laplace(size=4096).astype(np.float32)
    scale = float(np.abs(x).max())
    error = {
        name: float(np.mean((np.asarray(y) - x) ** 2))
        for name, y in {
            "apot": qj.fake_quant(jnp.asarray(x), scale, format=apot(max_bits=4)),
            "int": qj.fake_quant(jnp.asarray(x), scale / 7, format=qj.integer(max_bits=4)),
        }.items()
    }
    assert error["apot"] < error["int"]


def test_fake_quantization_under_traced_widths():
    x = values_near(wanted(6, signed=True), 5) * np.float32(0.5)
    run = jax.jit(lambda bits: qj.fake_quant(jnp.asarray(x), 0.5, format=EIGHT[True], bits=bits))
    for bits in WIDTHS[True]:
        levels = wanted(bits, signed=True)
        want = levels[oracle.snap(x * 2, levels, "half_even")] * np.float32(0.5)
        assert_array_equal(run(jnp.float32(bits)), want)
    assert_array_equal(run(ZERO), x)
    assert np.isnan(run(jnp.float32(1))).all()


def test_names_laws_and_widths():
    signed, unsigned = EIGHT[True], EIGHT[False]
    assert signed.label(4) == "apot4"
    assert unsigned.label(4) == "uapot4"
    assert apot(scale_rule=POWER_OF_TWO).name != signed.name
    assert {Law.ZERO, Law.ODD} <= signed.laws
    assert Law.ROUND_TRIP not in signed.laws  # +0 and -0 are one level
    assert {Law.ZERO, Law.ROUND_TRIP} <= unsigned.laws
    widths = jnp.float32([0, 1, 2, 8, 9, 2.5])
    for format, one in ((signed, False), (unsigned, True)):
        assert format.valid_bits(widths).tolist() == [True, one, True, True, False, False]


@pytest.mark.parametrize("max_bits", [0, 9])
@SIGNS
def test_containers_that_cannot_exist(max_bits, signed):
    with refused(errors.FormatError, f"got {max_bits}"):
        apot(max_bits=max_bits, signed=signed)


def test_one_bit_is_unsigned():
    with refused(errors.FormatError, "no magnitude bits", "signed=False"):
        apot(max_bits=1)
    assert apot(max_bits=1, signed=False).levels(jnp.float32(1)).tolist() == [0.0, 1.0]
    with refused(errors.BitsError):
        qj.fake_quant(jnp.ones(3), 1.0, format=EIGHT[True], bits=1)
