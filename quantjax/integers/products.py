"""Sums of integer products, with zero points folded in:

``Σ (q_x - z_x)(q_w - z_w) = Σ q_x q_w - z_x Σ q_w - z_w Σ q_x + n z_x z_w``.

Where a convolution pads or dilates its input, the zero point's code is what stands there, so that
the four sums run over the same terms. All arithmetic is int32, whose additions wrap around; the
result is exact, because the plan knows that it fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from quantjax.granularity import expand
from quantjax.integers.lowering import lowering, sums_over
from quantjax.integers.operands import IntegerOperand
from quantjax.interpreter import Op, Product
from quantjax.lean import narrowed
from quantjax.products import blocks, ragged
from quantjax.products.groups import (
    add_blocks,
    block_factors,
    block_length,
    scaled,
    shared_length,
)


class _Kernel(NamedTuple):
    """Sums of one product: of products, and of each operand alone, in the output's layout.

    ``length`` is the number of products in a sum; of a block without what fills it up.
    """

    multiply: Callable[[jax.Array, jax.Array], jax.Array]
    left_sums: Callable[[jax.Array], jax.Array]
    right_sums: Callable[[jax.Array], jax.Array]
    length: int | jax.Array


def integer_product(product: Product, lhs: IntegerOperand, rhs: IntegerOperand) -> jax.Array:
    """The product of two operands in integers, scaled once (by group, where scales vary along the
    sum), in the equation's own dtype."""
    lengths = (
        shared_length(product, 0, lhs.factor.shape),
        shared_length(product, 1, rhs.factor.shape),
    )
    if lengths == (None, None):
        total = scaled(product, accumulate(product, lhs, rhs), lhs.factor, rhs.factor)
    else:
        total = _by_group(product, lhs, rhs, block_length(product, lengths))
    if product.op is Op.RAGGED:  # rows behind all groups, to which zero points would add
        total = jnp.where(ragged.is_in_a_group(product), total, 0.0)
    return narrowed(total, product.out.dtype)


def accumulate(product: Product, lhs: IntegerOperand, rhs: IntegerOperand) -> Int32[Array, "..."]:
    """``Σ (q_lhs - z_lhs)(q_rhs - z_rhs)`` of a whole product, in the equation's output shape."""
    left, kernel = _whole(product, lhs)
    zeros = [
        None if operand.zero_point is None else blocks.to_output(product, side, operand.zero_point)
        for side, operand in enumerate((lhs, rhs))
    ]
    return _folded(kernel, left, rhs.codes, zeros[0], zeros[1])


def _folded(
    kernel: _Kernel,
    left: jax.Array,
    right: jax.Array,
    left_zero: jax.Array | None,
    right_zero: jax.Array | None,
) -> jax.Array:
    sums = kernel.multiply(left, right)
    if left_zero is not None:
        sums = sums - left_zero * kernel.right_sums(right)
    if right_zero is not None:
        sums = sums - right_zero * kernel.left_sums(left)
    if left_zero is not None and right_zero is not None:
        sums = sums + kernel.length * (left_zero * right_zero)
    return sums


def _whole(product: Product, lhs: IntegerOperand) -> tuple[jax.Array, _Kernel]:
    """The left operand, padded where need be, and the sums of the whole product."""
    length = product.contraction_size()
    if product.op is Op.CONV:
        left, padding = padded(product, lhs)
        return left, _conv_kernel(product, padding, length)
    if product.op is Op.RAGGED:
        return lhs.codes, _ragged_kernel(product, length)

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        numbers = product.params["dimension_numbers"]
        return lowering(Op.DOT)(left, right, dimension_numbers=numbers)

    def sums(side: int) -> Callable[[jax.Array], jax.Array]:
        return lambda codes: blocks.to_output(product, side, _sum(product, side, codes))

    return lhs.codes, _Kernel(multiply, sums(0), sums(1), length)


def _ragged_kernel(product: Product, length: int) -> _Kernel:
    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        operands = ragged.canonical(product, 0, left), ragged.canonical(product, 1, right)
        return lowering(Op.RAGGED)(*operands, group_sizes=product.rest[0])

    def sums(side: int) -> Callable[[jax.Array], jax.Array]:
        return lambda codes: blocks.to_output(product, side, _sum(product, side, codes))

    return _Kernel(multiply, sums(0), sums(1), length)


def _sum(product: Product, side: int, codes: jax.Array) -> jax.Array:
    """Sums over contracted and window axes, which keep size 1."""
    _, contracted, window = product.axes(side)
    has_batch = product.op is Op.RAGGED
    if product.op is Op.DOT:
        has_batch = bool(product.params["dimension_numbers"][1][side])
    return sums_over(codes, contracted + window, has_batch=has_batch)


