"""Choices and bounds of ``jax.numpy`` without a jitted function of their own.

``jnp.where``, ``jnp.clip`` and broadcasting against axes of size 1 are several operations each
until a compiler has simplified them. In the arithmetic of one operand, of which a model has
hundreds, that is most of what there is to trace and to compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped


def select(
    which: Bool[Array, "..."],
    yes: Float[Array, "..."] | float,
    no: Float[Array, "..."] | float,
) -> Float[Array, "..."]:
    """``yes`` where ``which`` is true, ``no`` elsewhere.

    Arrays broadcast against one another; a number has their dtype, two are float32.

    >>> select(jnp.array([True, False]), 1.0, jnp.array([2.0, 3.0])).tolist()
    [1.0, 3.0]
    """
    shape = jnp.broadcast_shapes(*(jnp.shape(array) for array in (which, yes, no)))
    dtype = next((case.dtype for case in (yes, no) if not isinstance(case, float)), jnp.float32)
    full = [
        lax.full(shape, case, dtype) if isinstance(case, float) else spread(case, shape)
        for case in (yes, no)
    ]
    return lax.select(which if which.ndim == 0 else spread(which, shape), *full)


def clip(
    x: Shaped[Array, "..."],
    low: Shaped[Array, "..."] | float,
    high: Shaped[Array, "..."] | float,
) -> Shaped[Array, "..."]:
    """``x`` within bounds that broadcast against it; NaN stays NaN.

    >>> clip(jnp.array([-2.0, 0.5, 2.0]), jnp.float32(-1.0), jnp.float32(1.0)).tolist()
    [-1.0, 0.5, 1.0]
    """
    return jnp.minimum(jnp.maximum(x, low), high)


def spread(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """``x`` broadcast to ``shape``, of its rank or larger.

    >>> spread(jnp.array([[1.0], [2.0]]), (2, 3)).tolist()
    [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    shape, first = tuple(shape), len(shape) - x.ndim
    if x.shape == shape:
        return x
    if x.ndim == 0:
        return lax.broadcast_in_dim(x, shape, ())
    kept = [axis for axis, n in enumerate(x.shape) if n != 1]
    squeezed = lax.reshape(x, [x.shape[axis] for axis in kept])
    return lax.broadcast_in_dim(squeezed, shape, [first + axis for axis in kept])
