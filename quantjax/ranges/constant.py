"""A range that is known beforehand."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.ranges.base import Range, RangeRule, Target, known_number, rule_of
from quantjax.statistics import Statistics


def _range(statistics: Statistics, target: Target, low: jax.Array, high: jax.Array) -> Range:
    del target
    shape = statistics.scale_shape
    low, high = (jnp.asarray(bound, jnp.float32) for bound in (low, high))
    valid = (low <= high) & jnp.isfinite(low) & jnp.isfinite(high)
    low, high = (jnp.broadcast_to(jnp.where(valid, end, jnp.nan), shape) for end in (low, high))
    return Range(low, high, jnp.asarray(True))


def constant(low: float | jax.Array, high: float | jax.Array) -> RangeRule:
    """``[low, high]``, whatever was seen: a ReLU6, a softmax, a range from elsewhere.

    Args:
      low, high: scalars, ``low <= high``; arrays may be traced.

    Raises:
      QuantizerError: bounds in the wrong order, or not finite. Traced ones give NaN.

    Sharp edges: it reads no statistics, but ``qj.calibrate`` asks for them all the same, where it
    can see that nothing was observed; not under a trace.

    >>> constant(0.0, 6.0).name
    'constant(0, 6)'
    """
    known = [known_number(bound, "constant") for bound in (low, high)]
    ends = [bound for bound in known if bound is not None]
    if len(ends) == 2 and not (-float("inf") < ends[0] <= ends[1] < float("inf")):
        raise errors.QuantizerError(
            f"a range from {ends[0]:g} to {ends[1]:g}",
            where="the range rule constant",
            fix="constant(0.0, 6.0): finite bounds in this order",
        )
    return rule_of("constant", _range, low, high)
