"""Counts at other bins than were collected, for rules that prescribe theirs; one group."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.formats import divide_by_scale
from quantjax.statistics import Histogram, Statistics, as_float


def magnitude_counts(statistics: Statistics, bins: int) -> jax.Array:
    """How many ``|x|`` lie in each of ``bins`` equal bins from 0 to the largest, float32."""
    largest = _largest(statistics)
    distribution = statistics.distribution
    if not isinstance(distribution, Histogram):
        sample = statistics.sample
        return _counted(jnp.abs(sample.values), sample.weights, largest, bins)
    edges = largest * _fractions(bins)
    above, below = _tails(distribution, edges[1:-1])
    total = jnp.sum(as_float(distribution.counts))[None]
    beyond = jnp.concatenate([total, above + below, jnp.zeros(1, jnp.float32)])
    return beyond[:-1] - beyond[1:]


def symmetric_counts(statistics: Statistics, bins: int) -> jax.Array:
    """How many ``x`` lie in each of ``bins`` equal bins from minus the largest magnitude to it.

    Args:
      bins: an odd number, so that one of them has 0 in its middle.
    """
    largest = _largest(statistics)
    distribution = statistics.distribution
    if not isinstance(distribution, Histogram):
        sample = statistics.sample
        return _counted(sample.values + largest, sample.weights, 2.0 * largest, bins)
    side = bins // 2
    # The edges right of zero: (2k + 1) / bins of the largest.
    ends = largest * divide_by_scale(
        2.0 * jnp.arange(side, dtype=jnp.float32) + 1.0, jnp.float32(bins)
    )
    above, below = _tails(distribution, ends)
    total = jnp.sum(as_float(distribution.counts))[None]
    zero = jnp.zeros(1, jnp.float32)
    right = above - jnp.concatenate([above[1:], zero])
    left = below - jnp.concatenate([below[1:], zero])
    return jnp.concatenate([left[::-1], total - above[:1] - below[:1], right])


def _largest(statistics: Statistics) -> jax.Array:
    low, high = statistics.extremes
    return jnp.maximum(jnp.abs(low), jnp.abs(high))


def _fractions(bins: int) -> jax.Array:
    return divide_by_scale(jnp.arange(bins + 1, dtype=jnp.float32), jnp.float32(bins))


def _counted(places: jax.Array, weights: jax.Array, span: jax.Array, bins: int) -> jax.Array:
    """As ``np.histogram`` does: the last bin holds its right end, too."""
    some = jnp.where(span > 0.0, span, 1.0)
    index = jnp.floor(divide_by_scale(places, some) * bins).astype(jnp.int32)
    index = jnp.clip(index, 0, bins - 1)
    # By integers: ones that are added in float32 are lost beyond 2^24.
    return jnp.zeros(bins, jnp.uint32).at[index].add(weights.astype(jnp.uint32)).astype(jnp.float32)


def _tails(histogram: Histogram, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many counts lie above each of these magnitudes, and below minus each of them.

    Linear within a bin, then rounded to whole counts: dense bins are split in proportion, and the
    sparse ones of the tails go to one side or the other. Sums run inwards from the ends, where the
    counts that matter are small.
    """
    counts = as_float(histogram.counts)
    bins = histogram.bins
    zero = jnp.zeros(1, jnp.float32)
    under = jnp.concatenate([zero, jnp.cumsum(counts)])
    over = jnp.concatenate([jnp.cumsum(counts[::-1])[::-1], zero])

    def at(places: jax.Array) -> tuple[jax.Array, jax.Array]:
        position = divide_by_scale(places, histogram.width) - histogram.origin.astype(jnp.float32)
        position = jnp.clip(position, 0.0, float(bins))
        index = jnp.minimum(jnp.floor(position).astype(jnp.int32), bins - 1)
        return index, position - index.astype(jnp.float32)

    index, share = at(places)
    above = jnp.round(over[index + 1] + (1.0 - share) * counts[index])
    index, share = at(-places)
    below = jnp.round(under[index] + share * counts[index])
    return above, below


def check_bins(bins: int, rule: str) -> None:
    """Raise ``QuantizerError`` for a number of bins that no histogram has."""
    if bins < 2:
        raise errors.QuantizerError(
            f"a histogram of {bins} bins", where=f"the range rule {rule}", fix="bins=2048"
        )
