"""Cut a product along its contracted axes into blocks.

:func:`split` cuts the flattened sum, wherever blocks of a given length end. :func:`split_groups`
cuts each run along the last contracted axis on its own, so that the entries of a block share their
factors; where groups do not divide the axis, the last block of each run is shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.granularity import expand, group_size, repeat_groups
from quantjax.interpreter import Op, Product
from quantjax.interpreter.product import HIGHEST
from quantjax.products import ragged


class Blocks(NamedTuple):
    """The operands of ``n`` smaller products whose results add up to the whole.

    Attributes:
      lhs, rhs: operands of the blocks, stacked along a new first axis.
      multiply: float32 product of one block.
      finish: the sum of the blocks' results, in the equation's output shape.
    """

    lhs: jax.Array
    rhs: jax.Array
    multiply: Callable[[jax.Array, jax.Array], jax.Array]
    finish: Callable[[jax.Array], jax.Array]


class DotAxes(NamedTuple):
    """Axes of a dot's operand in the order of its canonical form."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracted: tuple[int, ...]


def dot_axes(product: Product, side: int) -> DotAxes:
    """Batch, free and contracted axes of one operand of a ``dot_general``."""
    contracting, batching = product.params["dimension_numbers"]
    contracted, batch = tuple(contracting[side]), tuple(batching[side])
    rank = (product.lhs, product.rhs)[side].ndim
    free = tuple(a for a in range(rank) if a not in contracted + batch)
    return DotAxes(batch, free, contracted)


def _three_axes(product: Product, side: int, x: jax.Array) -> jax.Array:
    """``(batch, free, contracted)`` with each role flattened into one axis."""
    axes = dot_axes(product, side)
    sizes = [math.prod(x.shape[a] for a in role) for role in axes]
    return x.transpose(axes.batch + axes.free + axes.contracted).reshape(sizes)


def _pad(x: jax.Array, axis: int, missing: int) -> jax.Array:
    edges = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, edges) if missing else x


def _split_last(x: jax.Array, block: int) -> jax.Array:
    x = _pad(x, x.ndim - 1, -x.shape[-1] % block)
    count = x.shape[-1] // block  # not -1, which an empty batch leaves open
    return jnp.moveaxis(x.reshape(*x.shape[:-1], count, block), -2, 0)


