"""Quantization interval learning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Need, Parameters, reach
from quantjax.estimators.straight_through import ones
from quantjax.formats import Format, divide_by_scale


def _start(qparams: QParams, format: Format) -> Parameters:
    half = 0.5 * reach(format, qparams)
    return {"center": half, "distance": half, "gamma": jnp.ones_like(half)}


def _transform(x: jax.Array, qparams: QParams, own: Parameters, format: Format) -> jax.Array:
    center, distance, gamma = own["center"], own["distance"], own["gamma"]
    linear = 0.5 * divide_by_scale(jnp.abs(x) - center, distance) + 0.5
    between = (linear > 0.0) & (linear < 1.0)
    # Powers of 0 have infinite derivatives, which a product with 0 would make NaN.
    power = jnp.where(between, linear, 0.5) ** gamma
    magnitude = jnp.where(between, power, jnp.where(linear >= 1.0, 1.0, 0.0))
    signed = jnp.sign(x) * magnitude if format.signed else jnp.where(x > 0.0, magnitude, 0.0)
    odd = jnp.isnan(x) | jnp.isnan(center + distance)
    return jnp.where(odd, jnp.nan, signed * reach(format, qparams))


def _resolve(qparams: QParams, own: Parameters, format: Format, shape: tuple[int, ...]) -> QParams:
    del own, format, shape
    return qparams._replace(zero_point=jnp.zeros_like(qparams.zero_point))


def _is_interval(own: Parameters) -> jax.Array:
    ends = jnp.isfinite(own["center"]) & (own["distance"] > 0.0) & jnp.isfinite(own["distance"])
    return ends & (own["gamma"] > 0.0)


QIL = Estimator(
    "qil",
    ones,
    parameters=("center", "distance", "gamma"),
    start=_start,
    resolve=_resolve,
    transform=_transform,
    needs=frozenset({Need.FIXED_RANGE, Need.NO_ZERO_POINT, Need.MORE_THAN_ONE_BIT}),
    valid=_is_interval,
)
"""The interval that codes cover is learned: below it a value is pruned to 0, above it clipped to 1.

``t = 0`` for ``|x| < c - d``, ``sign(x)`` for ``|x| > c + d``, else
``(½ (|x| - c)/d + ½)^γ · sign(x)``; ``y = s · round(t · steps)``, rounding passed straight through;
``steps`` is the highest code where codes are narrow, as the paper has them. Gradients of the
interval's center ``c``, half width ``d`` and ``γ`` are those of ``t``. The paper's output is
normalized, ``s = 1 / high``; here ``s`` is the QParams' own, learned or not, so that pretrained
weights keep their size. It starts as the whole range, ``c = d``, ``γ = 1``; the paper learns ``γ``
for weights only.

Source: Jung et al., Learning to quantize deep networks by optimizing quantization intervals with
task loss, 2019, section 3.
"""
