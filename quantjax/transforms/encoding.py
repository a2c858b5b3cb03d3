"""The codes of one parameter, some rows at a time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.affine import QParams, Scaling
from quantjax.formats import Format
from quantjax.qtensor import encode_codes
from quantjax.rounding import Rounding
from quantjax.transforms.keys import Key

PARTS = 16
"""A parameter is encoded in at most so many parts, one after another."""
SMALL = 1 << 16
"""Entries of a parameter that is encoded at once."""


class Encoding(NamedTuple):
    """What is static about it; ``dtypes`` are those that the parameter is cast to on its way."""

    format: Format
    rounding: Rounding
    scaling: Scaling
    dtypes: tuple[Any, ...]


def encoded_codes(
    static: Encoding, leaf: jax.Array, qparams: QParams, key: Key | None
) -> jax.Array:
    """Codes of the whole, one an entry."""
    for dtype in static.dtypes:
        leaf = leaf.astype(dtype)
    arguments = static.format, static.rounding, key, static.scaling
    return encode_codes(leaf, qparams, *arguments)


@functools.partial(jax.jit, static_argnums=2)
def codes_by_parts(
    leaf: jax.Array, qparams: QParams, static: Encoding, key: Key | None
) -> jax.Array:
    """One compiled program a shape, some rows at a time: all at once would hold a leaf of floats,
    and operation by operation several.

    Args:
      qparams: ``bits`` and ``theta`` of the parameter's rank, as scales are.
    """
    parts = _parts(leaf, qparams)
    if parts == 1:
        return encoded_codes(static, leaf, qparams, key)

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] == 1:
            return jnp.broadcast_to(x, (parts, *x.shape))
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    def some(part: Any) -> jax.Array:
        rows, qparams, key = part
        return encoded_codes(static, rows, qparams, key)

    keys = None if key is None else jax.random.split(key, parts)
    codes = lax.map(some, (split(leaf), jax.tree.map(split, qparams), keys))
    return codes.reshape(leaf.shape)


def _parts(leaf: jax.Array, qparams: QParams) -> int:
    """How many parts of equal size, each of whole groups: one of a small leaf, whose loop would
    only be compiled."""
    if leaf.size <= SMALL or leaf.shape[0] == 1:
        return 1
    count = leaf.shape[0]
    groups = {array.shape[0] for array in jax.tree.leaves(qparams)} - {1}
    # Groups that the rows are no multiple of have a shorter last one, which a part would not see.
    if any(count % size for size in groups):
        return 1
    return max(n for n in range(1, PARTS + 1) if all(size % n == 0 for size in (count, *groups)))
