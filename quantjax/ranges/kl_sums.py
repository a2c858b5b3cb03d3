"""What both KL rules sum and divide with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.formats import divide_by_scale


def entropy(mass: jax.Array) -> jax.Array:
    """``m log m``, 0 for 0."""
    return mass * jnp.log(jnp.where(mass > 0.0, mass, 1.0))


def divergence_terms(p: jax.Array, q: jax.Array) -> jax.Array:
    """``p (r - 1 - log r)``, ``r = q/p``, of positive numbers: none is below 0, all digits count.

    Their sum is that of ``p log(p/q)`` where both have the same sum.
    """
    away = divide_by_scale(q - p, p)
    close = jnp.abs(away) < 0.5
    # Far from 1 the difference has lost the ratio's digits, close to it the ratio the difference's.
    apart = jnp.log(divide_by_scale(q, p))
    return p * (away - jnp.where(close, jnp.log1p(jnp.where(close, away, 0.0)), apart))


def prefix_sums(values: jax.Array) -> jax.Array:
    """Sums below each edge, ``[bins + 1]``, of values rounded to integers."""
    whole = jnp.round(values).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(whole)])


def near_quotient(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """``⌊x / divisor⌋``, to the last places of float32 from 2^22 on.

    CPUs divide many floats at once, integers singly; what remains says whether one is missing.
    """
    real = divide_by_scale(x.astype(jnp.float32), divisor.astype(jnp.float32))
    found = jnp.floor(real).astype(jnp.int32)
    rest = x - found * divisor
    return found + (rest >= divisor).astype(jnp.int32) - (rest < 0).astype(jnp.int32)


def whole_quotient(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """``⌊x / divisor⌋``, from 0 and from 1: that of what remains is added to the first one."""
    found = near_quotient(x, divisor)
    return found + near_quotient(x - found * divisor, divisor)
