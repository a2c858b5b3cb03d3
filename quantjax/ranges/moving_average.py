"""The moving average of each batch's range."""

from __future__ import annotations

import jax.numpy as jnp

from quantjax.ranges.base import Range, RangeRule, Target
from quantjax.statistics import Statistics
from quantjax.statistics.extremes import Extremes, seen


def _range(statistics: Statistics, target: Target) -> Range:
    del target
    low, high, _ = statistics.moving
    return Range(low, high, jnp.any(seen(Extremes(low, high))))


MOVING_AVERAGE = RangeRule("moving_average", _range)
"""The exponential moving average of per-batch minima and maxima, constant 0.01 unless chosen.

Source: Jacob et al., Quantization and training of neural networks for efficient
integer-arithmetic-only inference, 2018, section 3.1; constant and start as in PyTorch's
``MovingAverageMinMaxObserver``.
"""
