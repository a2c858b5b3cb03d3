"""The straight-through estimator."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.estimators.base import Estimator


def _slope(unclipped: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    del low, high
    return jnp.ones_like(unclipped)


STRAIGHT_THROUGH = Estimator("straight_through", _slope)
"""Gradient 1 everywhere, beyond the range too: ``∂y/∂x = 1``.

Source: Bengio, Léonard, Courville, Estimating or propagating gradients through stochastic neurons
for conditional computation, 2013, section 4.
"""
