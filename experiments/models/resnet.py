"""Residual networks for CIFAR, with shortcuts that have no parameters."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

_PADDING = ((1, 1), (1, 1))


class Block(nn.Module):
    """Two convolutions of 3x3, and the input added: a block of He et al., section 4.2.

    Where the shape changes, the shortcut takes every second pixel and has zeros for the channels
    that are new, half of them before the old ones (option A).
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``(batch, height, width, channels)`` -> the same over ``stride``."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.Conv, self.channels, (3, 3), padding=_PADDING, use_bias=False)
        y = conv(strides=(self.stride, self.stride), name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = norm(name="bn2")(conv(name="conv2")(y))
        new = self.channels - x.shape[-1]
        shortcut = x[:, :: self.stride, :: self.stride]
        if new:
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """``6 n + 2`` layers: a convolution, three stages of ``n`` blocks, one dense layer.

    Attributes:
      blocks: ``n``: 3 for ResNet-20, 5 for ResNet-32, 9 for ResNet-56.
      classes: how many.
      channels: of the first stage; each later one has twice as many.

    Source: He, Zhang, Ren and Sun, Deep residual learning for image recognition, 2016, section 4.2.
    """

    blocks: int = 3
    classes: int = 10
    channels: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits ``(batch, classes)`` of images ``(batch, height, width, 3)``."""
        x = nn.Conv(self.channels, (3, 3), padding=_PADDING, use_bias=False, name="conv1")(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn1")
        x = nn.relu(norm(x))
        for stage in range(3):
            for index in range(self.blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                block = Block(self.channels << stage, stride, name=f"layer{stage + 1}_{index}")
                x = block(x, train=train)
        return nn.Dense(self.classes, name="linear")(jnp.mean(x, axis=(1, 2)))


def resnet20(classes: int = 10) -> ResNet:
    """The network of 20 layers: 269,722 parameters with ten classes."""
    return ResNet(3, classes)


def resnet32(classes: int = 10) -> ResNet:
    """The network of 32 layers: 464,154 parameters with ten classes."""
    return ResNet(5, classes)


def resnet56(classes: int = 10) -> ResNet:
    """The network of 56 layers: 853,018 parameters with ten classes."""
    return ResNet(9, classes)
