"""Which scales there are, and which of them covers a span: named rules.

A scale is a real number unless a format says otherwise. Fixed-point formats and microscaling have
powers of two, and toolkits disagree on which: a rule is therefore a named value, and a field of the
format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from quantjax.lean import clip

SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127


class Span(NamedTuple):
    """What a scale has to cover; float32.

    Attributes:
      largest: the largest magnitude, or ``max - min`` of an asymmetric range; the scale's shape.
      quotient: ``largest / steps``, the real scale.
      top: the highest level, a scalar.
      unit: the distance of levels in the top binade, a scalar.
    """

    largest: jax.Array
    quotient: jax.Array
    top: jax.Array
    unit: jax.Array


class ScaleRule(NamedTuple):
    """How the scale of a group is derived.

    Attributes:
      name: what it prints as.
      scale: span -> scale. What it returns for an empty span is not used.
      is_power_of_two: whether every scale is ``2^k``.
    """

    name: str
    scale: Callable[[Span], jax.Array]
    is_power_of_two: bool = False


def exponent_of(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """``⌊log2 |x|⌋`` exactly, from the bits of normal float32 numbers; -127 for 0."""
    bits = lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)
    return ((bits >> 23) & 255) - 127


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """``2^exponent`` exactly, the exponent clipped to that of normal float32 numbers.

    >>> power_of_two(jnp.array([-1, 0, 10])).tolist()
    [0.5, 1.0, 1024.0]
    """
    clipped = clip(exponent, SMALLEST_EXPONENT, LARGEST_EXPONENT).astype(jnp.int32)
    return lax.bitcast_convert_type((clipped + 127) << 23, jnp.float32)


def unit_of(largest: Float[Array, "..."]) -> Int[Array, "..."]:
    """The exponent of a unit in which a magnitude is about one; 0 for what is 0 or not finite.

    Squares in such units neither vanish nor overflow; ``power_of_two(-unit_of(...))`` is a normal
    number.

    >>> unit_of(jnp.array([3e-30, 0.0, 5.0])).tolist()
    [-99, 0, 2]
    """
    known = (largest > 0.0) & jnp.isfinite(largest)
    return jnp.where(known, jnp.minimum(exponent_of(largest), LARGEST_EXPONENT - 1), 0)


def _is_power(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32) & 0x7FFFFF == 0


def ceil_exponent(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """``⌈log2 |x|⌉`` exactly."""
    return exponent_of(x) + jnp.where(_is_power(x), 0, 1)


def significand(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``|x| / 2^⌊log2 |x|⌋`` exactly, from the bits of normal float32 numbers; 1 for 0."""
    bits = lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)
    return lax.bitcast_convert_type(bits & 0x7FFFFF | (127 << 23), jnp.float32)


def _mantissa(x: jax.Array) -> jax.Array:
    """The significand, where infinity and NaN stay what they are and 0 is 0."""
    return x / power_of_two(exponent_of(x))


def _real(span: Span) -> jax.Array:
    return span.quotient


def _unclipped(span: Span) -> jax.Array:
    return power_of_two(ceil_exponent(span.quotient))


def _nearest(span: Span) -> jax.Array:
    # The middle of 2^k and 2^(k+1) on the logarithmic scale is 2^k √2, which no float32 equals.
    up = _mantissa(span.quotient) > jnp.sqrt(jnp.float32(2.0))
    return power_of_two(exponent_of(span.quotient) + up.astype(jnp.int32))


def _floor(span: Span) -> jax.Array:
    return power_of_two(exponent_of(span.largest) - exponent_of(span.top))


def _ceil(span: Span) -> jax.Array:
    return power_of_two(ceil_exponent(span.largest) - exponent_of(span.top))


def _even(span: Span) -> jax.Array:
    # Rounded half to even to the mantissa of the top binade, the span reaches the next power of two
    # from half a unit below it.
    limit = 2.0 - 0.5 * span.unit / power_of_two(exponent_of(span.top))
    up = (_mantissa(span.largest) >= limit).astype(jnp.int32)
    return power_of_two(exponent_of(span.largest) + up - exponent_of(span.top))


def _inq(span: Span) -> jax.Array:
    # ⌊log2(4 s / 3)⌋ = ⌊log2 s⌋ + 1 where the mantissa is 1.5 or more.
    up = (_mantissa(span.largest) >= 1.5).astype(jnp.int32)
    return power_of_two(exponent_of(span.largest) + up)


def _one(span: Span) -> jax.Array:
    return jnp.ones_like(span.quotient)


REAL = ScaleRule("real", _real)
"""Any positive float32: ``span / steps``."""

UNIT = ScaleRule("unit", _one, is_power_of_two=True)
"""1, whatever the span: levels are the values themselves, as in a cast."""

POWER_OF_TWO = ScaleRule("pow2", _unclipped, is_power_of_two=True)
"""The smallest power of two that clips nothing: ``2^⌈log2(span / steps)⌉``.

(But for the highest code of full-range signed integers, which a positive maximum exceeds by one.)

The rule of dynamic fixed point, whose fraction length is ``-log2 scale``, and the one that
microscaling toolkits call RCEIL.

>>> whole = Span(*map(jnp.float32, (38.1, 0.3, 127.0, 1.0)))
>>> float(POWER_OF_TWO.scale(whole))
0.5

Source: Gysel et al., Ristretto: a framework for empirical study of resource-efficient inference in
convolutional neural networks, 2018, section III-B.
"""

POWER_OF_TWO_NEAREST = ScaleRule("pow2-nearest", _nearest, is_power_of_two=True)
"""The power of two nearest to ``span / steps`` on the logarithmic scale; may clip.

Source: Jain et al., Trained quantization thresholds for accurate and efficient fixed-point
inference of deep neural networks, 2020, section 3.2.
"""

MX_FLOOR = ScaleRule("mx-floor", _floor, is_power_of_two=True)
"""``2^(⌊log2 span⌋ - ⌊log2 top⌋)``: the rule of the MX specification; the largest values saturate.

Scales end at 2^-126, the smallest normal number, where E8M0 has 2^-127: blocks of which no value is
above some 4e-34 have larger scales than the specification's.

Source: Open Compute Project, OCP Microscaling Formats (MX) Specification v1.0, 2023, section 6.3.
"""

MX_CEIL = ScaleRule("mx-ceil", _ceil, is_power_of_two=True)
"""``2^(⌈log2 span⌉ - ⌊log2 top⌋)``: nothing saturates, half the range may stay unused.

Source: torchao, ``ScaleCalculationMode.CEIL``.
"""

MX_EVEN = ScaleRule("mx-even", _even, is_power_of_two=True)
"""``MX_FLOOR`` of the span rounded to the element's mantissa: saturates by half a unit at most.

Source: torchao, ``ScaleCalculationMode.EVEN``.
"""

INQ_SCALE = ScaleRule("inq", _inq, is_power_of_two=True)
"""``2^⌊log2(4 span / 3)⌋``: the largest power of two that weights are rounded to.

Source: Zhou et al., Incremental network quantization, 2017, equation 3.
"""
