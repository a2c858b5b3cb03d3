"""What statistics have to come to, by plain loops."""

from collections.abc import Sequence

import numpy as np

from tests.oracles.integers import spread


def group_extremes(x: np.ndarray, groups: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of each group; NaN wins."""
    ids = spread(np.arange(np.prod(groups, dtype=int)).reshape(groups), x.shape)
    low, high = np.full(groups, np.inf, np.float32), np.full(groups, -np.inf, np.float32)
    for group in range(low.size):
        members = x[ids == group].astype(np.float32)
        if members.size:
            low.flat[group], high.flat[group] = members.min(), members.max()
    return low, high


def moving_average(values: Sequence[float], constant: float) -> float:
    """``torch.ao.quantization.MovingAverageMinMaxObserver``: the first value as it is."""
    average = float(values[0])
    for value in values[1:]:
        average = average + constant * (float(value) - average)
    return average
