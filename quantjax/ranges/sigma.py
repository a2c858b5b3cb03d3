"""The mean and some standard deviations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.ranges.base import (
    Range,
    RangeRule,
    Target,
    known_number,
    rule_of,
    square_root,
    within_seen,
)
from quantjax.statistics import Statistics


def _range(statistics: Statistics, target: Target, factor: jax.Array) -> Range:
    del target
    reach = jnp.asarray(factor, jnp.float32) * square_root(statistics.moments.variance)
    low, high, calibrated = within_seen(statistics, statistics.moments.mean, reach)
    factor = jnp.asarray(factor, jnp.float32)
    valid = (factor > 0.0) & jnp.isfinite(factor)
    return Range(jnp.where(valid, low, jnp.nan), jnp.where(valid, high, jnp.nan), calibrated)


def sigma(factor: float | jax.Array = 3.0) -> RangeRule:
    """``[μ - k σ, μ + k σ]``, and no more than what was seen.

    Args:
      factor: ``k``, positive; an array may be traced.

    Raises:
      QuantizerError: a factor that is not positive. A traced one gives NaN.

    Sharp edges: where the variance vanishes or the sum of squares overflows (values below 1e-19, or
    above 1e19 over the root of their number) the range is what was seen; next to that, below 1e-18,
    squares lose digits. After a ReLU the distribution is half of one, and zero lies within the
    range all the same; the upper bound is then lower than a Gaussian's would be.

    >>> from quantjax import integer, statistics
    >>> seen = statistics.of_tensor(jnp.array([-10.0] + 9999 * [1.0]), (1,), with_values=False)
    >>> found = sigma(3.0).range(seen, Target(integer(), True, jnp.float32(8)), 3.0)
    >>> round(found.low.item(), 2), found.high.item()
    (0.67, 1.0)

    Source: McKinstry et al., Discovering low-precision networks close to full-precision networks
    for efficient embedded inference, 2018, section 3.
    """
    known = known_number(factor, "sigma")
    if known is not None and not 0.0 < known < float("inf"):
        raise errors.QuantizerError(
            f"{known:g} standard deviations",
            where="the range rule sigma",
            fix="sigma(3.0)",
        )
    return rule_of("sigma", _range, factor)
