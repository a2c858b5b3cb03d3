"""Minifloats: tables of the specifications, laws, ends of the range, widths, what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_array_equal

from quantjax import errors
from quantjax.formats.base import Law
from quantjax.formats.minifloat import (
    BFLOAT16,
    E2M1,
    E2M3,
    E3M2,
    E3M4,
    E4M3,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FLOAT16,
    FloatBits,
    MinifloatFormat,
    Overflow,
    Specials,
    minifloat,
)
from quantjax.formats.scales import MX_FLOOR, REAL, UNIT
from quantjax.rounding import CEIL, FLOOR, HALF_AWAY, HALF_EVEN

pytestmark = pytest.mark.thinned(2)

SMALL = (E2M1, E2M3, E3M2, E3M4, E4M3, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ)
ALL = (*SMALL, BFLOAT16, FLOAT16)
EVERY = pytest.mark.parametrize("format", ALL, ids=lambda format: format.name)
ZERO = jnp.float32(0.0)
LARGEST = float(np.finfo(np.float32).max)
WIDE = minifloat(5, 10, specials=Specials.FN)  # a container that holds any traced width
SPECIAL = {
    format: minifloat(
        format.exponent_bits,
        format.mantissa_bits,
        specials=format.specials,
        overflow=Overflow.SPECIAL,
    )
    for format in ALL
    if format.specials is not Specials.FINITE
}


def width(format):
    return jnp.float32(format.max_bits)


@functools.partial(jax.jit, static_argnums=(0, 3))
def snapped(format, x, bits, rounding):
    return format.snap(x, ZERO, bits, rounding).level


def snap(format, values, rounding=HALF_EVEN):
    values = np.asarray(values, np.float32)
    x = np.zeros(max(values.size, 24), np.float32)  # one shape, one compilation
    x[: values.size] = values
    return np.asarray(snapped(format, x, width(format), rounding))[: values.size]


encode = jax.jit(lambda format, levels: format.encode(levels, width(format)), static_argnums=0)
decode = jax.jit(lambda format, codes: format.decode(codes, width(format)), static_argnums=0)


def levels(format):
    """What every code stands for, in the order of the codes."""
    codes = np.arange(2**format.max_bits, dtype=format.storage_dtype)
    return np.asarray(decode(format, codes))


def test_value_tables_of_the_specification():
    """OCP Microscaling Formats (MX) Specification v1.0, 2023, sections 5.3.1 to 5.3.3.

    Its e4m3 is ``E4M3FN``. The two of 8 bits are also table 1 of Micikevicius et al., FP8 formats
    for deep learning, 2022.
    """
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    e2m3 = (
        [n / 8 for n in range(16)] + [n / 4 for n in range(8, 16)] + [n / 2 for n in range(8, 16)]
    )
    e3m2 = [0, 1 / 16, 2 / 16, 3 / 16, 1 / 4, 5 / 16, 6 / 16, 7 / 16, 0.5, 5 / 8, 6 / 8, 7 / 8]
    e3m2 += [1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
    e4m3 = [n / 512 for n in range(8)]
    e4m3 += [n * 2.0**k for k in range(-9, 6) for n in range(8, 16)]
    e4m3[-1] = np.nan  # S.1111.111
    e5m2 = [n / 65536 for n in range(4)]
    e5m2 += [n * 2.0**k for k in range(-16, 14) for n in range(4, 8)]
    e5m2 += [np.inf, np.nan, np.nan, np.nan]  # S.11111.00 and the rest of that exponent
    tables = ((E2M1, e2m1), (E2M3, e2m3), (E3M2, e3m2), (E4M3FN, e4m3), (E5M2, e5m2))
    for format, half in tables:
        assert_array_equal(levels(format), half + [-value for value in half])


@pytest.mark.parametrize(
    ("format", "highest", "lowest_normal", "lowest", "finite", "infinities", "nans"),
    [
        (E4M3FN, 448.0, 2.0**-6, 2.0**-9, 254, 0, 2),
        (E5M2, 57344.0, 2.0**-14, 2.0**-16, 248, 2, 6),
        (E4M3, 240.0, 2.0**-6, 2.0**-9, 240, 2, 14),
        (E3M4, 15.5, 2.0**-2, 2.0**-6, 224, 2, 30),
        (E4M3FNUZ, 240.0, 2.0**-7, 2.0**-10, 255, 0, 1),
        (E5M2FNUZ, 57344.0, 2.0**-15, 2.0**-17, 255, 0, 1),
        (E2M1, 6.0, 1.0, 0.5, 16, 0, 0),
        (E2M3, 7.5, 1.0, 0.125, 64, 0, 0),
        (E3M2, 28.0, 0.25, 0.0625, 64, 0, 0),
        (FLOAT16, 65504.0, 2.0**-14, 2.0**-24, 63488, 2, 2046),
    ],
    ids=lambda value: value.name if isinstance(value, MinifloatFormat) else None,
)
def test_extremes_and_counts(format, highest, lowest_normal, lowest, finite, infinities, nans):
    """Sources as above; FNUZ: Noune et al., 8-bit numerical formats for deep neural networks, 2022;
    the rest: IEEE 754-2019, section 3.4, at these widths."""
    every = levels(format)
    numbers = every[np.isfinite(every)]
    assert (len(numbers), np.isinf(every).sum(), np.isnan(every).sum()) == (
        finite,
        infinities,
        nans,
    )
    assert numbers.max() == -numbers.min() == highest
    assert numbers[numbers > 0].min() == lowest
    # The first with a binade of its own is 2^m subnormals up.
    assert sorted(numbers[numbers > 0])[2**format.mantissa_bits - 1] == lowest_normal
    low, high = format.level_range(width(format))
    assert (low, high) == (-highest, highest)
    top = np.sort(numbers)[-2:]
    assert format.unit(width(format)) == top[1] - top[0]


def test_bfloat16_is_the_upper_half_of_float32():
    codes = np.arange(2**16, dtype=np.uint16)
    got = np.asarray(decode(BFLOAT16, codes))
    want = (codes.astype(np.uint32) << 16).view(np.float32)
    number = ~np.isnan(want)
    assert_array_equal(got.view(np.uint32)[number], want.view(np.uint32)[number])
    assert np.isnan(got[~number]).all()
    # 2^-126 (1 + 2^-7), whose distance from its neighbour is no normal float32 number.
    close = np.float32(2.0**-126 * (1 + 2.0**-7))
    got = snap(BFLOAT16, [close, close * (1 + 2.0**-12), -close])
    assert got.tolist() == [close, close, -close]


@EVERY
def test_every_level_stays_and_returns_to_its_code(format):
    every = levels(format)
    codes = np.arange(2**format.max_bits)
    kept = np.isfinite(every) & ((every == 0) | (np.abs(every) >= 2.0**-126))
    for rounding in (HALF_EVEN, HALF_AWAY, FLOOR, CEIL):
        assert_array_equal(snap(format, every, rounding)[kept], every[kept])
    back = np.asarray(encode(format, every))
    number = ~np.isnan(every)
    assert back.dtype == format.storage_dtype
    assert_array_equal(back[number], codes[number])


def reals():
    """Ties, levels, anything up to beyond the highest level; no float32 subnormals."""
    values = st.one_of(
        st.integers(-2000, 2000).map(lambda n: n / 64),
        st.floats(-(2.0**17), 2.0**17, width=32),
        st.floats(-(2.0**-6), 2.0**-6, width=32),
    )
    values = values.map(lambda x: x if abs(x) > 2.0**-60 else 0.0)
    return npst.arrays(np.float32, 24, elements=values.map(np.float32))


@EVERY
@given(x=reals())
def test_laws(format, x):
    x = np.sort(x)
    y = snap(format, x)
    assert y.dtype == np.float32
    assert Law.IDEMPOTENT in format.laws
    assert_array_equal(snap(format, y), y)
    assert Law.MONOTONE in format.laws
    assert np.all(np.diff(y) >= 0)
    assert Law.ODD in format.laws
    assert_array_equal(snap(format, -x), -y)
    assert Law.ZERO in format.laws
    assert snap(format, [0.0]).tolist() == [0.0]
    assert Law.NEAREST in format.laws
    if format.max_bits <= 8:
        every = levels(format)
        distance = np.abs(np.float64(x)[:, None] - every[np.isfinite(every)]).min(axis=1)
        assert_array_equal(np.abs(np.float64(x) - y), distance)
    codes = encode(format, y)
    assert Law.ROUND_TRIP in format.laws
    assert_array_equal(decode(format, codes), y)
    assert Law.INTEGER not in format.laws


def test_laws_that_specials_break():
    ieee, fn = SPECIAL[E5M2], SPECIAL[E4M3FN]
    assert Law.NEAREST not in ieee.laws
    assert Law.MONOTONE in ieee.laws
    assert snap(ieee, [57344.0, 61439.0, 61440.0]).tolist() == [57344.0, 57344.0, np.inf]
    assert not {Law.NEAREST, Law.MONOTONE} & fn.laws
    assert_array_equal(snap(fn, [448.0, 464.0, 465.0]), [448.0, 448.0, np.nan])


@EVERY
def test_the_ends_of_the_reals_saturate(format):
    high = float(format.level_range(width(format))[1])
    got = snap(format, [np.inf, -np.inf, LARGEST, -LARGEST, np.nan, 0.0, -0.0])
    assert_array_equal(got, [high, -high, high, -high, np.nan, 0.0, 0.0])
    assert np.signbit(got[-1]) == (format.specials is not Specials.FNUZ)
    codes = encode(format, got)
    decoded = np.asarray(decode(format, codes))
    has_nan = format.specials is not Specials.FINITE
    assert_array_equal(decoded, got if has_nan else np.where(np.isnan(got), 0.0, got))


@pytest.mark.parametrize("format", SPECIAL.values(), ids=lambda format: format.name)
def test_the_ends_of_the_reals_as_specials(format):
    beyond = np.inf if format.specials is Specials.IEEE else np.nan
    largest = LARGEST if format.exponent_bits == 8 else 1e9  # rounds up to 2^128 in bfloat16
    got = snap(format, [np.inf, -np.inf, largest, -largest, np.nan])
    assert_array_equal(got, [beyond, -beyond, beyond, -beyond, np.nan])
    codes = encode(format, got)
    assert_array_equal(decode(format, codes), got)


def test_what_is_unclipped_goes_on():
    snapped = E2M1.snap(jnp.array([5.1, 7.0, 9.0, -100.0, jnp.inf]), ZERO, width(E2M1), HALF_EVEN)
    assert snapped.level.tolist() == [6.0, 6.0, 6.0, -6.0, 6.0]  # 5.1 is nearer to 6 than to 4
    assert snapped.unclipped.tolist() == [6.0, 8.0, 8.0, -96.0, np.inf]


def test_directed_roundings_go_the_same_way_on_both_sides():
    x = [1.1, -1.1, 3.9, -3.9, 0.1, -0.1]
    assert snap(E2M1, x, FLOOR).tolist() == [1.0, -1.5, 3.0, -4.0, 0.0, -0.5]
    assert snap(E2M1, x, CEIL).tolist() == [1.5, -1.0, 4.0, -3.0, 0.5, 0.0]
    assert snap(E2M1, [0.25, 0.75, 1.25, 2.5, 5.0], HALF_AWAY).tolist() == [0.5, 1, 1.5, 3, 6]
    assert snap(E2M1, [0.25, 0.75, 1.25, 2.5, 5.0], HALF_EVEN).tolist() == [0, 1, 1, 2, 4]


def test_without_mantissa_bits_levels_are_powers_of_two():
    powers = minifloat(3, 0)
    assert levels(powers).tolist()[:8] == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    # A tie of two one-digit numbers goes to the larger.
    assert snap(powers, [1.5, 1.4, 3.0, 0.125, 0.2]).tolist() == [2.0, 1.0, 4.0, 0.0, 0.25]


def test_one_exponent_bit_makes_even_steps():
    assert levels(minifloat(1, 2)).tolist()[:8] == [n / 2 for n in range(8)]


@EVERY
def test_narrower_mantissas_are_levels_of_the_container(format):
    every = set(levels(format)[np.isfinite(levels(format))].tolist())
    x = np.random.default_rng(0).normal(size=200).astype(np.float32) * 4
    for mantissa in range(format.mantissa_bits + 1):
        bits = jnp.float32(1 + format.exponent_bits + mantissa)
        level = snapped(format, x, bits, HALF_EVEN)
        assert set(level.tolist()) <= every
        assert bool(format.valid_bits(bits))
        codes = encode(format, level)
        assert_array_equal(decode(format, codes), level)


def test_layers_that_are_stacked_have_a_width_each():
    x = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(np.float32)

    def all_of(format, x, bits, theta):
        level = format.snap(x, ZERO, bits, HALF_EVEN, theta).level
        codes = format.encode(level, bits, theta)
        top = format.level_range(bits, theta)[1]
        return level, codes, top, format.decode(codes, bits, theta)

    stacked = FloatBits(jnp.array([2.0, 4.0, 5.0]), jnp.array([1.0, 3.0, 2.0]))
    for format, bits, theta in (
        (E4M3FN, jnp.array([6.0, 7.0, 8.0]), ()),
        (WIDE, stacked.bits, stacked.theta),
    ):
        each = functools.partial(all_of, format)
        together, apart = jax.jit(each), jax.jit(jax.vmap(each))
        got = level, codes, top, back = together(x, bits, theta)
        jax.tree.map(assert_array_equal, got, apart(x, bits, theta))
        assert_array_equal(back, level)
        assert (codes.dtype, top.shape) == (format.storage_dtype, (3,))


def test_traced_exponents_have_patterns_of_their_own_width():
    bits = FloatBits(2, 1)
    codes = WIDE.encode(jnp.array([0.5, 6.0, -1.0]), bits.bits, bits.theta)
    assert codes.tolist() == [1, 7, 10]  # but 6 would be NaN: all ones
    assert_array_equal(WIDE.decode(codes, bits.bits, bits.theta), [0.5, np.nan, -1.0])
    assert WIDE.level_range(bits.bits, bits.theta)[1] == 4.0


def test_levels_do_not_move_with_the_width():
    codes = jnp.arange(8, dtype=jnp.uint16)
    theta = FloatBits(2, 1).theta
    _, tangent = jax.jvp(
        lambda theta: WIDE.decode(codes, jnp.float32(4), theta),
        (theta,),
        (jax.tree.map(jnp.ones_like, theta),),
    )
    assert_array_equal(tangent, np.zeros(8))


def test_valid_widths():
    widths = jnp.array([0.0, 4.0, 5.0, 6.5, 8.0, 9.0, -1.0, jnp.nan])
    want = [True, False, True, False, True, False, False, False]
    assert E4M3FN.valid_bits(widths).tolist() == want


@pytest.mark.parametrize("specials", Specials)
def test_valid_traced_widths(specials):
    format = minifloat(4, 5, specials=specials)
    for exponent, mantissa in itertools.product((0, 1, 1.5, 2, 7, 8, 9), (-1, 0, 0.5, 1, 5, 8)):
        bits = FloatBits(exponent, mantissa)
        least, most = (2, 8) if specials is Specials.IEEE else (1, 7)
        fits = exponent in range(least, most + 1) and mantissa in (0, 1, 5, 8)
        fits &= bits.bits <= format.max_bits
        empty = ((Specials.FN, 1, 0), (Specials.IEEE, exponent, 0))  # no number, no pattern for NaN
        fits &= (specials, exponent, mantissa) not in empty
        if bits.bits != 0.0:  # which passes the tensor through
            assert bool(format.valid_bits(bits.bits, bits.theta)) == fits, (exponent, mantissa)


def test_float_bits():
    width = FloatBits(jnp.array([4.0, 5.0]), 2)
    assert width.bits.tolist() == [7.0, 8.0]
    assert width.bits.dtype == width.theta["exponent_bits"].dtype == jnp.float32
    assert jax.tree.leaves(FloatBits(4, 3)) == [4, 3]


def test_names():
    names = [format.name for format in ALL]
    assert names == [
        *("e2m1", "e2m3", "e3m2", "e3m4", "e4m3", "e4m3fn", "e4m3fnuz"),
        *("e5m2", "e5m2fnuz", "e8m7-unit", "e5m10-unit"),
    ]
    assert E4M3FN.label(6) == "e4m1fn"
    assert E4M3FN.label(3) == "float3fn"
    assert minifloat(4, 3).name == "e4m3-finite"
    assert minifloat(3, 2, specials=Specials.IEEE).name == "e3m2-ieee"
    assert SPECIAL[E5M2].name == "e5m2-special"
    assert minifloat(2, 1, scale_rule=MX_FLOOR).name == "e2m1-mx-floor"
    kinds = itertools.product(Specials, ((4, 3), (3, 2)))
    assert len({minifloat(*bits, specials=kind).name for kind, bits in kinds}) == 8


@EVERY
def test_formats_are_static_values(format):
    again = minifloat(
        format.exponent_bits,
        format.mantissa_bits,
        specials=format.specials,
        scale_rule=UNIT if format.max_bits == 16 else REAL,
    )
    assert again == format
    assert hash(again) == hash(format)
    assert again != minifloat(4, 4)
    assert not format.has_zero_point
    assert format.largest_centered_code(symmetric=True) is None
    assert format.storage_dtype == (jnp.uint8 if format.max_bits <= 8 else jnp.uint16)
    high = format.level_range(width(format))[1]
    assert format.steps(width(format), symmetric=True) == high


@pytest.mark.parametrize(
    ("exponent", "mantissa", "specials", "message"),
    [
        (0, 3, Specials.FINITE, "1 to 7 exponent bits, got 0"),
        (9, 3, Specials.IEEE, "2 to 8 exponent bits, got 9"),
        (8, 7, Specials.FINITE, "1 to 7 exponent bits, got 8"),
        (8, 3, Specials.FNUZ, "1 to 7 exponent bits, got 8"),
        (1, 3, Specials.IEEE, "2 to 8 exponent bits, got 1"),
        (4, -1, Specials.FN, "0 to 10 mantissa bits, got -1"),
        (4, 11, Specials.FN, "0 to 10 mantissa bits, got 11"),
        (7, 9, Specials.FN, "0 to 8 mantissa bits, got 9"),
        (1, 0, Specials.FN, "1 to 10 mantissa bits, got 0"),
        (5, 0, Specials.IEEE, "1 to 10 mantissa bits, got 0"),
    ],
)
def test_what_cannot_exist_is_refused(exponent, mantissa, specials, message):
    with pytest.raises(errors.FormatError, match=message):
        minifloat(exponent, mantissa, specials=specials)


def test_contradictions_are_refused():
    with pytest.raises(errors.FormatError, match="no pattern for what is beyond"):
        minifloat(2, 1, overflow=Overflow.SPECIAL)
    with pytest.raises(errors.FormatError, match="has a sign"):
        MinifloatFormat(signed=False)
