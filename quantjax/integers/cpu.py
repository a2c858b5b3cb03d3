"""int8 products as XLA computes them fast on CPUs.

Seen with JAX 0.10.2 and 0.12.0: an int8 dot into int32 reads its operands as they lie, unless it
has a single row, or something else widens an operand, as a sum over it does. Then the whole operand
is widened first, 4 bytes an entry for every layer at once, and the dot takes several times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROWS = 2
"""What a single row is filled up to."""


def rows_dot(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """``lax.dot_general`` of int8 into int32; a single row or column beside a zero one.

    >>> x, w = jnp.ones((1, 3), jnp.int8), jnp.ones((3, 4), jnp.int8)
    >>> rows_dot(x, w, dimension_numbers=(((1,), (0,)), ((), ()))).tolist()
    [[3, 3, 3, 3]]
    """
    (contracted, (batch, _)) = numbers["dimension_numbers"]
    free = [
        [size for axis, size in enumerate(side.shape) if axis not in axes]
        for side, axes in zip((lhs, rhs), contracted, strict=True)
    ]
    single = [math.prod(sizes) == 1 for sizes in free]
    if batch or single[0] == single[1]:
        return _dot(lhs, rhs, numbers["dimension_numbers"])
    side = single.index(True)
    operands, axes = [lhs, rhs], list(contracted)
    others = [axis for axis in range(operands[side].ndim) if axis not in axes[side]]
    vector = lax.squeeze(operands[side], others)
    operands[side] = jnp.pad(vector[None], [(0, ROWS - 1), *[(0, 0)] * vector.ndim])
    # What is left of the axes, in their own order, behind the rows.
    order = sorted(axes[side])
    axes[side] = tuple(order.index(axis) + 1 for axis in axes[side])
    sums = _dot(operands[0], operands[1], (tuple(axes), ((), ())))
    return lax.index_in_dim(sums, 0, -side, keepdims=False).reshape(*free[0], *free[1])


def sums_by_product(codes: jax.Array, axes: Sequence[int]) -> jax.Array:
    """``Σ codes`` over some axes, which keep size 1, int32: a product with rows of ones.

    >>> sums_by_product(jnp.ones((3, 4), jnp.int8), (0,)).tolist()
    [[3, 3, 3, 3]]
    """
    ones = jnp.ones((ROWS, *(codes.shape[axis] for axis in axes)), jnp.int8)
    sums = _dot(ones, codes, ((tuple(range(1, ones.ndim)), tuple(axes)), ((), ())))
    return jnp.expand_dims(sums[0], tuple(axes))


def _dot(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> jax.Array:
    return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=jnp.int32)
