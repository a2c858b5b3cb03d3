"""A small convolutional network with batch norm, of any size; it knows nothing of quantization."""

from __future__ import annotations

import flax.linen as nn
import jax


class SmallCNN(nn.Module):
    """Convolutions of 3x3 with batch norm and ReLU, then one dense layer.

    Attributes:
      channels, strides: of each convolution. Strides take the place of pooling, whose gradients
        are slow on CPU.
      classes: how many.
    """

    channels: tuple[int, ...] = (16, 32, 64)
    strides: tuple[int, ...] = (2, 2, 2)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits ``(batch, classes)`` of images ``(batch, height, width, channels)``."""
        for channels, stride in zip(self.channels, self.strides, strict=True):
            x = nn.Conv(channels, (3, 3), strides=(stride, stride), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))


class PooledCNN(nn.Module):
    """Convolutions of 32, 64 and 64 channels with max pooling and a dense layer, no batch norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images ``(batch, 28, 28, 1)``."""
        for channels in (32, 64, 64):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            if channels < 64 or x.shape[1] > 7:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))
