"""The affine map of reals to levels, ``x ≈ scale · (level - zero_point)``, and its parameters.

The level of an integer code is the code; other formats have a table or a rule for it.

The one division by a scale in the library is :func:`quantjax.formats.divide_by_scale`.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from quantjax.formats import Format, ScaleRule, Span, Theta, divide_by_scale
from quantjax.lean import rounded_product, select

NEGATIVE_SHARE = 0.25
"""Of the largest value: what lies further below zero than that is no tail of an activation."""
SMALLEST_SCALE = float(jnp.finfo(jnp.float32).smallest_normal)
LARGEST_SCALE = float(jnp.finfo(jnp.float32).max)


class QParams(NamedTuple):
    """Quantization parameters of one tensor: float32 arrays, so that all can be optimized.

    Attributes:
      scale: one positive number for each group of entries that share it; the tensor's rank.
      zero_point: the code that stands for 0.0; the forward pass uses it rounded. Where ``scale``
        is NaN, it holds the :class:`Fault` that made it so.
      bits: the width in use, a scalar; 0 passes the tensor through unquantized. Where the estimator
        learns the width, that one is in ``theta``, and :func:`quantjax.training.learned_bits` says
        which is in use.
      theta: what else the format or the estimator has for parameters: a dictionary of float32
        arrays (a codebook's levels, a minifloat's exponent bits), ``()`` for most.
    """

    scale: Float[Array, "..."]
    zero_point: Float[Array, "..."]
    bits: Float[Array, ""]
    theta: PyTree[Float[Array, "..."]] = ()


class Fault(enum.IntEnum):
    """Why a scale is NaN; ``qj.check`` reads it back.

    Numbers that no zero point of any width is: a scale that became NaN in training has one, too.
    """

    NONE = 0
    NEVER_CALIBRATED = 2**20 + 1
    NOT_FINITE = 2**20 + 2
    BITS_OUTSIDE_FORMAT = 2**20 + 3
    ZERO_POINT = 2**20 + 4
    NEGATIVE = 2**20 + 5


class Scaling(NamedTuple):
    """How a real is brought into units of the scale, and when the zero point joins it.

    Attributes:
      name: what it prints as.
      quotient: ``(x, scale) -> x / scale``.
      adds_first: whether the zero point is added before rounding, ``round(x/s + z)``. For an odd
        zero point every exact tie then goes to the other code.
    """

    name: str
    quotient: Callable[[jax.Array, jax.Array], jax.Array]
    adds_first: bool = False


def _times_reciprocal(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * divide_by_scale(jnp.ones_like(scale), scale)


def _times_reciprocal_rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    # Fused with the sum of the zero point it would round once, which moves ties.
    return rounded_product(x, divide_by_scale(jnp.ones_like(scale), scale))


DIVIDED = Scaling("divided", divide_by_scale)
"""``round(x / s) + z`` with a true division: ONNX, StableHLO, and everything here by default."""

RECIPROCAL = Scaling("reciprocal", _times_reciprocal)
"""``round(x · (1/s)) + z``: what compilers make of a division by a broadcast scale.

So do ``torch.fake_quantize_per_tensor_affine`` and its relative per channel (2.13, CPU).
"""

RECIPROCAL_ADDED = Scaling("reciprocal-added", _times_reciprocal_rounded, adds_first=True)
"""``round(x · (1/s) + z)``: ``torch.quantize_per_channel`` (2.13, CPU)."""


def is_bypassed(bits: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether the width asks for no quantization at all."""
    return bits == 0.0


def is_positive(scale: Any) -> Any:
    """Whether a scale, an array of JAX or of NumPy, is a positive finite number.

    >>> is_positive(jnp.array([0.5, 0.0, -1.0, jnp.inf, jnp.nan])).tolist()
    [True, False, False, False, False]
    """
    return (scale > 0.0) & (scale < jnp.inf)


def has_codes(qparams: QParams) -> Bool[Array, "..."]:
    """Whether a tensor has codes: at a width, of a scale that is one.

    >>> [bool(has_codes(QParams(jnp.ones(()), jnp.zeros(()), jnp.float32(b)))) for b in (0, 4)]
    [False, True]
    """
    return is_positive(qparams.scale) & ~is_bypassed(qparams.bits)


def where_bypassed(
    bits: Float[Array, ""], then: Float[Array, "..."] | float, otherwise: Float[Array, "..."]
) -> Float[Array, "..."]:
    """``then`` at width 0, ``otherwise`` at every other.

    >>> where_bypassed(jnp.float32(0.0), 1.0, jnp.array([2.0, 3.0])).tolist()
    [1.0, 1.0]
    """
    return select(is_bypassed(bits), then, otherwise)


def qparams_from_range(
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    bits: Float[Array, ""],
    *,
    format: Format,
    symmetric: bool,
    calibrated: Bool[Array, ""],
    theta: Theta = (),
) -> QParams:
    """QParams that cover ``[low, high]`` with the codes of ``format`` at width ``bits``.

    Symmetric: ``scale = max(|low|, |high|) / steps``, ``zero_point = 0``, where ``steps`` is
    ``2^(b-1)`` for full signed codes, ``2^(b-1) - 1`` for narrow ones, ``2^b - 1`` unsigned, the
    highest level for all that are no integers.
    Asymmetric: the range is widened to hold 0, then ``scale = (high - low) / (q_max - q_min)`` and
    ``zero_point = clip(q_min - round(low / scale), q_min, q_max)``.

    A format with another scale rule than real numbers has the scale of that rule.

    All arithmetic is float32. An empty span (all zeros) has scale 1, or the smallest normal number
    where symmetric codes have no 0, which would otherwise become 1; where the quotient would be
    subnormal or infinite, the scale is the nearest normal number; bypass has scale 1 and zero
    point 0. A subnormal span is empty to a backend that flushes subnormals, as CPU does.

    Args:
      low, high: the range, the shape of the scale.
      bits: scalar width; may be traced.
      calibrated: False where no value has been seen.
      theta: of the format.

    Returns:
      QParams; where ``bits`` is no width of the format, a bound is not finite, or nothing was
      seen, ``scale`` is NaN and ``zero_point`` the :class:`Fault`.

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018,
    sections 2.1 and 2.2.
    """
    return _from_range(low, high, bits, calibrated, theta, format=format, symmetric=symmetric)


