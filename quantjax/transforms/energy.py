"""Sums of squares that neither vanish nor overflow, and their ratio in decibels."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax.formats import power_of_two
from quantjax.formats.scales import unit_of


class Energy(NamedTuple):
    """``Σ x² = total · 4^exponent``, so that squares of the smallest numbers are not 0.

    Attributes:
      total: in units of which the largest number has about one.
      exponent: float32, a whole number.
    """

    total: Float[Array, ""]
    exponent: Float[Array, ""]


def in_own_unit(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """``x`` times a power of two, by which the largest of its entries is about one; its exponent.

    >>> in_own_unit(jnp.array([3e-30, 1e-30]))[1].item()
    -99.0
    """
    exponent = unit_of(jnp.max(jnp.abs(x), initial=0.0))
    return x * power_of_two(-exponent), exponent.astype(jnp.float32)


def energy(x: Float[Array, "..."]) -> Energy:
    """Of all entries of a tensor.

    >>> energy(jnp.array([3e-30, 4e-30])).total > 0
    Array(True, dtype=bool)
    """
    scaled, exponent = in_own_unit(x)
    return Energy(jnp.sum(scaled * scaled), exponent)


def added_up(parts: Energy) -> Energy:
    """The energies along all axes as one."""
    most = jnp.max(jnp.where(parts.total > 0.0, parts.exponent, -jnp.inf), initial=-jnp.inf)
    most = jnp.where(jnp.isfinite(most), most, 0.0)
    shares = power_of_two((2.0 * jnp.minimum(parts.exponent - most, 0.0)).astype(jnp.int32))
    return Energy(jnp.sum(parts.total * shares), most)


def decibels(signal: Energy, noise: Energy) -> Float[Array, ""]:
    """``10 log10(signal / noise)``; infinite without noise, NaN where either is.

    >>> one, thousandth = energy(jnp.ones(1)), energy(jnp.full(1, 1e-3))
    >>> round(decibels(one, thousandth).item(), 4)
    60.0
    """
    apart = 2.0 * (signal.exponent - noise.exponent) * jnp.log10(jnp.float32(2.0))
    some = jnp.where(noise.total == 0.0, 1.0, noise.total)
    ratio = 10.0 * (jnp.log10(signal.total / some) + apart)
    return jnp.where(noise.total == 0.0, jnp.inf, ratio)


__all__ = ["Energy", "added_up", "decibels", "energy", "in_own_unit"]
