"""The residual networks of :mod:`experiments.models.resnet` as modules of ``flax.nnx``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_PADDING = ((1, 1), (1, 1))


def _conv(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    strides = (stride, stride)
    return nnx.Conv(
        inputs, outputs, (3, 3), strides=strides, padding=_PADDING, use_bias=False, rngs=rngs
    )


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)


class Block(nnx.Module):
    """Two convolutions of 3x3, and the input added; see the linen one."""

    def __init__(self, inputs: int, channels: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv(inputs, channels, stride, rngs)
        self.bn1 = _norm(channels, rngs)
        self.conv2 = _conv(channels, channels, 1, rngs)
        self.bn2 = _norm(channels, rngs)
        self.new, self.stride = channels - inputs, stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, height, width, channels)`` -> the same over ``stride``."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        if self.new:
            before = self.new // 2
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (before, self.new - before)))
        return nnx.relu(y + shortcut)


class ResNet(nnx.Module):
    """``6 n + 2`` layers; the names of its parts are those of the linen network.

    ``module.eval()`` and ``module.train()`` choose the statistics of batch norm, as always in nnx.

    Source: He, Zhang, Ren and Sun, Deep residual learning for image recognition, 2016, section 4.2.
    """

    def __init__(
        self, blocks: int = 3, classes: int = 10, channels: int = 16, *, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = _conv(3, channels, 1, rngs)
        self.bn1 = _norm(channels, rngs)
        self.names = tuple(f"layer{s + 1}_{i}" for s in range(3) for i in range(blocks))
        inputs = channels
        for number, name in enumerate(self.names):
            stage, index = divmod(number, blocks)
            outputs, stride = channels << stage, 2 if stage > 0 and index == 0 else 1
            setattr(self, name, Block(inputs, outputs, stride, rngs=rngs))
            inputs = outputs
        self.linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(batch, classes)`` of images ``(batch, height, width, 3)``."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.linear(jnp.mean(x, axis=(1, 2)))


def resnet20_nnx(classes: int = 10, *, rngs: nnx.Rngs) -> ResNet:
    """The network of 20 layers: 269,722 parameters with ten classes."""
    return ResNet(3, classes, rngs=rngs)


def from_linen(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Params and state for :func:`quantjax.adapters.nnx.functional`, of the linen network's own.

    Parts have the same names in both; batch norm's four arrays are together here.
    """
    return dict(variables["params"]), dict(variables["batch_stats"])
