"""Quantize and dequantize in one step, with an estimator's gradient.

Two forms of the same arithmetic: :func:`fake_quant` returns reals ``s · (q - z)``;
:func:`centered_codes` returns the codes ``q - z`` as floats, for products that multiply codes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import QParams, divide_by_scale, is_bypassed
from quantjax.estimators import CLIPPED, Estimator
from quantjax.formats import Format, integer
from quantjax.granularity import check_scale_shape, expand
from quantjax.rounding import HALF_EVEN, Rounding


class Arithmetic(NamedTuple):
    """The static part of quantizing one tensor."""

    format: Format
    rounding: Rounding = HALF_EVEN
    estimator: Estimator = CLIPPED


class _Local(NamedTuple):
    centered: jax.Array
    slope: jax.Array
    passed: jax.Array


def _local(
    arithmetic: Arithmetic, x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: jax.Array
) -> _Local:
    """Codes minus zero point, the estimator's slope, and ``slope · x/s``; all float32."""
    format, rounding, estimator = arithmetic
    zero = jnp.round(zero_point)
    scaled = divide_by_scale(x, scale)
    centered = format.snap(scaled, zero, bits, rounding) - zero
    low, high = format.code_range(bits)
    slope = estimator.slope(rounding.apply(scaled) + zero, low, high)
    # Not a plain product: where the quotient is infinite and clipped, 0 · ∞ would be NaN.
    passed = jnp.where(slope == 0.0, 0.0, slope * scaled)
    return _Local(centered, slope, passed)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _centered(
    arithmetic: Arithmetic, x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: jax.Array
) -> jax.Array:
    return _local(arithmetic, x, scale, zero_point, bits).centered


