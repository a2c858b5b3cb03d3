"""Bit patterns of small floating point numbers, to and from float32.

A pattern with exponent field ``E`` and mantissa field ``M`` stands for
``2^(E - bias) (1 + M / 2^m)``, or ``2^(1 - bias) M / 2^m`` where ``E = 0``. The number of bits may
be traced. Float32 numbers are put together and taken apart as integers, so that nothing is lost
where a backend flushes subnormals.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from quantjax.formats.scales import power_of_two

MAX_EXPONENT_BITS, MAX_MANTISSA_BITS = 8, 10

# Of a float32.
EXPONENT_FIELD = 0x7F800000
LARGEST_BINADE = 0x7F000000  # 2^127
TWICE_RECIPROCAL = 0x7F800000  # minus the pattern of 2^e is that of 2^(1-e)
_SIGN_FIELD = -0x80000000
_QUIET_NAN = 0x7FC00000
_BIAS, _MANTISSA_BITS = 127, 23


class Specials(enum.Enum):
    """Which patterns are no finite numbers."""

    IEEE = "the highest exponent is infinity (mantissa 0) and NaN: e5m2, float16"
    FN = "all ones is NaN, there is no infinity: e4m3fn"
    FNUZ = "-0 is NaN, there is no infinity, the bias is one more: e4m3fnuz"
    FINITE = "none, every pattern is a number: e2m1"


class Layout(NamedTuple):
    """Fields of a pattern; int32 arrays of one shape.

    Attributes:
      exponent: bits of the exponent.
      mantissa: bits of the mantissa.
      bias: what is subtracted from the exponent field.
    """

    exponent: jax.Array
    mantissa: jax.Array
    bias: jax.Array

    @property
    def lowest_exponent(self) -> jax.Array:
        """That of the lowest binade, and of the subnormals below."""
        return 1 - self.bias

    @property
    def lowest_field(self) -> jax.Array:
        """The lowest binade's power of two as a float32 pattern."""
        return shifted(self.lowest_exponent + _BIAS, _MANTISSA_BITS)

    @property
    def sign(self) -> jax.Array:
        """The pattern of -0."""
        return shifted(1, self.exponent + self.mantissa)

    @property
    def infinity(self) -> jax.Array:
        """The pattern of infinity, where there is one."""
        return self.sign - shifted(1, self.mantissa)

    @property
    def rebias(self) -> jax.Array:
        """How much a float32's exponent field exceeds the pattern's, at the latter's place."""
        return shifted(_BIAS - self.bias, self.mantissa)

    def aligned(self, ndim: int) -> Layout:
        """For arrays of ``ndim`` axes, of which the first are those of the layout."""
        return Layout(*(aligned(field, ndim) for field in self))


def layout(
    exponent: int | Float[Array, "..."],
    bits: int | Float[Array, "..."],
    specials: Specials,
) -> Layout:
    """The layout of ``bits`` with so many exponent bits; anything beyond the limits is clipped."""
    whole = jnp.clip(jnp.asarray(exponent).astype(jnp.int32), 1, MAX_EXPONENT_BITS)
    mantissa = jnp.asarray(bits).astype(jnp.int32) - 1 - whole
    whole, mantissa = jnp.broadcast_arrays(whole, jnp.clip(mantissa, 0, MAX_MANTISSA_BITS))
    return Layout(whole, mantissa, shifted(1, whole - 1) - (0 if specials is Specials.FNUZ else 1))


def aligned(value: jax.Array, ndim: int) -> jax.Array:
    """With axes of size 1 behind, as many as make ``ndim``; scalars stay."""
    return value.reshape(value.shape + (1,) * (ndim - value.ndim)) if value.ndim else value


def shifted(value: int | jax.Array, by: int | jax.Array) -> jax.Array:
    """``value · 2^by``, int32."""
    return jnp.left_shift(jnp.asarray(value, jnp.int32), jnp.asarray(by, jnp.int32))


