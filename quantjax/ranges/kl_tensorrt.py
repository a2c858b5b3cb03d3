"""The clip with the smallest Kullback-Leibler divergence, as TensorRT chooses it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax import errors
from quantjax.formats import divide_by_scale, exponent_of, power_of_two
from quantjax.ranges.base import Configured, Range, RangeRule, Target, known_number
from quantjax.ranges.kl_best import best_of
from quantjax.ranges.kl_look import enough, looked_at
from quantjax.ranges.kl_sums import divergence_terms, prefix_sums, whole_quotient
from quantjax.ranges.rebin import check_bins, magnitude_counts
from quantjax.statistics import Statistics

_LOW = 2.0**12  # what the lower of two words of a count holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What implementations differ in.

    Attributes:
      name: what it prints as.
      bins: of ``|x|``, from 0 to the largest.
      stride: every how many bins a clip is tried.
      copies_first_bin: whether the count of the bin at 0 is replaced by that of its neighbour, so
        that the zeros of a ReLU do not decide.
      unsigned_levels: whether unsigned codes of data that are never negative have ``2^b`` levels;
        ``2^(b-1)`` otherwise and for all others.
      half_bin: whether the clip lies half a bin above the last one that is kept.
      fewest_bins: of a clip, at any width; 0 is as many as there are levels.
      takes_last: whether of equal divergences the widest clip is taken, and not the narrowest. Of
        few values (pixels) several clips have none at all.
    """

    name: str
    bins: int = 2048
    stride: int = 1
    copies_first_bin: bool = False
    unsigned_levels: bool = False
    half_bin: bool = True
    fewest_bins: int = 0
    takes_last: bool = False


PUBLISHED = Variant(name="tensorrt")
"""The slides: all clips from ``2^(b-1)`` bins on."""

MODELOPT = Variant(
    name="modelopt",
    copies_first_bin=True,
    unsigned_levels=True,
    half_bin=False,
    fewest_bins=128,
    takes_last=True,
)
"""NVIDIA's own code since pytorch-quantization, which tries clips from 128 bins on at any width."""


def divergences(
    counts: jax.Array, levels: jax.Array, candidates: jax.Array, *, most: int = 256
) -> jax.Array:
    """``KL(P ‖ Q)`` of each clip after ``candidates`` bins; infinite where only ``Q`` is 0.

    ``P`` is the histogram with all that lies beyond added to its last bin. ``Q`` has the counts of
    the kept bins alone, taken together into ``levels`` runs, bin ``k`` of ``i`` in run
    ``⌊k · levels / i⌋``, each spread evenly over its bins that are not empty. Both are normalized.
    ``Σ P log(P/Q)`` is summed as ``Σ P (r - 1 - log r)``, ``r = Q/P``, of terms not below 0.

    Args:
      counts: ``[bins]``, whole numbers in float32; scaled down where they sum to more than 2^40.
      levels: int32 scalar.
      candidates: int32, any shape.
      most: a static bound of ``levels``.
    """
    bins = counts.shape[0]
    place = jnp.arange(bins, dtype=jnp.int32)
    total = jnp.sum(counts)
    shrink = power_of_two(jnp.minimum(40 - exponent_of(jnp.maximum(total, 1.0)), 0))
    high = jnp.floor(counts * (shrink / _LOW))
    low = jnp.round(counts * shrink - high * _LOW)
    some = (counts > 0.0).astype(jnp.float32)
    # Sums over runs are differences, exact in two words of integers.
    below = jnp.stack([prefix_sums(part) for part in (high, low, some)], axis=1)
    runs = jnp.arange(min(most, bins) + 1, dtype=jnp.int32)

    def one(kept: jax.Array) -> jax.Array:
        inside = place < kept
        edges = jnp.where(runs < levels, whole_quotient(runs * kept + levels - 1, levels), kept)
        parts = below[lax.optimization_barrier(edges)]
        parts = (parts[1:] - parts[:-1]).astype(jnp.float32)
        sums = (parts[:, 0] * _LOW + parts[:, 1]) * (1.0 / shrink)
        # A barrier: fused into the gather below, the mean of a run is found for each of its bins.
        mean = lax.optimization_barrier(divide_by_scale(sums, jnp.maximum(parts[:, 2], 1.0)))
        run = whole_quotient(place * levels, jnp.maximum(kept, 1))
        held = jnp.where(inside, counts, 0.0)
        mass = jnp.sum(held)
        beyond = jnp.sum(jnp.where(inside, 0.0, counts))
        p = held + jnp.where(place == kept - 1, beyond, 0.0)
        q = jnp.where(inside, some * mean[jnp.minimum(run, runs.size - 2)], 0.0)
        p = divide_by_scale(p, jnp.maximum(total, 1.0))
        q = divide_by_scale(q, jnp.where(mass > 0.0, mass, 1.0))
        both = (p > 0.0) & (q > 0.0)
        terms = jnp.where(
            both, divergence_terms(jnp.where(both, p, 1.0), jnp.where(both, q, 1.0)), 0.0
        )
        lost = jnp.any((p > 0.0) & (q == 0.0))
        return jnp.where(lost | (mass == 0.0), jnp.inf, jnp.sum(terms))

    return lax.map(one, candidates, batch_size=16)


