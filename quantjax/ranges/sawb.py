"""Statistics-aware weight binning: a range from two absolute moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.lean import rounded_product
from quantjax.ranges.base import Range, RangeRule, Target, square_root, where_seen
from quantjax.statistics import Statistics

COEFFICIENTS = {
    2: (3.12, -2.064),
    3: (7.509, -6.892),
    4: (12.68, -12.80),
    5: (17.74, -18.64),
    8: (31.76, -35.04),
}
"""``c1`` and ``c2`` by width."""


def coefficients(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``c1`` and ``c2`` at a width of 2 to 8, linear between those that were published.

    >>> [round(float(c), 3) for c in coefficients(jnp.float32(4))]
    [12.68, -12.8]
    """
    # A table, since arithmetic on the width would round otherwise from program to program.
    widths = np.arange(2, 9)
    known, pairs = list(COEFFICIENTS), np.array(list(COEFFICIENTS.values()))
    table = np.stack([np.interp(widths, known, column) for column in pairs.T])
    first, second = jnp.asarray(table, jnp.float32)[:, jnp.clip(bits.astype(jnp.int32) - 2, 0, 6)]
    return first, second


def _range(statistics: Statistics, target: Target) -> Range:
    c1, c2 = coefficients(target.bits)
    low, high = statistics.extremes
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    reach = rounded_product(square_root(statistics.moments.square), c1)
    reach += rounded_product(statistics.moments.magnitude, c2)
    fitted = (reach > 0.0) & jnp.isfinite(reach) & (target.bits >= 2.0) & (target.bits <= 8.0)
    reach = jnp.where(fitted, reach, largest)
    if target.symmetric:
        return Range(-reach, reach, statistics.batches > 0)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    return where_seen(statistics, jnp.maximum(-reach, low), jnp.minimum(reach, high))


SAWB = RangeRule("sawb", _range)
"""``α = c1 √E[w²] + c2 E|w|``, the range ``[-α, α]``.

The coefficients were fitted to six distributions by their authors, for codes ``-α .. α`` without an
own zero, and are published for 2, 3, 4, 5 and 8 bits; 6 and 7 are interpolated here. An asymmetric
range, which the authors do not have, ends at what was seen. At widths outside 2 to 8, and where the
formula is not positive (all entries equal in magnitude, for instance), the range is that of the
largest magnitude.

Source: Choi et al., Accurate and efficient 2-bit quantized neural networks, 2019, section 3;
coefficients as in IBM's fms-model-optimizer, ``sawb_utils.py``.
"""
