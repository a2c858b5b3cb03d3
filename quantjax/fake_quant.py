"""Quantize and dequantize in one step, with an estimator's gradient.

Two forms of the same arithmetic: :func:`fake_quant` returns reals ``s · (q - z)``;
:func:`centered_codes` returns the levels ``q - z`` as floats, for products that multiply codes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import DIVIDED, QParams, Scaling, is_bypassed
from quantjax.estimators import CLIPPED, Estimator
from quantjax.formats import Format, Snapped, Theta, divide_by_scale, integer
from quantjax.granularity import check_scale_shape, expand
from quantjax.rounding import HALF_EVEN, Rounding


class Arithmetic(NamedTuple):
    """The static part of quantizing one tensor."""

    format: Format
    rounding: Rounding = HALF_EVEN
    estimator: Estimator = CLIPPED
    scaling: Scaling = DIVIDED


class _Given(NamedTuple):
    """The arrays beside ``x``, expanded to its shape; ``noise`` is None unless it is needed."""

    scale: jax.Array
    zero_point: jax.Array
    bits: jax.Array
    theta: Theta
    noise: jax.Array | None


class _Local(NamedTuple):
    centered: jax.Array
    slope: jax.Array
    passed: jax.Array


def _snapped(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> tuple[jax.Array, Snapped]:
    """``x/s``, and the level that it becomes."""
    format, rounding, _, scaling = arithmetic
    zero = jnp.round(given.zero_point)
    scaled = scaling.quotient(x, given.scale)
    inside, outside = (
        (scaled + zero, jnp.zeros_like(zero)) if scaling.adds_first else (scaled, zero)
    )
    rounding = rounding.given(given.noise)
    return scaled, format.snap(inside, outside, given.bits, rounding, given.theta)


def _local(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> _Local:
    """Levels minus zero point, the estimator's slope, and ``slope · x/s``; all float32."""
    format, _, estimator, _ = arithmetic
    zero, bits, theta = jnp.round(given.zero_point), given.bits, given.theta
    scaled, snapped = _snapped(arithmetic, x, given)
    low, high = format.level_range(bits, theta)
    slope = estimator.slope(snapped.unclipped, low, high)
    # Not a plain product: where the quotient is infinite and clipped, 0 · ∞ would be NaN.
    passed = jnp.where(slope == 0.0, 0.0, slope * scaled)
    return _Local(snapped.level - zero, slope, passed)


