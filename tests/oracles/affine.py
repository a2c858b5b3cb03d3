"""Scale and zero point of a range, exactly and as float32 arithmetic gives them."""

from typing import NamedTuple

import numpy as np

from tests.oracles.integers import Integers, bounds, levels

SMALLEST_NORMAL = np.finfo(np.float32).tiny
LARGEST = np.finfo(np.float32).max


class Parameters(NamedTuple):
    """What a range comes to."""

    scale: np.ndarray
    zero_point: np.ndarray


def step_count(family: Integers, *, symmetric: bool) -> int:
    """How many steps the span has; the span is the largest magnitude where symmetric."""
    low, high = bounds(family)
    if not symmetric:
        return high - low
    if not family.signed:
        return high
    # Full range: the grid reaches from -2^(b-1) steps; narrow: to the highest code on both sides.
    return max(high if family.narrow else 2 ** (family.bits - 1), 1)


def exact_scale(
    low: np.ndarray, high: np.ndarray, family: Integers, *, symmetric: bool
) -> np.ndarray:
    """The scale in float64, of a range that is not empty."""
    low, high = np.float64(low), np.float64(high)
    if symmetric:
        span = np.maximum(np.abs(low), np.abs(high))
    else:
        span = np.maximum(high, 0) - np.minimum(low, 0)
    return span / step_count(family, symmetric=symmetric)


def float32_parameters(
    low: np.ndarray, high: np.ndarray, family: Integers, *, symmetric: bool
) -> Parameters:
    """Scale and zero point by float32 operations alone, in the order of the equations."""
    low, high = np.float32(low), np.float32(high)
    count = np.float32(step_count(family, symmetric=symmetric))
    if symmetric:
        span = np.maximum(np.abs(low), np.abs(high))
        scale = usable(span / count, span, empty=empty_scale(family))
        return Parameters(scale, np.zeros_like(scale))
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    with np.errstate(over="ignore"):
        span = high - low
        halves = high / count - low / count
    scale = usable(np.where(np.isinf(span), halves, span / count), span)
    bottom, top = bounds(family)
    zero_point = np.clip(bottom - np.rint(low / scale), bottom, top)
    reach = np.maximum(np.abs(bottom - zero_point), np.abs(top - zero_point)) * np.float64(scale)
    # Levels beyond the largest number: as many steps for the span of one more.
    narrower = np.float32(scale * (count / (count + np.float32(1))))
    return Parameters(np.where(reach > LARGEST, narrower, scale), zero_point)


def empty_scale(family: Integers) -> float:
    """Of a symmetric range of zeros: 1 where 0 is a code, or zeros would become ±1."""
    return 1.0 if 0 in levels(family) else float(SMALLEST_NORMAL)


def usable(scale: np.ndarray, span: np.ndarray, *, empty: float = 1.0) -> np.ndarray:
    """``empty`` for an empty span, neither subnormal nor infinite otherwise."""
    return np.float32(np.where(span == 0, empty, np.clip(scale, SMALLEST_NORMAL, LARGEST)))
