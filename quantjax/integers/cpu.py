"""int8 products as XLA computes them fast on CPUs.

Seen with JAX 0.10.2 and 0.12.0: an int8 dot into int32 reads its operands as they lie, unless it
has a single row, or something else widens an operand, as a sum over it does. Then the whole operand
is widened first, 4 bytes an entry for every layer at once, and the dot takes several times as long.
A convolution is fast in two dimensions of space with channels last, and enough of them; in others
every product is taken singly, at a tenth of the speed of floats and less. What can be brought into
that form is, and everything else is a dot of patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.integers.direct import direct_conv, direct_dot
from quantjax.integers.patches import channels_last, conv_of_patches, dilated

ROWS = 2
"""What a single row is filled up to."""

CHANNELS = 4
"""Input channels that a fast convolution has at least, with more than ``OUTPUTS`` channels."""
MANY_CHANNELS = 32
"""Input channels with which any number of outputs is fast."""
OUTPUTS = 16


def rows_dot(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """``lax.dot_general`` of int8 into int32; a single row or column beside a zero one.

    Under ``vmap`` there are more rows than one, and nothing is filled up.

    >>> x, w = jnp.ones((1, 3), jnp.int8), jnp.ones((3, 4), jnp.int8)
    >>> rows_dot(x, w, dimension_numbers=(((1,), (0,)), ((), ()))).tolist()
    [[3, 3, 3, 3]]
    """
    contracted, (batch, _) = numbers["dimension_numbers"]
    free = [
        [size for axis, size in enumerate(side.shape) if axis not in axes]
        for side, axes in zip((lhs, rhs), contracted, strict=True)
    ]
    single = [math.prod(sizes) == 1 for sizes in free]
    if batch or single[0] == single[1]:
        return direct_dot(lhs, rhs, **numbers)

    @jax.custom_batching.custom_vmap
    def filled(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        sums = _of_one_row(single.index(True), (lhs, rhs), contracted)
        return sums.reshape(*free[0], *free[1])

    @filled.def_vmap
    def lanes(
        size: int, are_batched: Any, lhs: jax.Array, rhs: jax.Array
    ) -> tuple[jax.Array, bool]:
        axes = [0 if is_batched else None for is_batched in are_batched]
        each = jax.vmap(lambda a, b: direct_dot(a, b, **numbers), axes, axis_size=size)
        return each(lhs, rhs), True

    return cast(jax.Array, filled(lhs, rhs))


def _of_one_row(
    side: int, operands: tuple[jax.Array, jax.Array], contracted: Sequence[Sequence[int]]
) -> jax.Array:
    """The sums without the axes of ``side``, of which none but the contracted ones has entries."""
    row, axes = operands[side], list(contracted)
    vector = lax.squeeze(row, [axis for axis in range(row.ndim) if axis not in axes[side]])
    rows = jnp.pad(vector[None], [(0, ROWS - 1), *[(0, 0)] * vector.ndim])
    # What is left of the axes, in their own order, behind the rows.
    order = sorted(axes[side])
    axes[side] = tuple(order.index(axis) + 1 for axis in axes[side])
    left, right = (rows, operands[1]) if side == 0 else (operands[0], rows)
    sums = direct_dot(left, right, dimension_numbers=(tuple(axes), ((), ())))
    return lax.index_in_dim(sums, 0, -side, keepdims=False)


def conv(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """``lax.conv_general_dilated`` of int8 into int32, channels last or by patches."""
    spec, groups = numbers["dimension_numbers"], numbers["feature_group_count"]
    outputs, channels = rhs.shape[spec.rhs_spec[0]], rhs.shape[spec.rhs_spec[1]]
    space = [lhs.shape[axis] for axis in spec.lhs_spec[2:]]
    enough = channels >= MANY_CHANNELS or (channels >= CHANNELS and outputs > OUTPUTS)
    if len(space) == 2 and (enough if groups == 1 else channels > 1):
        return _conv_channels_last(lhs, rhs, **numbers)
    if not all(isinstance(size, int) for size in space):  # symbolic: patches have to be cut out
        return _conv(lhs, rhs, **numbers)
    return conv_of_patches(lhs, rhs, dot=rows_dot, **numbers)


def _conv_channels_last(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    **numbers: Any,
) -> jax.Array:
    """The convolution between transpositions, of an input that is dilated already."""
    x, w, back = channels_last(lhs, rhs, dimension_numbers)
    if any(by > 1 for by in lhs_dilation):
        x, padding = dilated(x, padding, lhs_dilation), [(0, 0)] * len(padding)
    last = lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))
    sums = _conv(x, w, padding=padding, dimension_numbers=last, **numbers)
    return lax.transpose(sums, back)


def sums_by_product(codes: jax.Array, axes: Sequence[int]) -> jax.Array:
    """``Σ codes`` over some axes, which keep size 1, int32: a product with rows of ones.

    >>> sums_by_product(jnp.ones((3, 4), jnp.int8), (0,)).tolist()
    [[3, 3, 3, 3]]
    """
    ones = jnp.ones((ROWS, *(codes.shape[axis] for axis in axes)), jnp.int8)
    contracted = tuple(range(1, ones.ndim)), tuple(axes)
    sums = direct_dot(ones, codes, dimension_numbers=(contracted, ((), ())))
    return jnp.expand_dims(sums[0], tuple(axes))


def _conv(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    # JAX 0.12.0 does not compile an input that is dilated by a pad next to it: XLA fuses the two.
    return direct_conv(lax.optimization_barrier(lhs), rhs, **numbers)
