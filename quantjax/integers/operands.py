"""One operand of an integer product."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Int32

from quantjax.formats import Format


class IntegerOperand(NamedTuple):
    """``operand ≈ (codes - zero_point) · factor``.

    Attributes:
      codes: int8, the operand's own shape; unsigned codes are moved down by 128.
      zero_point: in the same numbering, of the scale's shape; None where it is known to be 0.
      factor: the scale.
    """

    codes: Int8[Array, "..."]
    zero_point: Int32[Array, "..."] | None
    factor: Float[Array, "..."]


def shift_of(format: Format) -> int:
    """What moves the codes of a container of at most 8 bits into int8."""
    return 0 if format.signed else 128


def int8_codes(codes: Int[Array, "..."], format: Format) -> Int8[Array, "..."]:
    """Stored codes, int8 or uint8, as int8; an unsigned code ``q`` becomes ``q - 128``."""
    if format.signed:
        return codes.astype(jnp.int8)
    return (codes.astype(jnp.int32) - shift_of(format)).astype(jnp.int8)
