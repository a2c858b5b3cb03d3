"""The scale that learned step sizes start from."""

from __future__ import annotations

import jax.numpy as jnp

from quantjax.formats import divide_by_scale
from quantjax.ranges.base import Range, RangeRule, Target
from quantjax.statistics import Statistics


def _range(statistics: Statistics, target: Target) -> Range:
    format, bits, theta = target.format, target.bits, target.theta
    _, q_max = format.level_range(bits, theta)
    root = jnp.sqrt(jnp.maximum(q_max, 1.0))
    scale = divide_by_scale(2.0 * statistics.moments.magnitude, root)
    span = scale * format.steps(bits, symmetric=target.symmetric, theta=theta)
    low, high = statistics.extremes
    # The mean of values near the largest number overflows, the scale of the smallest ones vanishes.
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    is_tiny = ~(span > 0.0)
    span = jnp.where(jnp.isfinite(span) & ~is_tiny, span, largest)
    if target.symmetric:
        return Range(-span, span, statistics.batches > 0)
    span = jnp.where(is_tiny & (low < 0.0) & (high > 0.0), 2.0 * span, span)
    # All of the span on the side where the data are, else half of it on either side.
    below = jnp.where(low >= 0.0, 0.0, jnp.where(high <= 0.0, -span, -0.5 * span))
    return Range(below, below + span, statistics.batches > 0)


LSQ = RangeRule("lsq", _range)
"""``scale = 2 E|x| / √q_max``: where LSQ starts from, with ``q_max`` the highest code.

An asymmetric quantizer gets that scale, too: from 0 up for data that are never negative, about 0
for the rest, to within the rounding of its bounds.

Sharp edges: it is a start for training. The range may be wider than what was seen.

Source: Esser et al., Learned step size quantization, 2020, section 2.1.
"""
