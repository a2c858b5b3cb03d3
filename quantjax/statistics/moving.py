"""Exponential moving average of each batch's extremes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax._compat import concrete
from quantjax.lean import select
from quantjax.statistics.extremes import Extremes, seen

TORCH_AVERAGING_CONSTANT = 0.01
"""The constant of ``torch.ao.quantization.MovingAverageMinMaxObserver``."""


class MovingExtremes(NamedTuple):
    """``m ← m + c · (m_batch - m)``, the first batch as it is; depends on the order of batches.

    Attributes:
      low, high: the averages, at the shape of the scale.
      constant: ``c``, an array, so that a sweep can vary it.
    """

    low: Float[Array, "..."]
    high: Float[Array, "..."]
    constant: Float[Array, ""]


def init(scale_shape: Sequence[int], constant: float | jax.Array) -> MovingExtremes:
    """Nothing seen; averages of NaN by a traced constant that is no weight."""
    shape = tuple(scale_shape)
    if concrete(constant) is None:  # one that is known was checked
        constant = jnp.where((constant >= 0.0) & (constant <= 1.0), constant, jnp.nan)
    return MovingExtremes(
        jnp.full(shape, jnp.inf, jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.array(constant, jnp.float32),  # a copy: a shared one could not be donated
    )


def update(moving: MovingExtremes, batch: Extremes) -> MovingExtremes:
    """One batch later; a batch without values changes nothing.

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018,
    section 3; the constant and the first batch as in PyTorch's observer.
    """
    first = ~seen(Extremes(moving.low, moving.high))
    empty = ~seen(batch)

    def step(average: jax.Array, value: jax.Array) -> jax.Array:
        before = select(first | empty, 0.0, average)  # infinite; its difference would be NaN
        moved = before + moving.constant * (select(empty, 0.0, value) - before)
        return select(empty, average, select(first, value, moved))

    return moving._replace(low=step(moving.low, batch.low), high=step(moving.high, batch.high))
