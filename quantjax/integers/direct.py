"""Products of int8 as XLA has them: what the forms of each backend are made of."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax


class Lowering(Protocol):
    """``(lhs, rhs, **numbers) -> int32``; ``numbers`` are the equation's own parameters."""

    def __call__(self, lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
        """The product."""
        ...


def direct_dot(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """``lax.dot_general`` of int8 into int32."""
    return lax.dot_general(lhs, rhs, preferred_element_type=jnp.int32, **numbers)


def direct_conv(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """``lax.conv_general_dilated`` of int8 into int32."""
    return lax.conv_general_dilated(lhs, rhs, preferred_element_type=jnp.int32, **numbers)


def direct_ragged(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """``lax.ragged_dot`` of int8 into int32; ``numbers`` are the sizes of the groups."""
    return lax.ragged_dot(lhs, rhs, preferred_element_type=jnp.int32, **numbers)
