"""The range with the smallest error, by search: first over the whole span, then around the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax._compat import varying_like
from quantjax.formats import REAL, IntegerFormat, divide_by_scale, power_of_two
from quantjax.formats.scales import unit_of
from quantjax.ranges.base import Range, Target, where_seen
from quantjax.statistics import Statistics
from quantjax.symbolic import at_most

COARSE = 40  # from the whole range down to a thousandth of it
_SMALLEST = 2.0**-10
_RATIO = _SMALLEST ** (1.0 / (COARSE - 1))
PLACES = 16
FINE = 12
TOGETHER = 6  # ranges, before a look whether one of the others may be better
TRIED_AT_ONCE = 1 << 22  # entries, of one group under several ranges
_TINY = -100  # the exponent of ranges that are not widened
_LARGE = 2.0**120


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


class _Round(NamedTuple):
    """Ranges that are tried together; rounds of one move start from the same range.

    Attributes:
      factors: ``[TOGETHER]``, by which the ends that move are multiplied, the widest first.
      of_limits: whether those of the whole range are, and not those of the start.
      low, high: which ends move.
      opens: whether a move begins.
      shrinks: whether the last range only says whether narrower ones may be better.
      widens: whether factors say how far from what was seen to the widest range the ends are.
      is_wider: whether ranges may be wider than what was seen.
    """

    factors: Any
    of_limits: Any
    low: Any
    high: Any
    opens: Any
    shrinks: Any
    widens: Any
    is_wider: Any


class _Search(NamedTuple):
    """The best of all and of narrower or wider ranges alone, and where the search is.

    Attributes:
      mine: the best of those that are no wider than what was seen; then of those that may be.
      start: the range that the move started from.
      done: how many rounds are.
    """

    best: _Best
    mine: _Best
    start: _Pair
    done: jax.Array


def search(
    statistics: Statistics, target: Target, loss: Loss, *, is_sum: bool = True, margin: float = 0.0
) -> Range:
    """The range of one group with the smallest loss among those that were tried.

    The whole range, with zero, is tried first, and another one replaces it only if it is better, so
    that no result is worse than :data:`MIN_MAX` by the loss of the sample. Then both ends shrink
    together, by 40 factors from 1 to 2^-10, each 1.19 times the next. In an asymmetric range, the
    lower, the upper and again the lower end are tried at 16 places from zero to what was seen.
    Around the best, first the upper end moves, then the lower one, then both again by finer steps.
    Symmetric quantizers have one end. Last, wider ranges are tried, up to twice what was seen,
    where the outermost levels may lie below the ends (the upper one of two's complement does, those
    of powers of two may): six; and where levels are not evenly spaced: twelve, and 12 around the
    best of those. A result is never worse by the sample than it were without them.

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
    part = _part(target, jnp.maximum(-low, high))
    values, low, high = values * part, low * part, high * part
    if target.symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    leaves_early = is_sum and (target.symmetric or target.format.scale_rule == REAL)
    wider, limits = _widest(target, jnp.maximum(-low, high), part), (low, high)
    is_real = target.format.scale_rule == REAL
    rounds, coarse = _schedule(
        symmetric=target.symmetric,
        leaves_early=leaves_early,
        wider=0 if wider is None else 2 if is_real else 1,
    )

    # All alike: of a remainder, the quantizer would be compiled again.
    parts = [part for part in range(1, TOGETHER + 1) if TOGETHER % part == 0]
    at_once = max(n for n in parts if n == 1 or at_most(n * values.size, TRIED_AT_ONCE))

    def cost(low: jax.Array, high: jax.Array, of_clipped: jax.Array) -> jax.Array:
        """What a range costs, or what it costs at least if it were narrower."""
        quantized, clipped = target.quantize(values, low, high)
        error = quantized - values
        if leaves_early:
            beyond = jnp.abs(error)
            if not target.symmetric:
                beyond = jnp.maximum(beyond - target.qparams(low, high).scale, 0.0)
            error = jnp.where(of_clipped, jnp.where(clipped, beyond, 0.0), error)
        return loss(Outcome(values, quantized, error, clipped, weights))

    def some_more(state: _Search) -> _Search:
        """One round. All of them are one loop: a quantizer is slow to compile a second time."""
        this: _Round = jax.tree.map(lambda rows: jnp.asarray(rows)[state.done], rounds)
        best, mine = state.best, state.mine
        if wider is not None:  # anew, so that a wider one does not end the search of narrower ones
            mine = mine._replace(loss=jnp.where(this.widens, jnp.inf, mine.loss))
        start = jax.tree.map(lambda a, b: jnp.where(this.opens, a, b), tuple(mine[1:]), state.start)
        # A barrier: fused into whatever reads them, they are found again in half a dozen kernels.
        lows, highs = lax.optimization_barrier(_moved(this, start, limits, wider))
        of_clipped = this.shrinks & (jnp.arange(TOGETHER) == TOGETHER - 1)
        costs = lax.map(lambda each: cost(*each), (lows, highs, of_clipped), batch_size=at_once)
        none = jnp.isnan(costs) | ((lows == 0.0) & (highs == 0.0)) | of_clipped
        losses = jnp.where(none, jnp.inf, costs)
        # The first of them, by a call that keeps the loop around it on all cores: XLA makes one
        # kernel, which has one, of any loop with small operands and without such calls.
        good = losses <= jnp.min(losses) * (1.0 + margin)
        first = lax.top_k(good.astype(jnp.float32), 1)[1][0]
        found = _Best(losses[first], lows[first], highs[first])
        mine = _better(found, mine, margin)
        best = mine if wider is None else _better(mine, best, margin)
        is_over = this.shrinks & (costs[-1] >= mine.loss)
        return _Search(best, mine, start, jnp.where(is_over, coarse, state.done + 1))

    nothing = _Best(jnp.float32(jnp.inf), low, high)
    begin = _Search(nothing, nothing, (low, high), jnp.int32(0))
    begin = varying_like(begin, (statistics, target.bits, target.theta))
    number = rounds.opens.shape[0]
    best = lax.while_loop(lambda state: state.done < number, some_more, begin).best
    return where_seen(statistics, best.low / part, best.high / part)


