"""Quantize and dequantize one tensor in one step: :func:`fake_quant`."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import DIVIDED, QParams, Scaling, is_positive
from quantjax.arguments import expect, expect_declared, expect_key
from quantjax.arithmetic import Arithmetic
from quantjax.estimators import CLIPPED, Estimator
from quantjax.formats import Format, Theta, integer
from quantjax.granularity import check_scale_shape
from quantjax.meshes import automatic, spec_of
from quantjax.rounding import HALF_EVEN, Rounding
from quantjax.simulation import apply


def fake_quant(
    x: Float[Array, "..."],
    scale: Float[Array, "..."] | float,
    zero_point: Float[Array, "..."] | float = 0,
    *,
    bits: Float[Array, ""] | int | None = None,
    signed: bool = True,
    narrow: bool = False,
    format: Format | None = None,
    theta: Theta = (),
    rounding: Rounding = HALF_EVEN,
    estimator: Estimator = CLIPPED,
    scaling: Scaling = DIVIDED,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "..."]:
    """Round ``x`` to the values that codes can stand for: ``y = s · (q - z)``.

    For integers ``q = clip(round(x/s) + round(z), low, high)``, with the bounds of
    :func:`quantjax.integer`; other formats round ``x/s`` to their own levels.

    Args:
      x: float array of any shape; float16, bfloat16 and float64 are computed in float32 and cast
        back.
      scale: positive; a scalar, or of the rank of ``x`` with axes of size 1, full size, or groups.
      zero_point: the code of 0.0, the shape of ``scale`` or scalar; 0 unless codes are integers.
      bits: at most 16 for integers, at most the container of ``format``; 0 returns ``x``. Traced or
        not, the result is the same bit for bit. Default: 8, or the container's width.
      signed, narrow: which integers, where no ``format`` is given.
      format: another family of levels, such as ``qj.formats.E4M3FN``.
      theta: the format's and the estimator's own parameters, a dictionary of arrays.
      rounding: default half to even; a random one needs ``key``.
      estimator: the gradient of rounding and clipping, and what is learned with it; default passes
        1 inside the range.
      scaling: how ``x`` is divided; variants for parity with other toolkits.
      key: for random roundings and estimators.

    Returns:
      An array of the shape and dtype of ``x``. NaN stays NaN; infinities saturate. In
      float16 a level beyond 65504 is infinite itself.

    Raises:
      ArgumentError: a width that is no number, QParams for a scale.
      BitsError: a concrete width that the format does not hold. Traced: the result is NaN.
      GranularityError: shapes that do not fit.
      QuantizerError: a concrete scale that is not positive and finite, a zero point that is not
        finite; a zero point, or the choice of signed or narrow, for a format that has none.
      DataError: ``x`` is not of a floating-point dtype.
      KeyMissingError: a random rounding or estimator without ``key``.
      EstimatorError: ``theta`` lacks what the estimator learns.

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
    if format is not None and not (signed and not narrow):
        raise errors.QuantizerError(
            "signed and narrow say which integers, and a format is given",
            where="qj.fake_quant",
            fix="format=qj.integer(signed=..., narrow=...)",
        )
    for name, value, kind in (
        ("format", format or integer(), Format),
        ("rounding", rounding, Rounding),
        ("estimator", estimator, Estimator),
        ("scaling", scaling, Scaling),
    ):
        example = "qj.integer(), qj.rounding.HALF_EVEN, qj.estimators.LSQ, qj.affine.DIVIDED"
        expect(value, kind, argument=name, where="qj.fake_quant", fix=f"one as in {example}")
    expect_declared(format, where="qj.fake_quant")
    container = format or integer(max_bits=16, signed=signed, narrow=narrow)
    if isinstance(scale, QParams):
        raise errors.ArgumentError(
            "scale is QParams, and an array is needed",
            where="qj.fake_quant",
            why="a scale, a zero point and a width are arguments each",
            fix="qj.fake_quant(x, qparams.scale, qparams.zero_point, bits=qparams.bits, ...)",
        )
    x = jnp.asarray(x)
    check_floating(x, "qj.fake_quant")
    if bits is None:
        bits = 8 if format is None else format.max_bits
    dtype = bits.dtype if isinstance(bits, jax.Array) else np.asarray(bits).dtype
    if not jnp.issubdtype(dtype, jnp.number):
        raise errors.ArgumentError(
            f"bits is {bits}, and a number is needed",
            where="qj.fake_quant",
            fix=f"bits={min(8, container.max_bits)}",
        )
    width = jnp.asarray(bits, jnp.float32)
    if width.ndim:
        raise errors.BitsError(
            f"widths of shape {width.shape} for one tensor",
            where=f"qj.fake_quant of shape {x.shape}",
            fix="jax.vmap(lambda bits: qj.fake_quant(x, scale, bits=bits, ...))(bits)",
        )
    _check_concrete(scale, zero_point, bits, estimator.rest(theta), container)
    if key is not None:
        expect_key(key, where="qj.fake_quant")
    for shaped in (scale, zero_point):
        if jnp.ndim(shaped) > 0:
            check_scale_shape(x.shape, jnp.shape(shaped))
    scale, zero_point = (jnp.asarray(a, jnp.float32) for a in (scale, zero_point))
    qparams = QParams(scale, zero_point, width, theta)
    applied = functools.partial(_applied, Arithmetic(container, rounding, estimator, scaling))
    return cast(jax.Array, automatic(applied, x, qparams, key, specs=lambda _: spec_of(x)))


