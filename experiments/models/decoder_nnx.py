"""The decoder of :mod:`experiments.models.decoder` as a module of ``flax.nnx``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.models.attention import (
    FLOAT_CACHE,
    Cache,
    CacheCodec,
    attend_with_cache,
    check_tokens,
    rotate,
)
from experiments.models.decoder import DecoderShape


class Layer(nnx.Module):
    """Attention and a gated feed-forward network; see the linen one."""

    def __init__(self, shape: DecoderShape, *, rngs: nnx.Rngs) -> None:
        def dense(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        keys = shape.kv_heads * shape.head_features
        self.attention_norm = nnx.RMSNorm(shape.width, epsilon=shape.epsilon, rngs=rngs)
        self.query = dense(shape.width, shape.width)
        self.key = dense(shape.width, keys)
        self.value = dense(shape.width, keys)
        self.output = dense(shape.width, shape.width)
        self.mlp_norm = nnx.RMSNorm(shape.width, epsilon=shape.epsilon, rngs=rngs)
        self.gate = dense(shape.width, shape.hidden)
        self.up = dense(shape.width, shape.hidden)
        self.down = dense(shape.hidden, shape.width)
        self.shape = shape

    def __call__(
        self,
        x: Float[Array, "b t w"],
        cache: Cache | None,
        positions: Int[Array, "t"],
        codec: CacheCodec,
    ) -> tuple[Float[Array, "b t w"], Cache | None]:
        """The tokens after this layer, and its cache with these tokens in it."""
        shape = self.shape

        def heads(features: jax.Array, count: int) -> jax.Array:
            return features.reshape(*x.shape[:2], count, shape.head_features)

        y = self.attention_norm(x)
        query = rotate(heads(self.query(y), shape.heads), positions, shape.rotary_base)
        keys = rotate(heads(self.key(y), shape.kv_heads), positions, shape.rotary_base)
        values = heads(self.value(y), shape.kv_heads)
        mixed, cache = attend_with_cache(query, keys, values, positions, cache, codec)
        x = x + self.output(mixed.reshape(x.shape))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), cache


class Decoder(nnx.Module):
    """The same network: layers made by ``nnx.vmap``, run by ``nnx.scan``.

    Source: as of :class:`experiments.models.decoder.Decoder`.
    """

    def __init__(
        self, shape: DecoderShape, *, codec: CacheCodec = FLOAT_CACHE, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        create = nnx.vmap(lambda rngs: Layer(shape, rngs=rngs), in_axes=(0,), out_axes=0)
        self.layers = nnx.split_rngs(splits=shape.layers)(create)(rngs)
        self.norm = nnx.RMSNorm(shape.width, epsilon=shape.epsilon, rngs=rngs)
        self.shape, self.codec = shape, codec

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of the token after each, of whole texts ``(batch, length)``."""
        check_tokens(tokens, self.shape.positions)
        return self._through(tokens, None, jnp.arange(tokens.shape[1]))[0]

    def step(
        self, tokens: Int[Array, "b t"], cache: Any, position: Int[Array, ""]
    ) -> tuple[Float[Array, "b t v"], Any]:
        """Logits of the token after each, and the cache with these tokens in it."""
        check_tokens(tokens, self.shape.positions)
        positions = jnp.asarray(position, jnp.int32) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return self._through(tokens, cache, positions)

    def _through(
        self, tokens: jax.Array, cache: Any, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        codec = self.codec

        def run(x: jax.Array, layer: Layer, cache: Any) -> tuple[jax.Array, Any]:
            return layer(x, cache, positions, codec)

        scanned = nnx.scan(run, in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
        x, cache = scanned(self.embedding(tokens), self.layers, cache)
        return self.embedding.attend(self.norm(x)), cache


def from_linen(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Params for :func:`quantjax.adapters.nnx.functional`, of the linen decoder's own.

    Both have the same names, and a leading axis of layers.
    """
    return dict(variables["params"])
