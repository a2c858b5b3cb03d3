"""Widths that are learned."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Need, Parameters, highest
from quantjax.estimators.gradients import ceil_through, clip_through, round_through
from quantjax.estimators.pact import clip_of, clipped_to
from quantjax.estimators.straight_through import ones
from quantjax.formats import Format, divide_by_scale

_NEEDS = frozenset({Need.FIXED_RANGE, Need.INTEGERS, Need.NO_ZERO_POINT})


def _transform(x: jax.Array, qparams: QParams, own: Parameters, format: Format) -> jax.Array:
    widest = qparams._replace(bits=jnp.full_like(qparams.bits, float(format.max_bits)))
    held = qparams.scale * highest(format, widest)  # what the container has codes for
    # No minimum, whose gradient is divided between the two where they start: at the same number.
    clip = jnp.where(own["clip"] > held, held, own["clip"])
    return clipped_to(x, clip, format)


def _clipped(x: jax.Array, qparams: QParams, own: Parameters, format: Format) -> jax.Array:
    del qparams
    return clipped_to(x, own["clip"], format)


def _of_tensor(width: jax.Array, format: Format, least: float = 1.0) -> jax.Array:
    """One width: that of the group which needs most."""
    return clip_through(jnp.max(width), least, float(format.max_bits))


def _differentiable(qparams: QParams, own: Parameters, format: Format) -> jax.Array:
    clip = own["clip"]
    clip = jnp.where(clip > 0.0, clip, qparams.scale)  # what is none has no width
    needed = ceil_through(jnp.log2(divide_by_scale(clip, qparams.scale) + 1.0))
    sign = 1.0 if format.signed else 0.0  # one bit of two signs would have no 0
    return _of_tensor(needed + sign, format, 1.0 + sign)


def _resolve_differentiable(
    qparams: QParams, own: Parameters, format: Format, shape: tuple[int, ...]
) -> QParams:
    del shape
    zero, bits = jnp.zeros_like(qparams.zero_point), _differentiable(qparams, own, format)
    scale = jnp.where(own["clip"] > 0.0, qparams.scale, jnp.nan)
    return qparams._replace(scale=scale, bits=bits, zero_point=zero)


DIFFERENTIABLE_QUANTIZATION = Estimator(
    "differentiable-quantization",
    ones,
    parameters=("clip",),
    start=clip_of,
    resolve=_resolve_differentiable,
    transform=_transform,
    needs=_NEEDS | {Need.MORE_THAN_ONE_BIT},
)
"""Scale ``d`` and clip ``q_max`` are learned; the width is ``ceil(log2(q_max/d + 1)) + 1``.

``y = d · round(clip(x, ±q_max) / d)``. ``∂y/∂d = q - x/d`` inside the range; outside it is that of
the clip, ``round(q_max/d) - q_max/d``, because the bound is a code here and not ``q_max`` itself;
``∂y/∂q_max = sign(x)`` outside and 0 inside; the width of unsigned codes is one less. Where groups
have scales of their own, the width is that of the group which needs most.
``quantjax.training.learned_bits`` is the width, differentiable, for a penalty on the size.

Source: Uhlich et al., Mixed precision DNNs: all you need is a good parametrization, 2020, section
2, parametrization U3.
"""


def _start_rounded(qparams: QParams, format: Format) -> Parameters:
    width = jnp.broadcast_to(qparams.bits, jnp.shape(qparams.scale))
    return {**clip_of(qparams, format), "width": width}


def _resolve_rounded(
    qparams: QParams, own: Parameters, format: Format, shape: tuple[int, ...]
) -> QParams:
    del shape
    bits = _of_tensor(round_through(own["width"]), format)
    high = highest(format, qparams._replace(bits=jax.lax.stop_gradient(bits)))
    # high is 2^(b-1) - 1 or 2^b - 1, whose derivative is (high + 1) ln 2; its value stays.
    high = high + math.log(2.0) * (high + 1.0) * (bits - jax.lax.stop_gradient(bits))
    scale = divide_by_scale(own["clip"], high)
    zero = jnp.zeros_like(qparams.zero_point)
    return qparams._replace(scale=scale, bits=bits, zero_point=zero)


ROUNDED_WIDTH = Estimator(
    "rounded-width",
    ones,
    parameters=("clip", "width"),
    start=_start_rounded,
    resolve=_resolve_rounded,
    transform=_clipped,
    needs=_NEEDS | {Need.REAL_SCALES},
)
"""A real width is learned and rounded straight through: ``b = round(width)``, ``s = clip/high(b)``.

``∂y/∂width = -(q - x/s) · s · ln 2 · (high + 1)/high`` inside the range, 0 outside: the error of
rounding, which a step less would double. ``∂y/∂clip = (q - x/s) / high`` inside, the sign outside.
Without a penalty on the size, widths only grow as far as they help; see
``quantjax.training.learned_bits``. For integers.

Source: the parametrization with a bit width of Uhlich et al., Mixed precision DNNs: all you need is
a good parametrization, 2020, section 2 (U1), with the rounding straight through.
"""


def learned_bits(qparams: QParams, format: Format, estimator: Estimator) -> jax.Array:
    """The width in use of one tensor, differentiable where it is learned.

    >>> from quantjax.formats import integer
    >>> qparams = QParams(jnp.float32(0.25), jnp.float32(0.0), jnp.float32(8.0))
    >>> qparams = qparams._replace(theta={"clip": jnp.float32(1.0)})
    >>> float(learned_bits(qparams, integer(), DIFFERENTIABLE_QUANTIZATION))
    4.0
    """
    resolved = estimator.resolved(qparams, format, jnp.shape(qparams.scale))
    return jnp.asarray(resolved.bits, jnp.float32)
