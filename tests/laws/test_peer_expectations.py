"""What the tests of other libraries expect of integer quantization, restated for this one.

Each names its source; values are theirs, code is not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import stats

from quantjax import QParams, encode, fake_quant, integer, statistics
from quantjax.affine import qparams_from_range
from quantjax.ranges import MIN_MAX, Target


def min_max(x: jax.Array, groups: tuple[int, ...], bits: int, *, symmetric=True) -> QParams:
    """QParams of the whole range of ``x``."""
    width = jnp.float32(bits)
    collected = statistics.update(statistics.init(groups), x)
    low, high, seen = MIN_MAX.range(collected, Target(integer(), symmetric, width))
    return qparams_from_range(
        low, high, width, format=integer(), symmetric=symmetric, calibrated=seen
    )


@pytest.mark.parametrize(
    ("bits", "x", "codes"),
    [
        (8, [1.2, 3.5, -127.5, 129.0, -1300.0], [1, 4, -128, 127, -128]),
        (8, [np.inf, -np.inf], [127, -128]),
        (4, [1.2, 3.5, 129.0, -1300.0], [1, 4, 7, -8]),
        (4, [np.inf, -np.inf], [7, -8]),
        (6, [1.2, 3.5, 129.0, -1300.0], [1, 4, 31, -32]),
    ],
)
def test_codes_at_scale_one(bits, x, codes):
    """Qwix, numerics_test.py."""
    one = QParams(jnp.float32(1), jnp.float32(0), jnp.float32(bits))
    assert encode(jnp.array(x), one, integer()).codes.tolist() == codes


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_256_even_values_have_256_codes(noise):
    """Qwix, qarray_test.py, test_exact_quantization."""
    x = (np.arange(256) / 255).astype(np.float32)
    x += np.random.default_rng(0).uniform(-noise, noise, 256).astype(np.float32)
    stored = encode(jnp.asarray(x), min_max(jnp.asarray(x), (1,), 8, symmetric=False), integer())
    assert stored.qparams.zero_point.tolist() == [-128]
    assert_array_equal(stored.codes, np.arange(-128, 128))
    np.testing.assert_allclose(stored.dequantize(), x, rtol=2e-7, atol=2 * noise)
    again = encode(stored.dequantize(), stored.qparams, integer())
    assert_array_equal(again.codes, stored.codes)
    assert_array_equal(again.dequantize(), stored.dequantize())


@pytest.mark.parametrize(
    ("bits", "symmetric", "bound"), [(8, True, 0.00766), (4, True, 0.1226), (8, False, 0.0070)]
)
def test_relative_error_on_normal_values(bits, symmetric, bound):
    """Qwix, qarray_test.py: mean absolute error over mean magnitude, one scale a slice.

    The symmetric bounds are theirs. The asymmetric one is the error of uniform rounding, a quarter
    of a step, at the range that 4096 of these values have.
    """
    x = jax.random.normal(jax.random.key(42), (10, 256, 16), jnp.bfloat16).astype(jnp.float32)
    qparams = min_max(x, (10, 1, 1), bits, symmetric=symmetric)
    error = jnp.abs(encode(x, qparams, integer()).dequantize() - x).mean()
    assert 0.8 * bound < error / jnp.abs(x).mean() <= bound
    # Not quite: bfloat16 values lie on a grid of their own.
    np.testing.assert_allclose(error, qparams.scale.mean() / 4, rtol=0.05)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("span", [0.1, 1000.0])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_errors_are_uniform_within_a_bucket(bits, span, zero_point):
    """AQT, aqt_dot_general_test.py: a Kolmogorov-Smirnov test against the uniform distribution."""
    x = np.random.default_rng(bits).uniform(-span, span, 20_000).astype(np.float32)
    # The levels end half a bucket before the range does; one signed bit has -1 and 1, no 0.
    step = 2 if bits == 1 else 1
    scale = np.float32(2 * span / 2**bits / step)
    middle = 0 if bits == 1 else -0.5
    x += np.float32((middle - zero_point) * scale)
    y = fake_quant(jnp.asarray(x), scale, zero_point, bits=bits)
    error = (np.float64(y) - x) / (step * scale)
    assert np.abs(error).max() <= 0.501
    assert stats.kstest(error + 0.5, "uniform").pvalue > 0.01


def test_a_three_bit_example_by_hand():
    """AQT, aqt_tensor_test_base.py, test_single_quant_simple: bound 7 over 3.5 steps."""
    x = jnp.array(
        [-7.0, -6.9, -5.1, -4.9, -3.0, -1.1, -0.9, 0.0, 0.9, 1.1, 3.1, 4.9, 5.1, 7.0, 9.0]
    )
    want = [-6, -6, -6, -4, -4, -2, 0, 0, 0, 2, 4, 4, 6, 6, 6]
    assert fake_quant(x, 2.0, bits=3, narrow=True).tolist() == want


@pytest.mark.parametrize(("clip", "want"), [(0.5, [0, 1, 0]), (1.0, [1, 1, 1])])
def test_gradients_stop_where_values_were_clipped(clip, want):
    """Qwix, dot_general_qt_test.py, test_gradient_clipping_integration."""
    x = jnp.array([-2.0, 0.0, 2.0])
    scale = clip * jnp.abs(x).max() / 127
    to_x = jax.grad(lambda x: fake_quant(x, scale, narrow=True).sum())(x)
    assert to_x.tolist() == want
