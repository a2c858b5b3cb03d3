"""Smallest and largest value seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax.granularity import reduce_to
from quantjax.lean import select, widened
from quantjax.statistics.devices import AxisName, over_devices


class Extremes(NamedTuple):
    """``min`` and ``max`` over all values, at the shape of the scale; merging is exact."""

    low: Float[Array, "..."]
    high: Float[Array, "..."]


def init(scale_shape: Sequence[int]) -> Extremes:
    """Nothing seen: ``(+inf, -inf)``, the identity of :func:`merge`."""
    shape = tuple(scale_shape)
    return Extremes(jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32))


def of_batch(
    x: Float[Array, "..."],
    scale_shape: Sequence[int],
    where: Bool[Array, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> Extremes:
    """The extremes of one tensor, or of all devices' tensors; masked entries do not count.

    NaN propagates, into both. XLA's reductions to a minimum or a maximum lose it on some shapes (on
    a CPU along the first of two axes) and over devices; sums do not. Values so large that their sum
    leaves float32 in both directions are NaN for that, too.
    """
    x = widened(x)
    options = {} if where is None else {"where": where}
    low = reduce_to(x, scale_shape, jnp.min, initial=jnp.inf, **options)
    high = reduce_to(x, scale_shape, jnp.max, initial=-jnp.inf, **options)
    # The sum that the moments start from: within one program it is made once.
    total = over_devices(lax.psum, reduce_to(x, scale_shape, jnp.sum, **options), axis_name)
    low, high = over_devices(lax.pmin, low, axis_name), over_devices(lax.pmax, high, axis_name)
    broken = jnp.isnan(total)
    return Extremes(select(broken, jnp.nan, low), select(broken, jnp.nan, high))


def merge(left: Extremes, right: Extremes) -> Extremes:
    """The extremes of both; associative and commutative."""
    return Extremes(jnp.minimum(left.low, right.low), jnp.maximum(left.high, right.high))


def seen(extremes: Extremes) -> jax.Array:
    """Where at least one value was seen (NaN counts as seen)."""
    return ~((extremes.low == jnp.inf) & (extremes.high == -jnp.inf))
