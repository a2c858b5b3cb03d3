"""The statistics of one operand: everything that the range rules read, in one pytree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from quantjax import errors
from quantjax._compat import concrete
from quantjax.statistics import extremes, moving
from quantjax.statistics.extremes import Extremes
from quantjax.statistics.moving import TORCH_AVERAGING_CONSTANT, MovingExtremes


class Statistics(NamedTuple):
    """What was seen of one operand.

    Attributes:
      batches: updates that held at least one value.
      extremes: unordered; merges exactly.
      moving: ordered; refuses to merge.
    """

    batches: Int[Array, ""]
    extremes: Extremes
    moving: MovingExtremes

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales that are derived from these statistics."""
        return tuple(self.extremes.low.shape)


def init(
    scale_shape: Sequence[int],
    *,
    averaging_constant: float | jax.Array = TORCH_AVERAGING_CONSTANT,
) -> Statistics:
    """Statistics of nothing, at the granularity of ``scale_shape``.

    >>> int(init((1, 1)).batches)
    0
    """
    return Statistics(
        jnp.zeros((), jnp.int32),
        extremes.init(scale_shape),
        moving.init(scale_shape, averaging_constant),
    )


def update(
    statistics: Statistics,
    x: Float[Array, "..."],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Statistics:
    """Statistics after one more tensor.

    Args:
      x: the tensor; its axes are multiples of the scale's.
      where: True for entries that count; broadcastable to ``x``.

    >>> s = update(init((1,)), jnp.array([-1.0, 3.0]))
    >>> float(s.extremes.low[0]), float(s.extremes.high[0]), int(s.batches)
    (-1.0, 3.0, 1)
    """
    batch = extremes.of_batch(x, statistics.scale_shape, where)
    some = jnp.any(extremes.seen(batch)).astype(jnp.int32)
    return Statistics(
        statistics.batches + some,
        extremes.merge(statistics.extremes, batch),
        moving.update(statistics.moving, batch),
    )


def merge(left: Statistics, right: Statistics) -> Statistics:
    """Both statistics as one; for shards, of which at most one has seen data.

    Raises:
      StatisticsError: both hold a moving average (or may, under a trace): it depends on the order
        in which batches came, which two finished shards do not tell.
    """
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
    """Exact merge of all that does not depend on order; the moving average starts anew."""
    return Statistics(
        left.batches + right.batches,
        extremes.merge(left.extremes, right.extremes),
        moving.init(left.scale_shape, left.moving.constant),
    )
