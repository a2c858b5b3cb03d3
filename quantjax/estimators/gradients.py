"""Functions whose value and derivative are chosen apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _through(value: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """``value(x)`` with derivative 1."""

    @jax.custom_jvp
    def function(x: jax.Array) -> jax.Array:
        return value(x)

    @function.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        return function(*primals), tangents[0]

    return function


round_through = _through(jnp.round)
"""Rounded half to even, derivative 1."""

ceil_through = _through(jnp.ceil)
"""Rounded up, derivative 1."""


@jax.custom_jvp
def clip_through(x: jax.Array, low: float | jax.Array, high: float | jax.Array) -> jax.Array:
    """Clipped, derivative 1: what has left the bounds finds back."""
    return jnp.clip(x, low, high)


@clip_through.defjvp
def _clip_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    clipped = clip_through(*primals)
    return clipped, jnp.broadcast_to(tangents[0], clipped.shape)


@jax.custom_jvp
def scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x``, whose gradient is multiplied by ``factor``.

    >>> float(jax.grad(lambda x: scale_gradient(x, 0.25) ** 2)(3.0))
    1.5
    """
    del factor
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # By itself, not x: its derivative has the factor, too.
    return scale_gradient(*primals), tangents[0] * jax.lax.stop_gradient(primals[1])


@jax.custom_vjp
def by_sign(x: jax.Array, asymmetry: jax.Array) -> jax.Array:
    """``x``, whose gradient ``g`` becomes ``g · (1 + asymmetry · sign(g))``.

    >>> float(jax.grad(lambda x: -by_sign(x, jnp.float32(0.25)))(3.0))
    -0.75
    """
    del asymmetry
    return x


def _by_sign_forward(x: jax.Array, asymmetry: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, asymmetry


def _by_sign_backward(asymmetry: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g * (1.0 + asymmetry * jnp.sign(g)), jnp.zeros_like(asymmetry)


by_sign.defvjp(_by_sign_forward, _by_sign_backward)