def _split_dot(product: Product, lhs: jax.Array, rhs: jax.Array, block: int) -> Blocks:
    lhs = _split_last(_three_axes(product, 0, lhs), block)
    rhs = _split_last(_three_axes(product, 1, rhs), block)

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return lax.dot_general(
            left,
            right,
            (((2,), (2,)), ((0,), (0,))),
            precision=None if left.dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    return Blocks(lhs, rhs, multiply, lambda total: total.reshape(product.out.shape))


def _split_ragged(product: Product, lhs: jax.Array, rhs: jax.Array, block: int) -> Blocks:
    left = _split_last(ragged.canonical(product, 0, lhs), block)
    right = ragged.canonical(product, 1, rhs)
    right = _split_last(right.swapaxes(1, 2), block).swapaxes(2, 3)
    return Blocks(left, right, ragged.in_float32(product), lambda total: total)


def _split_conv(product: Product, lhs: jax.Array, rhs: jax.Array, channels: int) -> Blocks:
    """Blocks of input channels, the same for each feature group."""
    numbers = product.params["dimension_numbers"]
    groups = product.params["feature_group_count"]
    left_axis, right_axis = numbers.lhs_spec[1], numbers.rhs_spec[1]
    left = jnp.moveaxis(lhs, left_axis, -1)
    left = _split_last(left.reshape(*left.shape[:-1], groups, -1), channels)
    left = left.reshape(*left.shape[:-2], groups * channels)
    right = _split_last(jnp.moveaxis(rhs, right_axis, -1), channels)

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return product.in_float32(
            jnp.moveaxis(left, -1, left_axis), jnp.moveaxis(right, -1, right_axis)
        )

    return Blocks(left, right, multiply, lambda total: total)


def split(product: Product, lhs: jax.Array, rhs: jax.Array, block: int) -> Blocks:
    """Blocks of at most ``block`` products an output; the last is filled up with zeros.

    Args:
      block: for a dot the length along the flattened contracted axes; a convolution takes as many
        input channels as fit, at least one.
    """
    if product.op is Op.DOT:
        return _split_dot(product, lhs, rhs, block)
    if product.op is Op.RAGGED:
        return _split_ragged(product, lhs, rhs, block)
    return _split_conv(product, lhs, rhs, max(block // product.taps(), 1))


class Chunks(NamedTuple):
    """``n`` smaller products, one by one, whose results add up to the whole.

    Attributes:
      n: how many.
      product: the float32 result of one, by its index.
      finish: the sum of all in the equation's output shape.
    """

    n: int
    product: Callable[[jax.Array], jax.Array]
    finish: Callable[[jax.Array], jax.Array]


def chunks(product: Product, lhs: jax.Array, rhs: jax.Array, block: int) -> Chunks:
    """The blocks of :func:`split`, or others no longer, where operands can stay as they lie.

    Most can: each block is then a slice of both along one axis, and nothing is transposed or
    copied ahead.
    """
    length = _slice_length(product, block)
    if length:
        return _slices(product, lhs, rhs, length)
    parts = split(product, lhs, rhs, block)
    one = lambda i: parts.multiply(parts.lhs[i], parts.rhs[i])  # noqa: E731
    return Chunks(len(parts.lhs), one, parts.finish)


def _slice_length(product: Product, block: int) -> int:
    """Entries of the last contracted axis in a slice of ``block`` products at most, or 0.

    A length that divides the axis, where one is more than half of the longest, fills up nothing.
    """
    if product.op is Op.RAGGED or product.params.get("feature_group_count", 1) != 1:
        return 0
    n = product.rhs.shape[product.axes(1)[1][-1]]
    longest = block * n // max(product.contraction_size(), 1)
    return next((m for m in range(longest, longest // 2, -1) if n % m == 0), longest)


def _slices(product: Product, lhs: jax.Array, rhs: jax.Array, length: int) -> Chunks:
    axes = [product.axes(side)[1][-1] for side in (0, 1)]
    left, right = (
        _pad(x, axis, -x.shape[axis] % length) for x, axis in zip((lhs, rhs), axes, strict=True)
    )
    precision = None if lhs.dtype == jnp.bfloat16 else HIGHEST

    def one(i: jax.Array) -> jax.Array:
        cut = lambda x, axis: lax.dynamic_slice_in_dim(x, i * length, length, axis)  # noqa: E731
        return product.in_float32(cut(left, axes[0]), cut(right, axes[1]), precision)

    return Chunks(left.shape[axes[0]] // length, one, lambda total: total)


def split_groups(product: Product, lhs: jax.Array, rhs: jax.Array, block: int) -> Blocks:
    """Blocks of ``block`` products an output, none of which leaves a run of the last contracted
    axis; the last of each run is filled up with zeros.

    Other contracted axes are flattened in the order of the dimension numbers.
    """
    if product.op is not Op.DOT:
        return split(product, lhs, rhs, block)
    padded = []
    for side, x in enumerate((lhs, rhs)):
        last = dot_axes(product, side).contracted[-1]
        padded.append(_pad(x, last, -x.shape[last] % block))
    return _split_dot(product, padded[0], padded[1], block)


def _run(product: Product, block: int) -> tuple[int, int]:
    """Entries of the last contracted axis that one output sums, and how many of them a block has;
    a convolution sums those of one feature group."""
    if product.op is not Op.CONV:
        return product.rhs.shape[product.axes(1)[1][-1]], block
    return product.rhs.shape[product.axes(1)[1][0]], max(block // product.taps(), 1)


def block_lengths(product: Product, block: int) -> np.ndarray:
    """How many products each block of :func:`split_groups` has, without what fills it up."""
    n, entries = _run(product, block)
    lengths = np.minimum(entries, n - np.arange(0, n, entries)) * product.taps()
    runs = product.contraction_size() // (n * product.taps()) if n else 0
    return np.tile(lengths, runs).astype(np.int32)


def to_output(product: Product, side: int, factor: jax.Array) -> jax.Array:
    """Bring a factor of operand rank, 1 along summed axes, into the output's layout.

    Where it has an entry for each group of a free axis, it is repeated for each index.
    """
    if product.op is Op.RAGGED:
        return ragged.to_output(product, side, factor)
    factor = _expanded(product, side, factor, product.axes(side)[0])
    if product.op is Op.CONV:
        numbers = product.params["dimension_numbers"]
        source = (numbers.lhs_spec, numbers.rhs_spec)[side][0]
        shape = [1] * factor.ndim
        shape[numbers.out_spec[side]] = factor.shape[source]
        return factor.reshape(shape)
    axes = dot_axes(product, side)
    other = len(dot_axes(product, 1 - side).free)
    batch = [factor.shape[a] for a in axes.batch]
    free = [factor.shape[a] for a in axes.free]
    ordered = factor.transpose(axes.batch + axes.free + axes.contracted)
    if side == 0:
        return ordered.reshape(batch + free + [1] * other)
    return ordered.reshape(batch + [1] * other + free)


def _expanded(product: Product, side: int, factor: jax.Array, axes: Sequence[int]) -> jax.Array:
    shape = list(factor.shape)
    for axis in axes:
        shape[axis] = (product.lhs, product.rhs)[side].shape[axis]
    return expand(factor, shape)


def factors_by_block(product: Product, side: int, factor: jax.Array, block: int) -> jax.Array:
    """Factors of operand rank that vary along contracted axes, one slice for each block of
    :func:`split_groups`.

    Returns:
      ``(blocks, ...)``, each slice broadcastable against a block's result: for a dot
      ``(batch, lhs free, 1)`` or ``(batch, 1, rhs free)``, for all others the output's layout.
    """
    shape = (product.lhs, product.rhs)[side].shape
    last = product.axes(side)[1][-1]
    n, entries = _run(product, block)
    count = -(-n // entries)
    if factor.shape[last] != 1:
        times = group_size(n, factor.shape[last]) // entries
        factor = repeat_groups(factor, times, count, axis=last)
    full = list(factor.shape)
    full[last] = count
    if product.op is not Op.DOT:
        by_block = jnp.moveaxis(jnp.broadcast_to(factor, full), last, 0)
        return jax.vmap(lambda f: to_output(product, side, jnp.expand_dims(f, last)))(by_block)
    axes = dot_axes(product, side)
    others = axes.batch + axes.free + axes.contracted[:-1]
    for a in others:
        full[a] = shape[a]
    factor = _expanded(product, side, factor, others)
    flat = _three_axes(product, side, jnp.broadcast_to(factor, full))
    by_block = jnp.moveaxis(flat, -1, 0)
    return by_block[..., None] if side == 0 else by_block[..., None, :]
