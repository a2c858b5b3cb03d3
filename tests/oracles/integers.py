"""Integer codes in int64.

``q = clip(rint(x/s) + z, low, high)`` and ``y = s (q - z)``. A float32 quotient is taken as the
float64 quotient rounded once more: float64 has more than 2·24 + 2 bits, so that is the correctly
rounded quotient (Figueroa, When is double rounding innocuous?, 1995). Products of a code of at most
17 bits and a float32 are exact in float64.
"""

from typing import NamedTuple

import numpy as np


class Integers(NamedTuple):
    """A width and a family."""

    bits: int
    signed: bool = True
    narrow: bool = False


def bounds(family: Integers) -> tuple[int, int]:
    """Lowest and highest code, as Python integers."""
    bits, signed, narrow = family
    if bits == 1:
        return (-1, 1) if signed else (0, 1)
    if signed:
        top = 2 ** (bits - 1) - 1
        return (-top if narrow else -top - 1), top
    return (1 if narrow else 0), 2**bits - 1


def levels(family: Integers) -> list[int]:
    """All codes, in order; one signed bit leaves 0 out."""
    low, high = bounds(family)
    return [-1, 1] if family.bits == 1 and family.signed else list(range(low, high + 1))


def spread(groups: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales of groups, one for each entry of a tensor of ``shape``."""
    groups = np.asarray(groups)
    if groups.ndim == 0:
        return np.broadcast_to(groups, shape)
    out = np.empty(shape, groups.dtype)
    for index in np.ndindex(shape):
        home = tuple(i * g // n for i, g, n in zip(index, groups.shape, shape, strict=True))
        out[index] = groups[home]
    return out


def quotient(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The float32 nearest to ``x / scale``, held in float64."""
    wide = np.float64(x) / spread(np.float64(scale), np.shape(x))
    with np.errstate(over="ignore"):
        return np.float64(np.float32(wide))


def codes(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, family: Integers) -> np.ndarray:
    """int64 codes of finite or infinite ``x``; ties to even, then the zero point."""
    low, high = bounds(family)
    zero = np.rint(spread(np.float64(zero_point), np.shape(x)))
    scaled = quotient(x, scale)
    if family.bits == 1 and family.signed:
        return np.where(scaled + zero >= 0, 1, -1).astype(np.int64)
    return np.clip(np.rint(scaled) + zero, low, high).astype(np.int64)


def reals(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """The float32 nearest to ``scale · (codes - zero_point)``."""
    zero = np.rint(spread(np.float64(zero_point), codes.shape))
    return np.float32((codes - zero) * spread(np.float64(scale), codes.shape))


def fake_quant(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, family: Integers
) -> np.ndarray:
    """``reals(codes(x))``."""
    return reals(codes(x, scale, zero_point, family), scale, zero_point)
