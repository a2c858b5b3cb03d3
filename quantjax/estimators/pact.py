"""Parameterized clipping activation, and the scale estimator for weights that goes with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Need, Parameters, highest
from quantjax.estimators.straight_through import ones
from quantjax.formats import Format, divide_by_scale


def clip_of(qparams: QParams, format: Format) -> Parameters:
    """``{"clip": s · (high - z)}``: what the highest code stands for."""
    high = highest(format, qparams) - jnp.round(qparams.zero_point)
    return {"clip": qparams.scale * jnp.maximum(high, 1.0)}


def clipped_to(x: jax.Array, clip: jax.Array, format: Format) -> jax.Array:
    """``clip(x, 0, α)``, or ``clip(x, -α, α)`` where codes have signs; the bound has α's slope."""
    # Comparisons that NaN fails, so that it stays.
    above = jnp.where(x >= clip, clip, x)
    if format.signed:
        return jnp.where(above <= -clip, -clip, above)
    return jnp.where(above <= 0.0, 0.0, above)


def _resolve(qparams: QParams, own: Parameters, format: Format, shape: tuple[int, ...]) -> QParams:
    del shape
    clip = jax.lax.stop_gradient(own["clip"])
    scale = divide_by_scale(clip, highest(format, qparams))
    return qparams._replace(scale=scale, zero_point=jnp.zeros_like(scale))


def _transform(x: jax.Array, qparams: QParams, own: Parameters, format: Format) -> jax.Array:
    del qparams
    return clipped_to(x, own["clip"], format)


PACT = Estimator(
    "pact",
    ones,
    parameters=("clip",),
    start=clip_of,
    resolve=_resolve,
    transform=_transform,
    needs=frozenset({Need.FIXED_RANGE, Need.NO_ZERO_POINT, Need.REAL_SCALES}),
)
"""The clip of an activation is learned: ``y = round(clip(x, 0, α) / s) · s`` with ``s = α / high``.

``∂y/∂x = 1`` for ``0 < x < α``, else 0; ``∂y/∂α = 1`` for ``x >= α``, else 0. Signed codes are
clipped to ``±α``. The scale and the zero point of the QParams are not used: the scale follows from
``theta["clip"]``, and the zero point is 0. The paper adds ``λ α²`` to the loss, for instance by
``optax.add_decayed_weights`` on ``theta``.

Source: Choi et al., PACT: parameterized clipping activation for quantized neural networks, 2018,
equations 1 to 3.
"""
