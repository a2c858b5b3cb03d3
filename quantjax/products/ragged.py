"""Ragged products: rows in consecutive groups, each group times a matrix of its own (experts)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from quantjax.granularity import expand
from quantjax.interpreter import Product


def canonical(product: Product, side: int, x: jax.Array) -> jax.Array:
    """``(rows, summed)`` of the left operand, ``(groups, summed, columns)`` of the right one."""
    _, contracted, _ = product.axes(side)
    if side == 0:
        return x.transpose((1 - contracted[0], contracted[0]))
    numbers = product.params["ragged_dot_dimension_numbers"]
    group = numbers.rhs_group_dimensions[0]
    column = next(a for a in range(3) if a not in (group, contracted[0]))
    return x.transpose((group, contracted[0], column))


def in_float32(product: Product) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The product of canonical operands, which may be parts of the sum."""

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return lax.ragged_dot(
            left,
            right,
            product.rest[0],
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    return multiply


def to_output(product: Product, side: int, factor: jax.Array) -> jax.Array:
    """A factor of operand rank, 1 along the sum, for each row and column; 0 behind all groups."""
    rows = product.lhs.shape[product.axes(0)[0][0]]
    factor = canonical(product, side, factor)
    if side == 0:
        return expand(factor, (rows, 1))
    columns = canonical(product, 1, jnp.zeros(product.rhs.shape, bool)).shape[2]
    factor = expand(factor[:, 0], (factor.shape[0], columns))
    return by_row(product, factor)


def by_row(product: Product, by_group: jax.Array) -> jax.Array:
    """``(groups or 1, columns) -> (rows or 1, columns)``: to each row what its group has."""
    if by_group.shape[0] == 1:
        return by_group
    ends = jnp.cumsum(product.rest[0])
    rows = product.lhs.shape[product.axes(0)[0][0]]
    index = jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right")
    return jnp.take(by_group, index, axis=0, mode="fill", fill_value=0)


def is_in_a_group(product: Product) -> Bool[Array, "rows 1"]:
    """The rows that a group has; all others of the result are 0."""
    rows = product.lhs.shape[product.axes(0)[0][0]]
    sizes = product.rest[0]
    return (jnp.arange(rows, dtype=sizes.dtype) < jnp.sum(sizes, dtype=sizes.dtype))[:, None]
