"""Gradient rules for the rounding and clipping of a quantizer: one method a file.

Python keeps no text for a value: ``help(qj.estimators.PACT)`` shows what all estimators have. What
is said of each one, with its source, stands below it in its file, beside this one.

| value | gradient, and what is learned | file |
|---|---|---|
| ``CLIPPED`` | 1 inside the range, 0 where a value was clipped | clipped.py |
| ``STRAIGHT_THROUGH`` | 1 everywhere | straight_through.py |
| ``LSQ``, ``LSQ_FEATURES`` | clipped; the scale is learned, of weights, of activations | lsq.py |
| ``LSQ_PLUS`` | clipped; scale and zero point are learned | lsq.py |
| ``PACT`` | clipped; the clip is learned | pact.py |
| ``TQT`` | clipped; the logarithm of the threshold is learned | tqt.py |
| ``SAWB`` | straight through; the range is found anew in each pass | sawb.py |
| ``DOREFA_WEIGHTS``, ``DOREFA_ACTIVATIONS`` | through a tanh, through a clip to 0..1 | dorefa.py |
| ``DSQ`` | of a smooth staircase; its sharpness is learned | dsq.py |
| ``EWGS`` | scaled by the distance from the level | ewgs.py |
| ``QIL`` | of an interval, which is learned | qil.py |
| ``QUANT_NOISE`` | exact where an entry is not quantized, which is drawn | quant_noise.py |
| ``DIFFERENTIABLE_QUANTIZATION`` | scale, clip and so the width are learned | learned_width.py |
| ``ROUNDED_WIDTH`` | clipped; clip and width are learned | learned_width.py |
| ``APPROX_SIGN``, ``SWISH_SIGN`` | of one bit: a parabola's, a smooth sign's | binary.py |
| ``MAGNITUDE_AWARE``, ``ERROR_DECAY`` | of one bit: with its scale, ever sharper | binary.py |
"""

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
