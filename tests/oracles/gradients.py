"""Gradients of ``y = s (q - z)`` in float64, by the formulas of the papers.

Straight through (Bengio et al., 2013): ``∂q/∂(x/s) = 1``. Clipped (Jacob et al., 2018): 1 where the
rounded code lies inside the range, 0 outside. The scale's follow as in LSQ (Esser et al., 2020,
equation 3), the zero point's as in LSQ+ (Bhalgat et al., 2020, equations 5 and 6).
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.integers import Integers, bounds, codes, quotient, spread


class Gradients(NamedTuple):
    """``cotangent · ∂y/∂·``, summed over the entries that share a parameter."""

    x: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray


def gather(entries: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    """Sums over the entries of each group; a shape of () sums all."""
    if not groups:
        return np.asarray(entries.sum())
    out = np.zeros(groups)
    for index in np.ndindex(entries.shape):
        home = tuple(i * g // n for i, g, n in zip(index, groups, entries.shape, strict=True))
        out[home] += entries[index]
    return out


def _gradients(cotangent, slope, x, scale, zero_point, family) -> Gradients:
    wide = spread(np.float64(scale), x.shape)
    centered = codes(x, scale, zero_point, family) - np.rint(
        spread(np.float64(zero_point), x.shape)
    )
    to_scale = centered - np.where(slope == 0, 0, slope * quotient(x, scale))
    return Gradients(
        cotangent * slope,
        gather(cotangent * to_scale, np.shape(scale)),
        gather(cotangent * wide * (slope - 1), np.shape(zero_point)),
    )


def straight_through(
    cotangent: np.ndarray,
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    family: Integers,
) -> Gradients:
    """Slope 1 everywhere."""
    return _gradients(cotangent, np.ones(x.shape), x, scale, zero_point, family)


def clipped(
    cotangent: np.ndarray,
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    family: Integers,
) -> Gradients:
    """Slope 1 where ``low <= rint(x/s) + z <= high``."""
    low, high = bounds(family)
    unclipped = np.rint(quotient(x, scale)) + np.rint(spread(np.float64(zero_point), x.shape))
    slope = np.float64((unclipped >= low) & (unclipped <= high))
    return _gradients(cotangent, slope, x, scale, zero_point, family)
