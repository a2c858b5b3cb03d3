"""What calibration collects, once, for every range rule and width.

``init / update / merge`` are pure; a :class:`Statistics` is a pytree at the granularity of the
plan, of constant size, and works under ``jit``, ``scan`` and ``vmap``.
"""

from quantjax.statistics.collection import Statistics, init, merge, merge_unordered, update
from quantjax.statistics.extremes import Extremes
from quantjax.statistics.moving import TORCH_AVERAGING_CONSTANT, MovingExtremes

__all__ = [
    "TORCH_AVERAGING_CONSTANT",
    "Extremes",
    "MovingExtremes",
    "Statistics",
    "init",
    "merge",
    "merge_unordered",
    "update",
]