def _tangent_of_theta(
    arithmetic: Arithmetic, centered: jax.Array, given: _Given, dtheta: Theta
) -> jax.Array | float:
    """How the levels at hand move with ``theta``, their codes staying what they are."""
    if not jax.tree.leaves(given.theta):
        return 0.0
    format, bits, theta = arithmetic.format, given.bits, given.theta
    codes = format.encode(centered + jnp.round(given.zero_point), bits, theta)
    decode = lambda theta: format.decode(codes, bits, theta)  # noqa: E731
    return jax.jvp(decode, (theta,), (dtheta,))[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _centered(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> jax.Array:
    return _local(arithmetic, x, given).centered


@_centered.defjvp
def _centered_jvp(arithmetic: Arithmetic, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, given), (dx, d) = primals, tangents
    _, slope, passed = _local(arithmetic, x, given)
    to_x, to_scale = divide_by_scale(slope, given.scale), -divide_by_scale(passed, given.scale)
    # The function itself, not its body: else its derivative would be differentiated as rounding.
    centered = _centered(arithmetic, x, given)
    tangent = to_x * dx + to_scale * d.scale + (slope - 1.0) * d.zero_point
    return centered, tangent + _tangent_of_theta(arithmetic, centered, given, d.theta)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fake_quant(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> jax.Array:
    centered = _local(arithmetic, x, given).centered
    return jnp.where(is_bypassed(given.bits), x, centered * given.scale)


@_fake_quant.defjvp
def _fake_quant_jvp(arithmetic: Arithmetic, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, given), (dx, d) = primals, tangents
    _, slope, passed = _local(arithmetic, x, given)
    centered = _centered(arithmetic, x, given)
    bypass = is_bypassed(given.bits)
    slope = jnp.where(bypass, 1.0, slope)
    to_scale = jnp.where(bypass, 0.0, centered - passed)
    to_zero = jnp.where(bypass, 0.0, (slope - 1.0) * given.scale)
    tangent = slope * dx + to_scale * d.scale + to_zero * d.zero_point
    if jax.tree.leaves(given.theta):
        moved = _tangent_of_theta(arithmetic, centered, given, d.theta)
        tangent = tangent + jnp.where(bypass, 0.0, given.scale * moved)
    return _fake_quant(arithmetic, x, given), tangent


def _prepared(
    x: jax.Array, qparams: QParams, arithmetic: Arithmetic, key: jax.Array | None
) -> tuple[jax.Array, _Given]:
    x = jnp.asarray(x)
    noise = arithmetic.rounding.noise(key, x.shape)
    spread = lambda array: expand(jnp.asarray(array, jnp.float32), x.shape)  # noqa: E731
    theta = arithmetic.format.map_groups(qparams.theta, spread)
    bits = jnp.asarray(qparams.bits, jnp.float32)
    given = _Given(spread(qparams.scale), spread(qparams.zero_point), bits, theta, noise)
    return x.astype(jnp.float32), given


def centered_codes(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "..."]:
    """``clip(round(x/s) + z, low, high) - z``: levels about their zero point, float32.

    Differentiable in ``x``, ``scale``, ``zero_point`` and ``theta`` by the estimator: the gradient
    of ``s · centered_codes(x)`` is that of :func:`fake_quant`. Bypass (``bits == 0``) is the
    caller's.
    """
    return _centered(arithmetic, *_prepared(x, qparams, arithmetic, key))


def is_clipped(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Bool[Array, "..."]:
    """Where the range has no level for ``x``, and the outermost one stands in."""
    x, given = _prepared(x, qparams, arithmetic, key)
    low, high = arithmetic.format.level_range(given.bits, given.theta)
    unclipped = _snapped(arithmetic, x, given)[1].unclipped
    return (unclipped < low) | (unclipped > high)


def apply(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "..."]:
    """:func:`fake_quant` for QParams and an :class:`Arithmetic`; the dtype of ``x``."""
    x = jnp.asarray(x)
    y = _fake_quant(arithmetic, *_prepared(x, qparams, arithmetic, key)).astype(x.dtype)
    if x.dtype == jnp.float64:  # float32 would round what passes through
        y = jnp.where(is_bypassed(jnp.asarray(qparams.bits, jnp.float32)), x, y)
    return y


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
      theta: the format's own parameters, a dictionary of arrays.
      rounding: default half to even; a random one needs ``key``.
      estimator: the gradient of rounding and clipping; default passes 1 inside the range.
      scaling: how ``x`` is divided; variants for parity with other toolkits.
      key: for random roundings.

    Returns:
      An array of the shape and dtype of ``x``. NaN stays NaN; infinities saturate.

    Raises:
      BitsError: a concrete width that the format does not hold. Traced: the result is NaN.
      GranularityError: shapes that do not fit.
      QuantizerError: a concrete scale that is not positive and finite; a zero point, or the choice
        of signed or narrow, for a format that has none.
      DataError: ``x`` is not of a floating-point dtype.
      KeyMissingError: a random rounding without ``key``.

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
    container = format or integer(max_bits=16, signed=signed, narrow=narrow)
    x = jnp.asarray(x)
    check_floating(x, "qj.fake_quant")
    if bits is None:
        bits = 8 if format is None else format.max_bits
    width = jnp.asarray(bits, jnp.float32)
    if width.ndim:
        raise errors.BitsError(
            f"widths of shape {width.shape} for one tensor",
            where=f"qj.fake_quant of shape {x.shape}",
            fix="jax.vmap(lambda bits: qj.fake_quant(x, scale, bits=bits, ...))(bits)",
        )
    _check_concrete(scale, zero_point, bits, theta, container)
    for shaped in (scale, zero_point):
        if jnp.ndim(shaped) > 0:
            check_scale_shape(x.shape, jnp.shape(shaped))
    width = jnp.where(container.valid_bits(width, theta), width, jnp.nan)
    scale = jnp.asarray(scale, jnp.float32)
    scale = jnp.where(jnp.isnan(width), jnp.nan, scale)
    qparams = QParams(scale, jnp.asarray(zero_point, jnp.float32), width, theta)
    return apply(x, qparams, Arithmetic(container, rounding, estimator, scaling), key)


def check_floating(x: jax.Array, where: str) -> None:
    """Raise ``DataError`` for integers: casting the result back would truncate it."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise errors.DataError(
            f"a tensor of {x.dtype} cannot be quantized",
            where=f"{where} of shape {x.shape}",
            why="values between the integers could not be returned in its dtype",
            fix="x.astype(jnp.float32)",
        )


def _check_concrete(scale: Any, zero_point: Any, bits: Any, theta: Theta, format: Format) -> None:
    if format.known_valid(bits, theta) is False:
        raise errors.BitsError(
            f"bits = {concrete(bits)} is no whole width of {format.name}",
            where="qj.fake_quant",
            why=f"its container holds {format.max_bits} bits",
            fix=f"bits={min(8, format.max_bits)}, or bits=0 to pass the tensor through",
        )
    values = concrete(scale)
    if values is not None and not np.all((values > 0) & np.isfinite(values)):
        raise errors.QuantizerError(
            "a scale is not a positive finite number",
            where=f"qj.fake_quant, scale of shape {values.shape}",
            why="an all-zero tensor, or a calibration that saw NaN, gives such a scale",
            fix="derive scales with qj.calibrate, which has a rule for each of these cases",
        )
    zeros = concrete(zero_point)
    if not format.has_zero_point and (zeros is None or np.any(zeros)):
        raise errors.QuantizerError(
            f"a zero point for {format.name}, whose levels are no integers",
            where="qj.fake_quant",
            fix="leave zero_point out, or quantize with qj.integer(...)",
        )
