"""Mean, variance and mean magnitude, merged without loss of digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from quantjax.formats import divide_by_scale
from quantjax.granularity import expand, reduce_to
from quantjax.lean import rounded_product, select, widened
from quantjax.statistics.devices import AxisName, over_devices


class Moments(NamedTuple):
    """Averages over all values, at the shape of the scale; 0 where nothing was seen.

    Attributes:
      mean: ``E x``.
      variance: ``E (x - E x)²``.
      magnitude: ``E |x|``, the first absolute moment.
    """

    mean: Float[Array, "..."]
    variance: Float[Array, "..."]
    magnitude: Float[Array, "..."]

    @property
    def square(self) -> Float[Array, "..."]:
        """``E x²``, the second absolute moment."""
        return self.variance + rounded_product(self.mean, self.mean)


def init(scale_shape: Sequence[int]) -> Moments:
    """Nothing seen."""
    shape = tuple(scale_shape)
    return Moments(*(jnp.zeros(shape, jnp.float32) for _ in range(3)))


def of_batch(
    x: Float[Array, "..."],
    scale_shape: Sequence[int],
    where: Bool[Array, "..."] | None,
    number: Float[Array, "..."],
    *,
    axis_name: AxisName = None,
) -> Moments:
    """Moments of one tensor, or of all devices' tensors.

    The variance takes a second look at the tensor, because ``E x² - (E x)²`` has no digits left
    where the mean is large.

    Args:
      number: how many values count, at the shape of the scale, on all devices.
    """
    x = widened(x)
    options = {} if where is None else {"where": where}
    some = jnp.maximum(number, 1.0)

    def mean(values: jax.Array) -> jax.Array:
        total = reduce_to(values, scale_shape, jnp.sum, **options)
        return divide_by_scale(over_devices(jax.lax.psum, total, axis_name), some)

    center = mean(x)
    away = x - expand(center, x.shape)
    return Moments(center, mean(away * away), mean(jnp.abs(x)))


def merge(
    left: Moments,
    right: Moments,
    left_number: Float[Array, "..."],
    right_number: Float[Array, "..."],
) -> Moments:
    """The moments of both.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, 1979, equation 2.1.
    """
    total = jnp.maximum(left_number + right_number, 1.0)
    share, other = divide_by_scale(right_number, total), divide_by_scale(left_number, total)

    def averaged(a: jax.Array, b: jax.Array) -> jax.Array:
        # a + share · (b - a) is a itself where the other has nothing, and where both are equal.
        return select(other < share, b + other * (a - b), a + share * (b - a))

    away = right.mean - left.mean
    between = (away * share) * (away * other)  # 0 where one has nothing, however large the mean
    return Moments(
        averaged(left.mean, right.mean),
        averaged(left.variance, right.variance) + between,
        averaged(left.magnitude, right.magnitude),
    )
