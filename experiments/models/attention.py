"""Causal attention with rotary positions and shared key heads, and the cache of keys and values.

What decoders have in common, as pure functions: the linen and the nnx one call the same. A cache
is two stores, keys and values; a :class:`CacheCodec` says what a store is, so that the decoder
need not know whether it holds floats or codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models.errors import ModelShapeError

Store = Any
"""A pytree of arrays that holds one tensor ``(batch, positions, kv_heads, features)``."""


class CacheCodec(NamedTuple):
    """How keys and values are held between steps: pure functions.

    Attributes:
      empty: ``shape -> store`` for ``(batch, positions, kv_heads, features)``; reads as zeros.
      write: ``(store, values, position) -> store``, values ``(batch, new, kv_heads, features)``
        in place of the entries from ``position`` on.
      read: ``store -> (batch, positions, kv_heads, features)``, float32.
    """

    empty: Callable[[tuple[int, ...]], Store]
    write: Callable[[Store, Float[Array, "b n h d"], Int[Array, ""]], Store]
    read: Callable[[Store], Float[Array, "b s h d"]]


class Cache(NamedTuple):
    """Keys and values of one layer, or of all: then every leaf has the layers as leading axis."""

    keys: Store
    values: Store


def place_at(held: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """``held`` with ``new`` along axis 1 from ``position`` on."""
    return jax.lax.dynamic_update_slice_in_dim(held, new, position, axis=1)


def _empty(shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def _write(store: jax.Array, values: jax.Array, position: jax.Array) -> jax.Array:
    return place_at(store, values.astype(store.dtype), position)


def _read(store: jax.Array) -> jax.Array:
    return store


FLOAT_CACHE = CacheCodec(_empty, _write, _read)
"""Keys and values as they are, in float32."""


def rotate(
    x: Float[Array, "b t h d"], positions: Int[Array, "t"], base: float
) -> Float[Array, "b t h d"]:
    """Turn each pair of neighbouring features by an angle that grows with the position.

    ``(x_2i, x_2i+1) -> (x_2i cos φ - x_2i+1 sin φ, x_2i sin φ + x_2i+1 cos φ)`` with
    ``φ = position · base^(-2i/d)``: a product of a rotated query and key depends on the distance of
    their positions alone. Pairs are neighbours, as in the paper and in Llama's own code; other
    code pairs ``i`` with ``i + d/2``, which is the same for weights whose rows are permuted.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> [round(float(v), 4) for v in rotate(x, jnp.arange(2), 10000.0).ravel()]
    [1.0, 1.0, -0.3012, 1.3818]

    Source: Su et al., RoFormer: enhanced transformer with rotary position embedding, 2021,
    section 3.2.2 and equation 34.
    """
    cos, sin = (table[None, :, None, :] for table in rotations(positions, x.shape[-1], base))
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape)


def rotations(
    positions: Int[Array, "t"], features: int, base: float
) -> tuple[Float[Array, "t half"], Float[Array, "t half"]]:
    """Cosine and sine of every position's angles, ``features / 2`` of them, in float32."""
    exponents = [base ** (-2 * i / features) for i in range(features // 2)]
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(exponents, jnp.float32)[None]
    return jnp.cos(angles), jnp.sin(angles)


def attend(
    query: Float[Array, "b t h d"],
    keys: Float[Array, "b s k d"],
    values: Float[Array, "b s k d"],
    positions: Int[Array, "t"],
) -> Float[Array, "b t h d"]:
    """Causal attention, ``h / k`` query heads to each head of keys and values.

    ``softmax(Q Kᵀ / √d) V`` over the keys whose position is not after the query's; key ``s`` is at
    position ``s``, query ``t`` at ``positions[t]``. Softmax is in float32.

    Sharp edges: keys and values after the last position are multiplied by zero, so they have to be
    finite.

    Source: Ainslie et al., GQA: training generalized multi-query transformer models from
    multi-head checkpoints, 2023, section 2.2.
    """
    batch, length, heads, features = query.shape
    groups = query.reshape(batch, length, keys.shape[2], heads // keys.shape[2], features)
    scores = jnp.einsum("btkgd,bskd->bkgts", groups, keys) / math.sqrt(features)
    seen = jnp.arange(keys.shape[1])[None, :] <= positions[:, None]
    scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, values)
    return mixed.reshape(query.shape)


def attend_with_cache(
    query: Float[Array, "b t h d"],
    keys: Float[Array, "b t k d"],
    values: Float[Array, "b t k d"],
    positions: Int[Array, "t"],
    cache: Cache | None,
    codec: CacheCodec,
) -> tuple[Float[Array, "b t h d"], Cache | None]:
    """:func:`attend`, to these keys alone or to those of a cache once these are written to it.

    Keys come rotated. With a cache, these keys too are seen as the codec returns them.

    Raises:
      ModelShapeError: more tokens than the cache has positions.

    Sharp edges: a position beyond the cache's end cannot raise under a trace; what is written is
    NaN then, and so is the result.
    """
    if cache is None:
        return attend(query, keys, values, positions), None
    capacity = jax.eval_shape(codec.read, cache.keys).shape[1]
    if query.shape[1] > capacity:
        raise ModelShapeError(
            f"{query.shape[1]} tokens for a cache of {capacity} positions",
            where=f"keys of shape {keys.shape}",
            fix=f"shape.empty_cache(batch, positions={query.shape[1]}) or more",
        )
    fits = positions[-1] < capacity
    keys, values = (jnp.where(fits, new, jnp.nan) for new in (keys, values))
    dtypes = keys.dtype, values.dtype
    cache = Cache(
        codec.write(cache.keys, keys, positions[0]), codec.write(cache.values, values, positions[0])
    )
    keys, values = (
        codec.read(store).astype(dtype) for store, dtype in zip(cache, dtypes, strict=True)
    )
    return attend(query, keys, values, positions), cache


def empty_cache(codec: CacheCodec, shape: tuple[int, ...], layers: int) -> Cache:
    """A cache of nothing for ``layers`` layers, each ``(batch, positions, kv_heads, features)``.

    Every leaf of a store is repeated along a leading axis, widths of codes included, so that each
    layer may be given its own.

    >>> empty_cache(FLOAT_CACHE, (2, 16, 4, 8), layers=5).keys.shape
    (5, 2, 16, 4, 8)
    """
    store = codec.empty(shape)
    stacked = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layers, *jnp.shape(leaf))), store)
    return Cache(stacked, stacked)


def check_tokens(tokens: jax.Array, positions: int) -> None:
    """Tokens are integers ``(batch, length)``, no more than there are positions.

    Raises:
      ModelShapeError: they are not.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ModelShapeError(
            f"tokens are {tokens.dtype} of shape {tokens.shape}",
            why="a decoder reads integers (batch, length)",
            fix="tokens[None], or tokens.astype(jnp.int32)",
        )
    if not 0 < tokens.shape[1] <= positions:
        raise ModelShapeError(
            f"{tokens.shape[1]} tokens for {positions} positions",
            where=f"tokens of shape {tokens.shape}",
            fix=f"between 1 and {positions} tokens, or a longer cache or DecoderShape(positions=)",
        )