def _part(target: Target, largest: jax.Array) -> jax.Array:
    """A power of two, times which scales have a reciprocal: beyond 2^126 that is no normal number.

    Real scales and powers of two take factors along. Others end long before.
    """
    rule = target.format.scale_rule
    is_large = (largest > _LARGE) & (rule == REAL or rule.is_power_of_two)
    return jnp.where(is_large, jnp.float32(1.0 / 16.0), 1.0)


def _better(found: _Best, best: _Best, margin: float) -> _Best:
    better = found.loss < best.loss * (1.0 - margin)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)


def _widest(target: Target, largest: jax.Array, part: jax.Array) -> jax.Array | None:
    """How many times what was seen a range may be; None where wider ones are not tried.

    Evenly spaced levels that reach both ends are further apart in a wider range, which is seldom
    better: where many values happen to lie on levels. In two's complement ranges are as wide as the
    upper end needs to have a level.
    """
    format = target.format
    needed = jnp.float32(2.0)  # the next power of two; floats have the same levels there
    if isinstance(format, IntegerFormat) and format.scale_rule == REAL:
        if not target.symmetric or not format.signed or format.narrow:
            return None
        steps = format.steps(target.bits, symmetric=True, theta=target.theta)
        highest = format.level_range(target.bits, target.theta)[1]
        needed = jnp.minimum(divide_by_scale(steps, highest), 2.0)
    # Squares of what is next to float32's smallest numbers say nothing of a range.
    needed = jnp.where((needed > 1.0) & (unit_of(largest) > _TINY), needed, 1.0)  # of NaN, too
    end = jnp.finfo(jnp.float32).max * part
    return jnp.where(largest * needed < end, needed, 1.0)


def _moved(this: _Round, start: _Pair, limits: _Pair, wider: jax.Array | None) -> _Pair:
    """The ranges of a round, none of them beyond what was seen, or the widest."""
    factors, most = this.factors, limits
    if wider is not None:
        factors = jnp.where(this.widens, 1.0 + (wider - 1.0) * factors, factors)
        reach = jnp.where(this.is_wider, wider, 1.0)
        most = reach * limits[0], reach * limits[1]
    ends = []
    for moves, mine, limit, end, narrower in zip(
        (this.low, this.high), start, limits, most, (jnp.maximum, jnp.minimum), strict=True
    ):
        moved = narrower(factors * jnp.where(this.of_limits, limit, mine), end)
        ends.append(jnp.where(moves, moved, mine))
    return ends[0], ends[1]


def _schedule(*, symmetric: bool, leaves_early: bool, wider: int) -> tuple[_Round, int]:
    """All rounds, along a leading axis, and how many of them shrink the whole range.

    Args:
      wider: moves to ranges that are wider than what was seen; the second one is a finer one.
    """
    shares = np.arange(PLACES - 1, -1, -1) / PLACES
    shrinking = _RATIO ** np.arange(COARSE)
    rows = _rounds(shrinking, of_limits=True, low=True, high=True, shrinks=leaves_early)
    coarse = len(rows)
    if not symmetric:
        for low in (True, False, True):
            rows += _rounds(shares, of_limits=True, low=low, high=not low)
    places = (2.0 * np.arange(FINE - 1, -1, -1) + 1.0) / FINE - 1.0
    for reach in (1.0 / _RATIO, _RATIO ** (-2.0 / FINE)):
        for low, high in [(True, True)] if symmetric else [(False, True), (True, False)]:
            rows += _rounds(reach**places, of_limits=False, low=low, high=high)
    if wider:
        number = wider * TOGETHER
        widening = np.arange(number, 0, -1) / number
        rows += _rounds(widening, of_limits=True, low=True, high=True, widens=True, is_wider=True)
    if wider > 1:
        finer = (1.0 + 1.0 / number) ** places
        rows += _rounds(finer, of_limits=False, low=True, high=True, is_wider=True)
    return _Round(*map(np.stack, zip(*rows, strict=True))), coarse


def _rounds(
    factors: np.ndarray,
    *,
    of_limits: bool,
    low: bool,
    high: bool,
    shrinks: bool = False,
    widens: bool = False,
    is_wider: bool = False,
) -> list[_Round]:
    """Those of one move; the last range of the move is tried again where a round has room."""
    each = TOGETHER - 1 if shrinks else TOGETHER
    found = []
    for first in range(0, factors.size, each):
        some = factors[first : first + each]
        some = np.pad(some, (0, TOGETHER - some.size), mode="edge").astype(np.float32)
        opens = first == 0
        found.append(_Round(some, of_limits, low, high, opens, shrinks, widens, is_wider))
    return found


def per_unit(statistics: Statistics) -> jax.Array:
    """A power of two, times which no value is larger than 2: its powers do not overflow or vanish.

    It is a factor and no divisor: divisions are most of what a search costs.
    """
    low, high = statistics.extremes
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return power_of_two(-unit_of(largest))
