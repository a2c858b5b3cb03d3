"""Gradient rules for the rounding and clipping of a quantizer: one rule a file."""

from quantjax.estimators.base import Estimator
from quantjax.estimators.clipped import CLIPPED
from quantjax.estimators.straight_through import STRAIGHT_THROUGH

__all__ = ["CLIPPED", "STRAIGHT_THROUGH", "Estimator"]
