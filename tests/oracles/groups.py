"""Groups of a tensor, one after another."""

from collections.abc import Iterator

import numpy as np


def by_group(
    x: np.ndarray, groups: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Each group's index and entries; the last one along an axis has what is left."""
    steps = [-(-n // g) for n, g in zip(x.shape, groups, strict=True)]
    for home in np.ndindex(groups):
        yield home, x[tuple(slice(i * k, i * k + k) for i, k in zip(home, steps, strict=True))]
