"""The vision transformer; it knows nothing of quantization."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.errors import ModelShapeError

EPSILON = 1e-6  # of LayerNorm, as in the authors' code


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTShape:
    """The sizes of a vision transformer; by default ViT-Ti with patches of 4 x 4.

    Attributes:
      patch: pixels of a patch, in height and in width.
      width: features of a token.
      layers, heads: how many.
      hidden: features inside each feed-forward network.
      classes: how many.

    Raises:
      ModelShapeError: heads do not divide the width, or a size below 1.
    """

    patch: int = 4
    width: int = 192
    layers: int = 12
    heads: int = 3
    hidden: int = 768
    classes: int = 10

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1 or self.width % self.heads:
            raise ModelShapeError(
                f"{self.width} features in {self.heads} heads, or a size below 1",
                where=str(self),
                fix=f"width={64 * max(self.heads, 1)}",
            )


class EncoderBlock(nn.Module):
    """Attention and a network of two layers, each added to its input and normalized before."""

    shape: ViTShape

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, tokens, width)`` to the same."""
        y = nn.LayerNorm(epsilon=EPSILON, name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.shape.heads, name="attention")(y, y)
        y = nn.LayerNorm(epsilon=EPSILON, name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(self.shape.hidden, name="up")(y), approximate=False)
        return x + nn.Dense(self.shape.width, name="down")(y)


class ViT(nn.Module):
    """Patches become tokens by a convolution, a class token goes in front, and decides at the end.

    Learned positions are added; the number of parameters therefore depends on the image's size.

    Raises:
      ModelShapeError: the patch does not divide the image.

    Source: Dosovitskiy et al., An image is worth 16x16 words: transformers for image recognition at
    scale, 2021, section 3.1; the sizes of Touvron et al., Training data-efficient image
    transformers & distillation through attention, 2021, table 1 (DeiT-Ti).
    """

    shape: ViTShape = ViTShape()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(batch, classes)`` of images ``(batch, height, width, channels)``."""
        shape, patch = self.shape, (self.shape.patch, self.shape.patch)
        if x.ndim != 4 or x.shape[1] % shape.patch or x.shape[2] % shape.patch:
            raise ModelShapeError(
                f"images of shape {x.shape} in patches of {shape.patch} x {shape.patch}",
                why="the patch divides height and width of (batch, height, width, channels)",
                fix="ViTShape(patch=4) for images of 32 x 32",
            )
        x = nn.Conv(shape.width, patch, strides=patch, padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, shape.width)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, shape.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, shape.width)), x], axis=1)
        normal = nn.initializers.normal(0.02)
        x = x + self.param("positions", normal, (1, x.shape[1], shape.width))
        for index in range(shape.layers):
            x = EncoderBlock(shape, name=f"layer{index}")(x)
        x = nn.LayerNorm(epsilon=EPSILON, name="norm")(x[:, 0])
        return nn.Dense(shape.classes, name="linear")(x)


def vit_tiny(classes: int = 10) -> ViT:
    """ViT-Ti with patches of 4 x 4: 5,362,762 parameters for images of 32 x 32, ten classes."""
    return ViT(ViTShape(classes=classes))
