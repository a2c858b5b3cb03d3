"""The range that holds a given share of the values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.formats import divide_by_scale
from quantjax.ranges.base import Range, RangeRule, Target, known_number, rule_of
from quantjax.statistics import Histogram, Sample, Statistics, as_float


def _below(histogram: Histogram, amount: jax.Array) -> jax.Array:
    """The place below which ``amount`` of the counts lie, linear within a bin."""
    counts = as_float(histogram.counts)
    return _reached(counts, histogram.edges, amount)


def _above(histogram: Histogram, amount: jax.Array) -> jax.Array:
    """The place above which ``amount`` of the counts lie; summed from the top, where few are."""
    counts = as_float(histogram.counts)
    return -_reached(counts[::-1], -histogram.edges[::-1], amount)


def _reached(counts: jax.Array, edges: jax.Array, amount: jax.Array) -> jax.Array:
    sums = jnp.cumsum(counts)
    index = jnp.argmax((sums >= amount) & (counts > 0.0))
    before = sums[index] - counts[index]
    share = divide_by_scale(amount - before, jnp.maximum(counts[index], 1.0))
    return edges[index] + jnp.clip(share, 0.0, 1.0) * (edges[index + 1] - edges[index])


def _between(sample: Sample, amount: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order statistics ``amount`` from both ends, linear between neighbours."""
    some = sample.weights > 0.0
    number = jnp.sum(some, dtype=jnp.int32)
    values = jnp.sort(jnp.where(some, sample.values, jnp.inf))
    first = jnp.minimum(jnp.floor(amount).astype(jnp.int32), jnp.maximum(number - 1, 0))
    share = amount - jnp.floor(amount)

    def at(index: jax.Array) -> jax.Array:
        return values[jnp.clip(index, 0, jnp.maximum(number - 1, 0))]

    low = at(first) + share * (at(first + 1) - at(first))
    high = at(number - 1 - first) - share * (at(number - 1 - first) - at(number - 2 - first))
    return low, high


def _range(statistics: Statistics, target: Target, share: jax.Array) -> Range:
    del target
    share = jnp.asarray(share, jnp.float32)
    number = as_float(statistics.number)
    cut = 0.5 * (1.0 - share)
    distribution = statistics.distribution
    if isinstance(distribution, Histogram):
        low, high = _below(distribution, cut * number), _above(distribution, cut * number)
    else:
        low, high = _between(statistics.sample, cut * jnp.maximum(number - 1.0, 0.0))
    low = jnp.minimum(low, high)  # both are the median at p = 0, from either side of its bin
    least, most = statistics.extremes
    some = number > 0.0
    low = jnp.where(some & (share < 1.0), jnp.clip(low, least, most), least)
    high = jnp.where(some & (share < 1.0), jnp.clip(high, least, most), most)
    valid, calibrated = (share >= 0.0) & (share <= 1.0), statistics.batches > 0
    return Range(jnp.where(valid, low, jnp.nan), jnp.where(valid, high, jnp.nan), calibrated)


def percentile(share: float | jax.Array = 0.999) -> RangeRule:
    """The range between two quantiles: ``[Q((1-p)/2), Q((1+p)/2)]``.

    Quantiles of a tensor at hand are those of ``np.quantile``; those of a histogram are linear
    within a bin. ``p = 1`` is :data:`MIN_MAX`, exactly.

    Args:
      share: ``p``, from 0 to 1; an array may be traced, so that it can be an axis of a sweep.

    Raises:
      QuantizerError: a number outside [0, 1]. A traced one gives NaN, which ``qj.check`` reports.

    Sharp edges: ``p`` is a float32 number, of which ``1 - p`` has three digits at 0.99999. A
    symmetric quantizer covers the larger bound, so it keeps more than ``p``.

    >>> from quantjax import integer, statistics
    >>> from quantjax.ranges import derive
    >>> seen = statistics.of_tensor(jnp.arange(101.0), (1,), with_values=True)
    >>> found = derive(percentile(0.9), seen, Target(integer(), False, jnp.float32(8)))
    >>> round(found.low.item(), 3), round(found.high.item(), 3)
    (5.0, 95.0)

    Source: Wu et al., Integer quantization for deep learning inference, 2020, section 4.1.
    """
    known = known_number(share, "percentile")
    if known is not None and not 0.0 <= known <= 1.0:
        raise errors.QuantizerError(
            f"a share of {known:g} of the values",
            where="the range rule percentile",
            why="it is a part of all values, not a number of percent",
            fix="percentile(0.999)",
        )
    return rule_of("percentile", _range, share, reads_distribution=True)
