"""Element-wise gradient scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Parameters, Point
from quantjax.estimators.clipped import inside
from quantjax.formats import Format, divide_by_scale


def _asymmetry(point: Point) -> jax.Array:
    span = point.high - point.low
    span = jnp.where(span > 0.0, span, 1.0)
    return divide_by_scale(point.parameters["delta"] * (point.position - point.level), span)


def _delta(qparams: QParams, format: Format) -> Parameters:
    del format
    return {"delta": jnp.full_like(qparams.scale, 1e-3)}


EWGS = Estimator("ewgs", inside, parameters=("delta",), start=_delta, asymmetry=_asymmetry)
"""A gradient ``g`` of a level becomes ``g · (1 + δ sign(g) (x_n - x_q))``.

``x_n`` and ``x_q`` are the value and its level on the scale from 0 to 1 that the range covers. A
step that would move a value away from its level is made larger, one towards it smaller. ``δ`` is
``theta["delta"]``, 1e-3 to start with; the paper adapts it to the curvature. At ``δ = 0`` it is
:data:`CLIPPED`. Reverse mode only.

Source: Lee, Kim, Ham, Network quantization with element-wise gradient scaling, 2021, section 3.2.
"""
