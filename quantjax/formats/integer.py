"""Two's complement and unsigned integers of 1 to 16 bits, full or narrow range."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax import errors
from quantjax._compat import concrete
from quantjax.arguments import expect
from quantjax.formats.base import ALL_LAWS, Format, Law, Snapped, Theta
from quantjax.formats.scales import REAL, ScaleRule
from quantjax.lean import clip, elementwise, select
from quantjax.rounding import Rounding

MAX_CONTAINER_BITS = 16


def _two_to(bits: jax.Array, less: int = 0) -> jax.Array:
    """``2^(bits - less)`` of a width in use, which is far from the ends of float32's exponents.

    Of the nearest whole width: the conversion rounds down, and half a bit is in the sum.
    """
    exponent = lax.convert_element_type(elementwise(lax.add, bits, 127.5 - less), jnp.int32)
    return lax.bitcast_convert_type(elementwise(lax.shift_left, exponent, 23), jnp.float32)


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
        expect(
            self.max_bits,
            numbers.Integral,
            argument="max_bits",
            where="qj.integer",
            fix="max_bits=8",
        )
        if not 1 <= self.max_bits <= MAX_CONTAINER_BITS:
            raise errors.FormatError(
                f"integer containers hold 1 to {MAX_CONTAINER_BITS} bits, got {self.max_bits}",
                fix=f"qj.integer(max_bits={min(max(self.max_bits, 1), MAX_CONTAINER_BITS)})",
            )

    @property
    def name(self) -> str:
        """``int``, ``uint``, ``int-narrow``, ``uint-narrow``, and the scale rule: ``int-pow2``."""
        family = ("int" if self.signed else "uint") + ("-narrow" if self.narrow else "")
        return self.named(family)

    @property
    def laws(self) -> frozenset[Law]:
        """All, but ODD for codes that are not symmetric and ZERO where 0 is no code."""
        missing = set() if self.signed and self.narrow else {Law.ODD}
        if self.max_bits == 1 and self.signed:
            missing |= {Law.ODD, Law.ZERO}
        if self.narrow and not self.signed:
            missing.add(Law.ZERO)
        return ALL_LAWS - missing

    @property
    def has_zero_point(self) -> bool:
        """Integers can be moved."""
        return True

    @property
    def storage_dtype(self) -> jnp.dtype:
        """int8, uint8, int16 or uint16."""
        small = self.max_bits <= 8
        if self.signed:
            return jnp.dtype(jnp.int8 if small else jnp.int16)
        return jnp.dtype(jnp.uint8 if small else jnp.uint16)

    def level_range(self, bits: jax.Array, theta: Theta = ()) -> tuple[jax.Array, jax.Array]:
        """See the table of the class."""
        del theta
        bits = jnp.asarray(bits, jnp.float32)
        if self.signed:
            half = _two_to(bits, 1)
            # One bit has -1 and +1.
            low = jnp.minimum(1.0 - half, -1.0) if self.narrow else -half
            return low, jnp.maximum(half - 1.0, 1.0)
        low = select(lax.round(bits) == 1.0, 0.0, 1.0) if self.narrow else jnp.zeros_like(bits)
        return low, _two_to(bits) - 1.0

    def steps(self, bits: jax.Array, *, symmetric: bool, theta: Theta = ()) -> jax.Array:
        """Symmetric signed: ``2^(b-1)`` full, ``2^(b-1)-1`` narrow; otherwise ``high - low``."""
        bits = jnp.asarray(bits, jnp.float32)
        low, high = self.level_range(bits, theta)
        if not symmetric:
            return high - low
        if not self.signed:
            return high
        half = _two_to(bits, 1)
        return jnp.maximum(half - 1.0, 1.0) if self.narrow else half

    def holds_nearest(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """In few operations: every operand of a program has its own."""
        del theta
        most = np.nextafter(np.float32(self.max_bits + 0.5), np.float32(0.0))
        held = lax.eq(clip(bits, 0.5, float(most)), bits)
        return held | elementwise(lax.eq, bits, 0.0)

    def known_valid(self, bits: Any, theta: Theta = ()) -> bool | None:
        """In NumPy: a program of JAX would have to be compiled."""
        del theta
        known = concrete(bits)
        if known is None:
            return None
        known = known.astype(np.float32)
        held = (known >= 0) & (known <= self.max_bits) & (known == np.floor(known))
        return bool(np.all(held))

    def holds_zero(self, like: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """Not one signed bit, and not unsigned narrow codes of more."""
        low, _ = self.level_range(bits, theta)
        held = jnp.asarray(bits) != 1.0 if self.signed else low == 0.0
        return jnp.broadcast_to(held, like.shape)

    def is_elementwise(self, theta: Theta) -> bool:
        """The level is the code."""
        del theta
        return True

    def snap(
        self,
        scaled: jax.Array,
        zero_point: jax.Array | None,
        bits: jax.Array,
        rounding: Rounding,
        theta: Theta = (),
    ) -> Snapped:
        """``clip(round(x/s) + z, low, high)``; no ``z`` is one of 0, in fewer operations.

        NaN at a width that the container does not hold.

        One signed bit: ``+1`` where ``x/s + z >= 0``; other roundings than to the nearest choose
        between -1 and +1 as they do between neighbouring integers.
        """
        low, high = self.level_range(bits, theta)
        high = select(self.holds_nearest(bits), high, jnp.nan)
        unclipped = rounding.apply(scaled)
        if zero_point is not None:
            unclipped = elementwise(lax.add, unclipped, zero_point)
        if not self.signed:
            level = clip(unclipped, low, high)
            return Snapped(lax.abs(level) if zero_point is None else level, unclipped)
        # Codes have no -0, so 0 is added to those of several bits. Not a constant, even where the
        # width is one: XLA takes ``x + 0`` for ``x``, and which 0 is larger for its own choice.
        one = lax.round(lax.optimization_barrier(bits)) == 1.0
        odd = one.astype(scaled.dtype)
        if rounding.is_nearest:
            # For the sign, the quotient is taken so large that it rounds to itself, and is read
            # once: XLA writes out a quotient that is read twice, another pass over ``x``.
            most: jax.Array | float = 2.0**127
            if zero_point is not None:
                most = select(jnp.abs(zero_point) <= 1.0, most, 2.0**100)
            grown = select(one, most, 1.0)
            shifted = rounding.apply(elementwise(lax.mul, scaled, grown))
            if zero_point is not None:
                shifted += zero_point * grown
            # An integer n of one bit becomes 2n + 1, which is never 0, and has its sign.
            level = elementwise(lax.mul, shifted, elementwise(lax.add, odd, 1.0))
            level = elementwise(lax.add, level, odd)
            return Snapped(clip(level, low, high), unclipped)
        shifted = scaled if zero_point is None else scaled + zero_point
        signs = 2.0 * rounding.apply(0.5 * jnp.clip(shifted, -1.0, 1.0) + 0.5) - 1.0
        signs = jnp.where(jnp.isnan(shifted), shifted, signs)
        level = jnp.where(one, signs, jnp.clip(unclipped, low, high) + odd)
        return Snapped(level, unclipped)

    def narrowed(self, bits: int) -> IntegerFormat:
        """The same codes in a container of ``bits``; one signed bit has codes of its own."""
        return dataclasses.replace(self, max_bits=min(max(bits, 1), self.max_bits))

    def largest_centered_code(self, *, symmetric: bool) -> int:
        """``2^(max_bits-1)`` for signed symmetric codes, ``2^max_bits - 1`` for all others."""
        if self.signed and symmetric:
            return 1 << (self.max_bits - 1)
        return max((1 << self.max_bits) - 1, 2)


def integer(
    *,
    max_bits: int = 8,
    signed: bool = True,
    narrow: bool = False,
    scale_rule: ScaleRule = REAL,
) -> IntegerFormat:
    """An integer format whose widths in use are at most ``max_bits``.

    Args:
      max_bits: bits of the container, 1 to 16; the width in use is an array in ``QParams``.
      signed: two's complement, or unsigned.
      narrow: leave out the lowest code, so that signed codes are symmetric around zero.
      scale_rule: ``qj.formats.POWER_OF_TWO`` makes it dynamic fixed point: a sign, integer bits and
        ``-log2 scale`` fraction bits, chosen for each tensor or group.

    Raises:
      ArgumentError: ``max_bits`` is no whole number.
      FormatError: it lies outside 1..16.

    >>> import jax.numpy as jnp
    >>> low, high = integer(max_bits=8).level_range(jnp.array([1.0, 2.0, 4.0, 8.0]))
    >>> [int(v) for v in low], [int(v) for v in high]
    ([-1, -2, -8, -128], [1, 1, 7, 127])

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018,
    section 2.
    """
    return IntegerFormat(max_bits=max_bits, signed=signed, narrow=narrow, scale_rule=scale_rule)
