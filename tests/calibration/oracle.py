"""Integer quantization in NumPy float64, from a range alone: what a report is held against."""

from typing import NamedTuple

import numpy as np


class Quantized(NamedTuple):
    """A group under a range.

    Attributes:
      signal, noise: ``Σ x²`` and ``Σ (Q(x) - x)²``.
      clipped: how many values have no level.
      low, high: the outermost levels.
    """

    signal: float
    noise: float
    clipped: int
    low: float
    high: float


def asymmetric(x: np.ndarray, low: float, high: float, bits: int) -> Quantized:
    """Unsigned codes with a zero point; the range is widened to hold 0."""
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = float(np.float32(np.float32(high) - np.float32(low)) / np.float32(top)) or 1.0
    zero = np.clip(-np.rint(np.float32(low) / np.float32(scale)), 0, top)
    return _quantized(x, scale, zero, 0, top)


def symmetric(x: np.ndarray, low: float, high: float, bits: int) -> Quantized:
    """Full-range signed codes about 0."""
    largest = np.float32(max(abs(low), abs(high)))
    scale = float(largest / np.float32(2 ** (bits - 1))) or 1.0
    return _quantized(x, scale, 0.0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _quantized(x: np.ndarray, scale: float, zero: float, low: int, high: int) -> Quantized:
    x = np.asarray(x, np.float64)
    codes = np.rint((x.astype(np.float32) / np.float32(scale)).astype(np.float64)) + zero
    levels = scale * (np.clip(codes, low, high) - zero)
    return Quantized(
        float(np.sum(x * x)),
        float(np.sum((levels - x) ** 2)),
        int(np.sum((codes < low) | (codes > high))),
        scale * (low - zero),
        scale * (high - zero),
    )


def sqnr(signal: float, noise: float) -> float:
    """In dB."""
    return np.inf if noise == 0.0 else float(10.0 * np.log10(signal / noise))