# One program where it is called eagerly, and nothing but its operations inside another one.
@functools.partial(jax.jit, static_argnames=("format", "symmetric"), inline=True)
def _from_range(
    low: jax.Array,
    high: jax.Array,
    bits: jax.Array,
    calibrated: jax.Array,
    theta: Theta,
    *,
    format: Format,
    symmetric: bool,
) -> QParams:
    low = jnp.asarray(low, jnp.float32)
    high = jnp.asarray(high, jnp.float32)
    bits = jnp.asarray(bits, jnp.float32)
    steps = format.steps(bits, symmetric=symmetric, theta=theta)
    q_min, q_max = format.level_range(bits, theta)
    unit = format.unit(bits, theta)
    rule = format.scale_rule
    finite = jnp.isfinite(low) & jnp.isfinite(high)  # (inf, -inf) is nothing seen of a group
    if symmetric:
        largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
        span = Span(largest, divide_by_scale(largest, steps), q_max, unit)
        empty = jnp.where(format.holds_zero(largest, bits, theta), 1.0, SMALLEST_SCALE)
        scale = _usable(rule, span, empty)
        zero_point = jnp.zeros_like(scale)
    else:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        largest = high - low
        halves = divide_by_scale(high, steps) - divide_by_scale(low, steps)
        quotient = jnp.where(jnp.isinf(largest), halves, divide_by_scale(largest, steps))
        scale = _usable(rule, Span(largest, quotient, steps, unit), jnp.float32(1.0))
        zero_point = jnp.clip(q_min - jnp.round(divide_by_scale(low, scale)), q_min, q_max)
        # A rounded zero point moves both ends, and one may come to lie beyond the largest number.
        ends = (q_min - zero_point) * scale, (q_max - zero_point) * scale
        narrower = scale * divide_by_scale(steps, steps + 1.0)
        scale = jnp.where(jnp.isinf(ends[0]) | jnp.isinf(ends[1]), narrower, scale)
    return mark_faults(
        QParams(scale, zero_point, bits, theta),
        calibrated=calibrated,
        # A scale may depend on the ranges of other groups, too.
        finite=finite & ~jnp.isnan(scale),
        valid=format.valid_bits(bits, theta),
    )


def _usable(rule: ScaleRule, span: Span, empty: jax.Array) -> jax.Array:
    """A normal number, or NaN where a rule made 0, less or infinity of one.

    The span says what is empty: a tiny quotient is flushed to 0 on CPU. That of one step may be
    infinite.
    """
    scale, quotient = rule.scale(span), span.quotient
    is_scale = (scale > 0.0) & (scale < jnp.inf)
    is_scale |= (quotient < SMALLEST_SCALE) | (quotient > LARGEST_SCALE)
    scale = jnp.where(is_scale, jnp.clip(scale, SMALLEST_SCALE, LARGEST_SCALE), jnp.nan)
    return jnp.where(span.largest == 0.0, empty, scale)


def mark_faults(
    qparams: QParams, *, calibrated: jax.Array, finite: jax.Array, valid: jax.Array
) -> QParams:
    """Scale NaN and the :class:`Fault` for zero point, where something is wrong; 1 and 0 at width
    0, which passes the tensor through."""
    bypass = is_bypassed(qparams.bits)
    fault = jnp.where(finite, float(Fault.NONE), float(Fault.NOT_FINITE))
    fault = jnp.where(calibrated, fault, float(Fault.NEVER_CALIBRATED))
    fault = jnp.where(bypass, float(Fault.NONE), fault)
    fault = jnp.where(valid, fault, float(Fault.BITS_OUTSIDE_FORMAT))
    faulty = fault != float(Fault.NONE)
    scale = where_bypassed(qparams.bits, 1.0, qparams.scale)
    zero_point = where_bypassed(qparams.bits, 0.0, qparams.zero_point)
    return qparams._replace(
        scale=jnp.where(faulty, jnp.nan, scale), zero_point=jnp.where(faulty, fault, zero_point)
    )


def mark_negatives(qparams: QParams, low: jax.Array, high: jax.Array) -> QParams:
    """NaN and :attr:`Fault.NEGATIVE` where unsigned codes about zero would clip to 0 what lies far
    below it.

    Args:
      low, high: of what is quantized, at the shape of the scale.
    """
    far = clips_negatives(low, high) & (qparams.zero_point == 0.0) & ~jnp.isnan(qparams.scale)
    far &= ~is_bypassed(qparams.bits)
    return qparams._replace(
        scale=jnp.where(far, jnp.nan, qparams.scale),
        zero_point=jnp.where(far, float(Fault.NEGATIVE), qparams.zero_point),
    )


def clips_negatives(low: jax.Array, high: jax.Array) -> jax.Array:
    """Where a range lies further below zero than a tail does.

    >>> clips_negatives(jnp.array([-0.2, -0.3, -jnp.inf]), jnp.ones(3)).tolist()
    [False, True, False]
    """
    below = jnp.minimum(low, 0.0) < -NEGATIVE_SHARE * jnp.maximum(high, 0.0)
    return below & jnp.isfinite(low)
