"""Ranges by signal-to-noise ratio and by cosine similarity."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.formats import divide_by_scale
from quantjax.ranges.base import Range, RangeRule, Target, known_number, rule_of
from quantjax.ranges.norms import squared_error
from quantjax.ranges.search import Outcome, per_unit, search
from quantjax.statistics import Statistics


def sqnr(clip_weight: float | jax.Array = 3.0) -> RangeRule:
    """The largest ratio of signal to noise, where clipping counts ``γ`` times as much as rounding.

    ``argmin Σ_rounded (Q(x) - x)² + γ Σ_clipped (Q(x) - x)²``; with ``γ = 1`` that is :data:`MSE`,
    whose range has the best ratio.

    Args:
      clip_weight: ``γ``, positive; an array may be traced.

    Raises:
      QuantizerError: a weight that is not positive. A traced one gives NaN.

    Sharp edges: the search is that of :data:`MSE`; AIMET, whose default is 3 too, takes rounding
    errors to be uniform and has a grid of its own.

    >>> sqnr(1.0).name
    'sqnr(1)'

    Source: AIMET, ``SqnrEncodingAnalyzer``.
    """
    known = known_number(clip_weight, "sqnr")
    if known is not None and not 0.0 < known < float("inf"):
        raise errors.QuantizerError(
            f"clipping errors that count {known:g} times",
            where="the range rule sqnr",
            fix="sqnr(3.0)",
        )
    return rule_of("sqnr", squared_error, clip_weight, reads_distribution=True)


SQNR = sqnr()
"""Clipping errors count three times; see :func:`sqnr`."""


_SAME = 1e-12  # sin² of an angle of 1e-6
_MARGIN = 1e-3  # ranges of which one is a multiple of the other may have the same codes


def _cosine(statistics: Statistics, target: Target) -> Range:
    unit = per_unit(statistics)

    def loss(outcome: Outcome) -> jax.Array:
        x = outcome.x * unit
        # Not x and its error: of a range a thousandth as wide their sum has four digits left.
        q = outcome.quantized * unit
        xx, xq, length = outcome.total(x * x), outcome.total(x * q), outcome.total(q * q)
        some = jnp.where(length > 0.0, length, 1.0)
        # sin² of the angle between x and Q(x), from what is left of x beside its projection:
        # 1 - cos has no digits left, and a difference of sums has few where the range is narrow.
        beside = x - divide_by_scale(xq, some) * q
        sine = divide_by_scale(outcome.total(beside * beside), jnp.where(xx > 0.0, xx, 1.0))
        # What float32 cannot tell from the same direction is that direction, and the first range,
        # the widest, keeps it: one value has the cosine 1 whatever becomes of it.
        sine = jnp.maximum(sine, _SAME)
        # A tensor that becomes all zeros has no direction.
        return jnp.where((length > 0.0) | (xx == 0.0), sine, 2.0)

    return search(statistics, target, loss, is_sum=False, margin=_MARGIN)


COSINE = RangeRule("cosine", _cosine, reads_distribution=True)
"""``argmax ⟨x, Q(x)⟩ / (‖x‖ ‖Q(x)‖)`` over ranges, by search as :data:`MSE`.

A common factor does not count, so ranges come out narrower than by squared error at few bits: what
the next layer makes of the lost length is left to it. Of ranges whose cosines agree to a thousandth
of their distance from 1 the widest is taken, since all that clip every value alike are equal. One
value that outweighs all others has the direction nearly to itself, and may be clipped far.

Source: Wu et al., EasyQuant: post-training quantization via scale optimization, 2020, section 3.
"""