@_centered.defjvp
def _centered_jvp(arithmetic: Arithmetic, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, scale, zero_point, bits = primals
    dx, dscale, dzero, _ = tangents
    _, slope, passed = _local(arithmetic, x, scale, zero_point, bits)
    to_x, to_scale = divide_by_scale(slope, scale), -divide_by_scale(passed, scale)
    # The function itself, not its body: else its derivative would be differentiated as rounding.
    centered = _centered(arithmetic, x, scale, zero_point, bits)
    return centered, to_x * dx + to_scale * dscale + (slope - 1.0) * dzero


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fake_quant(
    arithmetic: Arithmetic, x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: jax.Array
) -> jax.Array:
    centered = _local(arithmetic, x, scale, zero_point, bits).centered
    return jnp.where(is_bypassed(bits), x, centered * scale)


@_fake_quant.defjvp
def _fake_quant_jvp(arithmetic: Arithmetic, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, scale, zero_point, bits = primals
    dx, dscale, dzero, _ = tangents
    _, slope, passed = _local(arithmetic, x, scale, zero_point, bits)
    centered = _centered(arithmetic, x, scale, zero_point, bits)
    bypass = is_bypassed(bits)
    slope = jnp.where(bypass, 1.0, slope)
    to_scale = jnp.where(bypass, 0.0, centered - passed)
    to_zero = jnp.where(bypass, 0.0, (slope - 1.0) * scale)
    value = _fake_quant(arithmetic, x, scale, zero_point, bits)
    return value, slope * dx + to_scale * dscale + to_zero * dzero


def _prepared(x: jax.Array, qparams: QParams) -> tuple[jax.Array, ...]:
    x = jnp.asarray(x)
    scale = expand(jnp.asarray(qparams.scale, jnp.float32), x.shape)
    zero_point = expand(jnp.asarray(qparams.zero_point, jnp.float32), x.shape)
    return x.astype(jnp.float32), scale, zero_point, jnp.asarray(qparams.bits, jnp.float32)


def centered_codes(
    x: Float[Array, "..."], qparams: QParams, arithmetic: Arithmetic
) -> Float[Array, "..."]:
    """``clip(round(x/s) + z, low, high) - z``: codes about their zero point, float32.

    Differentiable in ``x``, ``scale`` and ``zero_point`` by the estimator: the gradient of
    ``s · centered_codes(x)`` is that of :func:`fake_quant`. Bypass (``bits == 0``) is the caller's.
    """
    return _centered(arithmetic, *_prepared(x, qparams))


def apply(x: Float[Array, "..."], qparams: QParams, arithmetic: Arithmetic) -> Float[Array, "..."]:
    """:func:`fake_quant` for QParams and an :class:`Arithmetic`; the dtype of ``x``."""
    x = jnp.asarray(x)
    y = _fake_quant(arithmetic, *_prepared(x, qparams)).astype(x.dtype)
    if x.dtype == jnp.float64:  # float32 would round what passes through
        y = jnp.where(is_bypassed(jnp.asarray(qparams.bits, jnp.float32)), x, y)
    return y


def fake_quant(
    x: Float[Array, "..."],
    scale: Float[Array, "..."] | float,
    zero_point: Float[Array, "..."] | float = 0,
    *,
    bits: Float[Array, ""] | int = 8,
    signed: bool = True,
    narrow: bool = False,
    rounding: Rounding = HALF_EVEN,
    estimator: Estimator = CLIPPED,
) -> Float[Array, "..."]:
    """Round ``x`` to the values that integer codes can stand for: ``y = s · (q - z)``.

    ``q = clip(round(x/s) + round(z), low, high)``, with the bounds of :func:`quantjax.integer`.

    Args:
      x: float array of any shape; float16, bfloat16 and float64 are computed in float32 and cast
        back.
      scale: positive; a scalar, or of the rank of ``x`` with axes of size 1, full size, or a
        divisor (groups).
      zero_point: the code of 0.0, the shape of ``scale`` or scalar.
      bits: 1 to 16, or 0 to return ``x``; traced or not, the result is the same bit for bit.
      signed, narrow: which codes.
      rounding: default half to even.
      estimator: the gradient of rounding and clipping; default passes 1 inside the range.

    Returns:
      An array of the shape and dtype of ``x``. NaN stays NaN; infinities saturate.

    Raises:
      BitsError: a concrete width outside 0..16 or not whole. Traced: the result is NaN.
      GranularityError: shapes that do not fit.
      QuantizerError: a concrete scale that is not positive and finite.
      DataError: ``x`` is not of a floating-point dtype.

    Sharp edges: with full signed codes and ``s = max|x| / 2^(b-1)``, the largest value itself lies
    one step beyond the last code and is clipped, in value and gradient.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([-2.0, -0.3, 0.2, 2.0])
    >>> [round(float(v), 2) for v in fake_quant(x, 0.25, bits=3)]
    [-1.0, -0.25, 0.25, 0.75]
    >>> [float(v) for v in jax.grad(lambda x: fake_quant(x, 0.25, bits=3).sum())(x)]
    [0.0, 1.0, 1.0, 0.0]

    Source: Jacob et al., Quantization and training of neural networks for efficient
    integer-arithmetic-only inference, 2018, equation 12.
    """
    container = integer(max_bits=16, signed=signed, narrow=narrow)
    x = jnp.asarray(x)
    check_floating(x, "qj.fake_quant")
    width = jnp.asarray(bits, jnp.float32)
    _check_concrete(scale, bits)
    for shaped in (scale, zero_point):
        if jnp.ndim(shaped) > 0:
            check_scale_shape(x.shape, jnp.shape(shaped))
    width = jnp.where(container.valid_bits(width), width, jnp.nan)
    scale = jnp.asarray(scale, jnp.float32)
    scale = jnp.where(jnp.isnan(width), jnp.nan, scale)
    qparams = QParams(scale, jnp.asarray(zero_point, jnp.float32), width)
    return apply(x, qparams, Arithmetic(container, rounding, estimator))


def check_floating(x: jax.Array, where: str) -> None:
    """Raise ``DataError`` for integers: casting the result back would truncate it."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise errors.DataError(
            f"a tensor of {x.dtype} cannot be quantized",
            where=f"{where} of shape {x.shape}",
            why="values between the integers could not be returned in its dtype",
            fix="x.astype(jnp.float32)",
        )


def _check_concrete(scale: Any, bits: Any) -> None:
    width = concrete(bits)
    if width is not None and not np.all((width >= 0) & (width <= 16) & (width == np.floor(width))):
        raise errors.BitsError(
            f"bits = {width} is not a whole number from 0 to 16",
            where="qj.fake_quant",
            fix="bits=8, or bits=0 to pass the tensor through",
        )
    values = concrete(scale)
    if values is not None and not np.all((values > 0) & np.isfinite(values)):
        raise errors.QuantizerError(
            "a scale is not a positive finite number",
            where=f"qj.fake_quant, scale of shape {values.shape}",
            why="an all-zero tensor, or a calibration that saw NaN, gives such a scale",
            fix="derive scales with qj.calibrate, which has a rule for each of these cases",
        )
