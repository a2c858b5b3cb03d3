"""Logarithmic formats: LogNet's and INQ's rules, codes, laws, roundings."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import errors
from quantjax.affine import QParams, qparams_from_range
from quantjax.arithmetic import Arithmetic
from quantjax.formats import logarithmic
from quantjax.formats.base import Law
from quantjax.formats.logarithmic import LogFormat, Magnitudes, Nearest, inq, lognet
from quantjax.formats.scales import INQ_SCALE, POWER_OF_TWO_NEAREST, REAL
from quantjax.rounding import CEIL, FLOOR, HALF_AWAY, HALF_EVEN, STOCHASTIC
from quantjax.simulation import apply
from tests.oracles import logarithms as oracle
from tests.oracles.logarithms import FAMILIES, Logarithms

pytestmark = pytest.mark.thinned(2)

ZERO = jnp.float32(0)
EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: container(f).name)

# How many magnitudes there are decides nothing but where they end.
FULL = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not f.half], ids=lambda f: container(f).name
)


def container(family: Logarithms, max_bits: int = 8) -> LogFormat:
    """The format of a family; its width is of no concern."""
    return LogFormat(
        max_bits=max_bits,
        signed=family.signed,
        per_octave=family.per_octave,
        nearest=Nearest.LINEAR if family.linear else Nearest.LOGARITHMIC,
        magnitudes=Magnitudes.HALF if family.half else Magnitudes.ALL,
    )


def widths(family: Logarithms) -> range:
    return range(2 if family.signed else 1, 9)


@functools.cache
def snapping(format: LogFormat, rounding):
    """One program for all widths."""
    return jax.jit(lambda x, bits: format.snap(x, ZERO, bits, rounding))


def snap(format: LogFormat, x, bits, rounding=HALF_EVEN) -> np.ndarray:
    return np.asarray(snapping(format, rounding)(jnp.asarray(x, jnp.float32), jnp.float32(bits))[0])


@functools.cache
def program(format: LogFormat, rounding=HALF_EVEN):
    """``fake_quant`` of a tensor, one program for all widths."""

    def run(x, scale, bits):
        return apply(x, QParams(scale, jnp.zeros_like(scale), bits), Arithmetic(format, rounding))

    return jax.jit(run)


def padded(x: np.ndarray) -> np.ndarray:
    """One shape for all widths."""
    return np.resize(x, 8192)


def test_borders_are_those_of_exact_arithmetic():
    # The largest float32 below 2^(p/q): its q-th power is below 2^p, its successor's is not.
    borders = {
        (1, 2): logarithmic.ROOT,
        (1, 4): logarithmic.FOURTH_ROOT,
        (3, 4): logarithmic.FOURTH_ROOT_CUBED,
    }
    for (p, q), border in borders.items():
        above = float(np.nextafter(np.float32(border), np.float32(2)))
        assert float(np.float32(border)) == border
        assert Fraction(border) ** q < 2**p < Fraction(above) ** q
    assert float(np.float32(np.sqrt(2))) == logarithmic.ROOT


@EACH
@pytest.mark.parametrize("rounding", [HALF_EVEN, HALF_AWAY], ids=lambda r: r.name)
def test_snap_is_the_float64_model(family, rounding):
    if rounding is HALF_AWAY and not family.linear:
        return  # no float32 lies on a border
    for bits in widths(family):
        at = family._replace(bits=bits)
        x = padded(oracle.values(at))
        want = oracle.snap(x, at, away=rounding is HALF_AWAY)
        assert_array_equal(snap(container(family), x, bits, rounding), np.float32(want))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("per_octave", [1, 2])
def test_lognet_is_the_papers_equation(signed, per_octave):
    format = lognet(max_bits=4, signed=signed, per_octave=per_octave)
    x = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    x[:3] = [0.0, 1e-20, -1e-20]
    for bits in (2, 3, 4):
        lowest = -(2 ** (bits - signed) - 2)
        exponent = np.clip(
            np.rint(per_octave * np.log2(np.abs(x[1:], dtype=np.float64))), lowest, 0
        )
        want = np.sign(x[1:]) * 2.0 ** (exponent / per_octave)
        want = want if signed else np.maximum(want, 0)
        got = snap(format, x, bits)
        assert_allclose(got[1:], want, rtol=1e-7)
        assert got[0] == 0
        assert abs(got[1]) == np.float32(2.0 ** (lowest / per_octave))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("largest", [1.0, 1.4999999, 1.5, 0.75, 0.7499999, 3.1e-5, 700.0])
def test_inq_is_the_papers_rule_by_the_letter(bits, largest):
    format = inq()
    generator = np.random.default_rng(bits)
    weights = generator.laplace(size=300).astype(np.float32)
    # Every border of the rule, and the numbers next to it.
    borders = np.float32([c * 2.0**k for k in range(-9, 2) for c in (0.5, 0.75, 1.0)])
    steps = [np.nextafter(borders, np.float32(0)), np.nextafter(borders, np.float32(9))]
    weights = np.clip(weights / np.abs(weights).max(), -1, 1) * np.float32(largest)
    power = np.float32(2.0 ** np.floor(np.log2(largest)))
    extra = np.concatenate([borders, *steps]) * power
    weights = np.concatenate([weights, extra[extra <= np.float32(largest)]])
    weights = np.concatenate([weights, -weights, np.float32([largest])])
    weights = np.resize(weights, 1000)
    top = jnp.abs(jnp.asarray(weights)).max(keepdims=True)
    qparams = qparams_from_range(
        -top, top, jnp.float32(bits), format=format, symmetric=True, calibrated=jnp.bool_(True)
    )
    got = np.asarray(program(format, HALF_AWAY)(weights, *qparams[:3:2]))
    assert_array_equal(got, np.float32(oracle.inq(weights, bits)))
    # Half to even differs at the lower bounds alone, (α + β) / 2.
    even = np.asarray(program(format)(weights, *qparams[:3:2]))
    ties = np.frexp(np.abs(weights[even != got]))[0]
    assert set(ties.tolist()) <= {0.75, 0.5}


def test_lognets_scale_is_what_the_largest_magnitude_rounds_to():
    for largest in (0.7, 0.71, 1.0, 1.41, 1.42, 5.0):
        reach = jnp.full((1,), largest)
        qparams = qparams_from_range(
            -reach, reach, jnp.float32(4), format=lognet(), symmetric=True, calibrated=jnp.bool_(1)
        )
        want = 2.0 ** np.rint(np.log2(np.float64(np.float32(largest))))
        assert float(qparams.scale[0]) == want
        assert float(apply(reach, qparams, Arithmetic(lognet()))[0]) == want


@EACH
@pytest.mark.parametrize("max_bits", [3, 4, 8])
def test_every_code_is_what_its_level_encodes_to(family, max_bits):
    format, bits = container(family, max_bits), jnp.float32(max_bits)
    codes = jnp.arange(2**max_bits, dtype=jnp.uint8)
    decoded = format.decode(codes, bits)
    known = ~np.isnan(decoded)
    assert_array_equal(np.asarray(format.encode(decoded, bits))[known], np.asarray(codes)[known])
    assert format.storage_dtype == jnp.uint8
    assert 2**format.code_bits >= 2**max_bits
    # Only magnitudes below the normal numbers have no level.
    magnitudes = np.asarray(codes, np.int64) % 2 ** (max_bits - family.signed)
    assert_array_equal(known, magnitudes <= 126 * family.per_octave + 1)


@EACH
def test_levels_of_each_width_and_their_codes(family):
    format = container(family)
    for bits in widths(family):
        at = family._replace(bits=bits)
        levels = oracle.levels(at)
        held = np.resize(levels, 600)
        assert_array_equal(snap(format, held, bits), held)
        codes = format.encode(jnp.asarray(held, jnp.float32), jnp.float32(bits))
        assert len(set(codes.tolist())) == len(levels)
        # A code means the same at every width.
        assert_array_equal(format.decode(codes, jnp.float32(8)), held)
        assert len(levels) - 1 == oracle.count(at) * (2 if family.signed else 1)
        low, high = format.level_range(jnp.float32(bits))
        assert (float(low), float(high)) == (levels[0], levels[-1])
        assert float(format.steps(jnp.float32(bits), symmetric=True)) == 1


def test_codes_by_hand():
    levels = jnp.array([0.0, 1.0, 0.5, 2.0**-6, -1.0, -(2.0**-6)])
    assert lognet().encode(levels, jnp.float32(4)).tolist() == [0, 1, 2, 7, 9, 15]
    assert lognet(signed=False).encode(levels[:4], jnp.float32(4)).tolist() == [0, 1, 2, 7]
    root = lognet(per_octave=2).encode(jnp.array([1.0, 0.70710678, -0.5]), jnp.float32(4))
    assert root.tolist() == [1, 2, 11]
    # An ulp off is the same level.
    near = jnp.nextafter(levels, 2.0 * levels)
    assert_array_equal(lognet().encode(near, ZERO)[1:], lognet().encode(levels, ZERO)[1:])
    assert lognet().encode(jnp.array([jnp.nan, -jnp.nan]), ZERO).tolist() == [0, 0]
    minus = lognet().decode(jnp.uint8([8]), ZERO)
    assert minus[0] == 0
    assert np.signbit(minus)[0]


@EACH
@settings(max_examples=20)
@given(
    x=npst.arrays(np.float32, 24, elements=st.floats(-4, 4, width=32)),
    bits=st.integers(2, 8),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    exponent=st.integers(-20, 20),
)
def test_laws(family, x, bits, scale, exponent):
    format = container(family)
    # Products of scale and level stay normal.
    bits = min(bits, 5)
    x = np.where(np.abs(x) < 2.0**-60, np.float32(0), x) * np.float32(scale)

    def simulate(x, scale):
        return np.asarray(program(format)(x, np.float32(scale), np.float32(bits)))

    y = simulate(x, scale)
    assert_array_equal(simulate(y, scale), y)
    order = np.argsort(x)
    assert (np.diff(y[order]) >= 0).all()
    assert (y[x == 0] == 0).all()
    factor = np.float32(2.0**exponent)
    assert_array_equal(simulate(x * factor, scale * factor), y * factor)
    if family.signed:
        assert_array_equal(simulate(-x, scale), -y)
    if Law.NEAREST in format.laws:
        levels = np.float64(oracle.levels(family._replace(bits=bits))) * np.float64(
            np.float32(scale)
        )
        best = np.abs(np.float64(x)[:, None] - levels).min(1)
        assert (np.abs(np.float64(x) - y) <= best * (1 + 1e-6) + 1e-6 * np.abs(x)).all()


def test_laws_that_are_not_declared_have_counterexamples():
    assert Law.NEAREST not in lognet().laws
    assert snap(lognet(), [1.45 / 2], 4) == 1.0  # 0.5 is nearer
    assert Law.NEAREST in inq().laws
    assert snap(inq(), [1.45 / 2], 4) == 0.5
    assert Law.ODD in lognet().laws
    assert Law.ODD not in lognet(signed=False).laws
    assert snap(lognet(signed=False), [-1.0], 4) == 0.0
    assert Law.INTEGER not in lognet().laws | inq().laws


@FULL
def test_traced_widths_are_static_widths(family):
    format = container(family)
    x = jnp.asarray(np.random.default_rng(2).normal(size=64).astype(np.float32))
    at = jnp.array([float(bits) for bits in widths(family)])
    many = jax.jit(jax.vmap(lambda bits: format.snap(x, ZERO, bits, HALF_EVEN)))(at)
    mixed = jnp.tile(at, 64 // len(at) + 1)[:64]
    together = format.snap(x, ZERO, mixed, HALF_EVEN)
    assert format.is_elementwise(())
    for i, bits in list(enumerate(widths(family)))[::3]:
        eager = format.snap(x, ZERO, jnp.float32(bits), HALF_EVEN)
        for got, want in zip(many, eager, strict=True):
            assert_array_equal(got[i], want)
        assert_array_equal(eager.level, snap(format, x, bits))
        assert_array_equal(together.level[mixed == bits], eager.level[mixed == bits])


@FULL
def test_floor_and_ceil_are_the_neighbours(family):
    format = container(family)
    for bits in (3, 6):
        at = family._replace(bits=bits)
        levels = oracle.levels(at)
        x = padded(oracle.values(at))
        inside = np.clip(x, levels[0], levels[-1])
        below = levels[np.searchsorted(levels, inside, side="right") - 1]
        above = levels[np.searchsorted(levels, inside, side="left")]
        assert_array_equal(snap(format, x, bits, FLOOR), below)
        assert_array_equal(snap(format, x, bits, CEIL), above)


def stochastic(
    format: LogFormat, value: float, bits: float = 4.0, size: int = 40_000
) -> np.ndarray:
    noise = STOCHASTIC.noise(jax.random.key(3), (size,))
    x = jnp.full(size, value, jnp.float32)
    return np.asarray(format.snap(x, ZERO, jnp.float32(bits), STOCHASTIC.given(noise)).level)


@pytest.mark.parametrize("value", [0.8, -0.55, 0.3, -0.01, 0.002, 1.0, 0.0])
@pytest.mark.parametrize("per_octave", [1, 2])
def test_linear_stochastic_rounding_is_unbiased(value, per_octave):
    format = LogFormat(max_bits=4, nearest=Nearest.LINEAR, per_octave=per_octave)
    got = stochastic(format, value)
    assert len(np.unique(got)) <= 2
    assert abs(got.mean() - value) < 4 * got.std() / np.sqrt(len(got)) + 1e-7


@pytest.mark.parametrize("value", [0.8, -0.55, 0.3, -0.04])
@pytest.mark.parametrize("per_octave", [1, 2])
def test_logarithmic_stochastic_rounding_is_unbiased_in_exponent(value, per_octave):
    got = stochastic(lognet(per_octave=per_octave), value, bits=4.0)
    exponents = np.log2(np.abs(got), dtype=np.float64)
    want = max(np.log2(abs(value)), -6 / per_octave)
    assert (np.sign(got) == np.sign(value)).all()
    assert abs(exponents.mean() - want) < 4 * exponents.std() / np.sqrt(len(got)) + 1e-6


def test_zero_is_infinitely_far_on_a_logarithmic_scale():
    assert (stochastic(lognet(), 1e-9) == 2.0**-6).all()
    assert (stochastic(lognet(), 0.0) == 0).all()
    assert snap(lognet(), [1e-9, -1e-9], 4, FLOOR).tolist() == [0.0, -(2.0**-6)]
    assert snap(lognet(), [1e-9, -1e-9], 4, CEIL).tolist() == [2.0**-6, 0.0]


def test_the_level_before_clipping():
    x = jnp.array([1.0, 1.4, 1.5, 5.0, -6.0, 0.001, jnp.inf])
    level, unclipped = lognet().snap(x, ZERO, jnp.float32(4), HALF_EVEN)
    assert level.tolist() == [1, 1, 1, 1, -1, 2.0**-6, 1]
    assert unclipped.tolist() == [1, 1, 2, 4, -8, 2.0**-6, 2.0**127]
    level, unclipped = lognet(signed=False).snap(-x, ZERO, jnp.float32(4), HALF_EVEN)
    assert level.tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert (unclipped < 0).tolist() == [True] * 4 + [False] + [True] * 2


def test_special_values():
    tiny = np.float32(2.0**-130)
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0, tiny, -tiny, 2.0**-126])
    for rounding in (HALF_EVEN, HALF_AWAY, FLOOR, CEIL):
        got = snap(lognet(), x, 4, rounding)
        assert_array_equal(got[:7], [np.nan, 1, -1, 0, 0, 0, 0])
    assert snap(lognet(), x, 4)[7] == 2.0**-6
    assert not np.signbit(snap(lognet(), x, 4)[3:7]).any()
    # Levels that are no normal numbers are left out.
    unsigned = lognet(max_bits=8, signed=False)
    assert snap(unsigned, [2.0**-126, 1e-30], 8).tolist() == [2.0**-126, 2.0**-100]
    assert inq().snap(jnp.zeros((0, 3)), ZERO, ZERO, HALF_EVEN).level.shape == (0, 3)


def test_valid_widths():
    at = jnp.arange(-1, 10, dtype=jnp.float32)
    assert_array_equal(lognet().valid_bits(at), (at == 0) | ((at >= 2) & (at <= 4)))
    assert_array_equal(lognet(signed=False).valid_bits(at), (at >= 0) & (at <= 4))
    assert not inq().valid_bits(jnp.array([2.5, jnp.nan])).any()


@pytest.mark.parametrize(
    "asked",
    [
        {"max_bits": 9},
        {"max_bits": 1},
        {"max_bits": 0, "signed": False},
        {"per_octave": 3},
        {"per_octave": 0},
    ],
)
def test_containers_that_cannot_exist(asked):
    with pytest.raises(errors.FormatError) as caught:
        lognet(**asked)
    # The suggested edit works.
    lognet(**(asked | eval(f"dict({caught.value.fix})")))


def test_formats_are_values():
    assert inq() == inq()
    assert hash(lognet()) == hash(lognet())
    assert len({container(family) for family in FAMILIES}) == 16
    assert len({container(family).name for family in FAMILIES}) == 16
    assert inq().name == "log-linear-half-inq"
    assert lognet(signed=False, per_octave=2, scale_rule=REAL).label(3) == "ulog3-sqrt2"
    assert inq().scale_rule == INQ_SCALE
    assert lognet().scale_rule == POWER_OF_TWO_NEAREST
    assert inq().largest_centered_code(symmetric=True) is None
    assert not lognet().has_zero_point