@functools.partial(jax.jit, static_argnums=0, inline=True)  # one program where it is called eagerly
def _applied(
    arithmetic: Arithmetic, x: jax.Array, qparams: QParams, key: PRNGKeyArray | None
) -> jax.Array:
    """NaN at what is no width."""
    theta = arithmetic.estimator.rest(qparams.theta)
    is_width = arithmetic.format.valid_bits(qparams.bits, theta)
    scale = jnp.where(is_width, qparams.scale, jnp.nan)
    width = jnp.where(is_width, qparams.bits, jnp.nan)
    return apply(x, qparams._replace(scale=scale, bits=width), arithmetic, key)


def check_floating(x: jax.Array, where: str) -> None:
    """Raise ``DataError`` for integers: casting the result back would truncate it."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise errors.DataError(
            f"a tensor of {x.dtype} cannot be quantized",
            where=f"{where} of shape {x.shape}",
            why="values between the integers could not be returned in its dtype",
            fix="x.astype(jnp.float32)",
        )


def check_scale(scale: Any, zero_point: Any, *, where: str) -> None:
    """Raise ``QuantizerError`` for concrete scales and zero points that are none."""
    values, zeros = concrete(scale), concrete(zero_point)
    if values is not None and not np.all(is_positive(values)):
        raise errors.QuantizerError(
            "a scale is not a positive finite number",
            where=f"{where}, scale of shape {values.shape}",
            why="an all-zero tensor, or a calibration that saw NaN, gives such a scale",
            fix="derive scales with qj.calibrate, which has a rule for each of these cases",
        )
    if zeros is not None and not np.all(np.isfinite(zeros)):
        raise errors.QuantizerError(
            "a zero point is NaN or infinite",
            where=f"{where}, zero point of shape {zeros.shape}",
            why="it is the code that stands for 0.0",
            fix="zero_point=0, or one that qj.calibrate derives",
        )


def _check_concrete(scale: Any, zero_point: Any, bits: Any, theta: Theta, format: Format) -> None:
    if format.known_valid(bits, theta) is False:
        raise errors.BitsError(
            f"bits = {concrete(bits)} is no whole width of {format.name}",
            where="qj.fake_quant",
            why=f"its container holds {format.max_bits} bits",
            fix=f"bits={min(8, format.max_bits)}, or bits=0 to pass the tensor through",
        )
    check_scale(scale, zero_point, where="qj.fake_quant")
    zeros = concrete(zero_point)
    if not format.has_zero_point and (zeros is None or np.any(zeros)):
        raise errors.QuantizerError(
            f"a zero point for {format.name}, whose levels are no integers",
            where="qj.fake_quant",
            fix="leave zero_point out, or quantize with qj.integer(...)",
        )
