"""Minifloats against ``ml_dtypes`` and against float64 models that share nothing with them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from quantjax.formats import divide_by_scale
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
    Overflow,
    Specials,
    minifloat,
)
from quantjax.rounding import CEIL, FLOOR, HALF_AWAY, HALF_EVEN, STOCHASTIC
from tests.oracles import minifloats as oracle
from tests.oracles.minifloats import Minifloat

PEERS = {
    "float4_e2m1fn": E2M1,
    "float6_e2m3fn": E2M3,
    "float6_e3m2fn": E3M2,
    "float8_e3m4": E3M4,
    "float8_e4m3": E4M3,
    "float8_e4m3fn": E4M3FN,
    "float8_e4m3fnuz": E4M3FNUZ,
    "float8_e5m2": E5M2,
    "float8_e5m2fnuz": E5M2FNUZ,
    "bfloat16": BFLOAT16,
    "float16": FLOAT16,
}
PEER = pytest.mark.parametrize("peer", PEERS)
SMALL = pytest.mark.parametrize("peer", [name for name in PEERS if name != "bfloat16"])
KINDS = {
    "ieee": Specials.IEEE,
    "fn": Specials.FN,
    "fnuz": Specials.FNUZ,
    "finite": Specials.FINITE,
}
KIND = pytest.mark.parametrize("kind", KINDS)
ZERO = jnp.float32(0.0)
TINY = float(np.finfo(np.float32).tiny)


def peer_dtype(name):
    return np.dtype(name) if name == "float16" else np.dtype(getattr(ml_dtypes, name))


def family_of(format):
    kind = next(kind for kind, specials in KINDS.items() if specials is format.specials)
    return Minifloat(format.exponent_bits, format.mantissa_bits, kind)


def with_overflow(format, overflow):
    return minifloat(
        format.exponent_bits, format.mantissa_bits, specials=format.specials, overflow=overflow
    )


@functools.partial(jax.jit, static_argnums=0)
def snapped(format, x, bits):
    return format.snap(x, ZERO, bits, HALF_EVEN).level


@functools.partial(jax.jit, static_argnums=0)
def encoded(format, levels):
    return format.encode(levels, jnp.float32(format.max_bits))


@functools.partial(jax.jit, static_argnums=0)
def decoded(format, codes):
    return format.decode(codes, jnp.float32(format.max_bits))


def all_codes(format):
    return np.arange(2**format.max_bits, dtype=format.storage_dtype)


def quiet(values, dtype):
    """NumPy's cast, which warns where it gives infinity."""
    with np.errstate(all="ignore"):
        return values.astype(dtype)


@functools.cache
def reals(lowest, highest, count=1_000_000):
    """Log-uniform magnitudes of both signs, a quarter of them on a coarse grid of ties."""
    rng = np.random.default_rng(0)
    size = np.exp2(rng.uniform(lowest, highest, count)).astype(np.float32)
    size[::4] = (size[::4].view(np.int32) & ~0x1FFF).view(np.float32)
    x = np.where(rng.random(count) < 0.5, size, -size)
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(np.float32).max, TINY]
    x[: len(edges)] = edges
    return x


def reals_of(format):
    """Reals from below the smallest number to beyond the highest."""
    family = family_of(format)
    low = 1 - family.bias - family.mantissa - 2
    high = 2**family.exponent - family.bias + 1
    return reals(max(low, -126), min(high, 127.999))


@PEER
def test_every_pattern_stands_for_the_same_number(peer):
    format = PEERS[peer]
    codes = all_codes(format)
    want = codes.view(peer_dtype(peer))
    got = np.asarray(decoded(format, codes))
    assert got.dtype == np.float32
    # As bits: NaN aside, signs of zero and bfloat16's subnormals count.
    number = ~np.isnan(want.astype(np.float32))
    assert_array_equal(np.isnan(got), ~number)
    assert_array_equal(got.view(np.int32)[number], want.astype(np.float32).view(np.int32)[number])


@SMALL
def test_the_model_reads_the_same_patterns(peer):
    format = PEERS[peer]
    want = np.float32(oracle.numbers(family_of(format)))
    assert_array_equal(decoded(format, all_codes(format)), want)


