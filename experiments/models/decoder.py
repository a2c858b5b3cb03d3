"""A decoder-only transformer of Llama 2's architecture; it knows nothing of quantization."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models.attention import (
    FLOAT_CACHE,
    Cache,
    CacheCodec,
    attend_with_cache,
    check_tokens,
    empty_cache,
    rotate,
)
from experiments.models.errors import ModelShapeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes of a decoder.

    Attributes:
      width: features of a token.
      hidden: features inside each feed-forward network.
      layers, heads, kv_heads: how many; ``heads / kv_heads`` query heads share keys and values.
      vocabulary: tokens that there are.
      positions: the longest text.
      rotary_base: of the angles of positions.
      epsilon: added to mean squares.

    Raises:
      ModelShapeError: heads do not divide the width, or key heads the heads; an odd number of
        features a head, which rotations pair; a size below 1.
    """

    width: int = 64
    hidden: int = 172
    layers: int = 5
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 512
    positions: int = 512
    rotary_base: float = 10_000.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        names = ("width", "hidden", "layers", "heads", "kv_heads", "vocabulary", "positions")
        small = [name for name in names if getattr(self, name) < 1]
        if small:
            raise ModelShapeError(f"{', '.join(small)} below 1", where=str(self), fix="at least 1")
        if self.width % self.heads or self.heads % self.kv_heads or self.head_features % 2:
            raise ModelShapeError(
                f"{self.width} features in {self.heads} heads, {self.kv_heads} of keys",
                why="key heads divide the heads, these the width, into an even number of features",
                fix=f"heads={self.kv_heads}, width={2 * self.kv_heads * self.head_features or 2}",
            )

    @property
    def head_features(self) -> int:
        """Features of one head."""
        return self.width // self.heads

    def empty_cache(
        self, batch: int, *, positions: int | None = None, codec: CacheCodec = FLOAT_CACHE
    ) -> Cache:
        """A cache of nothing, for ``positions`` tokens or as many as there are positions."""
        length = self.positions if positions is None else positions
        shape = (batch, length, self.kv_heads, self.head_features)
        return empty_cache(codec, shape, self.layers)


class Layer(nn.Module):
    """Attention and a gated feed-forward network, each added to its input and normalized before."""

    shape: DecoderShape
    codec: CacheCodec = FLOAT_CACHE

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t w"], cache: Cache | None, positions: Int[Array, "t"]
    ) -> tuple[Float[Array, "b t w"], Cache | None]:
        """The tokens after this layer, and its cache with these tokens in it."""
        shape = self.shape

        def heads(name: str, count: int) -> jax.Array:
            features = nn.Dense(count * shape.head_features, use_bias=False, name=name)(y)
            return features.reshape(*y.shape[:2], count, shape.head_features)

        y = nn.RMSNorm(epsilon=shape.epsilon, name="attention_norm")(x)
        query, keys = (
            rotate(heads(name, count), positions, shape.rotary_base)
            for name, count in (("query", shape.heads), ("key", shape.kv_heads))
        )
        values = heads("value", shape.kv_heads)
        mixed, cache = attend_with_cache(query, keys, values, positions, cache, self.codec)
        x = x + nn.Dense(shape.width, use_bias=False, name="output")(mixed.reshape(x.shape))
        y = nn.RMSNorm(epsilon=shape.epsilon, name="mlp_norm")(x)
        gate = nn.silu(nn.Dense(shape.hidden, use_bias=False, name="gate")(y))
        up = nn.Dense(shape.hidden, use_bias=False, name="up")(y)
        return x + nn.Dense(shape.width, use_bias=False, name="down")(gate * up), cache


class Decoder(nn.Module):
    """Embedded tokens through layers that are stacked and scanned, and back by the same table.

    RMSNorm before each part, rotary positions, grouped queries, SwiGLU; no biases. The parameters
    of all layers are one array each, ``layers/query/kernel`` of ``(layers, width, width)``.

    Attributes:
      shape: the sizes.
      codec: how a cache holds keys and values.

    >>> model = Decoder(DecoderShape(width=8, hidden=12, layers=2, heads=2, kv_heads=1))
    >>> tokens = jnp.array([[1, 5, 7]])
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> model.apply(variables, tokens).shape
    (1, 3, 512)
    >>> cache = model.shape.empty_cache(1, positions=16)
    >>> logits, cache = model.apply(variables, tokens, cache, jnp.int32(0), method="step")

    Source: Touvron et al., Llama 2: open foundation and fine-tuned chat models, 2023, section 2.2;
    Zhang and Sennrich, Root mean square layer normalization, 2019; Shazeer, GLU variants improve
    transformer, 2020, equation 6.
    """

    shape: DecoderShape
    codec: CacheCodec = FLOAT_CACHE

    def setup(self) -> None:
        """The parts; linen calls this."""
        shape = self.shape
        self.embedding = nn.Embed(shape.vocabulary, shape.width)
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=shape.layers,
        )
        self.layers = scanned(shape, self.codec)
        self.norm = nn.RMSNorm(epsilon=shape.epsilon)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of the token after each, of whole texts ``(batch, length)``.

        Raises:
          ModelShapeError: tokens are no integers of this shape, or more than the positions.
        """
        check_tokens(tokens, self.shape.positions)
        return self._through(tokens, None, jnp.arange(tokens.shape[1]))[0]

    def step(
        self, tokens: Int[Array, "b t"], cache: Any, position: Int[Array, ""]
    ) -> tuple[Float[Array, "b t v"], Any]:
        """Logits of the token after each, and the cache with these tokens in it.

        The first token is at ``position``, and attends to all in the cache before it.

        Raises:
          ModelShapeError: tokens are no integers ``(batch, length)``, or more than the positions.

        Sharp edges: where the cache has no room for the last token, all logits are NaN.
        """
        check_tokens(tokens, self.shape.positions)
        positions = jnp.asarray(position, jnp.int32) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return self._through(tokens, cache, positions)

    def _through(
        self, tokens: jax.Array, cache: Any, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        x, cache = self.layers(self.embedding(tokens), cache, positions)
        return self.embedding.attend(self.norm(x)), cache


def stories260k_shape() -> DecoderShape:
    """The sizes of Karpathy's stories260K: 260,032 parameters."""
    return DecoderShape()
