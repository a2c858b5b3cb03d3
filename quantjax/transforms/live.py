"""QParams at hand: those that were calibrated, or those of the tensor as it comes."""

from __future__ import annotations

import jax

from quantjax.affine import QParams
from quantjax.quantizer import RangeMode
from quantjax.site_plan import OperandPlan


def live_qparams(operand: OperandPlan, x: jax.Array, qparams: QParams) -> QParams:
    """The QParams to use: those given, or for a live range those of ``x`` itself.

    The zero point of a symmetric quantizer is not learned: an optimizer of all QParams leaves it 0.
    """
    quantizer = operand.quantizer
    if quantizer is not None and quantizer.symmetric:
        qparams = qparams._replace(zero_point=jax.lax.stop_gradient(qparams.zero_point))
    if quantizer is None or quantizer.range is not RangeMode.LIVE:
        return qparams
    shape = quantizer.granularity.scale_shape(x.shape, operand.axes, is_weight=operand.is_weight)
    x, theta = jax.lax.stop_gradient(x), quantizer.estimator.rest(qparams.theta)
    found = quantizer.qparams_of(x, qparams.bits, theta, scale_shape=shape)
    own = quantizer.estimator.own(qparams.theta)
    return found._replace(theta={**(found.theta or {}), **own}) if own else found