def best_bin(
    counts: jax.Array,
    levels: jax.Array,
    *,
    stride: int | jax.Array = 1,
    fewest: int | jax.Array = 0,
    takes_last: bool | jax.Array = False,
    most: int = 256,
) -> jax.Array:
    """After how many bins to clip: ``argmin`` of :func:`divergences`, the first of equals.

    All clips from ``levels`` bins on, or from the fewest, are looked at to four digits, those that
    may be the best again to seven. Where none has a finite divergence, there is no clip: all bins
    are kept.

    Args:
      counts: ``[bins]``.
      levels: int32, a power of two; more of them than bins leave nothing to clip for.
      stride: every how many bins a clip is tried; the last bin is one in any case.
      fewest: how many bins the first clip keeps; 0 is as many as there are levels.
      takes_last: whether the last of equals is taken.
      most: a static bound of ``levels``.
    """
    bins = counts.shape[0]
    kept = jnp.arange(bins + 1, dtype=jnp.int32)
    fewest = jnp.asarray(fewest, jnp.int32)
    start = jnp.minimum(jnp.where(fewest > 0, fewest, levels), bins)
    tried = (kept >= start) & (((kept - start) % stride == 0) | (kept == bins))
    rough = looked_at(counts, levels, tried)
    values = functools.partial(_divergences, most)
    return best_of(values, (counts, levels), rough, enough(jnp.min(rough)), takes_last=takes_last)


def _divergences(most: int, operands: Any, clips: jax.Array) -> jax.Array:
    counts, levels = operands
    return divergences(counts, levels, clips, most=most)


class _Numbers(NamedTuple):
    """Those of a variant that may be traced, so that several are one branch of a stack."""

    stride: int | jax.Array
    copies_first_bin: bool | jax.Array
    unsigned_levels: bool | jax.Array
    half_bin: bool | jax.Array
    fewest_bins: int | jax.Array
    takes_last: bool | jax.Array


def _range(statistics: Statistics, target: Target, *numbers: Any, bins: int) -> Range:
    variant = _Numbers(*numbers)
    counts = lax.stop_gradient(magnitude_counts(statistics, bins))
    counts = counts.at[0].set(jnp.where(variant.copies_first_bin, counts[1], counts[0]))
    low, high = statistics.extremes
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    whole = (low >= 0.0) & variant.unsigned_levels & (not target.format.signed)
    exponent = target.bits.astype(jnp.int32) - jnp.where(whole, 0, 1)
    # Of one level the first bin alone has no divergence, whatever was seen.
    levels = jnp.left_shift(jnp.int32(1), jnp.clip(exponent, 1, 24))
    most = min(1 << target.format.max_bits, bins)
    kept = best_bin(
        counts,
        levels,
        stride=variant.stride,
        fewest=variant.fewest_bins,
        takes_last=variant.takes_last,
        most=most,
    ).astype(jnp.float32)
    kept += jnp.where(variant.half_bin, 0.5, 0.0)
    clip = jnp.minimum(largest * divide_by_scale(kept, jnp.float32(bins)), largest)
    clip = jnp.where(jnp.asarray(variant.stride) >= 1, clip, jnp.nan)  # one that is traced
    return Range(jnp.clip(low, -clip, clip), jnp.clip(high, -clip, clip), statistics.batches > 0)


def _rule(variant: Variant) -> RangeRule:
    numbers = _Numbers(**{name: getattr(variant, name) for name in _Numbers._fields})
    found = Configured.of(_range, bins=variant.bins)
    return RangeRule(f"kl_{variant.name}", found, True, tuple(numbers), entries=variant.bins)


def kl_tensorrt(variant: Variant = PUBLISHED) -> RangeRule:
    """``[-t, t]`` with the smallest ``KL(P ‖ Q)`` of the histogram of ``|x|``.

    ``P`` is the clipped histogram, ``Q`` what ``2^(b-1)`` levels make of it (:func:`divergences`);
    ``t = (m + 1/2) · width`` after the best number ``m`` of bins. The range is no wider than what
    was seen. At 1 bit there are two levels: of one, the first bin alone would be without loss.
    Implementations differ: see :class:`Variant`.

    Sharp edges: the divergence jumps from bin to bin, because a clip at an empty bin is no
    candidate, so that equal distributions give thresholds several percent apart; and bins, stride
    and the bin at zero are part of the rule: where zeros are counted (:data:`PUBLISHED`), those of
    a ReLU leave 2 bits a thousandth of the range. From a histogram, ``|x|`` is put into the rule's
    bins to within the histogram's own. Levels of formats that are no integers are taken to be
    uniform.

    >>> kl_tensorrt().name, kl_tensorrt(MODELOPT).name
    ('kl_tensorrt', 'kl_modelopt')

    Source: Migacz, 8-bit inference with TensorRT, GPU Technology Conference 2017, slide 26.
    """
    check_bins(variant.bins, f"kl_{variant.name}")
    stride = known_number(variant.stride, f"kl_{variant.name}")
    if stride is not None and stride < 1:
        raise errors.QuantizerError(
            f"a stride of {stride:g}",
            where=f"the range rule kl_{variant.name}",
            why="it is every how many bins a clip is tried",
            fix="stride=1",
        )
    return _rule(variant)


KL_TENSORRT = kl_tensorrt()
"""2048 bins, every clip from ``2^(b-1)`` on, zeros counted; see :func:`kl_tensorrt`."""

KL_MODELOPT = kl_tensorrt(MODELOPT)
"""The same, but for the bin at 0, unsigned codes, the first clip, and the last of equal ones, as in
NVIDIA's ModelOpt."""
