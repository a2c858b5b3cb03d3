"""Levels so large that sums of their products leave float32."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.formats.base import Format, Theta
from quantjax.formats.scales import UNIT

LARGEST_SUMMED = 2.0**60  # of which sums of 2^7 products of two are float32 numbers


def levels_overflow(format: Format, bits: jax.Array, theta: Theta) -> jax.Array:
    """Where sums of products of two levels can leave float32 (bool, the shape of ``bits``).

    Levels that only a fit will give are about 1.
    """
    try:
        _, high = format.level_range(bits, theta)
    except errors.FormatError:
        return jnp.zeros(jnp.shape(bits), bool)
    except (KeyError, TypeError):  # theta["gamma"] of a format of one's own
        if theta != ():
            raise
        return jnp.zeros(jnp.shape(bits), bool)
    is_scaled = format.scale_rule != UNIT
    return (high > LARGEST_SUMMED) & (bits != 0.0) & is_scaled


def known_overflow(format: Format, bits: Any, theta: Theta = ()) -> bool:
    """Whether they do so at these widths; False where one is not known yet."""
    if not format.known_valid(bits, theta):
        return False
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        return bool(_any_overflows(format, jnp.asarray(bits, jnp.float32), theta))


@functools.partial(jax.jit, static_argnums=0)
def _any_overflows(format: Format, bits: jax.Array, theta: Theta) -> jax.Array:
    """One program: called as it is, each of a format's operations would be one."""
    return jnp.any(levels_overflow(format, bits, theta))
