"""What calibration collects, once, for every range rule and width.

``init / update / merge`` are pure; a :class:`Statistics` is a pytree at the granularity of the
plan, of constant size, and works under ``jit``, ``scan`` and ``vmap``.
"""

from quantjax.statistics.collection import (
    Statistics,
    init,
    merge,
    merge_unordered,
    of_tensor,
    update,
)
from quantjax.statistics.count import Count, as_float, as_integer
from quantjax.statistics.devices import AxisName
from quantjax.statistics.extremes import Extremes
from quantjax.statistics.histogram import BINS, Histogram
from quantjax.statistics.moments import Moments
from quantjax.statistics.moving import TORCH_AVERAGING_CONSTANT, MovingExtremes
from quantjax.statistics.sample import Held, Sample

__all__ = [
    "BINS",
    "TORCH_AVERAGING_CONSTANT",
    "AxisName",
    "Count",
    "Extremes",
    "Held",
    "Histogram",
    "Moments",
    "MovingExtremes",
    "Sample",
    "Statistics",
    "as_float",
    "as_integer",
    "init",
    "merge",
    "merge_unordered",
    "of_tensor",
    "update",
]
