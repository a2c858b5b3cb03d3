"""Kullback-Leibler calibration in float64, clip by clip: as published and as ONNX Runtime does."""

import numpy as np

DISTRIBUTIONS = ("gaussian", "laplacian", "relu")
SAMPLES = 200_000


def drawn(kind: str, seed: int, size: int = SAMPLES) -> np.ndarray:
    """Samples of a distribution, float32; with seed 0 those that peers' figures are of."""
    generator = np.random.default_rng(seed)
    normal = generator.normal(size=size)
    if kind == "laplacian":
        return np.float32(generator.laplace(size=size))
    return np.float32(normal if kind == "gaussian" else np.maximum(normal, 0.0))


def magnitudes(x: np.ndarray, bins: int = 2048) -> np.ndarray:
    """How many ``|x|`` lie in each bin from 0 to the largest."""
    return np.histogram(np.abs(x), bins, (0.0, np.abs(x).max()))[0]


def both_signs(x: np.ndarray, bins: int = 1025) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges from minus the largest magnitude to it."""
    largest = np.abs(x).max()
    return np.histogram(x, bins, (-largest, largest))


def tensorrt(counts: np.ndarray, levels: int, *, start: int = 0) -> np.ndarray:
    """``KL(P ‖ Q)`` after each number of bins from ``levels`` on; infinite where undefined.

    Migacz, 8-bit inference with TensorRT, 2017, slides 25 and 26: bin ``k`` of ``i`` falls into
    level ``⌊k · levels / i⌋``; the outliers go into the last bin of ``P`` alone.
    """
    counts = np.float64(counts)
    found = np.full(counts.size + 1, np.inf)
    for kept in range(start or levels, counts.size + 1):
        held = counts[:kept]
        level = np.arange(kept) * levels // kept
        sums = np.bincount(level, held, levels)
        numbers = np.bincount(level, held > 0, levels)
        q = np.where(held > 0, (sums / np.maximum(numbers, 1))[level], 0.0)
        p = held.copy()
        p[-1] += counts[kept:].sum()
        some = p > 0
        if held.sum() == 0 or (q[some] == 0).any():
            continue
        p, q = p / p.sum(), q / q.sum()
        found[kept] = (p[some] * np.log(p[some] / q[some])).sum()
    return found


def modelopt(counts: np.ndarray, levels: int) -> np.ndarray:
    """NVIDIA ModelOpt's variant: the bin at zero has the count of its neighbour, and the first clip
    keeps 128 bins (``start_bin`` of ``compute_amax``), at every width."""
    counts = counts.copy()
    counts[0] = counts[1]
    return tensorrt(counts, levels, start=128)


def last_of_equals(found: np.ndarray) -> int:
    """The last of the smallest, as ModelOpt takes it (``last_argmin``), but for rounding."""
    return int(np.flatnonzero(found <= found.min() + 1e-12)[-1])


def onnxruntime(counts: np.ndarray, levels: int) -> np.ndarray:
    """``KL(P ‖ Q)`` with ``levels / 2`` bins or more on either side of the middle one."""
    middle = counts.size // 2
    found = np.full(middle + 1, np.inf)
    for reach in range(levels // 2, middle + 1):
        first, last = middle - reach, middle + reach + 1
        kept = counts[first:last].astype(np.int64)
        p = kept.copy()
        p[0] += counts[:first].sum()
        p[-1] += counts[last:].sum()
        size = kept.size // levels
        held = kept[: size * levels].reshape(levels, size).sum(1)
        held[-1] += kept[size * levels :].sum()
        numbers = (p[: size * levels] != 0).reshape(levels, size).sum(1)
        whole = np.where(numbers > 0, held // np.maximum(numbers, 1), 0)
        q = np.zeros_like(p)
        q[: size * levels] = np.repeat(whole, size)
        p, q = smoothed(p), smoothed(q)
        if p is not None and q is not None:
            found[reach] = (p * np.log(p / q)).sum()
    return found


def smoothed(counts: np.ndarray, epsilon: float = 1e-4) -> np.ndarray | None:
    """A distribution without empty bins; None of nothing."""
    empty = counts == 0
    if empty.all():
        return None
    share = epsilon * empty.sum() / (~empty).sum()
    moved = counts + np.where(empty, epsilon, -share)
    return moved / moved.sum()
