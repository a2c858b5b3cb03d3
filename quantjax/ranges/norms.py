"""The range with the smallest error in an L_p norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.ranges.base import Range, RangeRule, Target, known_number, rule_of
from quantjax.ranges.search import Outcome, per_unit, search
from quantjax.statistics import Statistics


def squared_error(statistics: Statistics, target: Target, clip_weight: jax.Array) -> Range:
    """The range with the smallest squared error, in which clipping counts ``clip_weight`` times."""
    unit, clip_weight = per_unit(statistics), jnp.asarray(clip_weight, jnp.float32)

    def loss(outcome: Outcome) -> jax.Array:
        error = outcome.error * unit
        cost = jnp.where(outcome.clipped, clip_weight, 1.0)
        return outcome.total(cost * error * error)

    low, high, calibrated = search(statistics, target, loss)
    valid = (clip_weight > 0.0) & jnp.isfinite(clip_weight)
    return Range(jnp.where(valid, low, jnp.nan), jnp.where(valid, high, jnp.nan), calibrated)


def _power(statistics: Statistics, target: Target, p: jax.Array) -> Range:
    unit, p = per_unit(statistics), jnp.asarray(p, jnp.float32)

    def loss(outcome: Outcome) -> jax.Array:
        error = jnp.abs(outcome.error * unit)
        return outcome.total(jnp.exp(p * jnp.log(error)))

    low, high, calibrated = search(statistics, target, loss)
    valid = (p > 0.0) & jnp.isfinite(p)
    return Range(jnp.where(valid, low, jnp.nan), jnp.where(valid, high, jnp.nan), calibrated)


MSE = RangeRule("mse", squared_error, True, (1.0,))
"""``argmin Σ (Q(x) - x)²`` over ranges, by search; any format, each width its own.

At most 64 symmetric ranges are tried, or 136 asymmetric ones, :data:`MIN_MAX` among them, on the
tensor itself or on 2048 points that stand for a histogram. Up to 24 more are wider than what was
seen, at most twice: two's complement has no level at its upper end (two bits are -2, -1, 0 and 1,
so that weights 0 and 1 are exact at twice the scale), powers of two may fall short of it, and
floats and codebooks have their levels elsewhere then. Small groups in few levels come to within
a percent of the best range there is, on average; those of 8 bits do not (32 normal numbers: int8 to
4 percent, E4M3 to 16), because the error jumps with each value that changes its code. Weights get
an error that is not above that of :data:`MIN_MAX`; activations up to how well the points stand for
the values, a percent where there are many, some percent of a few dozen at 8 bits.
Against a search on the values themselves the error is a fraction of a percent higher at few bits,
and 4 (ReLU) to 9 percent (Laplacian) at 8, where a step is as wide as some bins.

Sharp edges: it takes tens of passes over the sample. Under a width above 10 bits a histogram's
bins are wider than the steps, and the search is decided by the clipped share alone.

Source: Sung, Shin and Hwang, Resiliency of deep neural networks under quantization, 2016,
section 3; Nagel et al., A white paper on neural network quantization, 2021, section 3.1.
"""


def l_p(p: float | jax.Array = 2.4) -> RangeRule:
    """``argmin Σ |Q(x) - x|^p`` over ranges, by search as :data:`MSE`; larger ``p``, less clipping.

    Args:
      p: positive; an array may be traced. 2.4 is what block reconstruction starts from.

    Raises:
      QuantizerError: a power that is not positive. A traced one gives NaN.

    >>> l_p(2.4).name
    'l_p(2.4)'

    Source: Nahshan et al., Loss aware post-training quantization, 2021, section 3.1; the default as
    in Li et al., BRECQ, 2021, code.
    """
    known = known_number(p, "l_p")
    if known is not None and not 0.0 < known < float("inf"):
        raise errors.QuantizerError(
            f"an error to the power of {known:g}",
            where="the range rule l_p",
            fix="l_p(2.4), or qj.ranges.MSE",
        )
    return rule_of("l_p", _power, p, reads_distribution=True)
