"""Bypass, NaN, infinities, zeros, empty tensors, single entries and float64: all defined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from quantjax import QParams, encode, fake_quant, integer
from quantjax.affine import qparams_from_range
from quantjax.arithmetic import Arithmetic
from quantjax.simulation import apply
from tests.laws.cases import FAMILIES
from tests.oracles import integers as oracle
from tests.oracles.integers import Integers

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
VIEW = {2: np.uint16, 4: np.uint32, 8: np.uint64}
STRANGE = [0.0, -0.0, 1.5, -3.25, np.inf, -np.inf, np.nan, 1e-7, 6e4]


def raw(x) -> np.ndarray:
    """The bits of a float array."""
    x = np.asarray(x)
    return x.view(VIEW[x.itemsize])


def from_range(x: np.ndarray, axis: int, *, bits=8.0, symmetric=True, **options) -> QParams:
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    return qparams_from_range(
        low,
        high,
        jnp.float32(bits),
        format=integer(**options),
        symmetric=symmetric,
        calibrated=jnp.bool_(True),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bypass_returns_the_tensor_bit_for_bit(dtype):
    x = jnp.asarray(STRANGE, dtype)
    for scale in (0.1, jnp.full(x.shape, 0.1)):
        for y in (
            fake_quant(x, scale, bits=0),
            jax.jit(lambda x, bits, s=scale: fake_quant(x, s, bits=bits))(x, jnp.float32(0)),
            jax.vmap(lambda bits, s=scale: fake_quant(x, s, bits=bits))(jnp.zeros(1))[0],
        ):
            assert y.dtype == dtype
            assert_array_equal(raw(y), raw(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bypass_has_the_gradient_of_the_identity(dtype):
    x = jnp.asarray(STRANGE, dtype)
    cotangent = jnp.asarray(np.linspace(-2, 2, x.size), dtype)

    def pull(x, scale, zero_point, bits):
        _, back = jax.vjp(lambda *a: fake_quant(*a, bits=bits), x, scale, zero_point)
        return back(cotangent)

    for function in (pull, jax.jit(pull)):
        to_x, *others = function(x, jnp.float32(0.1), jnp.float32(2.0), jnp.float32(0))
        assert to_x.dtype == dtype
        assert_array_equal(to_x, cotangent)
        assert others == [0.0, 0.0]


@pytest.mark.parametrize("scale", [jnp.nan, 0.0, jnp.inf])
def test_bypass_does_not_look_at_its_parameters(scale):
    x, width = jnp.array([1.0, -2.0]), jnp.float32(0)

    def bypassed(x, scale, zero_point):
        return apply(x, QParams(scale, zero_point, width), Arithmetic(integer()))

    primals = x, jnp.float32(scale), jnp.float32(jnp.nan)
    value, back = jax.vjp(bypassed, *primals)
    assert_array_equal(value, x)
    to_x, *others = back(jnp.array([3.0, 4.0]))
    assert to_x.tolist() == [3, 4]
    assert others == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("signed", "narrow"), FAMILIES)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_nan_stays_nan_and_infinities_saturate(bits, signed, narrow, dtype):
    x = jnp.asarray([np.nan, np.inf, -np.inf, 0.25], dtype)
    low, high = oracle.bounds(Integers(bits, signed, narrow))
    zero_point = 1.0
    y = fake_quant(x, 0.5, zero_point, bits=bits, signed=signed, narrow=narrow)
    assert np.isnan(y[0])
    assert_array_equal(y[1:3], np.array([high - 1, low - 1]) * 0.5)
    assert np.isfinite(y[3])
    codes = encode(
        x[1:],
        QParams(jnp.float32(0.5), jnp.float32(zero_point), jnp.float32(bits)),
        integer(signed=signed, narrow=narrow),
    ).codes
    assert_array_equal(codes[:2], [high, low])


def test_one_nan_does_not_spread():
    x = jnp.asarray(np.linspace(-1, 1, 12, dtype=np.float32)).at[5].set(jnp.nan)
    y, without = fake_quant(x, 0.1), fake_quant(jnp.delete(x, 5), 0.1)
    assert_array_equal(jnp.delete(y, 5), without)
    to_x = jax.grad(lambda x: fake_quant(x, 0.1).sum())(x)
    assert_array_equal(jnp.delete(to_x, 5), jnp.ones(11))


def test_a_nan_scale_makes_its_channel_nan_and_no_other():
    x = jnp.ones((3, 2))
    y = jax.jit(fake_quant)(x, jnp.array([[jnp.nan, 0.5]]))
    assert_array_equal(np.isnan(y), [[True, False]] * 3)
    qparams = QParams(jnp.array([[jnp.nan, 0.5]]), jnp.array([[1.0, 0.0]]), jnp.float32(8))
    decoded = jax.jit(lambda x, qparams: encode(x, qparams, integer()).dequantize())(x, qparams)
    assert_array_equal(decoded, y)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_tensor_stays_zero(symmetric, signed, dtype):
    x = jnp.zeros((4, 3), dtype)
    qparams = from_range(np.zeros((4, 3), np.float32), 0, symmetric=symmetric, signed=signed)
    assert_array_equal(qparams.scale, np.ones((1, 3)))
    assert_array_equal(apply(x, qparams, Arithmetic(integer(signed=signed))), x)
    assert_array_equal(encode(x, qparams, integer(signed=signed)).dequantize(), x)


@pytest.mark.parametrize("value", [3.7, -3.7, 1e-20, -2e30])
def test_channels_of_one_entry(value):
    x = np.array([[value], [2 * value]], np.float32)
    exact = np.float64(x)
    narrow = from_range(x, 1, narrow=True)
    y = np.float64(apply(jnp.asarray(x), narrow, Arithmetic(integer(narrow=True))))
    np.testing.assert_allclose(y, exact, rtol=2e-7)
    asymmetric = from_range(x, 1, symmetric=False)
    y = np.float64(apply(jnp.asarray(x), asymmetric, Arithmetic(integer())))
    np.testing.assert_allclose(y, exact, rtol=2e-7)
    # Full codes reach one step less above zero than below.
    full = np.float64(apply(jnp.asarray(x), from_range(x, 1), Arithmetic(integer())))
    np.testing.assert_allclose(full, exact * (127 / 128 if value > 0 else 1), rtol=2e-7)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((0,), ()), ((0,), (1,)), ((0, 3), (1, 3)), ((3, 0), (3, 1)), ((3, 0), (1, 1))],
)
def test_empty_tensors(shape, groups, dtype):
    x, scale = jnp.zeros(shape, dtype), jnp.ones(groups)
    y = fake_quant(x, scale)
    assert (y.shape, y.dtype) == (shape, dtype)
    stored = encode(x, QParams(scale, jnp.zeros(groups), jnp.float32(8)), integer())
    assert stored.codes.dtype == jnp.int8
    assert stored.dequantize().shape == shape
    to_scale = jax.grad(lambda scale: fake_quant(x, scale).astype(jnp.float32).sum())(scale)
    assert_array_equal(to_scale, jnp.zeros(groups))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield np.array([0.1, -0.3, 1 / 3, 1e300, -np.inf, np.nan, -0.0], np.float64)


def test_float64_is_computed_in_float32_and_cast_back(float64):
    x, scale = jnp.asarray(float64), jnp.float64(0.01)
    y = fake_quant(x, scale)
    with np.errstate(over="ignore"):
        single = jnp.asarray(float64.astype(np.float32))
    assert y.dtype == jnp.float64
    assert_array_equal(y, np.float64(fake_quant(single, jnp.float32(scale))))
    stored = encode(x[:-2], QParams(scale, jnp.float64(0), jnp.float64(8)), integer())
    assert stored.dequantize().dtype == jnp.float64
    assert_array_equal(stored.dequantize(), y[:-2])
    assert jax.grad(lambda x: fake_quant(x, scale).sum())(x).dtype == jnp.float64


def test_float64_is_bypassed_bit_for_bit(float64):
    x = jnp.asarray(float64)
    for y in (
        fake_quant(x, 0.1, bits=0),
        jax.jit(lambda x, bits: fake_quant(x, 0.1, bits=bits))(x, jnp.float64(0)),
    ):
        assert_array_equal(raw(y), raw(float64))
    cotangent = jnp.asarray(float64[:3])
    _, back = jax.vjp(lambda x: fake_quant(x, 0.1, bits=jnp.float32(0)), x[:3])
    assert_array_equal(raw(back(cotangent)[0]), raw(cotangent))
