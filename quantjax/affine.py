"""The affine map between reals and codes, ``x ≈ scale · (code - zero_point)``, and its parameters.

The one division by a scale in the library is :func:`divide_by_scale`.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from quantjax.formats import Format

SMALLEST_SCALE = float(jnp.finfo(jnp.float32).smallest_normal)
LARGEST_SCALE = float(jnp.finfo(jnp.float32).max)


class QParams(NamedTuple):
    """Quantization parameters of one tensor: float32 arrays, so that all can be optimized.

    Attributes:
      scale: one positive number for each group of entries that share it; the tensor's rank.
      zero_point: the code that stands for 0.0; the forward pass uses it rounded. Where ``scale``
        is NaN, it holds the :class:`Fault` that made it so.
      bits: the width in use, a scalar; 0 passes the tensor through unquantized.
      theta: the estimator's own parameters, a pytree of float32 arrays, empty for most.
    """

    scale: Float[Array, "..."]
    zero_point: Float[Array, "..."]
    bits: Float[Array, ""]
    theta: PyTree[Float[Array, "..."]] = ()


class Fault(enum.IntEnum):
    """Why a scale is NaN; ``qj.check`` reads it back."""

    NONE = 0
    NEVER_CALIBRATED = 1
    NOT_FINITE = 2
    BITS_OUTSIDE_FORMAT = 3


def divide_by_scale(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x / scale`` with a true IEEE division, elementwise, in float32.

    XLA rewrites a division by a broadcast value into a product with its reciprocal, which moves
    12 % of exact ties to the other code. A divisor that depends on ``x`` keeps the division. It
    depends by a comparison with NaN, which is never true; the barrier keeps XLA from knowing so,
    and from evaluating the comparison where ``x`` is a constant of the program.

    Args:
      x: float32 values.
      scale: positive, broadcastable against ``x`` (equal rank or scalar).

    >>> float(divide_by_scale(jnp.float32(0.0825), jnp.float32(0.033)))
    2.5
    """
    never = lax.optimization_barrier(jnp.full((), jnp.nan, x.dtype))
    return x / jnp.where(x == never, jnp.ones_like(x), scale)


def is_bypassed(bits: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether the width asks for no quantization at all."""
    return bits == 0.0


def qparams_from_range(
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    bits: Float[Array, ""],
    *,
    format: Format,
    symmetric: bool,
    calibrated: Bool[Array, ""],
) -> QParams:
    """QParams that cover ``[low, high]`` with the codes of ``format`` at width ``bits``.

    Symmetric: ``scale = max(|low|, |high|) / steps``, ``zero_point = 0``, where ``steps`` is
    ``2^(b-1)`` for full signed codes, ``2^(b-1) - 1`` for narrow ones, ``2^b - 1`` unsigned.
    Asymmetric: the range is widened to hold 0, then ``scale = (high - low) / (q_max - q_min)`` and
    ``zero_point = clip(q_min - round(low / scale), q_min, q_max)``.

    All arithmetic is float32. An empty span (all zeros) has scale 1; where the quotient would be
    subnormal or infinite, the scale is the nearest normal number; bypass has scale 1 and zero
    point 0. A subnormal span is empty to a backend that flushes subnormals, as CPU does.

    Args:
      low, high: the range, the shape of the scale.
      bits: scalar width; may be traced.
      calibrated: False where no value has been seen.

    Returns:
      QParams; where ``bits`` is no width of the format, a bound is not finite, or nothing was
      seen, ``scale`` is NaN and ``zero_point`` the :class:`Fault`.

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018,
    sections 2.1 and 2.2.
    """
    low = jnp.asarray(low, jnp.float32)
    high = jnp.asarray(high, jnp.float32)
    bits = jnp.asarray(bits, jnp.float32)
    steps = format.steps(bits, symmetric=symmetric)
    if symmetric:
        span = jnp.maximum(jnp.abs(low), jnp.abs(high))
        scale = _usable(divide_by_scale(span, steps), span)
        zero_point = jnp.zeros_like(scale)
    else:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        span = high - low
        halves = divide_by_scale(high, steps) - divide_by_scale(low, steps)
        scale = jnp.where(jnp.isinf(span), halves, divide_by_scale(span, steps))
        scale = _usable(scale, span)
        q_min, q_max = format.code_range(bits)
        zero_point = jnp.clip(q_min - jnp.round(divide_by_scale(low, scale)), q_min, q_max)
    return _mark_faults(
        QParams(scale, zero_point, bits),
        calibrated=calibrated,
        finite=jnp.isfinite(low) & jnp.isfinite(high),
        valid=format.valid_bits(bits),
    )


def _usable(scale: jax.Array, span: jax.Array) -> jax.Array:
    """A normal number. The span decides on 1: a quotient of a tiny one is flushed to 0 on CPU."""
    return jnp.where(span == 0.0, 1.0, jnp.clip(scale, SMALLEST_SCALE, LARGEST_SCALE))


def _mark_faults(
    qparams: QParams, *, calibrated: jax.Array, finite: jax.Array, valid: jax.Array
) -> QParams:
    bypass = is_bypassed(qparams.bits)
    fault = jnp.where(finite, float(Fault.NONE), float(Fault.NOT_FINITE))
    fault = jnp.where(calibrated, fault, float(Fault.NEVER_CALIBRATED))
    fault = jnp.where(bypass, float(Fault.NONE), fault)
    fault = jnp.where(valid, fault, float(Fault.BITS_OUTSIDE_FORMAT))
    faulty = fault != float(Fault.NONE)
    scale = jnp.where(bypass, 1.0, qparams.scale)
    zero_point = jnp.where(bypass, 0.0, qparams.zero_point)
    return qparams._replace(
        scale=jnp.where(faulty, jnp.nan, scale), zero_point=jnp.where(faulty, fault, zero_point)
    )
