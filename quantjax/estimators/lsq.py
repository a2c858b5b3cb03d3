"""Learned step size quantization, and its extension to zero points."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Need, Parameters, Point, highest
from quantjax.estimators.gradients import clip_through, scale_gradient
from quantjax.formats import Format


def _factor(
    qparams: QParams, format: Format, shape: tuple[int, ...], *, has_batch: bool
) -> jax.Array:
    """``1 / sqrt(N · Q_P)``, with N the entries that share a scale."""
    entries = math.prod(shape[1:] if has_batch and len(shape) > 1 else shape)
    groups = qparams.scale.size
    if has_batch and jnp.ndim(qparams.scale) == len(shape) > 1:
        groups //= qparams.scale.shape[0]
    count = max(entries // max(groups, 1), 1)
    return 1.0 / jnp.sqrt(float(count) * highest(format, qparams))


def _scale(qparams: QParams, own: Parameters, format: Format, shape: tuple[int, ...]) -> QParams:
    del own
    factor = _factor(qparams, format, shape, has_batch=False)
    return qparams._replace(scale=scale_gradient(qparams.scale, factor))


def _scale_of_features(
    qparams: QParams, own: Parameters, format: Format, shape: tuple[int, ...]
) -> QParams:
    del own
    factor = _factor(qparams, format, shape, has_batch=True)
    return qparams._replace(scale=scale_gradient(qparams.scale, factor))


def _both_of_features(
    qparams: QParams, own: Parameters, format: Format, shape: tuple[int, ...]
) -> QParams:
    del own
    factor = _factor(qparams, format, shape, has_batch=True)
    low, high = format.level_range(qparams.bits, qparams.theta)
    return qparams._replace(
        scale=scale_gradient(qparams.scale, factor),
        zero_point=clip_through(scale_gradient(qparams.zero_point, factor), low, high),
    )


def between_levels(point: Point) -> jax.Array:
    """1 where ``x/s + z``, not rounded, lies between the outermost levels, 0 on them and beyond.

    NaN is not beyond: its gradient passes, and is not masked.
    """
    is_beyond = (point.position <= point.low) | (point.position >= point.high)
    return (~is_beyond).astype(jnp.float32)


NEEDS = frozenset({Need.FIXED_RANGE})  # what is learned is the scale

LSQ = Estimator("lsq", between_levels, resolve=_scale, needs=NEEDS)
"""The scale is learned, by a gradient of its own times ``1/sqrt(N · Q_P)``.

``∂y/∂s = g · (q - x/s)`` where ``-Q_N < x/s < Q_P``, and ``g · q`` at the bounds and beyond;
``∂y/∂x`` is 1 and 0 there. ``g = 1/sqrt(N · Q_P)``, with N the entries that share a scale and
``Q_P`` the highest code. Values up to half a step beyond a bound, which round to it, count as
beyond, where :data:`CLIPPED` lets them pass: at 2 bits that is a twentieth of normal weights, and
most of the gradient of the scale. The factor makes the relative updates
of scales and weights alike under plain gradient descent; optimizers that normalize gradients, such
as Adam, do not see it. Start from the range rule ``qj.ranges.LSQ``.

Sharp edges: a step of the optimizer may make a scale negative, and what it scales NaN;
``quantjax.training.keep_positive`` stops it. With an activation's batch axis, see
:data:`LSQ_FEATURES`.

Source: Esser et al., Learned step size quantization, 2020, equation 3 and section 2.2.
"""

LSQ_FEATURES = Estimator("lsq-features", between_levels, resolve=_scale_of_features, needs=NEEDS)
""":data:`LSQ` for activations: N counts features, without the leading (batch) axis.

Source: Esser et al., Learned step size quantization, 2020, section 2.2.
"""

LSQ_PLUS = Estimator("lsq-plus", between_levels, resolve=_both_of_features, needs=NEEDS)
"""Scale and zero point of activations are learned, ``∂y/∂z = -g · s`` where ``x`` lies beyond the
outermost levels or on them.

The paper's offset is ``β = -s · z``. Here the zero point is what is learned, and the forward pass
rounds it and keeps it among the codes, as PyTorch's learnable fake quantization does, so that
integer products stay possible: zero has a code. Its gradient passes there, too, and finds back.
``g`` is LSQ's.

Source: Bhalgat et al., LSQ+: improving low-bit quantization through learnable offsets and better
initialization, 2020, section 3.1.
"""
