"""Traced widths equal static widths, bit for bit: one program serves a sweep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import encode, fake_quant, integer
from quantjax.affine import Fault, qparams_from_range
from quantjax.arithmetic import Arithmetic
from quantjax.simulation import apply
from tests.laws.cases import FAMILIES

WIDTHS = tuple(range(1, 17))
X = (np.random.default_rng(5).standard_t(3, (12, 8)) * 2.0 ** np.arange(-4, 4)).astype(np.float32)
LOW, HIGH = X.min(0, keepdims=True), X.max(0, keepdims=True)


def quantize(x, low, high, bits, *, format, symmetric):
    """Everything that a width decides: parameters, values, codes."""
    qparams = qparams_from_range(
        low, high, bits, format=format, symmetric=symmetric, calibrated=jnp.bool_(True)
    )
    values = apply(x, qparams, Arithmetic(format))
    codes = encode(x, qparams, format).codes
    return qparams.scale, qparams.zero_point, values, codes


def same_bits(left, right) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("signed", "narrow"), FAMILIES)
def test_a_vector_of_widths_is_the_loop_over_them(signed, narrow, symmetric):
    format = integer(max_bits=16, signed=signed, narrow=narrow)

    def at(bits):
        return quantize(X, LOW, HIGH, bits, format=format, symmetric=symmetric)

    widths = jnp.array(WIDTHS, jnp.float32)
    vmapped = jax.jit(jax.vmap(at))(widths)
    mapped = jax.jit(lambda widths: lax.map(at, widths))(widths)
    traced = jax.jit(at)
    for i, bits in enumerate(WIDTHS):
        static = at(bits)
        same_bits(static, traced(jnp.float32(bits)))
        same_bits(static, [leaf[i] for leaf in vmapped])
        same_bits(static, [leaf[i] for leaf in mapped])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("bits", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_width_folded_into_the_program_changes_nothing(bits, symmetric):
    format = integer(max_bits=16)

    def at(x, low, high, bits):
        return quantize(x, low, high, bits, format=format, symmetric=symmetric)

    folded = jax.jit(lambda x, low, high: at(x, low, high, bits))(X, LOW, HIGH)
    same_bits(folded, jax.jit(at)(X, LOW, HIGH, jnp.float32(bits)))


@pytest.mark.parametrize(("signed", "narrow"), FAMILIES)
def test_the_public_function_takes_any_array_of_a_width(signed, narrow):
    def at(bits):
        return fake_quant(X, 0.07, bits=bits, signed=signed, narrow=narrow)

    integers = jax.vmap(at)(jnp.arange(17))
    floats = jax.jit(jax.vmap(at))(jnp.arange(17.0))
    for bits in range(17):
        static = at(bits)
        assert_array_equal(integers[bits], static)
        assert_array_equal(floats[bits], static)
        assert_array_equal(at(jnp.bfloat16(bits)), static)


def test_widths_that_are_none_are_nan_and_spare_the_others():
    widths = jnp.array([-1.0, 0.0, 2.5, 4.0, 16.0, 17.0, jnp.nan, jnp.inf])
    values = jax.vmap(lambda bits: fake_quant(X, 0.07, bits=bits))(widths)
    valid = np.array([False, True, False, True, True, False, False, False])
    assert np.isnan(values[~valid]).all()
    assert_array_equal(values[1], X)
    assert_array_equal(values[3], fake_quant(X, 0.07, bits=4))
    assert_array_equal(values[4], fake_quant(X, 0.07, bits=16))


def test_each_width_has_its_own_fault():
    at = jax.vmap(
        lambda bits: qparams_from_range(
            LOW, HIGH, bits, format=integer(), symmetric=True, calibrated=jnp.bool_(True)
        )
    )
    qparams = at(jnp.array([4.0, 9.0, 0.0, 4.5]))
    assert_array_equal(np.isnan(qparams.scale).all((1, 2)), [False, True, False, True])
    assert (qparams.zero_point[1] == Fault.BITS_OUTSIDE_FORMAT).all()
    assert_array_equal(qparams.scale[2], np.ones_like(LOW))


def test_one_program_serves_all_widths():
    traces = []

    @jax.jit
    def at(bits):
        traces.append(bits)
        return fake_quant(X, 0.07, bits=bits)

    for bits in WIDTHS:
        at(jnp.float32(bits))
    assert len(traces) == 1
