"""Differentiable soft quantization."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Need, Parameters, Point
from quantjax.formats import Format


def _distance(point: Point) -> jax.Array:
    """Of neighbouring levels: the two of one signed bit are 2 apart."""
    return jnp.where((point.bits == 1.0) & (point.low < 0.0), 2.0, 1.0)


def _parts(point: Point) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """α, κ, the offset from the middle of two levels, and where the range holds ``x``."""
    alpha = point.parameters["alpha"]
    kappa = jnp.log(2.0 / alpha - 1.0)
    steps = (point.position - point.low) / _distance(point)
    offset = steps - jnp.floor(steps) - 0.5
    within = ~((point.position < point.low) | (point.position > point.high))  # NaN is within
    return alpha, kappa, offset, within


def _slope(point: Point) -> jax.Array:
    alpha, kappa, offset, within = _parts(point)
    bump = 0.5 * kappa / (1.0 - alpha) * (1.0 - jnp.tanh(kappa * offset) ** 2)
    return jnp.where(within, bump, 0.0)


def _to_alpha(point: Point, tangents: Parameters) -> jax.Array:
    alpha, kappa, offset, within = _parts(point)
    t = jnp.tanh(kappa * offset)
    of_kappa = -2.0 / (alpha * (2.0 - alpha))
    moved = t / (1.0 - alpha) ** 2 + (1.0 - t**2) * offset * of_kappa / (1.0 - alpha)
    return jnp.where(within, 0.5 * _distance(point) * moved, 0.0) * tangents["alpha"]


def _is_between(parameters: Parameters) -> jax.Array:
    return (parameters["alpha"] > 0.0) & (parameters["alpha"] < 1.0)


def _alpha(qparams: QParams, format: Format) -> Parameters:
    del format
    return {"alpha": jnp.full_like(qparams.scale, 0.2)}


DSQ = Estimator(
    "dsq",
    _slope,
    parameters=("alpha",),
    start=_alpha,
    to_parameters=_to_alpha,
    needs=frozenset({Need.INTEGERS}),
    valid=_is_between,
)
"""The backward pass sees a smooth staircase, ``½ (tanh(κ v) / (1 - α) + 1)`` between two levels.

``v`` is the distance from the middle of the two, in ``-½ .. ½``; ``κ = ln(2/α - 1)``, so that the
staircase meets the levels. ``∂q/∂u = κ / (2 (1-α)) · (1 - tanh²(κ v))`` inside the range, 0
outside. ``α`` is ``theta["alpha"]``, in 0 .. 1, 0.2 to start with: towards 0 the staircase is as
sharp as rounding. It is learned through the same staircase; keep it in bounds with
``quantjax.training.keep_between``.

Source: Gong et al., Differentiable soft quantization, 2019, section 3.
"""
