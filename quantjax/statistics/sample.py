"""Values with weights: what rules that look at a distribution read."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from quantjax.granularity import groups_last
from quantjax.lean import widened
from quantjax.statistics import count
from quantjax.statistics.histogram import Histogram

POINTS = 2048
_GOLDEN = 0.6180339887498949  # multiples of it are spread evenly modulo 1


class Sample(NamedTuple):
    """Values and how often each of them counts, for each group.

    Attributes:
      values: ``[*scale, n]``; those of weight 0 mean nothing.
      weights: ``[*scale, n]``.
    """

    values: Float[Array, "... n"]
    weights: Float[Array, "... n"]


class Held(NamedTuple):
    """A tensor as it is kept until a rule looks at it: in as few bytes as it came in.

    Attributes:
      values: ``[*scale, n]``, float32, or the 16-bit format that the tensor has.
      counted: ``[*scale, n]``; False where there is no value, or one that is not finite.
    """

    values: Float[Array, "... n"]
    counted: Bool[Array, "... n"]

    @property
    def sample(self) -> Sample:
        """In float32, each value once."""
        return Sample(widened(self.values), self.counted.astype(jnp.float32))


def of_tensor(x: Float[Array, "..."], scale_shape: tuple[int, ...]) -> Held:
    """The tensor itself, group by group; what is not finite does not count.

    >>> of_tensor(jnp.array([[1.0, 2.0], [3.0, 4.0]]), (1, 2)).values.tolist()
    [[[1.0, 3.0], [2.0, 4.0]]]
    """
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    values, some = groups_last(x if half else x.astype(jnp.float32), scale_shape)
    counted = some & jnp.isfinite(values)
    return Held(jnp.where(counted, values, jnp.zeros_like(values)), counted)


def of_histogram(histogram: Histogram, points: int = POINTS) -> Sample:
    """At most ``points`` values that stand for the bins, which are taken together where need be.

    A value lies somewhere in its bins, at a multiple of the golden ratio and not in the middle:
    middles would be in step with the levels of a quantizer, and look better or worse than what they
    stand for. The bin that starts at 0 has the value 0, which most of it is after a ReLU.
    """
    together = max(histogram.bins // points, 1)
    points = histogram.bins // together
    weights = count.as_float(histogram.counts)
    weights = weights.reshape(*weights.shape[:-1], points, together).sum(-1)
    starts = histogram.edges[..., :-1:together]
    widths = histogram.width * together
    places = jnp.arange(points, dtype=jnp.float32) * _GOLDEN
    places = (places - jnp.floor(places)).reshape((1,) * histogram.origin.ndim + (points,))
    values = jnp.where(starts == 0.0, 0.0, starts + places * widths[..., None])
    return Sample(values, weights)
