"""Microscaling: hand vectors, scale rules against exact models, published noise ratios."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_array_equal

from quantjax import errors
from quantjax.formats import divide_by_scale
from quantjax.formats.integer import integer
from quantjax.formats.microscaling import (
    MX_BLOCK,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    NVFP4_BLOCK,
    NVFP4_SCALE,
    e8m0_codes,
    e8m0_scales,
    mx,
)
from quantjax.formats.minifloat import E2M1, E4M3FN
from quantjax.formats.scales import (
    INQ_SCALE,
    MX_CEIL,
    MX_EVEN,
    MX_FLOOR,
    POWER_OF_TWO,
    POWER_OF_TWO_NEAREST,
    REAL,
    Span,
)
from quantjax.rounding import HALF_EVEN
from tests.oracles import minifloats as oracle
from tests.oracles.minifloats import Minifloat

ALL_MX = (MXFP8_E4M3, MXFP8_E5M2, MXFP6_E3M2, MXFP6_E2M3, MXFP4, MXINT8)
EVERY_MX = pytest.mark.parametrize("format", ALL_MX, ids=lambda format: format.name)
ZERO = jnp.float32(0.0)
TOPS = {  # highest level, its binade's exponent, mantissa bits
    MXFP8_E4M3: (448.0, 8, 3),
    MXFP8_E5M2: (57344.0, 15, 2),
    MXFP6_E3M2: (28.0, 4, 2),
    MXFP6_E2M3: (7.5, 2, 3),
    MXFP4: (6.0, 2, 1),
    MXINT8: (127.0, 6, 6),
}


def span_of(largest, format):
    bits = jnp.float32(format.max_bits)
    largest = jnp.asarray(largest, jnp.float32)
    quotient = divide_by_scale(largest, format.steps(bits, symmetric=True))
    return Span(largest, quotient, format.level_range(bits)[1], format.unit(bits))


@functools.partial(jax.jit, static_argnums=1)
def scales_of(largest, format):
    """The scale for each largest magnitude."""
    return format.scale_rule.scale(span_of(largest, format))


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized(x, format, block):
    """Blocks along the last axis, quantized and dequantized."""
    blocks = x.reshape(-1, block)
    scale = scales_of(jnp.abs(blocks).max(axis=1), format)[:, None]
    scaled = divide_by_scale(blocks, scale)
    level = format.snap(scaled, ZERO, jnp.float32(format.max_bits), HALF_EVEN).level
    return (level * scale).reshape(x.shape)


def with_rule(format, rule):
    return mx(format, scale_rule=rule)


def test_the_floor_rule_saturates_957_to_896():
    # 957 = 1.87 · 2^9 has the exponent 9, 448 has 8: scale 2. 957 / 2 is beyond 448.
    x = np.zeros(MX_BLOCK, np.float32)
    x[:5] = [957.0, -957.0, 1.0, 0.3, 896.0]
    got = quantized(x, MXFP8_E4M3, MX_BLOCK)
    assert scales_of(np.float32([957.0]), MXFP8_E4M3).tolist() == [2.0]
    # 0.3 / 2 = 0.15 lies between 0.140625 and 0.15625 and is nearer to the latter.
    assert got[:6].tolist() == [896.0, -896.0, 1.0, 0.3125, 896.0, 0.0]
    # No rule that clips nothing: 957 / 448 > 2, so scale 4, and 239.25 becomes 240.
    ceil = with_rule(E4M3FN, POWER_OF_TWO)
    assert quantized(x, ceil, MX_BLOCK)[0] == 960.0


@pytest.mark.parametrize(
    ("format", "largest", "scale"),
    [
        (MXFP4, 6.0, 1.0),
        (MXFP4, 7.99, 1.0),
        (MXFP4, 8.0, 2.0),
        (MXFP4, 4.0, 1.0),
        (MXFP4, 3.99, 0.5),
        (MXFP6_E2M3, 7.5, 1.0),
        (MXFP6_E3M2, 28.0, 1.0),
        (MXFP6_E3M2, 0.9, 2.0**-5),
        (MXFP8_E5M2, 127.9999, 2.0**-9),
        (MXFP8_E5M2, 57344.0, 1.0),
        (MXINT8, 1.984375, 2.0**-6),
        (MXINT8, 127.0, 1.0),
        (MXINT8, 128.0, 2.0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_floor_scales_by_hand(format, largest, scale):
    assert scales_of(np.float32([largest]), format).tolist() == [scale]


def exponents(rule, largest, top):
    """``log2 scale`` for a positive float32 number, in integers and exact reals."""
    highest, binade, mantissa_bits = top
    fraction, exponent = np.frexp(np.float64(largest))
    fraction, exponent = 2 * fraction, exponent - 1  # 1 <= fraction < 2
    if rule is MX_FLOOR:
        return exponent - binade
    if rule is MX_CEIL:
        return exponent + (fraction > 1) - binade
    if rule is MX_EVEN:
        steps = np.rint(fraction * 2**mantissa_bits)  # 2^(m + 1) is a tie upwards: it is even
        return exponent + (steps == 2 ** (mantissa_bits + 1)) - binade
    if rule is INQ_SCALE:
        return np.floor(np.log2(4 * fraction / 3)).astype(int) + exponent
    # The others go by the quotient as float32 has it.
    steps = 128.0 if highest == 127.0 else highest
    quotient = np.float64(np.float32(np.float32(largest) / np.float32(steps)))
    fraction, exponent = np.frexp(quotient)
    fraction, exponent = 2 * fraction, exponent - 1
    if rule is POWER_OF_TWO:
        return exponent + (fraction > 1)
    assert rule is POWER_OF_TWO_NEAREST
    return exponent + (fraction**2 > 2)


RULES = (MX_FLOOR, MX_CEIL, MX_EVEN, POWER_OF_TWO, POWER_OF_TWO_NEAREST, INQ_SCALE)


@functools.partial(jax.jit, static_argnums=1)
def scales_of_all(largest, rule):
    """One compilation for all formats: most of this file's time would be theirs."""
    return [scales_of(largest, with_rule(format, rule)) for format in ALL_MX]


