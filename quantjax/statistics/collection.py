"""The statistics of one operand: everything that the range rules read, in one pytree."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from quantjax import errors
from quantjax._compat import concrete
from quantjax.arguments import expect
from quantjax.granularity import group_counts, reduce_to
from quantjax.meshes import automatic
from quantjax.printing import shape_text
from quantjax.statistics import count, extremes, histogram, moments, moving, sample
from quantjax.statistics.count import Count
from quantjax.statistics.devices import AxisName, over_devices
from quantjax.statistics.extremes import Extremes
from quantjax.statistics.histogram import BINS, Histogram
from quantjax.statistics.moments import Moments
from quantjax.statistics.moving import TORCH_AVERAGING_CONSTANT, MovingExtremes
from quantjax.statistics.sample import Held, Sample


class Statistics(NamedTuple):
    """What was seen of one operand; its size does not depend on how much that was.

    Attributes:
      batches: updates that held at least one value.
      number: how many values, exactly.
      extremes: smallest and largest; unordered, merge exactly.
      moving: their moving average; ordered, refuses to merge.
      moments: mean, variance, mean magnitude.
      distribution: a histogram, which merges exactly; the values themselves where a tensor is at
        hand; None where neither was asked for.
    """

    batches: Int[Array, ""]
    number: Count
    extremes: Extremes
    moving: MovingExtremes
    moments: Moments
    distribution: Histogram | Held | None = None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales that are derived from these statistics."""
        return tuple(self.extremes.low.shape)

    @property
    def sample(self) -> Sample:
        """Values and weights that stand for what was seen.

        Raises:
          StatisticsError: no histogram was kept.
        """
        found = self.distribution
        if found is None:
            raise errors.StatisticsError(
                "these statistics hold no histogram",
                why="it was left out, or the rule does not say that it reads it",
                fix="qj.init(plan) without histogram_bins=None; RangeRule(..., "
                "reads_distribution=True)",
            )
        return sample.of_histogram(found) if isinstance(found, Histogram) else found.sample


def init(
    scale_shape: Sequence[int],
    *,
    averaging_constant: float | jax.Array = TORCH_AVERAGING_CONSTANT,
    histogram_bins: int | None = BINS,
) -> Statistics:
    """Statistics of nothing, at the granularity of ``scale_shape``.

    Args:
      averaging_constant: the weight of a new batch in the moving average, as in PyTorch
        (TensorFlow's decay of 0.99 is 0.01 here); an array may be traced.
      histogram_bins: a power of two; None keeps no histogram.

    Raises:
      StatisticsError: a constant that is no weight, or another number of bins.

    >>> int(init((1, 1)).batches)
    0
    """
    kinds = (numbers.Real, jax.Array, np.ndarray, np.generic)
    where, fix = "statistics", "averaging_constant=0.01, PyTorch's"
    expect(averaging_constant, kinds, argument="averaging_constant", where=where, fix=fix)
    known = concrete(averaging_constant)
    if known is not None and not ((known >= 0.0) & (known <= 1.0)).all():
        raise errors.StatisticsError(
            f"an averaging constant of {known}",
            why="it is the weight of a new batch, from 0 to 1",
            fix="averaging_constant=0.01, PyTorch's",
        )
    return Statistics(
        jnp.zeros((), jnp.int32),
        count.zero(scale_shape),
        extremes.init(scale_shape),
        moving.init(scale_shape, averaging_constant),
        moments.init(scale_shape),
        None if histogram_bins is None else histogram.init(scale_shape, histogram_bins),
    )


def of_tensor(
    x: Float[Array, "..."], scale_shape: Sequence[int], *, with_values: bool
) -> Statistics:
    """Statistics of a tensor that is at hand, its values in place of a histogram.

    >>> float(of_tensor(jnp.array([1.0, 3.0]), (1,), with_values=True).moments.mean[0])
    2.0
    """
    shape = tuple(scale_shape)
    return cast(
        Statistics,
        automatic(functools.partial(_of_tensor, scale_shape=shape, with_values=with_values), x),
    )


def expect_mask(where: Any) -> jax.Array | None:
    """A mask of samples or entries, if any, as an array; ``DataError`` for one of numbers."""
    if where is None:
        return None
    mask = jnp.asarray(where)
    if mask.dtype != jnp.bool_:
        raise errors.DataError(
            f"a mask of {mask.dtype}",
            where=f"where= of shape {shape_text(mask.shape)}",
            why="it says which samples count, and a number would be taken for a weight",
            fix="where=mask.astype(bool)",
        )
    return mask


# One program where it is called eagerly, and nothing but its operations inside another one.
@functools.partial(jax.jit, static_argnames=("scale_shape", "with_values"), inline=True)
def _of_tensor(x: jax.Array, *, scale_shape: tuple[int, ...], with_values: bool) -> Statistics:
    seen = update(init(scale_shape, histogram_bins=None), x)
    return seen._replace(distribution=sample.of_tensor(x, scale_shape)) if with_values else seen


