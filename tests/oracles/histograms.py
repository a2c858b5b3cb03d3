"""Histograms whose bins are a power of two wide, in float64 and Python integers.

Float32 numbers over a power of two are exact in float64, and so are their floors below 2^53.
"""

import math
from typing import NamedTuple

import numpy as np

LARGEST = float(np.finfo(np.float32).max)
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127
POSITIONS = 2.0**23  # bins are counted from zero, and the values' own are below this


class Window(NamedTuple):
    """Bins ``[(origin + i) · 2^exponent, (origin + i + 1) · 2^exponent)``."""

    exponent: int
    origin: int


class Counted(NamedTuple):
    """How many values lie in each bin of a window."""

    counts: list[int]
    window: Window


def flushed(values: np.ndarray) -> np.ndarray:
    """In float64, numbers that are not normal in float32 as 0, as XLA on CPU takes them."""
    wide = np.float64(values)
    return np.where(np.abs(wide) < SMALLEST_NORMAL, 0.0, wide)


def window(low: float, high: float, bins: int) -> Window:
    """The narrowest that holds both ends, the lower one in its first bin."""
    for exponent in range(SMALLEST_EXPONENT, LARGEST_EXPONENT + 1):
        width = 2.0**exponent
        first, last = math.floor(low / width), math.floor(high / width)
        if last - first < bins and max(-low, high) < POSITIONS * width:
            return Window(exponent, first)
    raise ValueError("no float32 range is that wide")


def histogram(values: np.ndarray, bins: int) -> Counted:
    """Of all finite values; infinities widen the window on their side, and NaN on both."""
    wide = flushed(np.ravel(values))
    ends = np.array([wide.min(), wide.max()]) if wide.size else np.zeros(2)
    if np.isnan(ends).any():
        ends = np.array([-LARGEST, LARGEST])
    found = window(*np.clip(ends, -LARGEST, LARGEST).tolist(), bins)
    counts = [0] * bins
    for value in wide[np.isfinite(wide)].tolist():
        counts[math.floor(value / 2.0**found.exponent) - found.origin] += 1
    return Counted(counts, found)


def edges(found: Window, bins: int) -> np.ndarray:
    """Ends of all bins, in float64."""
    return (found.origin + np.arange(bins + 1)) * 2.0**found.exponent


def moved(counts: list[int], old: Window, new: Window) -> list[int]:
    """The same counts in a window of wider bins, as Python integers."""
    steps, out = new.exponent - old.exponent, [0] * len(counts)
    for place, number in enumerate(counts, old.origin):
        if number:
            out[(place >> steps) - new.origin] += number
    return out
