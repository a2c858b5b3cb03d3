"""A histogram that widens without losing a count, and merges exactly."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from quantjax import errors
from quantjax._compat import varying_like
from quantjax.arguments import expect
from quantjax.formats import exponent_of, power_of_two
from quantjax.granularity import expand
from quantjax.lean import clip, elementwise, select, widened
from quantjax.statistics import count
from quantjax.statistics.count import Count
from quantjax.statistics.devices import AxisName, over_devices
from quantjax.statistics.extremes import Extremes

BINS = 8192
MAX_BINS = 1 << 16
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127
_DIGITS = 23  # positions in units of a bin: those of all edges are below 2^24, exact in float32


class Histogram(NamedTuple):
    """Counts of equal bins ``[(o + i) · 2^e, (o + i + 1) · 2^e)``, for each group.

    The bin width is the smallest power of two at which all that was seen fits, and the lowest value
    lies in the first bin. So the histogram is a function of the values alone: in whatever order,
    batches or shards they come, it is the same, count for count. Widening adds bins pairwise,
    because bin ``j`` becomes bin ``⌊j / 2⌋``.

    Attributes:
      counts: ``[*scale, bins]``.
      exponent: ``e``, the shape of the scale.
      origin: ``o``, in units of a bin.
    """

    counts: Count
    exponent: Int32[Array, "..."]
    origin: Int32[Array, "..."]

    @property
    def bins(self) -> int:
        """How many there are."""
        return int(self.counts.low.shape[-1])

    @property
    def width(self) -> Float[Array, "..."]:
        """``2^e``."""
        return power_of_two(self.exponent)

    @property
    def edges(self) -> Float[Array, "... edges"]:
        """Left ends of all bins and the right end of the last, ascending.

        Exact; in place of those beyond float32, from ±2^128 on, its largest number.
        """
        limit = float(jnp.finfo(jnp.float32).max)
        offsets = jnp.arange(self.bins + 1, dtype=jnp.int32)
        places = self.origin[..., None] + _as_rank(offsets, self.origin.ndim)
        return jnp.clip(places.astype(jnp.float32) * self.width[..., None], -limit, limit)


def _as_rank(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape((1,) * ndim + x.shape)


def init(scale_shape: Sequence[int], bins: int = BINS) -> Histogram:
    """Nothing seen; bins as narrow as they get.

    Args:
      bins: a power of two up to 65,536; 8 bytes each for every group.

    Raises:
      StatisticsError: another number of bins.

    >>> init((1, 3), bins=16).counts.low.shape
    (1, 3, 16)
    """
    where, fix = "a histogram", "histogram_bins=2048"
    expect(bins, numbers.Integral, argument="histogram_bins", where=where, fix=fix)
    if not (4 <= bins <= MAX_BINS and bins & (bins - 1) == 0):
        raise errors.StatisticsError(
            f"a histogram of {bins} bins",
            why="bins are merged pairwise, and their sums are held in half words",
            fix=f"a power of two from 4 to {MAX_BINS}, {BINS} for instance",
        )
    shape = tuple(scale_shape)
    smallest = jnp.full(shape, SMALLEST_EXPONENT, jnp.int32)
    return Histogram(count.zero((*shape, bins)), smallest, jnp.zeros(shape, jnp.int32))


def _place(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """``⌊x / 2^e⌋``, exactly, for all exponents of histograms."""
    # Twice the power of two, whose own exponent is in range for all of them.
    twice = lax.bitcast_convert_type(lax.shift_left(128 - exponent, jnp.int32(23)), jnp.float32)
    scaled = elementwise(lax.mul, x, twice) * 0.5
    # What underflows lies in the bin on its own side of zero.
    scaled = select((x < 0.0) & (scaled == 0.0), -1.0, scaled)
    return lax.floor(clip(scaled, -(2.0**_DIGITS), 2.0**_DIGITS)).astype(jnp.int32)


def _window(extremes: Extremes, bins: int) -> tuple[jax.Array, jax.Array]:
    """Exponent and origin for values between these: what makes the histogram canonical."""
    limit = float(jnp.finfo(jnp.float32).max)
    low, high = extremes
    seen, broken = low <= high, (low != low) | (high != high)
    low = select(seen, clip(low, -limit, limit), select(broken, -limit, 0.0))
    high = select(seen, clip(high, -limit, limit), select(broken, limit, 0.0))
    smallest = exponent_of(lax.max(lax.abs(low), lax.abs(high))) + (1 - _DIGITS)
    smallest = lax.max(smallest, jnp.full_like(smallest, SMALLEST_EXPONENT))
    # One of three fits, nearly always the first: bins · 2^(e+2) > 4 · span. Of bins that are twice
    # as wide, the place is half of it, rounded down.
    first = exponent_of(0.5 * high - 0.5 * low) + (2 - bins.bit_length())
    first = lax.max(first, smallest)
    least, most = _place(low, first), _place(high, first)
    wider = (most - least >= bins).astype(jnp.int32)
    wider += ((most >> 1) - (least >> 1) >= bins).astype(jnp.int32)
    return first + wider, least >> wider


@jax.jit  # for eager calls, which would compile the branches below anew each time
def _moved(histogram: Histogram, exponent: jax.Array, origin: jax.Array) -> Histogram:
    """The same counts in a window that covers the old one."""
    bins, groups = histogram.bins, histogram.exponent.size

    def move(old: Count) -> Count:
        steps = clip(exponent - histogram.exponent, 0, 31)
        places = histogram.origin[..., None] + _as_rank(
            jnp.arange(bins, dtype=jnp.int32), origin.ndim
        )
        index = jnp.right_shift(places, steps[..., None]) - origin[..., None]
        # Bins outside hold nothing: an empty histogram starts anywhere.
        inside = (index >= 0) & (index < bins)
        group = jnp.arange(groups, dtype=jnp.int32).reshape(*origin.shape, 1)
        flat = jnp.where(inside, index + group * bins, groups * bins).reshape(-1)
        moved = count.scatter_add(jax.tree.map(jnp.ravel, old), flat, groups * bins)
        return jax.tree.map(lambda words: words.reshape(old.low.shape), moved)

    stays = jnp.all((exponent == histogram.exponent) & (origin == histogram.origin))
    counts = varying_like(histogram.counts, (exponent, origin))
    counts = lax.cond(stays, lambda old: old, move, counts)
    return Histogram(counts, exponent, origin)


def update(
    histogram: Histogram,
    x: Float[Array, "..."],
    extremes: Extremes,
    where: Bool[Array, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> Histogram:
    """The histogram after one more tensor, or all devices' tensors.

    Args:
      extremes: of all that was seen, this tensor included; they decide on the window.
      where: True for entries that count; broadcastable to ``x``.

    Sharp edges: NaN is in no bin. Infinities are in none either, and widen the bins to ``2^128 /
    bins``: what holds them has no range, which ``qj.calibrate`` says.
    """
    x = widened(x)
    bins, groups = histogram.bins, histogram.exponent.size
    exponent, origin = _window(extremes, bins)
    moved = _moved(histogram, exponent, origin)
    place = _place(x, expand(exponent, x.shape))
    index = clip(elementwise(lax.sub, place, expand(origin, x.shape)), 0, bins - 1)
    if groups > 1:
        group = jnp.arange(groups, dtype=jnp.int32).reshape(origin.shape)
        index += bins * expand(group, x.shape)
    counted = jnp.isfinite(x)
    if where is not None:
        counted &= jnp.broadcast_to(jnp.asarray(where), x.shape)
    fresh = jnp.zeros(groups * bins, jnp.uint32)
    fresh = fresh.at[index.reshape(-1)].add(
        counted.reshape(-1).astype(jnp.uint32),
        mode="promise_in_bounds",
        wrap_negative_indices=False,
    )
    fresh = over_devices(lax.psum, fresh, axis_name).reshape(moved.counts.low.shape)
    return moved._replace(counts=count.add(moved.counts, count.of(fresh)))


def merge(left: Histogram, right: Histogram, extremes: Extremes) -> Histogram:
    """The histogram of both; exact, associative and commutative.

    Args:
      extremes: of both together.

    Raises:
      StatisticsError: different numbers of bins.
    """
    if left.bins != right.bins:
        raise errors.StatisticsError(
            f"histograms of {left.bins} and of {right.bins} bins",
            why="bins of one would have to be split",
            fix="the same number of bins for every shard",
        )
    exponent, origin = _window(extremes, left.bins)
    return Histogram(
        count.add(_moved(left, exponent, origin).counts, _moved(right, exponent, origin).counts),
        exponent,
        origin,
    )


def memory(scale_shape: Sequence[int], bins: int = BINS) -> int:
    """Bytes of one histogram.

    >>> memory((1, 1), 8192)
    65544
    """
    return math.prod(scale_shape) * (8 * bins + 8)
