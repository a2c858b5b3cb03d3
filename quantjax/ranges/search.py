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
        quantized, clipped = target.quantize(values, low, high)
        found = loss(Outcome(values, quantized - values, clipped, weights))
        better = found < best.loss
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), _Best(found, low, high), best)

    def shrunk(index: jax.Array, best: _Best) -> _Best:
        factor = jnp.exp2(index.astype(jnp.float32) * jnp.log2(jnp.float32(_RATIO)))
        return tried(best, factor * low, factor * high)

    best = tried(_Best(jnp.asarray(jnp.inf), low, high), low, high)
    best = lax.fori_loop(1, COARSE, shrunk, best)
    ends: tuple[_Ends, ...] = (_Ends.BOTH,)
    if not target.symmetric:
        ends = (_Ends.HIGH, _Ends.LOW)
        for moving in (_Ends.LOW, _Ends.HIGH, _Ends.LOW):
            best = _along(best, moving, tried, (low, high))
    for reach in (1.0 / _RATIO, _RATIO ** (-2.0 / FINE)):
        for moving in ends:
            best = _around(best, reach, moving, tried, (low, high))
    return Range(best.low, best.high, statistics.batches > 0)


class _Ends(enum.Enum):
    """Which end of a range moves."""

    LOW = enum.auto()
    HIGH = enum.auto()
    BOTH = enum.auto()


def _along(
    best: _Best,
    moving: _Ends,
    tried: Callable[[_Best, jax.Array, jax.Array], _Best],
    limits: tuple[jax.Array, jax.Array],
) -> _Best:
    """One end at equal distances from zero to what was seen, the other as in the best."""
    start, (least, most) = best, limits

    def step(index: jax.Array, best: _Best) -> _Best:
        share = index.astype(jnp.float32) * (1.0 / PLACES)
        low = share * least if moving is _Ends.LOW else start.low
        high = share * most if moving is _Ends.HIGH else start.high
        return tried(best, low, high)

    return lax.fori_loop(0, PLACES, step, best)


def _around(
    best: _Best,
    reach: float,
    moving: _Ends,
    tried: Callable[[_Best, jax.Array, jax.Array], _Best],
    limits: tuple[jax.Array, jax.Array],
) -> _Best:
    """Ends ``1/reach`` to ``reach`` times those of the best, never beyond what was seen."""
    start, (least, most) = best, limits

    def step(index: jax.Array, best: _Best) -> _Best:
        share = divide_by_scale(2.0 * index.astype(jnp.float32) + 1.0, jnp.float32(FINE)) - 1.0
        factor = jnp.exp2(share * jnp.log2(jnp.float32(reach)))
        low = start.low if moving is _Ends.HIGH else jnp.maximum(factor * start.low, least)
        high = start.high if moving is _Ends.LOW else jnp.minimum(factor * start.high, most)
        return tried(best, low, high)

    return lax.fori_loop(0, FINE, step, best)


def per_unit(statistics: Statistics) -> jax.Array:
    """A power of two, times which no value is larger than 2: its powers do not overflow or vanish.

    It is a factor and no divisor: divisions are most of what a search costs.
    """
    low, high = statistics.extremes
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    known = (largest > 0.0) & jnp.isfinite(largest)
    return jnp.where(known, power_of_two(-exponent_of(largest)), 1.0)
