"""Levels of a table by comparing with each of them, and Lloyd's algorithm, in float64.

Differences of float32 numbers are exact in float64 where both lie between 2^-28 and 2^24, which is
all that is drawn; a tie is therefore a tie.
"""

import numpy as np
import scipy.stats

NEAREST = ("half_even", "half_away")


def snap(x: np.ndarray, levels: np.ndarray, rule: str, noise: np.ndarray | None = None):
    """The index of the level of each entry; ``levels`` ascending and distinct; no NaN."""
    levels, x = np.float64(levels), np.float64(x)
    inside = np.clip(x, levels[0], levels[-1])
    if rule in NEAREST:
        return np.vectorize(lambda v: _nearest(v, levels, rule), otypes=[np.int64])(inside)
    below = np.array([np.flatnonzero(levels <= v)[-1] for v in inside.ravel()]).reshape(x.shape)
    above = np.array([np.flatnonzero(levels >= v)[0] for v in inside.ravel()]).reshape(x.shape)
    if rule == "floor":
        return below
    if rule == "ceil":
        return above
    return np.where(noise < fraction(x, levels), above, below)


def _nearest(x: float, levels: np.ndarray, rule: str) -> int:
    distance = np.abs(levels - x)
    closest = np.flatnonzero(distance == distance.min())
    if len(closest) == 1:
        return int(closest[0])
    low, high = (int(i) for i in closest)
    if rule == "half_even":
        return low if low % 2 == 0 else high
    return low if x < 0 else high


def fraction(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """How far each entry is from the level below to the one above; 0 at a level and outside."""
    levels = np.float64(levels)
    inside = np.clip(np.float64(x), levels[0], levels[-1])
    index = np.clip(np.searchsorted(levels, inside, side="right") - 1, 0, len(levels) - 2)
    part = (inside - levels[index]) / (levels[index + 1] - levels[index])
    return np.where(part == 1.0, 0.0, part)


def lloyd(values: np.ndarray, centers: np.ndarray, iterations: int) -> np.ndarray:
    """Every entry to its nearest center, every center to the mean of its entries, so many times."""
    values, centers = np.float64(values).ravel(), np.float64(centers)
    for _ in range(iterations):
        home = np.abs(values[:, None] - centers).argmin(1)
        means = [
            values[home == i].mean() if (home == i).any() else c for i, c in enumerate(centers)
        ]
        centers = np.array(means)
    return centers


def squared_error(values: np.ndarray, centers: np.ndarray) -> float:
    """The mean squared distance to the nearest center."""
    values, centers = np.float64(values).ravel(), np.float64(centers)
    return float((np.abs(values[:, None] - centers).min(1) ** 2).mean())


def least_squared_errors(values: np.ndarray, most: int) -> np.ndarray:
    """The smallest mean squared error that 1 to ``most`` levels can have: dynamic programming.

    Best clusters are runs of the sorted entries, and the best clusters of the first ``j`` entries
    end with one run after the best of the first ``i`` (Fisher, On grouping for maximum homogeneity,
    1958).
    """
    values = np.sort(np.float64(values).ravel())
    size = values.size
    first = np.concatenate([[0.0], values.cumsum()])
    second = np.concatenate([[0.0], (values**2).cumsum()])
    start, end = np.ogrid[: size + 1, : size + 1]
    total, entries = first[end] - first[start], np.maximum(end - start, 1)
    run = np.where(end > start, second[end] - second[start] - total**2 / entries, np.inf)
    np.fill_diagonal(run, 0.0)
    run = np.ascontiguousarray(run.T)  # [end, start]
    best, least = run[:, 0], [run[-1, 0]]
    for _ in range(most - 1):
        best = (run + best).min(1)
        least.append(best[-1])
    return np.maximum(least, 0.0) / size


def apot_magnitudes(bits: int) -> np.ndarray:
    """Additive powers of two of 1 to 8 magnitude bits, as integers over the largest of them.

    With ``n`` terms, bits (the highest first) go around the terms three times, and an odd width
    has one bit of its own before the last round. A level is an integer with at most one bit of
    each.
    """
    n, odd = divmod(bits, 2)
    owners = [*range(n), *range(n), *["own"] * odd, *range(n)]
    masks = [
        sum(1 << (len(owners) - 1 - place) for place, o in enumerate(owners) if o == owner)
        for owner in dict.fromkeys(owners)
    ]
    levels = [
        v for v in range(1 << len(owners)) if all((v & mask).bit_count() <= 1 for mask in masks)
    ]
    return np.array(levels, np.float64) / levels[-1]


def normal_float(bits: int) -> np.ndarray:
    """NormalFloat by SciPy's normal quantiles, in the order of the published program."""
    offset = 1.0 - 0.5 * (0.5 / 2**bits + 0.5 / (2**bits - 1))
    half = 2 ** (bits - 1)
    above = scipy.stats.norm.ppf(np.linspace(offset, 0.5, half + 1)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, half)[:-1])
    return np.sort(np.concatenate([above, [0.0], below])) / above.max()