@PEER
def test_every_number_keeps_its_pattern(peer):
    format = PEERS[peer]
    codes = all_codes(format)
    numbers = decoded(format, codes)
    back = np.asarray(encoded(format, numbers))
    assert back.dtype == format.storage_dtype
    is_number = ~np.isnan(np.asarray(numbers))
    assert_array_equal(back[is_number], codes[is_number])
    assert np.all(np.isnan(np.asarray(decoded(format, back))) == ~is_number)
    # Where -0 is no number, its pattern is that of 0 and not of NaN.
    zeros = np.full(codes.shape, -0.0, np.float32)
    assert_array_equal(encoded(format, zeros), zeros.astype(peer_dtype(peer)).view(codes.dtype))


@PEER
def test_reals_become_what_a_cast_makes_of_them(peer):
    format = PEERS[peer]
    dtype = peer_dtype(peer)
    x = reals_of(format)
    cast = quiet(x, dtype)
    finite = format.specials is Specials.FINITE
    if finite:  # has no special, and ml_dtypes saturates
        x, cast = x[~np.isnan(x)], cast[~np.isnan(x)]
    overflow = Overflow.SATURATE if finite else Overflow.SPECIAL
    got = np.asarray(snapped(with_overflow(format, overflow), x, jnp.float32(format.max_bits)))
    assert_array_equal(got, cast.astype(np.float32))
    codes = np.asarray(encoded(format, got))
    if not finite:
        assert np.isnan(got).any()
    signed = ~(np.isnan(got) & np.signbit(x))  # which sign NaN has is nobody's promise
    assert_array_equal(codes[signed], cast.view(codes.dtype)[signed])


@PEER
def test_saturation_is_the_cast_of_what_is_clipped(peer):
    format = PEERS[peer]
    x = reals_of(format)
    limit = np.float32(ml_dtypes.finfo(peer_dtype(peer)).max)
    got = np.asarray(snapped(format, x, jnp.float32(format.max_bits)))
    want = quiet(np.clip(x, -limit, limit), peer_dtype(peer)).astype(np.float32)
    number = ~np.isnan(x)
    assert_array_equal(got[number], want[number])
    assert np.isnan(got[~number]).all()
    assert np.nanmax(got) == limit


@SMALL
def test_reals_become_the_nearest_number(peer):
    format = PEERS[peer]
    x = reals_of(format)
    got = np.asarray(snapped(format, x, jnp.float32(format.max_bits)))[:200_000]
    x = x[: len(got)]
    finite = np.isfinite(x)
    assert_array_equal(got[finite], np.float32(oracle.nearest(x[finite], family_of(format))))


@PEER
def test_ties_go_to_the_even_mantissa(peer):
    format = PEERS[peer]
    half = np.asarray(decoded(format, all_codes(format)[: 2 ** (format.max_bits - 1)]))
    half = np.float64(half[np.isfinite(half) & ((half == 0) | (half >= 2 * TINY))])
    ties = (half[1:] + half[:-1]) / 2
    assert_array_equal(ties, np.float32(ties))  # exact in float32
    even = np.where(np.asarray(encoded(format, np.float32(half))) % 2 == 0, half, 0)
    want = np.where(even[1:] > 0, half[1:], half[:-1])
    if peer == "bfloat16":  # 0 and 2^-125, the first that is no neighbour of it
        ties, want = ties[1:], want[1:]
    got = snapped(format, np.float32(ties), jnp.float32(format.max_bits))
    assert_array_equal(got, want)


def grid_of(kind):
    """Every exponent and mantissa of at most 16 bits that there are."""
    exponents = range(2, 9) if kind == "ieee" else range(1, 8)
    grid = itertools.product(exponents, (0, 1, 2, 3, 5, 10))
    fits = [(e, m) for e, m in grid if e + m <= 15]
    return [(e, m) for e, m in fits if (kind, e, m) != ("fn", 1, 0)]