def magnitudes():
    """Mantissas at and around every rule's limits, and any others; exponents that stay normal."""
    edges = [1.0, 1.25, 1.375, 1.5, 1.75, 1.875, 1.9375, 1.9921875, 2 - 2.0**-23, 2.0**0.5]
    edges += [1 + 2.0**-23, float(np.nextafter(np.float32(1.875), np.float32(0)))]
    ends = [top[0] for top in TOPS.values()]
    mantissas = st.one_of(st.sampled_from(edges + ends), st.floats(1.0, 2.0, width=32))
    powers = st.integers(-90, 90)
    values = st.builds(lambda m, k: np.float32(m) * np.float32(2.0**k), mantissas, powers)
    return npst.arrays(np.float32, 16, elements=values)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@given(largest=magnitudes())
def test_scale_rules_equal_the_exact_model(rule, largest):
    for format, got in zip(ALL_MX, map(np.asarray, scales_of_all(largest, rule)), strict=True):
        assert got.dtype == np.float32
        want = np.ldexp(1.0, exponents(rule, largest, TOPS[format]))
        assert_array_equal(got, want, err_msg=format.name)
        assert np.all(got.view(np.int32) & 0x7FFFFF == 0)
        highest = TOPS[format][0]
        if rule is MX_CEIL:  # 2^k with 1 of the top binade is enough
            assert np.all(largest <= got * highest)
        if rule is POWER_OF_TWO:
            reach = 128.0 if format is MXINT8 else highest
            assert np.all(np.float64(largest) <= np.float64(got) * reach * (1 + 2.0**-23))
            assert np.all(np.float64(largest) > np.float64(got) / 2 * reach * (1 - 2.0**-23))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_scales_stay_normal_numbers_at_the_ends(rule):
    largest = np.float32([2.0**-126, 1.5 * 2.0**-126, np.finfo(np.float32).max])
    for format in ALL_MX:
        got = np.asarray(scales_of(largest, with_rule(format, rule)))
        assert np.all(np.isfinite(got))
        assert np.all(got >= 2.0**-126)
        assert np.all(got.view(np.int32) & 0x7FFFFF == 0)


