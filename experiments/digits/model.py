"""A small convolutional network with batch norm; it knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax


class DigitsCNN(nn.Module):
    """Three blocks of convolution, batch norm, ReLU, the last two pooled; then one dense layer."""

    channels: Sequence[int] = (16, 32, 32)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits ``(batch, classes)`` of images ``(batch, 8, 8, 1)``."""
        for index, channels in enumerate(self.channels):
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
            if index > 0:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.classes)(x)
