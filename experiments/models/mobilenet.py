"""MobileNetV2: inverted residuals with depthwise convolutions; it knows nothing of quantization."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.errors import ModelShapeError


class Stage(NamedTuple):
    """Blocks of equal size.

    Attributes:
      expansion: channels inside a block over those that enter it.
      channels: that leave each block.
      blocks: how many.
      stride: of the first one; the others keep the size.
    """

    expansion: int
    channels: int
    blocks: int
    stride: int


IMAGENET_STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
"""Table 2 of the paper, for images of 224 x 224."""

CIFAR_STAGES = (IMAGENET_STAGES[0], Stage(6, 24, 2, 1), *IMAGENET_STAGES[2:])
"""The same with one stride less, for images of 32 x 32 and a first convolution of stride 1."""


class InvertedResidual(nn.Module):
    """Channels are made more, filtered each by itself, and made fewer; the input is added.

    The last convolution is linear; the input is added where the shape stays.
    """

    stage: Stage
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """``(batch, height, width, channels)`` -> ``stage.channels``, over the stride."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        inner, y = x.shape[-1] * self.stage.expansion, x
        if self.stage.expansion > 1:
            y = nn.Conv(inner, (1, 1), use_bias=False, name="expand")(y)
            y = jax.nn.relu6(norm(name="expand_norm")(y))
        depthwise = nn.Conv(
            inner,
            (3, 3),
            strides=(self.stride, self.stride),
            padding=((1, 1), (1, 1)),
            feature_group_count=inner,
            use_bias=False,
            name="depthwise",
        )
        y = jax.nn.relu6(norm(name="depthwise_norm")(depthwise(y)))
        y = nn.Conv(self.stage.channels, (1, 1), use_bias=False, name="project")(y)
        y = norm(name="project_norm")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """A convolution, stages of inverted residuals, a convolution of 1 x 1, one dense layer.

    Attributes:
      stages: of blocks.
      classes: how many.
      stem, head: channels of the first and of the last convolution.
      stem_stride: 1 for images of 32 x 32, 2 for those of 224 x 224.

    Raises:
      ModelShapeError: no stage, or one without blocks.

    Source: Sandler, Howard, Zhu, Zhmoginov and Chen, MobileNetV2: inverted residuals and linear
    bottlenecks, 2018, sections 3.3 and 4. For small images the strides of the first convolution
    and of the second stage are 1, so that 4 x 4 pixels reach the mean.
    """

    stages: tuple[Stage, ...] = CIFAR_STAGES
    classes: int = 10
    stem: int = 32
    head: int = 1280
    stem_stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits ``(batch, classes)`` of images ``(batch, height, width, channels)``."""
        _check_stages(self.stages)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = nn.Conv(
            self.stem,
            (3, 3),
            strides=(self.stem_stride, self.stem_stride),
            padding=((1, 1), (1, 1)),
            use_bias=False,
            name="stem",
        )
        x = jax.nn.relu6(norm(name="stem_norm")(conv(x)))
        for number, stage in enumerate(self.stages):
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                block = InvertedResidual(stage, stride, name=f"stage{number}_{index}")
                x = block(x, train=train)
        x = nn.Conv(self.head, (1, 1), use_bias=False, name="head")(x)
        x = jax.nn.relu6(norm(name="head_norm")(x))
        return nn.Dense(self.classes, name="linear")(jnp.mean(x, axis=(1, 2)))


def _check_stages(stages: tuple[Stage, ...]) -> None:
    if not stages or any(min(stage) < 1 for stage in stages):
        raise ModelShapeError(
            "a stage without blocks, channels or stride, or no stage at all",
            where=f"stages={stages}",
            fix="Stage(expansion=6, channels=24, blocks=2, stride=1)",
        )


def small_mobilenet(classes: int = 10) -> MobileNetV2:
    """Four stages of the CIFAR network, for runs of minutes on a CPU: 258,826 parameters."""
    return MobileNetV2(CIFAR_STAGES[:4], classes, head=256)