@functools.cache
def gaussian(count=1_000_000):
    return np.random.default_rng(0).normal(size=count // 32 * 32).astype(np.float32)


def sqnr(x, y):
    x, y = np.float64(x), np.float64(y)
    return 10 * np.log10(np.sum(x**2) / np.sum((x - y) ** 2))


@pytest.mark.parametrize(
    ("rule", "decibels"),
    [(MX_FLOOR, 18.80), (POWER_OF_TWO, 18.76), (MX_EVEN, 19.03), (REAL, 19.91)],
    ids=["floor", "ceil-of-quotient", "even", "real"],
)
def test_signal_to_noise_of_mxfp4_is_the_published_one(rule, decibels):
    format = E2M1 if rule is REAL else with_rule(E2M1, rule)
    got = sqnr(gaussian(), quantized(gaussian(), format, MX_BLOCK))
    assert abs(got - decibels) < 0.05, got


def test_nvfp4_is_close_to_real_scales():
    real = sqnr(gaussian(), quantized(gaussian(), E2M1, NVFP4_BLOCK))
    got = sqnr(gaussian(), quantized(gaussian(), NVFP4, NVFP4_BLOCK))
    coarse = sqnr(gaussian(), quantized(gaussian(), MXFP4, NVFP4_BLOCK))
    assert coarse + 1.0 < got < real
    assert real - got < 0.3


def test_nvfp4_scales_by_hand():
    # t = 2688 / (6 · 448) = 1, so scales are e4m3fn itself: 6.1 / 6 lies below 1.0625 (a tie with
    # 1.125 and 1) and is 1; 10.5 / 6 = 1.75; 0 and 10^-6 are the smallest, 2^-9.
    largest = np.float32([2688.0, 6.1, 10.5, 1e-6, 0.0])
    assert scales_of(largest, NVFP4).tolist() == [448.0, 1.0, 1.75, 2.0**-9, 2.0**-9]
    assert_array_equal(scales_of(largest * 2.0**20, NVFP4), scales_of(largest, NVFP4) * 2.0**20)


def nvfp4_scales(largest):
    """Each operation in float64 and rounded once more, which is what float32 does."""
    whole = np.float32(np.float64(largest.max()) / (6 * 448))
    quotient = np.float32(np.float64(largest) / 6)
    ratio = np.float32(np.float64(quotient) / np.float64(whole))
    block = np.minimum(ratio, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.float32(np.float64(np.maximum(block, 2.0**-9)) * np.float64(whole))


def elements(x, scale, format):
    """The nearest levels of float32 quotients, by the tables of numbers."""
    scaled = np.float32(np.float64(x) / np.float64(scale))
    if format is MXINT8:
        return np.clip(np.rint(np.float64(scaled)), -128, 127)
    kinds = {MXFP8_E4M3: "fn", MXFP8_E5M2: "ieee"}
    name = kinds.get(format, "finite")
    family = Minifloat(format.exponent_bits, format.mantissa_bits, name)
    return oracle.nearest(scaled, family)


def in_blocks(block, power=0):
    """16 blocks whose magnitudes differ, with ties."""
    rng = np.random.default_rng(power + 200)
    x = rng.normal(size=(16, block)) * np.exp2(rng.uniform(-8, 8, (16, 1)))
    x[:8] = np.round(x[:8] * 64) / 64
    return np.float32(x * 2.0**power)


@pytest.mark.parametrize("rule", [MX_FLOOR, MX_CEIL, MX_EVEN], ids=lambda rule: rule.name)
def test_blocks_equal_the_model(rule):
    x = in_blocks(MX_BLOCK)
    for format in ALL_MX:
        scale = np.ldexp(1.0, exponents(rule, np.abs(x).max(axis=1), TOPS[format]))[:, None]
        got = quantized.__wrapped__(x, with_rule(format, rule), MX_BLOCK)
        assert_array_equal(got, np.float32(elements(x, scale, format) * scale))


@pytest.mark.parametrize("power", [-80, 0, 80])
def test_nvfp4_blocks_equal_the_model(power):
    x = in_blocks(NVFP4_BLOCK, power)
    scale = nvfp4_scales(np.abs(x).max(axis=1))[:, None]
    want = np.float32(elements(x, scale, NVFP4) * np.float64(scale))
    assert_array_equal(quantized(x, NVFP4, NVFP4_BLOCK), want)


@pytest.mark.parametrize("power", [-80, 0, 80])
def test_nvfp4_scales_equal_the_model(power):
    rng = np.random.default_rng(power + 100)
    largest = np.exp2(rng.uniform(-20, 0, 4096) + power).astype(np.float32)
    # Some at and beside ties of e4m3fn, where one rounding too few or too many shows.
    numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    ties = np.float32((numbers[1:] + numbers[:-1]) / 2 * (largest.max() / 448))
    beside = ties.view(np.int32)[:, None] + np.arange(-6, 7, dtype=np.int32)
    largest[: beside.size] = np.append(beside[:-1], [largest.max().view(np.int32)] * 13).view(
        np.float32
    )
    want = nvfp4_scales(largest)
    assert_array_equal(scales_of(largest, NVFP4), want)
    assert_array_equal(scales_of.__wrapped__(largest, NVFP4), want)  # without jit
    # One of a batch, where the divisor is broadcast.
    pair = jax.vmap(lambda spans: scales_of(spans, NVFP4))(np.stack([largest, largest / 4]))
    assert_array_equal(pair[0], want)


def test_nvfp4_tensors_have_a_scale_each():
    largest = np.float32(np.random.default_rng(0).uniform(0.1, 1.0, (3, 16)))
    largest *= np.float32([[1.0], [2.0**10], [2.0**-10]])
    got = jax.vmap(lambda spans: scales_of(spans, NVFP4))(largest)
    for row in range(3):
        assert_array_equal(got[row], scales_of(largest[row], NVFP4))


def test_nvfp4_of_zeros_is_finite():
    got = np.asarray(scales_of(np.zeros(8, np.float32), NVFP4))
    assert np.all(np.isfinite(got))
    assert NVFP4_SCALE.is_power_of_two is False


@EVERY_MX
def test_microscaled_formats_are_their_elements_with_a_rule(format):
    highest, _, mantissa_bits = TOPS[format]
    bits = jnp.float32(format.max_bits)
    assert format.level_range(bits)[1] == highest
    assert format.unit(bits) == 2.0 ** (np.floor(np.log2(highest)) - mantissa_bits)
    assert format.scale_rule == MX_FLOOR
    assert format.name.endswith("-mx-floor")
    assert mx(format, scale_rule=MX_EVEN).name.endswith("-mx-even")


def test_names_and_block_sizes():
    assert (MX_BLOCK, NVFP4_BLOCK) == (32, 16)
    assert [format.name for format in (MXFP4, MXINT8, NVFP4)] == [
        "e2m1-mx-floor",
        "int-mx-floor",
        "e2m1-nvfp4",
    ]
    assert [format.max_bits for format in ALL_MX] == [8, 8, 6, 6, 4, 8]
    assert mx(integer(max_bits=4)).max_bits == 4
    assert mx(E2M1) == MXFP4


@pytest.mark.parametrize("rule", [REAL, NVFP4_SCALE], ids=["real", "nvfp4"])
def test_other_scales_than_powers_of_two_are_refused(rule):
    with pytest.raises(errors.FormatError, match="no powers of two"):
        mx(E2M1, scale_rule=rule)


def test_e8m0_codes_equal_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert want[0] == 2.0**-127
    got = np.asarray(e8m0_scales(jnp.asarray(codes)))
    assert_array_equal(got, want)
    back = np.asarray(e8m0_codes(jnp.asarray(got)))
    assert back.dtype == np.uint8
    assert_array_equal(back, codes)


@EVERY_MX
def test_every_scale_survives_storage(format):
    largest = np.exp2(np.random.default_rng(2).uniform(-120, 120, 256)).astype(np.float32)
    scales = scales_of(largest, format)
    assert_array_equal(e8m0_scales(e8m0_codes(scales)), scales)
