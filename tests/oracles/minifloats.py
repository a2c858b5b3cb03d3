"""Floating point of few bits in float64, by the definition of its patterns.

Two models that share nothing: :func:`number` reads a pattern by Python's own arithmetic, and
:func:`nearest` looks a real up among all numbers; :func:`snap` rounds by ``frexp`` and ``ldexp``.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FLOAT32_TINY = float(np.finfo(np.float32).tiny)


class Minifloat(NamedTuple):
    """Exponent bits, mantissa bits, and ``ieee``, ``fn``, ``fnuz`` or ``finite``."""

    exponent: int
    mantissa: int
    kind: str

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - (0 if self.kind == "fnuz" else 1)


def number(pattern: int, family: Minifloat) -> float:
    """What a pattern stands for."""
    exponent, mantissa, kind = family
    sign, rest = divmod(pattern, 2 ** (exponent + mantissa))
    field, fraction = divmod(rest, 2**mantissa)
    all_ones = rest == 2 ** (exponent + mantissa) - 1
    if kind == "fn" and all_ones:
        return math.nan
    if kind == "fnuz" and pattern == 2 ** (exponent + mantissa):
        return math.nan
    if kind == "ieee" and field == 2**exponent - 1:
        return math.nan if fraction else (-1.0) ** sign * math.inf
    if field == 0:
        return (-1.0) ** sign * fraction * 2.0 ** (1 - family.bias - mantissa)
    return (-1.0) ** sign * (1 + fraction / 2**mantissa) * 2.0 ** (field - family.bias)


@functools.cache
def numbers(family: Minifloat) -> np.ndarray:
    """What every pattern stands for, in the order of the patterns."""
    every = np.array([number(pattern, family) for pattern in range(2**family.bits)])
    every.flags.writeable = False  # all callers share it
    return every


@functools.cache
def top(family: Minifloat) -> float:
    """The highest finite number."""
    every = numbers(family)
    return float(every[np.isfinite(every)].max())


def nearest(x: np.ndarray, family: Minifloat) -> np.ndarray:
    """The finite number nearest to finite ``x``; ties to the even pattern, saturating."""
    half = numbers(family)[: 2 ** (family.bits - 1)]
    half = half[np.isfinite(half)]  # ascending, and the index is the pattern
    size = np.abs(np.float64(x))
    above = np.clip(np.searchsorted(half, size), 1, len(half) - 1)
    below = above - 1
    up, down = half[above] - size, size - half[below]
    even = np.where(above % 2 == 0, above, below)
    chosen = np.where(up < down, above, np.where(down < up, below, even))
    return np.copysign(half[chosen], x)


def quotients(x: np.ndarray, family: Minifloat) -> tuple[np.ndarray, np.ndarray]:
    """``x / u`` and ``u``, where ``u`` is the distance of numbers in the binade of finite ``x``."""
    binade = np.frexp(np.float64(x))[1] - 1
    binade = np.where(np.float64(x) == 0, -1000, binade)
    unit = np.ldexp(1.0, np.maximum(binade, 1 - family.bias) - family.mantissa)
    return np.float64(x) / unit, unit


def rounded(
    x: np.ndarray, family: Minifloat, rule: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """``x`` with the family's mantissa, whatever its exponent; ``rule`` takes reals to integers."""
    scaled, unit = quotients(x, family)
    return rule(scaled) * unit


def half_away(values: np.ndarray) -> np.ndarray:
    """Nearest integer, ties away from zero."""
    return np.copysign(np.floor(np.abs(values) + 0.5), values)


def stochastic(noise: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Up where the noise is below the fraction."""
    return lambda values: np.floor(values) + (np.float64(noise) < values - np.floor(values))


def snap(
    x: np.ndarray,
    family: Minifloat,
    rule: Callable[[np.ndarray], np.ndarray] = np.rint,
    *,
    saturate: bool = True,
) -> np.ndarray:
    """The number for each real, NaN and infinity included; float32 subnormals become 0."""
    x = np.where(np.abs(x) < FLOAT32_TINY, 0.0, np.float64(x))
    finite = np.isfinite(x)
    values = np.where(finite, rounded(np.where(finite, x, 0.0), family, rule), x)
    values = np.where(np.abs(values) < FLOAT32_TINY, 0.0, values)
    limit = top(family)
    if saturate:
        return np.clip(values, -limit, limit)
    beyond = np.inf if family.kind == "ieee" else np.nan
    return np.where(np.abs(values) > limit, np.copysign(beyond, values), values)
