"""Exact counts in two words of 32 bits: no limit at 2^24, where float32 stops, or at 2^32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

WORD = 32


class Count(NamedTuple):
    """``high · 2^32 + low``; wraps at ``2^64``."""

    low: UInt32[Array, "..."]
    high: UInt32[Array, "..."]


def zero(shape: Sequence[int]) -> Count:
    """Nothing counted."""
    return Count(jnp.zeros(tuple(shape), jnp.uint32), jnp.zeros(tuple(shape), jnp.uint32))


def of(values: UInt32[Array, "..."]) -> Count:
    """Numbers below ``2^32``."""
    return Count(values, jnp.zeros_like(values))


def add(left: Count, right: Count) -> Count:
    """The sum, with its carry.

    >>> total = add(of(jnp.uint32(2**32 - 1)), of(jnp.uint32(2)))
    >>> int(total.high), int(total.low)
    (1, 1)
    """
    low = left.low + right.low
    carry = (low < left.low).astype(jnp.uint32)
    return Count(low, left.high + right.high + carry)


def scatter_add(count: Count, index: jax.Array, size: int) -> Count:
    """Entries with the same ``index`` of ``0 .. size - 1`` added up, along the one axis there is.

    Those with the index ``size`` are left out. Exact for up to 65,536 entries: sums of half words
    stay inside a word.
    """

    def summed(words: jax.Array) -> jax.Array:
        # One place more, not an index out of bounds: jax.experimental.checkify reports those.
        places = jnp.zeros(size + 1, jnp.uint32).at[index]
        return places.add(words, mode="promise_in_bounds", wrap_negative_indices=False)[:-1]

    half = jnp.uint32(16)
    mask = jnp.uint32(0xFFFF)
    lower, upper = summed(count.low & mask), summed(count.low >> half)
    low = lower + (upper << half)
    carry = (low < lower).astype(jnp.uint32) + (upper >> half)
    return Count(low, summed(count.high) + carry)


def as_float(count: Count) -> Float[Array, "..."]:
    """The nearest float32, up to one rounding of each word."""
    return count.high.astype(jnp.float32) * 2.0**WORD + count.low.astype(jnp.float32)


def as_integer(count: Count) -> np.ndarray:
    """Concrete counts, exactly (NumPy uint64).

    >>> int(as_integer(of(jnp.uint32(7))))
    7
    """
    high = np.asarray(count.high).astype(np.uint64)
    return (high << np.uint64(WORD)) | np.asarray(count.low).astype(np.uint64)
