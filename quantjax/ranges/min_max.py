"""The whole range that was seen."""

from __future__ import annotations

from quantjax.ranges.base import Range, RangeRule, Target
from quantjax.statistics import Statistics


def _range(statistics: Statistics, target: Target) -> Range:
    del target
    low, high = statistics.extremes
    return Range(low, high, statistics.batches > 0)


MIN_MAX = RangeRule("min_max", _range)
"""``[min x, max x]`` over all that was observed: no value is clipped, outliers cost resolution.

Source: Jacob et al., Quantization and training of neural networks for efficient
integer-arithmetic-only inference, 2018, section 3.1.
"""
