"""The clip with the smallest Kullback-Leibler divergence, as ONNX Runtime chooses it."""

from __future__ import annotations

import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from quantjax import errors
from quantjax._compat import varying_like
from quantjax.arguments import expect
from quantjax.formats import divide_by_scale
from quantjax.ranges.base import Configured, Range, RangeRule, Target
from quantjax.ranges.kl_best import best_of
from quantjax.ranges.kl_sums import (
    divergence_terms,
    entropy,
    near_quotient,
    prefix_sums,
    whole_quotient,
)
from quantjax.ranges.rebin import symmetric_counts
from quantjax.statistics import Statistics

_LARGEST_TOTAL = 2.0**30
_EPSILON = 1e-4
_RELATIVE, _ABSOLUTE = 1.0005, 2e-7  # what the first look may be off by, from one to another
_TOTAL, _ENTROPY = 2.0**17, 2.0**10  # for the first look: counts sum to it, fractions of integers


class _Prefix(NamedTuple):
    """Sums over the bins below each edge: counts, those that are not empty, ``Σ c log c``."""

    counts: Int[Array, " edges"]
    numbers: Int[Array, " edges"]
    entropies: Int[Array, " edges"]


def best_reach(counts: jax.Array, levels: jax.Array, *, most: int = 128) -> jax.Array:
    """How many bins to keep on either side of the middle one: ``argmin KL(P ‖ Q)``, the first.

    ``P`` are the kept bins, all that lies beyond added to the outermost two. ``Q`` are their counts
    without that, in ``levels`` runs of ``⌊kept / levels⌋`` bins: each bin of a run has the sum over
    how many are not empty in ``P``, rounded down. The last run also has what is left over, and the
    bins that are left over have nothing. Both are smoothed: ``1e-4`` for each empty bin, taken
    evenly from the others.

    All reaches are looked at to four digits, those that may be the best again to six.

    Args:
      counts: ``[bins]``, an odd number of them, float32; scaled down where they sum to more than
        ``2^30``.
      levels: int32, a power of two from 2 on. Where there are more of them than bins, all are kept.
      most: a static bound of ``levels``.
    """
    bins = counts.shape[0]
    middle = bins // 2
    total = jnp.sum(counts)
    shrink = jnp.minimum(divide_by_scale(jnp.float32(_LARGEST_TOTAL), jnp.maximum(total, 1.0)), 1.0)
    whole = jnp.round(counts * shrink).astype(jnp.int32)
    share = whole.astype(jnp.float32) * divide_by_scale(
        jnp.float32(_TOTAL), jnp.maximum(total * shrink, 1.0)
    )
    prefix = _Prefix(
        *map(prefix_sums, (whole, (whole > 0).astype(jnp.int32), entropy(share) * _ENTROPY))
    )
    reaches = jnp.arange(middle + 1, dtype=jnp.int32)
    rough = jax.custom_batching.sequential_vmap(_first_look)(whole, prefix, levels)
    rough = jnp.where(reaches >= levels // 2, rough, jnp.inf)
    values = functools.partial(_divergences, min(most, bins))
    enough = _RELATIVE * jnp.min(rough) + _ABSOLUTE
    return best_of(values, (whole, prefix, levels), rough, enough)


def _divergences(most: int, operands: Any, reaches: jax.Array) -> jax.Array:
    whole, prefix, levels = operands
    return jax.vmap(functools.partial(_divergence, whole, prefix, levels, most))(reaches)


def _first_look(whole: jax.Array, prefix: _Prefix, levels: jax.Array) -> jax.Array:
    """The divergence of every reach, but for what smoothing takes from bins that have some.

    ``KL = [Σ p log p - Σ_runs S_p log q] / total + log(Σ q / total)``, where ``S_p`` is what ``P``
    has in a run, and ``q`` the whole number that its bins have in ``Q``, or ``1e-4`` for none.
    """
    bins = whole.shape[0]
    middle = bins // 2
    reach = jnp.arange(middle + 1, dtype=jnp.int32)
    first, end = middle - reach, middle + reach + 1
    total = jnp.maximum(prefix.counts[-1], 1)
    unit = divide_by_scale(jnp.float32(_TOTAL), total.astype(jnp.float32))
    left, right = prefix.counts[first], prefix.counts[-1] - prefix.counts[end]
    size = jnp.right_shift(end - first, 31 - lax.clz(levels))
    nothing = jnp.log(jnp.float32(_EPSILON))

    both = jnp.stack([prefix.counts, prefix.numbers], axis=1)  # one gather instead of two

    def run(level: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found, mass, below, fewer = sums
        stop = first + (level + 1) * size
        to_here, some = both[stop].T
        held, number = to_here - below, some - fewer
        last = level == levels - 1
        of_p = held + jnp.where(level == 0, left, 0)
        number += ((level == 0) & (left > 0) & (whole[first] == 0)).astype(jnp.int32)
        # The right end belongs to the last run where nothing is left over.
        ends_here = last & (stop == end) & (right > 0)
        of_p += jnp.where(ends_here, right, 0)
        number += (ends_here & (whole[end - 1] == 0)).astype(jnp.int32)
        held += jnp.where(last, prefix.counts[end] - to_here, 0)
        q = jnp.where(number > 0, near_quotient(held, jnp.maximum(number, 1)), 0)
        spread = q.astype(jnp.float32)
        logarithm = jnp.where(q > 0, jnp.log(jnp.maximum(spread, 1.0)), nothing)
        found += of_p.astype(jnp.float32) * unit * logarithm
        return found, mass + spread * size.astype(jnp.float32), to_here, some

    zero = jnp.zeros(middle + 1, jnp.float32)
    start = (zero, zero, prefix.counts[first], prefix.numbers[first])
    start = varying_like(start, (whole, levels))
    runs, mass, *_ = lax.fori_loop(0, jnp.minimum(levels, bins), run, start)
    stop = jnp.minimum(first + levels * size, end)
    left_over = prefix.counts[end] - prefix.counts[stop] + jnp.where(stop < end, right, 0)
    runs += left_over.astype(jnp.float32) * unit * nothing
    within = (prefix.entropies[end] - prefix.entropies[first]).astype(jnp.float32) / _ENTROPY
    for place, beyond in ((first, left), (end - 1, right)):
        own = whole[place].astype(jnp.float32) * unit
        within += entropy(own + beyond.astype(jnp.float32) * unit) - entropy(own)
    within -= _TOTAL * jnp.log(unit)
    value = (within - runs) / _TOTAL
    value += jnp.log(jnp.maximum(mass * unit, _EPSILON) / _TOTAL)
    return jnp.where((size > 0) & (mass > 0.0), value, jnp.inf)


def _divergence(
    whole: jax.Array, prefix: _Prefix, levels: jax.Array, most: int, reach: jax.Array
) -> jax.Array:
    """``KL(P ‖ Q)`` with ``reach`` bins on either side of the middle one, smoothed."""
    bins = whole.shape[0]
    middle, place = bins // 2, jnp.arange(bins, dtype=jnp.int32)
    sums, numbers = prefix.counts, prefix.numbers
    first, last = middle - reach, middle + reach + 1
    inside = (place >= first) & (place < last)
    left, right = sums[first], sums[bins] - sums[last]
    p = jnp.where(inside, whole, 0)
    p += jnp.where(place == first, left, 0) + jnp.where(place == last - 1, right, 0)
    size = (last - first) // levels
    offset = (place - first).astype(jnp.float32)
    run = jnp.floor(divide_by_scale(offset + 0.5, jnp.maximum(size, 1).astype(jnp.float32)))
    run = jnp.clip(run.astype(jnp.int32), 0, levels)
    runs = jnp.arange(most, dtype=jnp.int32)
    start = first + jnp.minimum(runs, levels - 1) * size
    start, stop = jnp.clip(start, 0, bins), jnp.clip(start + size, 0, bins)
    held = sums[stop] - sums[start]
    held += jnp.where(runs == levels - 1, sums[last] - sums[stop], 0)
    number = numbers[stop] - numbers[start]
    # The outermost bins hold what lies beyond, so they are not empty although they were.
    for end, beyond in ((first, left), (last - 1, right)):
        new = (whole[end] == 0) & (beyond > 0) & (start <= end) & (end < stop)
        number += new.astype(jnp.int32)
    q = jnp.where(number > 0, whole_quotient(held, jnp.maximum(number, 1)), 0)
    # A barrier: fused into the gather, what the bins of a run have is found for each of them.
    q = lax.optimization_barrier(q)[jnp.minimum(run, most - 1)]
    q = jnp.where(inside & (run < levels) & (size > 0), q, 0)
    smooth = [_smoothed(counts, inside) for counts in (p, q)]
    a, b = (divide_by_scale(s, jnp.maximum(jnp.sum(s), _EPSILON)) for s in smooth)
    some = inside & (a > 0.0) & (b > 0.0)
    a, b = (jnp.where(some, part, 1.0) for part in (a, b))
    value = jnp.sum(jnp.where(some, divergence_terms(a, b), 0.0))
    return jnp.where(jnp.any(p > 0) & jnp.any(q > 0), value, jnp.inf)


def _smoothed(counts: jax.Array, inside: jax.Array) -> jax.Array:
    empty = inside & (counts == 0)
    zeros = jnp.sum(empty.astype(jnp.float32))
    others = jnp.sum((counts > 0).astype(jnp.float32))
    taken = divide_by_scale(_EPSILON * zeros, jnp.maximum(others, 1.0))
    moved = counts.astype(jnp.float32) + jnp.where(empty, _EPSILON, -taken)
    return jnp.where(inside, moved, 0.0)


def _range(statistics: Statistics, target: Target, *, bins: int) -> Range:
    counts = lax.stop_gradient(symmetric_counts(statistics, bins))
    exponent = jnp.clip(target.bits.astype(jnp.int32) - 1, 1, 24)
    most = 1 << min(max(target.format.max_bits - 1, 1), 24)
    levels = jnp.left_shift(jnp.int32(1), exponent)
    reach = best_reach(counts, levels, most=most).astype(jnp.float32)
    low, high = statistics.extremes
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    clip = largest * divide_by_scale(2.0 * reach + 1.0, jnp.float32(bins))
    return Range(jnp.clip(low, -clip, clip), jnp.clip(high, -clip, clip), statistics.batches > 0)


def _rule(bins: int) -> RangeRule:
    name = "kl_onnxruntime" if bins == 1025 else f"kl_onnxruntime({bins})"
    return RangeRule(name, Configured.of(_range, bins=bins), reads_distribution=True, entries=bins)


def kl_onnxruntime(*, bins: int = 1025) -> RangeRule:
    """``[-t, t]`` with the smallest ``KL(P ‖ Q)`` of a histogram from ``-max|x|`` to ``max|x|``.

    ``P`` are the kept bins, ``Q`` what ``2^(b-1)`` runs make of them (:func:`best_reach`). The
    range is no wider than what was seen.

    Args:
      bins: an odd number, so that 0 lies in the middle of one. ONNX Runtime's own default is 128;
        with its 128 levels at 8 bits, which are left here, that tries no clip at all.

    Raises:
      QuantizerError: an even number of bins, or fewer than 5.

    Sharp edges: one side of the histogram is empty for data that are never negative. Of a rectified
    Gaussian, half of it zeros and the largest 4.40, the clip is 2.75, where ModelOpt's is 4.23. For
    data that are never positive it is no range to use, as in ONNX Runtime itself: bins that are
    left over have nothing, and lie at the upper end; of such a Gaussian's mirror image the clip is
    0.04 at 4 bits, where it was 2.89.

    >>> kl_onnxruntime().name
    'kl_onnxruntime'

    Source: ONNX Runtime, ``quantization/calibrate.py``, ``HistogramCollector``.
    """
    where = "the range rule kl_onnxruntime"
    expect(bins, numbers.Integral, argument="bins", where=where, fix="bins=1025")
    if bins < 5 or bins % 2 == 0:
        raise errors.QuantizerError(
            f"a histogram of {bins} bins",
            where=where,
            why="as many of them lie left of the middle one as right of it",
            fix="bins=1025",
        )
    return _rule(bins)


KL_ONNXRUNTIME = kl_onnxruntime()
"""1025 bins, ``2^(b-1)`` levels, both signs; see :func:`kl_onnxruntime`."""