def update(
    statistics: Statistics,
    x: Float[Array, "..."],
    *,
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName = None,
) -> Statistics:
    """Statistics after one more tensor.

    Args:
      x: the tensor; its axes are multiples of the scale's.
      where: True for entries that count; broadcastable to ``x``.
      axis_name: inside ``shard_map``, the mesh axes that the batch is spread over: each device has
        the statistics of the whole batch then, its moving average included.

    Raises:
      StatisticsError: the values themselves are kept, of one tensor.
      DataError: a mask of numbers.

    >>> s = update(init((1,)), jnp.array([-1.0, 3.0]))
    >>> float(s.extremes.low[0]), float(s.extremes.high[0]), int(s.batches)
    (-1.0, 3.0, 1)
    """
    where = expect_mask(where)
    updated = functools.partial(_updated, axis_name=axis_name)
    return cast(Statistics, automatic(updated, statistics, x, where))


@functools.partial(jax.jit, static_argnames="axis_name", inline=True)
def _updated(
    statistics: Statistics, x: jax.Array, where: jax.Array | None, *, axis_name: AxisName
) -> Statistics:
    shape, kept = statistics.scale_shape, _kept(statistics)
    batch = extremes.of_batch(x, shape, where, axis_name=axis_name)
    number = count.of(over_devices(jax.lax.psum, _number(x, shape, where), axis_name))
    seen = extremes.merge(statistics.extremes, batch)
    return Statistics(
        statistics.batches + jnp.any(number.low > 0).astype(jnp.int32),
        count.add(statistics.number, number),
        seen,
        moving.update(statistics.moving, batch),
        moments.merge(
            statistics.moments,
            moments.of_batch(x, shape, where, count.as_float(number), axis_name=axis_name),
            count.as_float(statistics.number),
            count.as_float(number),
        ),
        kept and histogram.update(kept, x, seen, where, axis_name=axis_name),
    )


def _number(x: jax.Array, scale_shape: tuple[int, ...], where: jax.Array | None) -> jax.Array:
    known = all(isinstance(n, int) for n in x.shape)  # an export may have symbols
    if where is None and known:
        return jnp.asarray(group_counts(x.shape, scale_shape), jnp.uint32)
    mask = jnp.broadcast_to(jnp.asarray(True if where is None else where), x.shape)
    # Under jax_enable_x64 a sum of 32 bits has 64.
    return reduce_to(mask.astype(jnp.uint32), scale_shape, jnp.sum).astype(jnp.uint32)


def _kept(statistics: Statistics) -> Histogram | None:
    """The histogram, if there is one."""
    if isinstance(statistics.distribution, Held):
        raise errors.StatisticsError(
            "these statistics hold the values of one tensor, and cannot take in another",
            why="their size would grow with what is seen",
            fix="qj.statistics.init(shape), which keeps a histogram",
        )
    return statistics.distribution


def _check_alike(left: Statistics, right: Statistics) -> None:
    if left.scale_shape != right.scale_shape:
        raise errors.StatisticsError(
            f"statistics of shape {left.scale_shape} and of {right.scale_shape}",
            why="the granularity is fixed when statistics are made",
            fix="make both by the same qj.init(plan)",
        )


def merge(left: Statistics, right: Statistics) -> Statistics:
    """Both statistics as one; for shards, of which at most one has seen data.

    Raises:
      StatisticsError: both hold a moving average (or may, under a trace): it depends on the order
        in which batches came, which two finished shards do not tell.
    """
    _check_alike(left, right)
    counts = concrete(left.batches), concrete(right.batches)
    if counts[1] is not None and not counts[1].any():
        return left
    if counts[0] is not None and not counts[0].any():
        return right
    raise errors.StatisticsError(
        "two moving averages cannot be merged",
        where=f"statistics after {counts[0]} and {counts[1]} batches",
        why="a moving average depends on the order of its batches",
        fix="qj.statistics.merge_unordered(left, right), which keeps all but the moving average",
    )


def merge_unordered(left: Statistics, right: Statistics) -> Statistics:
    """Both as one, without the moving average, which starts anew.

    Count, extremes and histogram are exactly those of all values; moments up to rounding. The
    number of batches is the sum.

    Raises:
      StatisticsError: other granularities, or histograms of other sizes.
    """
    _check_alike(left, right)
    one, other = _kept(left), _kept(right)
    if (one is None) != (other is None):
        raise errors.StatisticsError(
            "one of the two holds a histogram, and the other does not",
            fix="make both by the same qj.init(plan)",
        )
    seen = extremes.merge(left.extremes, right.extremes)
    return Statistics(
        left.batches + right.batches,
        count.add(left.number, right.number),
        seen,
        moving.init(left.scale_shape, left.moving.constant),
        moments.merge(
            left.moments, right.moments, count.as_float(left.number), count.as_float(right.number)
        ),
        one and other and histogram.merge(one, other, seen),
    )
