"""Factors of a product: where they apply, and sums group by group where they vary along a sum."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax._compat import varying_like
from quantjax.granularity import expand, group_size
from quantjax.interpreter import Product
from quantjax.lean import elementwise
from quantjax.products import blocks
from quantjax.tangents import with_tangent

Factors = tuple[jax.Array | None, jax.Array | None]
"""Of the left and the right operand; None for one that has no quantizer."""


class Coded(NamedTuple):
    """One operand as a product sees it: ``operand ≈ values · factor``.

    Attributes:
      values: float32; centered codes, or the operand itself where it is not quantized. Their
        tangent is that of ``values · factor``, the factor held (:func:`in_code_units`).
      factor: the scale, 1 under bypass; None for an operand that has no quantizer.
      bypass: whether the width is 0; None for an operand that has no quantizer.
      fits_bfloat16: whether the values are codes that bfloat16 holds; None where that is no matter.
      is_mixed: whether entries among them are not quantized; None where all are.
    """

    values: Float[Array, "..."]
    factor: Float[Array, "..."] | None = None
    bypass: Bool[Array, ""] | None = None
    fits_bfloat16: Bool[Array, ""] | None = None
    is_mixed: Bool[Array, ""] | None = None


def in_code_units(values: jax.Array, factor: jax.Array | None) -> jax.Array:
    """The values of a coded operand, with a tangent of their own: without the factor."""
    if factor is None:
        return values
    return with_tangent(values, expand(factor, values.shape), operator.truediv)


def group_length(
    shape: Sequence[int], scale_shape: Sequence[int], contracted: Sequence[int], channels: int
) -> int | None:
    """Entries of the last contracted axis that share a scale; None where all do.

    The last group may be shorter.

    1 where an output sums only ``channels`` of the entries: the channels of a grouped convolution,
    whose scales differ from one feature group to the next, have no common sum.
    """
    if all(scale_shape[axis] == 1 for axis in contracted):
        return None
    if math.prod(shape[axis] for axis in contracted) != channels:
        return 1
    last = contracted[-1]
    return group_size(shape[last], scale_shape[last])


def shared_length(product: Product, side: int, factor_shape: Sequence[int]) -> int | None:
    """How many products of a sum share a factor of one operand: None for all, 1 for none."""
    shape = (product.lhs, product.rhs)[side].shape
    free, contracted, _ = product.axes(side)
    spread = {a for a in range(len(shape)) if factor_shape[a] != 1 and a not in free}
    if not spread:
        return None
    channels = product.contraction_size() // product.taps()
    length = group_length(shape, factor_shape, contracted, channels)
    return length if spread <= set(contracted) and length is not None else 1


def grouped_or_folded(
    product: Product, side: int, operand: Coded, *, in_float: bool
) -> tuple[Coded, int | None]:
    """The operand, and its group length where groups of 2 or more share a factor.

    Factors that vary along a window, or entry by entry along the sum, are multiplied into the
    operand: no integer product can have them. So are those of groups where the product has none
    anyway, since one product of reals takes a fraction of the time of a product for each group.

    Args:
      in_float: whether it has no integer product, whatever the factors are.
    """
    if operand.factor is None:
        return operand, None
    length = shared_length(product, side, operand.factor.shape)
    if length is None or (length > 1 and not in_float):
        return operand, length
    factor = expand(operand.factor, operand.values.shape)
    folded = in_code_units(operand.values, factor) * factor
    return operand._replace(values=folded, factor=None, fits_bfloat16=None), None


def block_length(product: Product, lengths: tuple[int | None, int | None]) -> int:
    """Products that share their factors, given each operand's group length.

    The common divisor: groups of both operands begin together at the start of the axis. Where
    groups of one do not hold whole groups of the other, blocks are short, down to one product.
    """
    return math.gcd(*(n for n in lengths if n is not None)) * product.taps()


def block_factors(product: Product, factors: Factors, block: int) -> tuple[jax.Array, jax.Array]:
    """Factors of both operands for each block of so many products, 1 where there is none."""
    found = []
    for side, factor in enumerate(factors):
        rank = (product.lhs, product.rhs)[side].ndim
        factor = jnp.ones((1,) * rank, jnp.float32) if factor is None else factor
        found.append(blocks.factors_by_block(product, side, factor, block))
    return found[0], found[1]


def sum_of_groups(
    product: Product,
    values: tuple[jax.Array, jax.Array],
    factors: Factors,
    lengths: tuple[int | None, int | None],
) -> jax.Array:
    """``Σ_groups (Σ lhs · rhs) · (s_lhs · s_rhs)``, groups added in order."""
    block = block_length(product, lengths)
    parts = blocks.split_groups(product, *values, block)
    by_block = block_factors(product, factors, block)
    return parts.finish(add_blocks(parts.multiply, (parts.lhs, parts.rhs), by_block))


def add_blocks(
    multiply: Callable[..., jax.Array], operands: tuple[Any, ...], factors: tuple[Any, Any]
) -> jax.Array:
    """``Σ_blocks multiply(*operands) · (f_lhs · f_rhs)`` in float32, one block after another.

    Args:
      multiply: the sums of one block, in float32 or int32.
      operands, factors: stacked along a first axis.
    """

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        operands, (left, right) = part
        return total + times(multiply(*operands), left * right), None

    first = jax.tree.map(lambda leaf: leaf[0], operands)
    start = jnp.zeros(jax.eval_shape(multiply, *first).shape, jnp.float32)
    return lax.scan(add, varying_like(start, (operands, factors)), (operands, factors))[0]


def scaled(
    product: Product, sums: jax.Array, lhs: jax.Array | None, rhs: jax.Array | None
) -> jax.Array:
    """Sums in the output's layout times the factors of both operands.

    Where the result is transposed, so are the sums ahead of their factors: XLA makes that part of
    the product, as it does in the float program.
    """
    factors = [
        blocks.to_output(product, side, factor)
        for side, factor in enumerate((lhs, rhs))
        if factor is not None
    ]
    if not factors:
        return sums
    factor = functools.reduce(operator.mul, factors)
    return times(sums.T, factor.T).T if product.turns.out else times(sums, factor)


def sums_scale(product: Product, lhs: jax.Array, rhs: jax.Array) -> Float[Array, "..."]:
    """``s_lhs · s_rhs`` of factors that share their sums, as it meets the output."""
    return blocks.to_output(product, 0, lhs) * blocks.to_output(product, 1, rhs)


def times(sums: jax.Array, factor: jax.Array) -> jax.Array:
    """``sums · factor`` in float32, rounded before anything is added to it.

    XLA would contract this product and a bias into one multiply-add in some programs and not in
    others, so that a cell of a sweep differs from that cell alone. It does not look through a bit
    pattern that passes an exclusive or.
    """
    return _times(sums.astype(jnp.float32), factor)


@jax.custom_jvp
@functools.partial(jax.jit, inline=True)  # one program where it is called eagerly
def _times(sums: jax.Array, factor: jax.Array) -> jax.Array:
    # Compilers do not know that the bit pattern is left as it is; the mask is 0 unless the factor
    # is NaN, and so is the product.
    bits = lax.bitcast_convert_type(elementwise(lax.mul, sums, factor), jnp.int32)
    mask = lax.convert_element_type(lax.ne(factor, factor), jnp.int32)
    return lax.bitcast_convert_type(elementwise(lax.bitwise_xor, bits, mask), jnp.float32)


@_times.defjvp
def _times_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (sums, factor), (dsums, dfactor) = primals, tangents
    return _times(sums, factor), dsums * factor + sums * dfactor


def sum_length(contraction: int, taps: int, lengths: Sequence[int | None]) -> int:
    """How many products one float32 sum holds, given each operand's group length."""
    known = [n for n in lengths if n is not None and n > 1]
    return math.gcd(*known) * taps if known else contraction