def _conv_kernel(product: Product, padding: _Padding, length: int) -> _Kernel:
    params = product.params
    numbers = {
        "window_strides": params["window_strides"],
        "padding": padding.edges,
        "lhs_dilation": padding.dilation,
        "rhs_dilation": params["rhs_dilation"],
        "dimension_numbers": params["dimension_numbers"],
        "feature_group_count": params["feature_group_count"],
    }
    spec = params["dimension_numbers"]

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return lowering(Op.CONV)(left, right, **numbers)

    def left_sums(left: jax.Array) -> jax.Array:
        """Over each window: a convolution with ones, one output channel for each group."""
        groups = params["feature_group_count"]
        shape = list(product.rhs.shape)
        shape[spec.rhs_spec[0]] = groups
        shape[spec.rhs_spec[1]] = left.shape[spec.lhs_spec[1]] // groups
        sums = multiply(left, jnp.ones(shape, jnp.int8))
        channels = product.rhs.shape[spec.rhs_spec[0]]
        return jnp.repeat(sums, channels // groups, axis=spec.out_spec[1])

    def right_sums(right: jax.Array) -> jax.Array:
        return blocks.to_output(product, 1, _sum(product, 1, right))

    return _Kernel(multiply, left_sums, right_sums, length)


class _Padding(NamedTuple):
    """What is left for the convolution to do."""

    edges: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


def padded(product: Product, lhs: IntegerOperand) -> tuple[jax.Array, _Padding]:
    """The input with the zero point's code where the convolution would put zeros."""
    edges = tuple(map(tuple, product.params["padding"]))
    dilation = tuple(product.params["lhs_dilation"])
    zero = lhs.zero_point
    untouched = all(edge == (0, 0) for edge in edges) and all(n == 1 for n in dilation)
    if zero is None or untouched:
        return lhs.codes, _Padding(edges, dilation)
    config = [(0, 0, 0)] * lhs.codes.ndim
    for axis, edge, step in zip(product.axes(0)[2], edges, dilation, strict=True):
        config[axis] = (*edge, step - 1)
    left = _Padding(((0, 0),) * len(edges), (1,) * len(edges))
    if zero.size == 1:
        return lax.pad(lhs.codes, zero.reshape(()).astype(jnp.int8), config), left
    # Zero points of rows or of groups of channels: lax.pad knows only one value.
    inside = lax.pad(jnp.ones(lhs.codes.shape, bool), np.False_, config)
    codes = lax.pad(lhs.codes, np.int8(0), config)
    return jnp.where(inside, codes, expand(zero, codes.shape).astype(jnp.int8)), left


def _by_group(product: Product, lhs: IntegerOperand, rhs: IntegerOperand, length: int) -> jax.Array:
    """``Σ_groups (Σ (q_lhs - z_lhs)(q_rhs - z_rhs)) · (s_lhs · s_rhs)``, groups in order.

    A block that is filled up holds codes 0, not zero points: they add nothing to any of the sums of
    codes, and ``n`` counts the products that are there.
    """
    if product.op is Op.CONV:
        left, padding = padded(product, lhs)
        kernel = _conv_kernel(product, padding, length)
    elif product.op is Op.RAGGED:
        left = lhs.codes
        kernel = _Kernel(
            lambda a, b: lowering(Op.RAGGED)(a, b, group_sizes=product.rest[0]),
            lambda a: jnp.sum(a, axis=-1, keepdims=True, dtype=jnp.int32),
            lambda b: ragged.by_row(product, jnp.sum(b, axis=-2, dtype=jnp.int32)),
            length,
        )
    else:
        left = lhs.codes
        kernel = _Kernel(
            lambda a, b: lowering(Op.DOT)(a, b, dimension_numbers=(((2,), (2,)), ((0,), (0,)))),
            lambda a: jnp.sum(a, axis=-1, dtype=jnp.int32)[..., :, None],
            lambda b: jnp.sum(b, axis=-1, dtype=jnp.int32)[..., None, :],
            length,
        )
    parts = blocks.split_groups(product, left, rhs.codes, length)
    zeros = [
        None if zero is None else blocks.factors_by_block(product, side, zero, length)
        for side, zero in enumerate((lhs.zero_point, rhs.zero_point))
    ]
    counts = jnp.asarray(blocks.block_lengths(product, length))
    if product.op is Op.CONV:  # blocks hold the channels last while they are cut
        specs = product.params["dimension_numbers"]
        channels = specs.lhs_spec[1], specs.rhs_spec[1]
        parts = parts._replace(
            lhs=jnp.moveaxis(parts.lhs, -1, channels[0] + 1),
            rhs=jnp.moveaxis(parts.rhs, -1, channels[1] + 1),
        )

    def multiply(
        left: jax.Array,
        right: jax.Array,
        left_zero: jax.Array | None,
        right_zero: jax.Array | None,
        count: jax.Array,
    ) -> jax.Array:
        return _folded(kernel._replace(length=count), left, right, left_zero, right_zero)

    factors = block_factors(product, (lhs.factor, rhs.factor), length)
    return parts.finish(add_blocks(multiply, (parts.lhs, parts.rhs, *zeros, counts), factors))