@functools.cache
def rows(kind, count=400):
    """For each width a row of reals around its range, on a grid that is full of ties."""
    rng = np.random.default_rng(1)
    out = []
    for e, m in grid_of(kind):
        family = Minifloat(e, m, kind)
        low = max(1 - family.bias - m - 2, -125)
        exponents = rng.integers(low, min(2**e - family.bias + 2, 128), count)
        size = np.ldexp(rng.integers(2 ** (m + 2), 2 ** (m + 3), count), exponents - m - 2)
        row = np.where(rng.random(count) < 0.5, size, -size).astype(np.float32)
        row[:6] = [0.0, np.inf, -np.inf, np.nan, np.finfo(np.float32).max, 1.5]
        out.append(row)
    noise = rng.random((len(out), count)).astype(np.float32)
    return np.stack(out), noise


def widths(kind):
    e, m = np.float32(grid_of(kind)).T
    return FloatBits(e, m)


def container(kind):
    return minifloat(5, 10, specials=KINDS[kind])


RULES = {
    "half_even": (HALF_EVEN, lambda noise: np.rint),
    "half_away": (HALF_AWAY, lambda noise: oracle.half_away),
    "floor": (FLOOR, lambda noise: np.floor),
    "ceil": (CEIL, lambda noise: np.ceil),
    "stochastic": (STOCHASTIC, oracle.stochastic),
}


@pytest.mark.thinned(3)
@KIND
@pytest.mark.parametrize("rule", RULES)
def test_every_width_and_rounding_equals_the_model(kind, rule):
    x, noise = rows(kind)
    rounding, model = RULES[rule]
    overflows = [Overflow.SATURATE] + ([] if kind == "finite" else [Overflow.SPECIAL])

    @jax.jit
    @jax.vmap
    def traced(x, width, noise):
        formats = [with_overflow(container(kind), overflow) for overflow in overflows]
        given = rounding.given(noise)
        return [format.snap(x, ZERO, width.bits, given, width.theta).level for format in formats]

    for overflow, got in zip(overflows, traced(x, widths(kind), noise), strict=True):
        saturate = overflow is Overflow.SATURATE
        for row, (e, m) in enumerate(grid_of(kind)):
            family = Minifloat(e, m, kind)
            want = oracle.snap(x[row], family, model(noise[row]), saturate=saturate)
            assert_array_equal(got[row], np.float32(want), err_msg=str(family))


def narrow(kind):
    """Every exponent and mantissa of at most 8 bits in all."""
    exponents = range(2, 9) if kind == "ieee" else range(1, 8)
    fewest = {"ieee": lambda e: 1, "fn": lambda e: int(e == 1)}.get(kind, lambda e: 0)
    return [(e, m) for e in exponents for m in range(fewest(e), 8 - e)]


@KIND
@pytest.mark.parametrize("width", ["traced", "static"])
def test_every_pattern_of_every_format_of_at_most_8_bits_returns(kind, width):
    codes = np.arange(256, dtype=np.uint16)

    def there_and_back(format, bits, theta):
        numbers = format.decode(codes.astype(format.storage_dtype), bits, theta)
        level = format.snap(numbers, ZERO, bits, HALF_EVEN, theta).level
        return numbers, level, format.encode(numbers, bits, theta)

    traced = jax.jit(lambda width: there_and_back(container(kind), width.bits, width.theta))
    assert len(narrow(kind)) == {"ieee": 15, "fn": 27, "fnuz": 28, "finite": 28}[kind]
    for e, m in narrow(kind):
        bits = jnp.float32(1 + e + m)
        if width == "traced":
            got = traced(FloatBits(jnp.float32(e), jnp.float32(m)))
        else:
            got = there_and_back(minifloat(e, m, specials=KINDS[kind]), bits, ())
        # Patterns beyond the width are there for the sake of one shape.
        numbers, level, back = (np.asarray(part)[: 2 ** (1 + e + m)] for part in got)
        want = np.float32(oracle.numbers(Minifloat(e, m, kind)))
        number = ~np.isnan(want)
        assert_array_equal(np.isnan(numbers), ~number)
        assert_array_equal(numbers.view(np.int32)[number], want.view(np.int32)[number])
        assert_array_equal(back[number], codes[: len(back)][number], err_msg=f"e{e}m{m}")
        assert np.isnan(want[back[~number]]).all()
        finite = np.isfinite(want)
        assert_array_equal(level[finite], want[finite])


