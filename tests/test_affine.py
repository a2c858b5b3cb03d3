"""Scale and zero point of a range, against NumPy; what happens where there is none."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_array_equal

from quantjax import Fault, QParams, fake_quant, integer
from quantjax.affine import (
    DIVIDED,
    RECIPROCAL,
    RECIPROCAL_ADDED,
    SMALLEST_SCALE,
    is_bypassed,
    qparams_from_range,
)
from quantjax.formats import divide_by_scale
from tests.oracles import affine as oracle
from tests.oracles.integers import Integers, bounds

CHANNELS = 12
FAMILIES = tuple(itertools.product((True, False), (False, True)))
families = st.builds(Integers, bits=st.integers(1, 16), signed=st.booleans(), narrow=st.booleans())
MAGNITUDES = st.floats(2.0**-100, 2.0**120, width=32)
ENDS = st.one_of(MAGNITUDES, MAGNITUDES.map(lambda x: -x), st.just(0.0), st.floats(-4, 4, width=16))


def parameters(
    low, high, family: Integers, *, symmetric: bool, bits=None, calibrated=True
) -> QParams:
    return qparams_from_range(
        jnp.asarray(low, jnp.float32),
        jnp.asarray(high, jnp.float32),
        jnp.float32(family.bits) if bits is None else bits,
        format=integer(max_bits=16, signed=family.signed, narrow=family.narrow),
        symmetric=symmetric,
        calibrated=jnp.asarray(calibrated),
    )


def ordered(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ends.min(0), ends.max(0)


ranges = npst.arrays(np.float32, (2, CHANNELS), elements=ENDS.map(np.float32)).map(ordered)


@given(ranges, families, st.booleans())
def test_scale_and_zero_point_are_those_of_float32_arithmetic(ends, family, symmetric):
    got = parameters(*ends, family, symmetric=symmetric)
    want = oracle.float32_parameters(*ends, family, symmetric=symmetric)
    assert got.scale.dtype == got.zero_point.dtype == got.bits.dtype == jnp.float32
    assert_array_equal(got.scale, want.scale)
    assert_array_equal(got.zero_point, want.zero_point)
    assert got.bits == family.bits


@given(ranges, families, st.booleans())
def test_the_scale_is_within_one_ulp_of_the_exact_quotient(ends, family, symmetric):
    got = np.asarray(parameters(*ends, family, symmetric=symmetric).scale)
    exact = oracle.exact_scale(*ends, family, symmetric=symmetric)
    used = exact > 0
    error = np.abs(got[used] - exact[used])
    assert (error <= np.spacing(np.float32(exact[used]))).all()
    empty = oracle.empty_scale(family) if symmetric else 1.0
    assert (got[~used] == np.float32(empty)).all()


@given(ranges, families)
def test_an_asymmetric_zero_point_is_a_code_and_stands_for_zero(ends, family):
    if family == Integers(1, True, family.narrow):
        family = family._replace(bits=2)  # one signed bit has no code 0, so no middle either
    qparams = parameters(*ends, family, symmetric=False)
    low, high = bounds(family)
    zero_point = np.asarray(qparams.zero_point)
    assert ((zero_point >= low) & (zero_point <= high)).all()
    assert (zero_point == np.rint(zero_point)).all()
    options = family._asdict()
    zeros = fake_quant(jnp.zeros(CHANNELS), *qparams[:2], **options)
    assert_array_equal(zeros, np.zeros(CHANNELS))


@given(ranges, families)
def test_an_asymmetric_grid_covers_the_range_to_half_a_step(ends, family):
    qparams = parameters(*ends, family, symmetric=False)
    low, high = bounds(family)
    scale, zero_point = np.float64(qparams.scale), np.float64(qparams.zero_point)
    slack = 0.5001 * scale
    assert (scale * (low - zero_point) <= np.minimum(ends[0], 0) + slack).all()
    assert (scale * (high - zero_point) >= np.maximum(ends[1], 0) - slack).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("signed", "narrow"), FAMILIES)
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_huge_ranges_stay_finite(bits, signed, narrow, symmetric):
    family = Integers(bits, signed, narrow)
    low = np.array([-3e38, 0, -3.4e38, -1.0, -3e38], np.float32)
    high = np.array([3e38, 3.4e38, 0, 3e38, 1e-30], np.float32)
    got = parameters(low, high, family, symmetric=symmetric)
    want = oracle.float32_parameters(low, high, family, symmetric=symmetric)
    assert_array_equal(got.scale, want.scale)
    assert_array_equal(got.zero_point, want.zero_point)
    exact = oracle.exact_scale(low, high, family, symmetric=symmetric)
    # One step of the largest span has no float32 number, and no level lies beyond all numbers.
    bottom, top = oracle.bounds(family)
    reach = np.maximum(np.abs(bottom - got.zero_point), np.abs(top - got.zero_point))
    assert (reach * np.float64(got.scale) <= oracle.LARGEST).all()
    whole = np.minimum(exact, oracle.LARGEST)
    some = reach * np.float64(whole) <= np.float64(oracle.LARGEST)
    np.testing.assert_allclose(got.scale[some], whole[some], rtol=3e-7)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_tiny_ranges_have_a_normal_scale(symmetric, transform):
    # Ends in the normal numbers, steps below them.
    ends = np.array([1.2e-38, 1e-37, 1e-36, 2.9e-36, 3.1e-36, 1e-35], np.float32)

    def of(low, high):
        return parameters(low, high, Integers(8), symmetric=symmetric)[:2]

    scale, zero_point = transform(of)(-ends, ends)
    exact = oracle.exact_scale(-ends, ends, Integers(8), symmetric=symmetric)
    np.testing.assert_allclose(scale, np.maximum(exact, SMALLEST_SCALE), rtol=3e-7)
    assert np.finfo(np.float32).tiny == SMALLEST_SCALE
    low, high = scale * (-128 - zero_point), scale * (127 - zero_point)
    assert (low <= -ends + scale).all()
    assert (high >= ends - scale).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("end", [0.0, -0.0, 1e-40, 1e-45])
def test_an_empty_range_gives_zeros(end, symmetric):
    ends = np.full(3, end, np.float32)
    qparams = parameters(-ends, ends, Integers(8), symmetric=symmetric)
    assert np.isfinite(qparams.scale).all()
    if end == 0:
        assert (qparams.scale == 1).all()
    assert_array_equal(qparams.zero_point, np.full(3, 0 if symmetric else -128))
    assert_array_equal(fake_quant(jnp.zeros(3), *qparams[:2]), np.zeros(3))


def test_symmetric_ranges_use_the_larger_side():
    low, high = np.array([-2.0, -0.5, 0.5], np.float32), np.array([1.0, 4.0, 1.0], np.float32)
    steps = {(True, False): 128, (True, True): 127, (False, False): 255, (False, True): 255}
    for (signed, narrow), count in steps.items():
        qparams = parameters(low, high, Integers(8, signed, narrow), symmetric=True)
        assert_array_equal(qparams.scale, np.array([2, 4, 1], np.float32) / np.float32(count))
        assert_array_equal(qparams.zero_point, np.zeros(3))


NAN, INF = np.nan, np.inf
FAULTS = [
    ("nothing is wrong", (-1.0, 2.0, 8.0, True), Fault.NONE),
    ("never calibrated", (-1.0, 2.0, 8.0, False), Fault.NEVER_CALIBRATED),
    ("nothing seen", (INF, -INF, 8.0, False), Fault.NEVER_CALIBRATED),
    ("NaN low", (NAN, 2.0, 8.0, True), Fault.NOT_FINITE),
    ("NaN high", (-1.0, NAN, 8.0, True), Fault.NOT_FINITE),
    ("infinite low", (-INF, 2.0, 8.0, True), Fault.NOT_FINITE),
    ("infinite high", (-1.0, INF, 8.0, True), Fault.NOT_FINITE),
    ("bits above", (-1.0, 2.0, 9.0, True), Fault.BITS_OUTSIDE_FORMAT),
    ("bits below", (-1.0, 2.0, -1.0, True), Fault.BITS_OUTSIDE_FORMAT),
    ("bits between", (-1.0, 2.0, 2.5, True), Fault.BITS_OUTSIDE_FORMAT),
    ("bits NaN", (-1.0, 2.0, NAN, True), Fault.BITS_OUTSIDE_FORMAT),
    ("bits first", (NAN, 2.0, 9.0, False), Fault.BITS_OUTSIDE_FORMAT),
    ("bypass", (-1.0, 2.0, 0.0, True), Fault.NONE),
    ("bypass of nothing", (INF, -INF, 0.0, False), Fault.NONE),
    ("bypass of NaN", (NAN, NAN, 0.0, True), Fault.NONE),
]


@pytest.mark.parametrize(
    ("arguments", "fault"), [row[1:] for row in FAULTS], ids=[r[0] for r in FAULTS]
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_faults(arguments, fault, symmetric, transform):
    def of(low, high, bits, calibrated):
        return qparams_from_range(
            low, high, bits, format=integer(), symmetric=symmetric, calibrated=calibrated
        )

    low, high, bits, calibrated = arguments
    # A second channel, whose own range is fine.
    ends = jnp.array([[low], [-1.0]]), jnp.array([[high], [1.0]])
    qparams = transform(of)(*ends, jnp.float32(bits), jnp.bool_(calibrated))
    assert bool(jnp.isnan(qparams.scale[0, 0])) == (fault is not Fault.NONE)
    if fault is not Fault.NONE:
        assert qparams.zero_point[0, 0] == fault
    assert bool(jnp.isnan(qparams.scale[1, 0])) == (fault not in (Fault.NONE, Fault.NOT_FINITE))
    if bits == 0:
        assert_array_equal(qparams.scale, np.ones((2, 1)))
        assert_array_equal(qparams.zero_point, np.zeros((2, 1)))


def test_a_fault_shows_in_the_values_and_a_bypass_does_not():
    x = jnp.array([0.5, -0.5])
    for bits, shows in ((8.0, True), (0.0, False)):
        qparams = parameters(jnp.nan, 1.0, Integers(8), symmetric=True, bits=jnp.float32(bits))
        y = jax.jit(fake_quant)(x, *qparams[:2], bits=qparams.bits)
        assert bool(jnp.isnan(y).all()) == shows
        assert shows or bool((y == x).all())


def test_division_is_ieee():
    x = jnp.array([1.0, -1.0, 0.0, jnp.inf, jnp.nan, 1e38, jnp.nan, 5.0])
    scale = jnp.array([0.0, 0.0, 0.0, 2.0, 2.0, 1e-38, jnp.nan, jnp.nan])
    want = [np.inf, -np.inf, np.nan, np.inf, np.nan, np.inf, np.nan, np.nan]
    for divide in (divide_by_scale, jax.jit(divide_by_scale)):
        assert_array_equal(divide(x, scale), want)


def test_division_has_the_derivative_of_a_division():
    x, s = jnp.float32(3), jnp.float32(0.5)
    assert jax.grad(divide_by_scale, argnums=(0, 1))(x, s) == (2.0, -12.0)
    assert jax.jvp(divide_by_scale, (x, s), (jnp.ones_like(x), jnp.ones_like(s))) == (6.0, -10.0)


def test_bypass_is_a_width_of_zero_and_nothing_else():
    bits = jnp.array([0.0, -0.0, 1.0, 0.5, -1.0, jnp.nan])
    assert is_bypassed(bits).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("scaling", [DIVIDED, RECIPROCAL, RECIPROCAL_ADDED], ids=lambda s: s.name)
@pytest.mark.parametrize("zero_point", [0, 17, -128])
def test_a_scaling_is_the_same_compiled_and_not(scaling, zero_point):
    # Ties, where a fused multiply-add would tell, and all between.
    scale = np.float32(0.033)
    steps = np.concatenate([np.arange(-300, 300) + 0.5, np.random.default_rng(0).normal(size=5000)])
    x = jnp.asarray(np.float32(steps - zero_point) * scale)

    def codes(x, scale):
        zero = jnp.float32(zero_point)
        return fake_quant(x, scale, zero, scaling=scaling)

    assert_array_equal(jax.jit(codes)(x, scale), codes(x, jnp.asarray(scale)))


def test_scalings_by_hand():
    ties = jnp.array([-0.5, 0.5])
    assert fake_quant(ties, 1.0, 1, scaling=DIVIDED).tolist() == [0, 0]
    assert fake_quant(ties, 1.0, 1, scaling=RECIPROCAL_ADDED).tolist() == [-1, 1]
    # 1/1.7 is rounded down, and so is its product with 12.75 = 7.5 · 1.7.
    x, scale = jnp.float32(12.75), jnp.float32(1.7)
    assert float(fake_quant(x, scale, scaling=DIVIDED)) == float(8 * scale)
    assert float(fake_quant(x, scale, scaling=RECIPROCAL)) == float(7 * scale)
