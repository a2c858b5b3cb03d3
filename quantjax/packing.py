"""Codes of less than a byte, several to a byte.

Bytes lie along the **last axis** and nowhere else. Whatever is done along the other axes (slicing,
``vmap``, ``lax.scan``, stacking, sharding) is therefore done to bytes as it is to codes, without
unpacking. A row whose length the codes of a byte do not divide is filled up with zero bits, each
row for itself.

The first code of a byte takes its lowest bits, as in ONNX's INT4 tensors. The code sizes are those
of containers (:attr:`quantjax.formats.Format.code_bits`), static; the width in use may be smaller,
and may be traced.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8, UInt8

from quantjax import errors

PACKED_BITS = (1, 2, 4)
"""Code sizes of which several share a byte."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Packing:
    """How codes lie in bytes: all that :func:`unpack` needs to know besides the bytes.

    Static: a pytree without leaves, so that ``jit``, ``vmap`` and ``scan`` return it as it is.

    Attributes:
      bits: of one code: 1, 2 or 4.
      length: codes along the last axis.
      signed: two's complement, or unsigned. One signed bit has the codes -1 and +1, stored as 0
        and 1.

    Raises:
      FormatError: another number of bits.

    >>> Packing(bits=4, length=5, signed=True).packed_length
    3
    """

    bits: int
    length: int
    signed: bool

    def __post_init__(self) -> None:
        if self.bits not in PACKED_BITS:
            raise errors.FormatError(
                f"codes of {self.bits} bits do not share a byte",
                why="codes of 1, 2 and 4 bits do",
                fix="keep these codes as they are; qj.packing.can_pack tells",
            )

    @property
    def codes_per_byte(self) -> int:
        """8, 4 or 2."""
        return 8 // self.bits

    @property
    def packed_length(self) -> int:
        """Bytes along the last axis."""
        return -(-self.length // self.codes_per_byte)

    @property
    def dtype(self) -> np.dtype:
        """Of unpacked codes: int8 or uint8."""
        return np.dtype(np.int8 if self.signed else np.uint8)


def can_pack(code_bits: int, ndim: int) -> bool:
    """Whether codes of this size, in an array of this rank, can share bytes.

    >>> can_pack(4, ndim=2), can_pack(8, ndim=2), can_pack(4, ndim=0)
    (True, False, False)
    """
    return code_bits in PACKED_BITS and ndim > 0


def pack(
    codes: Int8[Array, "*rows n"] | UInt8[Array, "*rows n"], bits: int, *, signed: bool
) -> tuple[UInt8[Array, "*rows n_packed"], Packing]:
    """Put ``8 // bits`` codes into each byte, the first into the lowest bits.

    ``byte[j] = Σₖ (code[j · 8/bits + k] mod 2^bits) · 2^(k · bits)``

    Args:
      codes: int8 (``signed``) or uint8, of rank 1 or more. Only the lowest ``bits`` bits of a code
        are kept: one outside the range comes back as another code and leaves its neighbours alone.
      bits: 1, 2 or 4; static.
      signed: two's complement. One signed bit keeps the sign; the codes are -1 and +1.

    Returns:
      The bytes, of shape ``(*rows, ⌈n · bits / 8⌉)``, and how to read them.

    Raises:
      FormatError: ``bits`` of another size, a scalar, or codes of another dtype.

    >>> packed, packing = pack(jnp.array([1, -2, 7], jnp.int8), 4, signed=True)
    >>> [hex(byte) for byte in packed.tolist()]
    ['0xe1', '0x7']
    >>> unpack(packed, packing).tolist()
    [1, -2, 7]
    """
    codes = jnp.asarray(codes)
    if codes.ndim == 0:
        raise errors.FormatError(
            "a single code cannot be packed",
            why="codes share bytes along the last axis, and a scalar has none",
            fix="keep it as it is; qj.packing.can_pack tells",
        )
    packing = Packing(bits, codes.shape[-1], signed)
    if codes.dtype != packing.dtype:
        raise errors.FormatError(
            f"codes of {codes.dtype} cannot be packed as "
            f"{'signed' if signed else 'unsigned'} codes of {bits} bits",
            where=f"codes of shape {codes.shape}",
            fix=f"codes.astype(jnp.{packing.dtype}), signed={signed}",
        )
    return _packed(codes, packing), packing


@functools.partial(jax.jit, static_argnums=1, inline=True)  # one program where called eagerly
def _packed(codes: jax.Array, packing: Packing) -> jax.Array:
    bits, per_byte = packing.bits, packing.codes_per_byte
    if packing.signed and bits == 1:
        fields = (codes >= 0).astype(jnp.uint8)
    else:
        fields = lax.bitcast_convert_type(codes, jnp.uint8) & jnp.uint8(2**bits - 1)
    missing = packing.packed_length * per_byte - packing.length
    fields = jnp.pad(fields, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    fields = fields.reshape(*codes.shape[:-1], packing.packed_length, per_byte)
    moved = [fields[..., k] << jnp.uint8(k * bits) for k in range(per_byte)]
    return functools.reduce(lax.bitwise_or, moved)


def unpack(
    packed: UInt8[Array, "*rows n_packed"], packing: Packing
) -> Int8[Array, "*rows n"] | UInt8[Array, "*rows n"]:
    """The codes that :func:`pack` was given, exactly: int8 where they are signed, else uint8.

    ``code[j · 8/bits + k]`` is bits ``k · bits`` to ``(k + 1) · bits - 1`` of ``byte[j]``,
    sign-extended.

    Args:
      packed: uint8; any of its axes but the last may have been sliced, stacked or mapped over.
      packing: as returned by :func:`pack`.

    Raises:
      FormatError: bytes of another dtype, or a last axis of another length.

    >>> unpack(jnp.array([0b10_11_00_01], jnp.uint8), Packing(2, 3, signed=True)).tolist()
    [1, 0, -1]
    """
    packed = jnp.asarray(packed)
    if packed.dtype != jnp.uint8 or packed.shape[-1:] != (packing.packed_length,):
        raise errors.FormatError(
            f"{packed.dtype} of shape {packed.shape} does not hold {packing.length} codes a row",
            why=f"those take {packing.packed_length} bytes of uint8 along the last axis",
            fix="slice along the other axes only, or unpack first",
        )
    return _unpacked(packed, packing)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _unpacked(packed: jax.Array, packing: Packing) -> jax.Array:
    # By words of up to four bytes, each of which gives 8 to 32 codes: XLA on CPU vectorizes such an
    # innermost loop, and not one of two. The first byte of a word is its lowest.
    bits, word_bits = packing.bits, 8 * math.gcd(packing.packed_length, 4)
    dtype = np.dtype(f"{'int' if packing.signed else 'uint'}{word_bits}")
    words = packed.view(dtype)
    wide = (*words.shape, word_bits // bits)
    # Each code up to the top of its word, then down again, with the sign where there is one. The
    # distances are computed (iota), since they are slower to read from a constant array.
    place = lax.broadcasted_iota(dtype, wide, words.ndim)
    up = dtype.type(word_bits - bits) - dtype.type(bits) * place
    copies = lax.broadcast_in_dim(words, wide, range(words.ndim))
    codes = (copies << up) >> dtype.type(word_bits - bits)
    if packing.signed and bits == 1:
        codes = codes * dtype.type(-2) - dtype.type(1)  # 0 -> -1, -1 -> +1
    codes = codes.astype(packing.dtype)
    codes = codes.reshape(*packed.shape[:-1], packing.packed_length * packing.codes_per_byte)
    return codes[..., : packing.length]