@KIND
def test_traced_widths_equal_static_ones_in_one_compilation(kind):
    x, _ = rows(kind)
    traces = []

    @jax.jit
    def traced(x, width):
        traces.append(None)
        format = container(kind)
        low, high = format.level_range(width.bits, width.theta)
        unit = format.unit(width.bits, width.theta)
        level, unclipped = format.snap(x, ZERO, width.bits, HALF_EVEN, width.theta)
        codes = format.encode(level, width.bits, width.theta)
        back = format.decode(codes, width.bits, width.theta)
        return (low, high, unit), (level, unclipped, back), codes

    batched = jax.vmap(traced)(x, widths(kind))
    for row, (e, m) in enumerate(grid_of(kind)):
        width = FloatBits(jnp.float32(e), jnp.float32(m))
        scalars, reals, codes = got = traced(x[row], width)
        jax.tree.map(lambda a, b, row=row: assert_array_equal(a, b[row]), got, batched)
        if kind == "ieee" and m == 0:
            continue  # has no container of its own: NaN needs a mantissa
        format = minifloat(e, m, specials=KINDS[kind])
        bits = jnp.float32(1 + e + m)
        assert scalars[1] == oracle.top(Minifloat(e, m, kind))
        assert_array_equal(scalars[:2], format.level_range(bits))
        assert scalars[2] == format.unit(bits)
        static = format.snap(x[row], ZERO, bits, HALF_EVEN)
        assert_array_equal(reals[0].view(jnp.int32), static.level.view(jnp.int32))
        assert_array_equal(reals[1], static.unclipped)
        number = ~np.isnan(x[row])
        assert_array_equal(reals[0][number], reals[2][number])
        assert_array_equal(codes, format.encode(static.level, bits).astype(codes.dtype))
    assert len(traces) == 1


@KIND
def test_a_narrower_mantissa_equals_the_format_of_that_width(kind):
    x, _ = rows(kind)
    e = 4
    wide = minifloat(e, 10, specials=KINDS[kind])
    grid = [(row, m) for row, (f, m) in enumerate(grid_of(kind)) if f == e]
    for row, m in grid:
        bits = jnp.float32(1 + e + m)
        got = np.asarray(snapped(wide, x[row], bits))
        want = oracle.snap(x[row], Minifloat(e, m, kind))
        assert_array_equal(got, np.float32(want))
        # Stored as the container's own patterns, so that the width has no part in decoding.
        number = ~np.isnan(got)
        codes = wide.encode(got, bits)
        assert_array_equal(codes, encoded(wide, got))
        assert_array_equal(np.asarray(decoded(wide, codes))[number], got[number])


@pytest.mark.parametrize("scale", [0.5, 2.0**-100, 2.0**-120])
@pytest.mark.parametrize("format", [BFLOAT16, E5M2], ids=lambda format: format.name)
def test_tiny_values_by_a_small_scale_are_no_nan(format, scale):
    # (x / scale) / binade would be one division by their product, which is 0 in float32.
    def levels(x, scale):
        return format.snap(
            divide_by_scale(x, scale), ZERO, jnp.float32(format.max_bits), HALF_EVEN
        ).level

    # Subnormals at the end; CPU flushes them.
    x = np.float32([0.0, -0.0, 2.0**-126, -(2.0**-126), 2.0**-124, 1.5 * 2.0**-120, 1e-40, -1e-45])
    want = np.float32(oracle.snap(np.where(np.abs(x) < TINY, 0.0, x) / scale, family_of(format)))
    baked = np.float32(scale)
    for got in (
        jax.jit(levels)(x, jnp.float32(scale)),
        jax.jit(levels)(x, jnp.full(8, scale, jnp.float32)),
        jax.jit(lambda x: levels(x, baked))(x),
        jax.jit(
            lambda x: format.snap(x / baked, ZERO, jnp.float32(format.max_bits), HALF_EVEN).level
        )(x),
        jax.jit(lambda scale: levels(x, scale))(jnp.float32(scale)),
        levels(x, jnp.float32(scale)),
    ):
        assert_array_equal(got, want)
