"""Logarithmic levels in float64, by lists of levels and NumPy's logarithm.

Float32 numbers lie at least 2^-25 away from the borders between levels, relatively, unless they lie
on one; float64 logarithms err by 2^-50, so rounding them is right.
"""

import itertools
from typing import NamedTuple

import numpy as np

ROOT = float(np.float32(np.sqrt(2.0)))


class Logarithms(NamedTuple):
    """A width and a family."""

    bits: int
    signed: bool = True
    per_octave: int = 1
    linear: bool = False
    half: bool = False


FAMILIES = tuple(
    Logarithms(0, *flags)
    for flags in itertools.product((True, False), (1, 2), *[(False, True)] * 2)
)


def count(family: Logarithms) -> int:
    """How many magnitudes there are; those below 2^-126 are no normal float32 numbers."""
    codes = 2 ** (family.bits - family.signed)
    wanted = codes // 2 if family.half else codes - 1
    return min(wanted, 126 * family.per_octave + 1)


def magnitude(exponent: int, per_octave: int) -> float:
    """``2^(exponent / per_octave)``, as a float32 number."""
    whole, rest = divmod(exponent, per_octave)
    return 2.0**whole * (ROOT if rest else 1.0)


def magnitudes(family: Logarithms) -> np.ndarray:
    """All of them from 0 up; the place in this list is the place counted from zero."""
    exponents = range(1 - count(family), 1)
    return np.array([0.0, *(magnitude(k, family.per_octave) for k in exponents)])


def levels(family: Logarithms) -> np.ndarray:
    """All levels, in order."""
    positive = magnitudes(family)
    return np.concatenate([-positive[:0:-1], positive]) if family.signed else positive


def lognet(x: np.ndarray, family: Logarithms) -> np.ndarray:
    """``sign(x) 2^(clip(round(n log2 |x|), lowest, 0) / n)``, 0 for 0."""
    n = family.per_octave
    wide = np.float64(x)
    with np.errstate(divide="ignore"):
        exponent = np.rint(n * np.log2(np.abs(wide)))
    exponent = np.clip(exponent, 1 - count(family), 0)
    near = np.array([magnitude(int(k), n) for k in exponent])
    near = np.where(wide == 0, 0.0, np.sign(wide) * near)
    return near if family.signed else np.maximum(near, 0.0)


def linear(x: np.ndarray, family: Logarithms, *, away: bool) -> np.ndarray:
    """The level nearest in value; ties away from zero, or to the even place counted from zero."""
    places = magnitudes(family)
    # Sums of neighbouring levels are exact in float64.
    middles = (places[:-1] + places[1:]) / 2
    wide = np.abs(np.float64(x))
    at = np.searchsorted(middles, wide, side="left")
    is_tie = (at < len(middles)) & (wide == middles[np.minimum(at, len(middles) - 1)])
    near = places[at + (is_tie & (away | (at % 2 == 1)))] * np.sign(x)
    return near if family.signed else np.maximum(near, 0.0)


def snap(x: np.ndarray, family: Logarithms, *, away: bool = False) -> np.ndarray:
    """The level of each value in units of the scale."""
    return linear(x, family, away=away) if family.linear else lognet(x, family)


def inq(weights: np.ndarray, bits: int) -> np.ndarray:
    """INQ's rule by the letter, one weight and one pair of neighbours at a time."""
    largest = float(np.abs(weights).max())
    n1 = int(np.floor(np.log2(4 * largest / 3)))
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    candidates = [0.0] + [2.0**n for n in range(n2, n1 + 1)]
    out = np.zeros(len(weights))
    for i, weight in enumerate(np.float64(weights)):
        for alpha, beta in itertools.pairwise(candidates):
            if (alpha + beta) / 2 <= abs(weight) < 3 * beta / 2:
                out[i] = beta * np.sign(weight)
    return out


def values(family: Logarithms, seed: int = 0) -> np.ndarray:
    """Levels, borders of both kinds and their neighbours, values between, beyond and far below."""
    places = magnitudes(family)[1:]
    middles = [(a + b) / 2 for a, b in itertools.pairwise([0.0, *places, 2.0 * places[-1]])]
    roots = [np.sqrt(a * b) for a, b in itertools.pairwise([*places, 2.0 * places[-1]])]
    centers = np.float32([*places, *middles, *roots, 1.5, 2.0, 3.0])
    around = [centers]
    for toward in (0.0, np.inf):
        near = centers
        for _ in range(2):
            near = np.nextafter(near, np.float32(toward))
            around.append(near)
    generator = np.random.default_rng(seed)
    around.append(2.0 ** generator.uniform(-20, 3, 200).astype(np.float32))
    around.append(np.float32([0.0, 2.0**-126, 1e-30, 1e-9, 100.0, 3e38]))
    positive = np.concatenate(around)
    # Subnormal numbers count as zero; see the tests of special values.
    positive = np.where(positive < 2.0**-126, np.float32(0.0), positive)
    return np.concatenate([positive, -positive])
