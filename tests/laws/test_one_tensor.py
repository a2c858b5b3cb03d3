"""The core laws of one tensor, over all families, widths, granularities and dtypes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from quantjax import encode
from quantjax.simulation import apply, centered_codes
from tests.laws.cases import Case, cases, multiples, spread_scale
from tests.oracles import integers as oracle

ALL_DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])


def simulate(case: Case, x: np.ndarray | None = None) -> np.ndarray:
    x = case.x if x is None else x
    return np.asarray(apply(jnp.asarray(x), case.qparams, case.arithmetic))


def stored(case: Case) -> np.ndarray:
    return np.asarray(encode(jnp.asarray(case.x), case.qparams, case.format).codes, np.int64)


@given(cases())
def test_codes_and_values_are_those_of_the_int64_model(case: Case):
    assert_array_equal(stored(case), oracle.codes(*case))
    assert_array_equal(simulate(case), oracle.fake_quant(*case))


@given(cases(dtype=jnp.bfloat16))
def test_half_precision_is_float32_arithmetic_cast_at_the_end(case: Case):
    wide = case._replace(x=case.x.astype(np.float32))
    assert_array_equal(stored(case), oracle.codes(*wide))
    assert_array_equal(simulate(case), oracle.fake_quant(*wide).astype(case.x.dtype))


@ALL_DTYPES
@given(data=st.data())
def test_simulation_is_encoding_and_decoding(dtype, data):
    case = data.draw(cases(dtype=dtype))
    x = jnp.asarray(case.x)
    decoded = encode(x, case.qparams, case.format).dequantize()
    simulated = apply(x, case.qparams, case.arithmetic)
    assert decoded.dtype == simulated.dtype == x.dtype == dtype
    assert_array_equal(decoded, simulated)


@ALL_DTYPES
@given(data=st.data())
def test_codes_stay_in_the_range_of_the_width(dtype, data):
    case = data.draw(cases(dtype=dtype))
    low, high = oracle.bounds(case.family)
    codes = stored(case)
    assert low <= codes.min() <= codes.max() <= high
    assert set(np.unique(codes)) <= set(oracle.levels(case.family))


@ALL_DTYPES
@given(data=st.data())
def test_idempotent(dtype, data):
    # In half precision too, where long codes have no exact value: the cast of s·q lies nearest to a
    # code whose own value is cast to the same number.
    case = data.draw(cases(dtype=dtype))
    once = simulate(case)
    assert_array_equal(simulate(case, once), once)


@ALL_DTYPES
@given(data=st.data())
def test_monotone(dtype, data):
    case = data.draw(cases(dtype=dtype))
    more = np.float32(data.draw(st.floats(0.0, 8.0, width=32)))
    higher = case.x.astype(np.float32) + more * spread_scale(case.scale)
    higher = np.maximum(higher.astype(case.x.dtype), case.x)
    assert (simulate(case, higher) >= simulate(case)).all()


@ALL_DTYPES
@given(data=st.data())
def test_within_half_a_step_of_values_in_range(dtype, data):
    case = data.draw(cases(dtype=dtype))
    x, y = case.x.astype(np.float64), simulate(case).astype(np.float64)
    levels = np.array(oracle.levels(case.family), np.float64)
    scale = np.float64(spread_scale(case.scale))
    # Half the distance between levels: one scale for one signed bit, whose levels are -1 and 1.
    half = (levels[1] - levels[0]) / 2
    zero = spread_scale(case.zero_point)
    in_range = x >= (levels[0] - half - zero) * scale
    in_range &= x <= (levels[-1] + half - zero) * scale
    # A quotient in float32 and a cast of the result, each a rounding.
    slack = np.abs(x) * 2.0**-23 + np.abs(y) * float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(x - y) <= half * scale + slack)[in_range].all()


@given(cases())
def test_values_out_of_range_become_the_outermost_level(case: Case):
    low, high = oracle.bounds(case.family)
    below = stored(case._replace(x=-np.full_like(case.x, 2.0**70)))
    above = stored(case._replace(x=np.full_like(case.x, 2.0**70)))
    assert (below == low).all()
    assert (above == high).all()


@given(cases(), st.integers(-30, 30))
def test_equivariant_under_powers_of_two(case: Case, exponent: int):
    factor = np.float32(2.0) ** exponent
    rescaled = case._replace(x=case.x * factor, scale=case.scale * factor)
    assert_array_equal(stored(rescaled), stored(case))
    assert_array_equal(simulate(rescaled), simulate(case) * factor)


@given(cases())
def test_centered_codes_times_scale_is_fake_quant(case: Case):
    centered = np.asarray(centered_codes(jnp.asarray(case.x), case.qparams, case.arithmetic))
    assert centered.dtype == np.float32
    assert_array_equal(centered, oracle.codes(*case) - spread_scale(case.zero_point))
    assert_array_equal(centered * spread_scale(case.scale), simulate(case))


@given(cases(), st.floats(-0.4375, 0.4375, width=32))
def test_the_zero_point_is_used_rounded(case: Case, off: float):
    moved = case._replace(zero_point=case.zero_point + np.float32(off))
    assert_array_equal(stored(moved), stored(case))
    assert_array_equal(simulate(moved), simulate(case))
    decoded = encode(jnp.asarray(case.x), moved.qparams, case.format).dequantize()
    assert_array_equal(decoded, simulate(case))


@given(cases(bits=st.integers(2, 16)))
def test_zero_stays_zero_where_a_code_stands_for_it(case: Case):
    low, _ = oracle.bounds(case.family)
    # The zero point is a code; unsigned narrow codes begin at 1, so that 0 is none of theirs.
    zero_point = np.maximum(case.zero_point, low)
    zeros = case._replace(x=np.zeros_like(case.x), zero_point=zero_point)
    assert_array_equal(simulate(zeros), np.zeros_like(case.x))


@given(cases(bits=st.integers(2, 16)), multiples())
def test_negation_mirrors_symmetric_narrow_codes(case: Case, multiple: float):
    family = case.family._replace(signed=True, narrow=True)
    case = case._replace(family=family, zero_point=np.zeros_like(case.zero_point))
    x = case.x + np.float32(multiple) * spread_scale(case.scale)
    assert_array_equal(simulate(case, -x), -simulate(case, x))