def top_exponent(fields: Layout, specials: Specials) -> Int[Array, "..."]:
    """The exponent of the highest finite number."""
    top = shifted(1, fields.exponent) - 1 - fields.bias
    if specials is Specials.IEEE:
        return top - 1
    if specials is Specials.FN:
        return jnp.where(fields.mantissa == 0, top - 1, top)
    return top


def highest(fields: Layout, specials: Specials) -> Float[Array, "..."]:
    """The highest finite number."""
    # Its mantissa is 2 - 2^-m, or one step less where that pattern is NaN. Without mantissa bits
    # NaN takes a binade, which the exponent has left out already.
    lost = power_of_two(-fields.mantissa)
    if specials is Specials.FN:
        lost = jnp.where(fields.mantissa == 0, 1.0, 2.0 * lost)
    return (2.0 - lost) * power_of_two(top_exponent(fields, specials))


def encode(numbers: Float[Array, "..."], fields: Layout, specials: Specials) -> Int[Array, "..."]:
    """The pattern of each number, int32.

    NaN becomes a quiet one; where there is none, the pattern of -0, as ``ml_dtypes`` has it.

    Args:
      numbers: float32 numbers that have a pattern; larger ones get the highest.
      fields: the layout, broadcastable against ``numbers``.
      specials: which patterns are no finite numbers.
    """
    whole = lax.bitcast_convert_type(numbers, jnp.int32)
    absolute = whole & ~_SIGN_FIELD
    normal = (absolute >> (_MANTISSA_BITS - fields.mantissa)) - fields.rebias
    is_subnormal = absolute < fields.lowest_field
    # In units of the lowest binade. With float32's own bias the shift is right for them, too.
    unit = power_of_two(fields.mantissa - fields.lowest_exponent)
    small = jnp.where(is_subnormal, lax.bitcast_convert_type(absolute, jnp.float32), 0.0) * unit
    subnormal = jnp.where(fields.bias == _BIAS, normal, small.astype(jnp.int32))
    magnitude = jnp.where(is_subnormal, subnormal, normal)
    is_nan = absolute > EXPONENT_FIELD
    if specials is Specials.IEEE:
        quiet = fields.infinity | shifted(1, jnp.maximum(fields.mantissa - 1, 0))
        magnitude = jnp.where(is_nan, quiet, jnp.minimum(magnitude, fields.infinity))
    else:
        magnitude = jnp.minimum(magnitude, fields.sign - 1)
    patterns = jnp.where(whole < 0, fields.sign | magnitude, magnitude)
    if specials is Specials.FNUZ:
        patterns = jnp.where(magnitude == 0, 0, patterns)
    if specials in (Specials.FNUZ, Specials.FINITE):
        patterns = jnp.where(is_nan, fields.sign, patterns)
    return patterns


def decode(patterns: Int[Array, "..."], fields: Layout, specials: Specials) -> Float[Array, "..."]:
    """The float32 number of each int32 pattern."""
    magnitude = patterns & (fields.sign - 1)
    normal = (magnitude + fields.rebias) << (_MANTISSA_BITS - fields.mantissa)
    unit = power_of_two(fields.lowest_exponent - fields.mantissa)
    small = lax.bitcast_convert_type(magnitude.astype(jnp.float32) * unit, jnp.int32)
    is_subnormal = (magnitude < shifted(1, fields.mantissa)) & (fields.bias != _BIAS)
    whole = jnp.where(is_subnormal, small, normal)
    if specials is Specials.IEEE:
        whole = jnp.where(magnitude == fields.infinity, EXPONENT_FIELD, whole)
        whole = jnp.where(magnitude > fields.infinity, _QUIET_NAN, whole)
    elif specials is Specials.FN:
        whole = jnp.where(magnitude == fields.sign - 1, _QUIET_NAN, whole)
    elif specials is Specials.FNUZ:
        whole = jnp.where(patterns == fields.sign, _QUIET_NAN, whole)
    whole = jnp.where(patterns & fields.sign == 0, whole, whole | _SIGN_FIELD)
    return lax.bitcast_convert_type(whole, jnp.float32)
