"""The range with the smallest error, by search: first over the whole span, then around the best."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax._compat import varying_like
from quantjax.formats import REAL, divide_by_scale, power_of_two
from quantjax.formats.scales import unit_of
from quantjax.ranges.base import Range, Target, where_seen
from quantjax.statistics import Statistics

COARSE = 40  # from the whole range down to a thousandth of it
TOGETHER = 8  # of these, before a look whether one of the others may be better
_SMALLEST = 2.0**-10
_RATIO = _SMALLEST ** (1.0 / (COARSE - 1))
PLACES = 16
FINE = 12
TRIED_AT_ONCE = 1 << 22  # entries, of one group under several ranges


class Outcome(NamedTuple):
    """What a range does to a sample: all that a measure of its error is made of.

    Attributes:
      x: the values.
      quantized: ``Q(x)``.
      error: ``Q(x) - x``.
      clipped: where the range has no level for ``x``.
      weights: how often each value counts.
    """

    x: jax.Array
    quantized: jax.Array
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


_Pair = tuple[jax.Array, jax.Array]


class _Best(NamedTuple):
    loss: jax.Array
    low: jax.Array
    high: jax.Array


class _Shrinking(NamedTuple):
    """The best so far, how many factors were tried, and whether a smaller one may be better."""

    best: _Best
    done: jax.Array
    goes_on: jax.Array


def search(
    statistics: Statistics, target: Target, loss: Loss, *, is_sum: bool = True, margin: float = 0.0
) -> Range:
    """The range of one group with the smallest loss among those that were tried.

    The whole range, with zero, is tried first, and another one replaces it only if it is better, so
    that no result is worse than :data:`MIN_MAX` by the loss of the sample. Then both ends shrink
    together, by 40 factors from 1 to 2^-10, each 1.19 times the next. In an asymmetric range, the
    lower, the upper and again the lower end are tried at 16 places from zero to what was seen.
    Around the best, first the upper end moves, then the lower one, then both again by finer steps.
    Symmetric quantizers have one end.

    Args:
      is_sum: whether the loss is a sum over values, of terms that are not negative and grow with
        the error. Factors are left then once the values that are clipped cost as much as the best
        range does: under a smaller factor more are clipped, and further. A zero point that is
        rounded the other way moves a range by a step, which is taken off their errors. With scales
        that are no real numbers it moves by more, and all factors are tried.
      margin: by which share of its loss a range has to be better than a wider one. Where a range of
        another size may have the same codes and the same loss, rounding would choose otherwise.

    A range that is zero alone is no candidate: its scale would be arbitrary.
    """
    statistics = lax.stop_gradient(statistics)
    bits, theta = lax.stop_gradient((target.bits, target.theta))
    target = target._replace(bits=bits, theta=theta)
    values, weights = statistics.sample
    low, high = statistics.extremes
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if target.symmetric:
        high = jnp.maximum(-low, high)
        low = -high

    def outcome(low: jax.Array, high: jax.Array) -> Outcome:
        quantized, clipped = target.quantize(values, low, high)
        return Outcome(values, quantized, quantized - values, clipped, weights)

    def tried(best: _Best, low: jax.Array, high: jax.Array) -> _Best:
        """The better of the best so far and the best of some more, the first of equals."""
        some = max(TRIED_AT_ONCE // values.size, 1)
        one = lambda ends: loss(outcome(*ends))  # noqa: E731
        losses = lax.map(one, (low, high), batch_size=min(some, low.size))
        losses = jnp.where(jnp.isnan(losses) | ((low == 0.0) & (high == 0.0)), jnp.inf, losses)
        # The first of them, by a call that keeps the loop around it on all cores: XLA makes one
        # kernel, which has one, of any loop with small operands and without such calls.
        good = losses <= jnp.min(losses) * (1.0 + margin)
        first = lax.top_k(good.astype(jnp.float32), 1)[1][0]
        found = _Best(losses[first], low[first], high[first])
        better = found.loss < best.loss * (1.0 - margin)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)

    def shrunk(state: _Shrinking, some: int) -> _Shrinking:
        numbers = (state.done + jnp.arange(some, dtype=jnp.int32)).astype(jnp.float32)
        factors = jnp.exp2(numbers * jnp.log2(jnp.float32(_RATIO)))
        best = tried(state.best, factors * low, factors * high)
        narrowest = factors[-1] * low, factors[-1] * high
        least = outcome(*narrowest)
        beyond = jnp.abs(least.error)
        if not target.symmetric:
            beyond = jnp.maximum(beyond - target.qparams(*narrowest).scale, 0.0)
        least = least._replace(error=jnp.where(least.clipped, beyond, 0.0))
        return _Shrinking(best, state.done + some, ~(loss(least) >= best.loss))

    start = _Shrinking(_Best(jnp.float32(jnp.inf), low, high), jnp.int32(0), jnp.asarray(True))
    start = varying_like(start, (statistics, target.bits, target.theta))
    if is_sum and (target.symmetric or target.format.scale_rule == REAL):
        more = lambda state: state.goes_on & (state.done < COARSE)  # noqa: E731
        best = lax.while_loop(more, functools.partial(shrunk, some=TOGETHER), start).best
    else:
        best = shrunk(start, COARSE).best
    if not target.symmetric:
        along = _Ends.of([_Ends(low=True), _Ends(high=True), _Ends(low=True)])
        best = _moved(lambda b, ends: tried(b, *_along(b, ends, (low, high))), best, along)
    ends = [_Ends(low=True, high=True)] if target.symmetric else [_Ends(high=True), _Ends(low=True)]
    reaches = [1.0 / _RATIO] * len(ends) + [_RATIO ** (-2.0 / FINE)] * len(ends)
    around = jnp.asarray(reaches, jnp.float32), _Ends.of(ends * 2)
    best = _moved(lambda b, move: tried(b, *_around(b, move, (low, high))), best, around)
    return where_seen(statistics, best.low, best.high)


def _moved(step: Callable[[_Best, Any], _Best], best: _Best, moves: Any) -> _Best:
    """The best after each of the moves, which lie along a leading axis.

    In a loop, not one by one: a quantizer under a dozen ranges is slow to compile.
    """
    return lax.scan(lambda best, move: (step(best, move), None), best, moves)[0]


class _Ends(NamedTuple):
    """Which ends of a range move."""

    low: bool | jax.Array = False
    high: bool | jax.Array = False

    @staticmethod
    def of(moves: Sequence[_Ends]) -> _Ends:
        """One move after another, along a leading axis."""
        return jax.tree.map(lambda *ends: jnp.asarray(ends), *moves)


def _along(start: _Best, moving: _Ends, limits: _Pair) -> _Pair:
    """One end at equal distances from zero to what was seen, the other as in the best."""
    least, most = limits
    share = jnp.arange(PLACES - 1, -1, -1, dtype=jnp.float32) * (1.0 / PLACES)  # the widest first
    low = jnp.where(moving.low, share * least, start.low)
    return low, jnp.where(moving.high, share * most, start.high)


def _around(start: _Best, move: tuple[jax.Array, _Ends], limits: _Pair) -> _Pair:
    """Ends ``1/reach`` to ``reach`` times those of the best, never beyond what was seen."""
    (reach, moving), (least, most) = move, limits
    places = 2.0 * jnp.arange(FINE - 1, -1, -1, dtype=jnp.float32) + 1.0  # the widest first
    share = divide_by_scale(places, jnp.float32(FINE)) - 1.0
    factor = jnp.exp2(share * jnp.log2(reach))
    low = jnp.maximum(jnp.where(moving.low, factor, 1.0) * start.low, least)
    return low, jnp.minimum(jnp.where(moving.high, factor, 1.0) * start.high, most)


def per_unit(statistics: Statistics) -> jax.Array:
    """A power of two, times which no value is larger than 2: its powers do not overflow or vanish.

    It is a factor and no divisor: divisions are most of what a search costs.
    """
    low, high = statistics.extremes
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return power_of_two(-unit_of(largest))
