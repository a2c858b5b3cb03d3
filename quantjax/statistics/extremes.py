"""Smallest and largest value seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from quantjax.granularity import reduce_to
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

    NaN propagates.
    """
    x = x.astype(jnp.float32)
    options = {} if where is None else {"where": where}
    low = reduce_to(x, scale_shape, jnp.min, initial=jnp.inf, **options)
    high = reduce_to(x, scale_shape, jnp.max, initial=-jnp.inf, **options)
    if axis_name is not None:
        # A reduction over devices may lose NaN, which a sum does not.
        broken = over_devices(jax.lax.psum, jnp.isnan(low).astype(jnp.int32), axis_name) > 0
        low = jnp.where(broken, jnp.nan, over_devices(jax.lax.pmin, low, axis_name))
        high = jnp.where(broken, jnp.nan, over_devices(jax.lax.pmax, high, axis_name))
    return Extremes(low, high)


def merge(left: Extremes, right: Extremes) -> Extremes:
    """The extremes of both; associative and commutative."""
    return Extremes(jnp.minimum(left.low, right.low), jnp.maximum(left.high, right.high))


def seen(extremes: Extremes) -> jax.Array:
    """Where at least one value was seen (NaN counts as seen)."""
    return ~((extremes.low == jnp.inf) & (extremes.high == -jnp.inf))
