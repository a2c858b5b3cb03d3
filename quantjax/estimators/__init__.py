"""Gradient rules for the rounding and clipping of a quantizer: one method a file."""

from quantjax.estimators.base import Estimator, Need, Parameters, Point, highest, reach
from quantjax.estimators.binary import APPROX_SIGN, ERROR_DECAY, MAGNITUDE_AWARE, SWISH_SIGN
from quantjax.estimators.clipped import CLIPPED
from quantjax.estimators.dorefa import DOREFA_ACTIVATIONS, DOREFA_WEIGHTS
from quantjax.estimators.dsq import DSQ
from quantjax.estimators.ewgs import EWGS
from quantjax.estimators.gradients import (
    ceil_through,
    clip_through,
    round_through,
    scale_gradient,
)
from quantjax.estimators.learned_width import (
    DIFFERENTIABLE_QUANTIZATION,
    ROUNDED_WIDTH,
    learned_bits,
)
from quantjax.estimators.lsq import LSQ, LSQ_FEATURES, LSQ_PLUS
from quantjax.estimators.needs import check_needs
from quantjax.estimators.pact import PACT
from quantjax.estimators.qil import QIL
from quantjax.estimators.quant_noise import QUANT_NOISE
from quantjax.estimators.sawb import SAWB
from quantjax.estimators.straight_through import STRAIGHT_THROUGH
from quantjax.estimators.tqt import TQT

ESTIMATORS = (
    APPROX_SIGN,
    CLIPPED,
    DIFFERENTIABLE_QUANTIZATION,
    DOREFA_ACTIVATIONS,
    DOREFA_WEIGHTS,
    DSQ,
    ERROR_DECAY,
    EWGS,
    LSQ,
    LSQ_FEATURES,
    LSQ_PLUS,
    MAGNITUDE_AWARE,
    PACT,
    QIL,
    QUANT_NOISE,
    ROUNDED_WIDTH,
    SAWB,
    STRAIGHT_THROUGH,
    SWISH_SIGN,
    TQT,
)
"""Every estimator of the library."""

__all__ = [
    "APPROX_SIGN",
    "CLIPPED",
    "DIFFERENTIABLE_QUANTIZATION",
    "DOREFA_ACTIVATIONS",
    "DOREFA_WEIGHTS",
    "DSQ",
    "ERROR_DECAY",
    "ESTIMATORS",
    "EWGS",
    "LSQ",
    "LSQ_FEATURES",
    "LSQ_PLUS",
    "MAGNITUDE_AWARE",
    "PACT",
    "QIL",
    "QUANT_NOISE",
    "ROUNDED_WIDTH",
    "SAWB",
    "STRAIGHT_THROUGH",
    "SWISH_SIGN",
    "TQT",
    "Estimator",
    "Need",
    "Parameters",
    "Point",
    "ceil_through",
    "check_needs",
    "clip_through",
    "highest",
    "learned_bits",
    "reach",
    "round_through",
    "scale_gradient",
]
