"""Two's complement and unsigned integers of 1 to 16 bits, full or narrow range."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.formats.base import Format
from quantjax.rounding import Rounding

MAX_CONTAINER_BITS = 16


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """``2^exponent`` exactly, for integer-valued exponents 0..30 (``exp2`` is off by ulps)."""
    whole = jnp.clip(exponent, 0.0, 30.0).astype(jnp.int32)
    return jnp.left_shift(jnp.ones_like(whole), whole).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerFormat(Format):
    """Integers whose codes are ``b`` bits wide, ``b`` an array.

    | signed | narrow | codes |
    |---|---|---|
    | yes | no | ``-2^(b-1) .. 2^(b-1)-1`` |
    | yes | yes | ``-(2^(b-1)-1) .. 2^(b-1)-1`` |
    | no | no | ``0 .. 2^b-1`` |
    | no | yes | ``1 .. 2^b-1`` |

    One bit is a case of its own: signed codes are ``{-1, +1}`` (zero encodes as ``+1``), unsigned
    ones ``{0, 1}``, narrow or not. Construct with :func:`integer`.
    """

    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_bits <= MAX_CONTAINER_BITS:
            raise errors.FormatError(
                f"integer containers hold 1 to {MAX_CONTAINER_BITS} bits, got {self.max_bits}",
                fix=f"qj.integer(max_bits={min(max(self.max_bits, 1), MAX_CONTAINER_BITS)})",
            )

    @property
    def name(self) -> str:
        """``int``, ``uint``, ``int-narrow`` or ``uint-narrow``."""
        return ("int" if self.signed else "uint") + ("-narrow" if self.narrow else "")

    @property
    def storage_dtype(self) -> jnp.dtype:
        """int8, uint8, int16 or uint16."""
        small = self.max_bits <= 8
        if self.signed:
            return jnp.dtype(jnp.int8 if small else jnp.int16)
        return jnp.dtype(jnp.uint8 if small else jnp.uint16)

    def code_range(self, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See the table of the class."""
        bits = jnp.asarray(bits, jnp.float32)
        one = bits == 1.0
        if self.signed:
            half = _power_of_two(bits - 1.0)
            low = -half + 1.0 if self.narrow else -half
            return jnp.where(one, -1.0, low), jnp.where(one, 1.0, half - 1.0)
        low = jnp.where(one, 0.0, 1.0) if self.narrow else jnp.zeros_like(bits)
        return low, _power_of_two(bits) - 1.0

    def steps(self, bits: jax.Array, *, symmetric: bool) -> jax.Array:
        """Symmetric signed: ``2^(b-1)`` full, ``2^(b-1)-1`` narrow; otherwise ``high - low``."""
        bits = jnp.asarray(bits, jnp.float32)
        low, high = self.code_range(bits)
        if not symmetric:
            return high - low
        if not self.signed:
            return high
        half = _power_of_two(bits - 1.0)
        return jnp.maximum(half - 1.0, 1.0) if self.narrow else half

    def snap(
        self, scaled: jax.Array, zero_point: jax.Array, bits: jax.Array, rounding: Rounding
    ) -> jax.Array:
        """``clip(round(x/s) + z, low, high)``; one signed bit: ``+1`` where ``x/s + z >= 0``."""
        low, high = self.code_range(bits)
        codes = jnp.clip(rounding.apply(scaled) + zero_point, low, high)
        if not self.signed:
            return codes
        shifted = scaled + zero_point
        signs = jnp.where(jnp.isnan(shifted), shifted, jnp.where(shifted >= 0.0, 1.0, -1.0))
        return jnp.where(bits == 1.0, signs, codes)

    def largest_centered_code(self, *, symmetric: bool) -> int:
        """``2^(max_bits-1)`` for signed symmetric codes, ``2^max_bits - 1`` for all others."""
        if self.signed and symmetric:
            return 1 << (self.max_bits - 1)
        return max((1 << self.max_bits) - 1, 2)

    def valid_bits(self, bits: jax.Array) -> jax.Array:
        """Whole numbers 0 (bypass) to ``max_bits``."""
        return (bits >= 0.0) & (bits <= float(self.max_bits)) & (bits == jnp.floor(bits))


def integer(*, max_bits: int = 8, signed: bool = True, narrow: bool = False) -> IntegerFormat:
    """An integer format whose widths in use are at most ``max_bits``.

    Args:
      max_bits: bits of the container, 1 to 16; the width in use is an array in ``QParams``.
      signed: two's complement, or unsigned.
      narrow: leave out the lowest code, so that signed codes are symmetric around zero.

    Raises:
      FormatError: ``max_bits`` outside 1..16.

    >>> import jax.numpy as jnp
    >>> low, high = integer(max_bits=8).code_range(jnp.array([1.0, 2.0, 4.0, 8.0]))
    >>> [int(v) for v in low], [int(v) for v in high]
    ([-1, -2, -8, -128], [1, 1, 7, 127])

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018,
    section 2.
    """
    return IntegerFormat(max_bits=max_bits, signed=signed, narrow=narrow)
