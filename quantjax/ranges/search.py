"""The range with the smallest error, by search: first over the whole span, then around the best."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.formats import divide_by_scale, exponent_of, power_of_two
from quantjax.ranges.base import Range, Target
from quantjax.statistics import Statistics

COARSE = 40  # from the whole range down to a thousandth of it
_SMALLEST = 2.0**-10
_RATIO = _SMALLEST ** (1.0 / (COARSE - 1))
PLACES = 16
FINE = 12
TRIED_AT_ONCE = 1 << 22  # entries, of one group under several ranges


class Outcome(NamedTuple):
    """What a range does to a sample: all that a measure of its error is made of.

    Attributes:
      x: the values.
      error: ``Q(x) - x``.
      clipped: where the range has no level for ``x``.
      weights: how often each value counts.
    """

    x: jax.Array
    error: jax.Array
    clipped: jax.Array
    weights: jax.Array

    def total(self, costs: jax.Array) -> jax.Array:
        """The sum of what each value costs, as often as it counts.

        A product with the weights, for which CPUs have fast kernels; reductions have none.
        """
        return jnp.dot(costs, self.weights, precision=lax.Precision.HIGHEST)


Loss = Callable[[Outcome], jax.Array]
"""An outcome to a number that is smaller where the range is better."""


class _Best(NamedTuple):
    loss: jax.Array
    low: jax.Array
    high: jax.Array


def search(statistics: Statistics, target: Target, loss: Loss) -> Range:
    """The range of one group with the smallest loss among those that were tried.

    The whole range, with zero, is tried first, and another one replaces it only if it is better, so
    that no result is worse than :data:`MIN_MAX` by the loss of the sample. Then both ends shrink
    together, by 40 factors from 1 to 2^-10, each 1.19 times the next. In an asymmetric range, the
    lower, the upper and again the lower end are tried at 16 places from zero to what was seen.
    Around the best, first the upper end moves, then the lower one, then both again by finer steps.
    Symmetric quantizers have one end.
    """
    values, weights = statistics.sample
    low, high = statistics.extremes
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if target.symmetric:
        high = jnp.maximum(-low, high)
        low = -high

    def tried(best: _Best, low: jax.Array, high: jax.Array) -> _Best:
        """The better of the best so far and the best of some more, the first of equals."""

        def one(low: jax.Array, high: jax.Array) -> jax.Array:
            quantized, clipped = target.quantize(values, low, high)
            return loss(Outcome(values, quantized - values, clipped, weights))

        some = max(TRIED_AT_ONCE // values.size, 1)
        losses = lax.map(lambda ends: one(*ends), (low, high), batch_size=min(some, low.size))
        losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
        first = jnp.argmin(losses)
        found = _Best(losses[first], low[first], high[first])
        better = found.loss < best.loss
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)

    factors = jnp.exp2(jnp.arange(COARSE, dtype=jnp.float32) * jnp.log2(jnp.float32(_RATIO)))
    best = tried(_Best(jnp.asarray(jnp.inf), low, high), factors * low, factors * high)
    ends: tuple[_Ends, ...] = (_Ends.BOTH,)
    if not target.symmetric:
        ends = (_Ends.HIGH, _Ends.LOW)
        for moving in (_Ends.LOW, _Ends.HIGH, _Ends.LOW):
            best = tried(best, *_along(best, moving, (low, high)))
    for reach in (1.0 / _RATIO, _RATIO ** (-2.0 / FINE)):
        for moving in ends:
            best = tried(best, *_around(best, reach, moving, (low, high)))
    return Range(best.low, best.high, statistics.batches > 0)


class _Ends(enum.Enum):
    """Which end of a range moves."""

    LOW = enum.auto()
    HIGH = enum.auto()
    BOTH = enum.auto()


def _along(
    start: _Best, moving: _Ends, limits: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """One end at equal distances from zero to what was seen, the other as in the best."""
    least, most = limits
    share = jnp.arange(PLACES, dtype=jnp.float32) * (1.0 / PLACES)
    if moving is _Ends.LOW:
        return share * least, jnp.ones(PLACES) * start.high
    return jnp.ones(PLACES) * start.low, share * most


def _around(
    start: _Best, reach: float, moving: _Ends, limits: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Ends ``1/reach`` to ``reach`` times those of the best, never beyond what was seen."""
    least, most = limits
    places = 2.0 * jnp.arange(FINE, dtype=jnp.float32) + 1.0
    share = divide_by_scale(places, jnp.float32(FINE)) - 1.0
    factor = jnp.exp2(share * jnp.log2(jnp.float32(reach)))
    still = jnp.ones(FINE)
    low = jnp.maximum((still if moving is _Ends.HIGH else factor) * start.low, least)
    high = jnp.minimum((still if moving is _Ends.LOW else factor) * start.high, most)
    return low, high


def per_unit(statistics: Statistics) -> jax.Array:
    """A power of two, times which no value is larger than 2: its powers do not overflow or vanish.

    It is a factor and no divisor: divisions are most of what a search costs.
    """
    low, high = statistics.extremes
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    known = (largest > 0.0) & jnp.isfinite(largest)
    return jnp.where(known, power_of_two(-exponent_of(largest)), 1.0)
