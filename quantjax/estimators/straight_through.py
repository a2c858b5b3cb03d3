"""The straight-through estimator."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.estimators.base import Estimator, Point


def ones(point: Point) -> jax.Array:
    """1 everywhere."""
    return jnp.ones_like(point.unclipped)


STRAIGHT_THROUGH = Estimator("straight_through", ones)
"""Gradient 1 everywhere, beyond the range too: ``∂y/∂x = 1``.

Source: Bengio, Léonard, Courville, Estimating or propagating gradients through stochastic neurons
for conditional computation, 2013, section 4.
"""
