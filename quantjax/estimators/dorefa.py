"""DoReFa-Net's quantizers of weights and activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Need, Parameters, Point, reach
from quantjax.estimators.straight_through import ones
from quantjax.formats import Format, divide_by_scale


def _transform(x: jax.Array, qparams: QParams, own: Parameters, format: Format) -> jax.Array:
    del own
    squashed = jnp.tanh(x)
    largest = jnp.max(jnp.abs(squashed))
    # A tensor of zeros stays one.
    unit = divide_by_scale(squashed, jnp.where(largest > 0.0, largest, 1.0))
    return unit * reach(format, qparams)


DOREFA_WEIGHTS = Estimator(
    "dorefa-weights", ones, transform=_transform, needs=frozenset({Need.NO_ZERO_POINT})
)
"""Weights are squashed to ``t = tanh(w) / max|tanh(w)|`` and then rounded straight through.

``y = s · round(t · steps)``, so that the largest weight has the end of the range. The paper's
output is normalized, ``s = 1 / high``, which is the range rule ``qj.ranges.constant(-1.0, 1.0)``;
any other scale keeps the size of pretrained weights. The paper's levels are
``2 round((2^k - 1)(t/2 + 1/2)) / (2^k - 1) - 1``, which leave out 0: ``qj.formats.midrise()``.
``∂y/∂w`` is that of the squashing, through the maximum as well.

The maximum is over the tensor at hand. One bit in the paper is ``sign(w) · E|w|``: one signed bit
with the rule ``qj.ranges.XNOR`` and :data:`STRAIGHT_THROUGH`.

Source: Zhou et al., DoReFa-Net: training low bitwidth convolutional neural networks with low
bitwidth gradients, 2016, section 2.3.
"""


def _unrounded_inside(point: Point) -> jax.Array:
    outside = (point.position < point.low) | (point.position > point.high)
    return (~outside).astype(jnp.float32)  # NaN is not clipped


DOREFA_ACTIVATIONS = Estimator("dorefa-activations", _unrounded_inside)
"""``y = round((2^k - 1) clip(x, 0, 1)) / (2^k - 1)``; gradient 1 where ``x`` was not clipped.

The bound is on the value before rounding, unlike :data:`CLIPPED`'s. The paper's range is the rule
``qj.ranges.constant(0.0, 1.0)`` with an unsigned format.

Source: Zhou et al., DoReFa-Net, 2016, sections 2.2 and 2.4.
"""
