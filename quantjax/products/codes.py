"""Multiply two operands as codes, and scale the sums once.

``out = Σ (q_x - z_x)(q_w - z_w) · (s_x · s_w)``: the sum is an integer, held exactly, so that this
simulation and an integer program give the same value. Where a scale varies along a contracted axis,
sums are taken within each group and added in float32, one after another.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax.affine import QParams, is_bypassed
from quantjax.fake_quant import Arithmetic, centered_codes
from quantjax.granularity import expand
from quantjax.interpreter import Product
from quantjax.products import blocks
from quantjax.products.exactness import FLOAT32_EXACT, Exactness, Sizing


class Coded(NamedTuple):
    """One operand as a product sees it: ``operand ≈ values · factor``.

    Attributes:
      values: float32; centered codes, or the operand itself where it is not quantized.
      factor: the scale, 1 under bypass; None for an operand that has no quantizer.
      bypass: whether the width is 0; None for an operand that has no quantizer.
    """

    values: Float[Array, "..."]
    factor: Float[Array, "..."] | None = None
    bypass: Bool[Array, ""] | None = None


def coded(x: Float[Array, "..."], qparams: QParams, arithmetic: Arithmetic) -> Coded:
    """Centered codes and factor of ``x``; at width 0, ``x`` itself and 1."""
    bypass = is_bypassed(qparams.bits)
    codes = centered_codes(x, qparams, arithmetic)
    values = jnp.where(bypass, x.astype(jnp.float32), codes)
    # Without the barrier XLA moves the choice behind the product, onto its whole output, where no
    # fused kernel takes it: two more passes over memory, a forward pass 1.5 times as long.
    factor = lax.optimization_barrier(jnp.where(bypass, 1.0, qparams.scale))
    return Coded(values, factor, bypass)


def in_float(x: Float[Array, "..."]) -> Coded:
    """An operand without a quantizer."""
    return Coded(x.astype(jnp.float32))


def group_length(
    shape: Sequence[int], scale_shape: Sequence[int], contracted: Sequence[int], channels: int
) -> int | None:
    """Entries of the last contracted axis that share a scale; None where all do.

    1 where an output sums only ``channels`` of the entries: the channels of a grouped convolution,
    whose scales differ from one feature group to the next, have no common sum.
    """
    if all(scale_shape[axis] == 1 for axis in contracted):
        return None
    if math.prod(shape[axis] for axis in contracted) != channels:
        return 1
    last = contracted[-1]
    return shape[last] // scale_shape[last]


def multiply(
    product: Product, raw: tuple[jax.Array, jax.Array], lhs: Coded, rhs: Coded, sizing: Sizing
) -> jax.Array:
    """The product of two coded operands, in the equation's own dtype.

    Args:
      product: the equation.
      raw: its operands as they came; where every width is 0, the equation itself is evaluated.
      sizing: how the plan splits its sums.
    """
    flags = [side.bypass for side in (lhs, rhs) if side.bypass is not None]
    lhs, lhs_groups = _grouped_or_folded(product, 0, lhs)
    rhs, rhs_groups = _grouped_or_folded(product, 1, rhs)

    def quantized() -> jax.Array:
        if lhs_groups is None and rhs_groups is None:
            any_bypass = jnp.any(jnp.stack(flags))
            sums = _sums(product, sizing, lhs.values, rhs.values, any_bypass)
            total = _scaled(product, sums, lhs.factor, rhs.factor)
        else:
            total = _sum_of_groups(product, lhs, rhs, (lhs_groups, rhs_groups))
        return total.astype(product.out.dtype)

    ungrouped = lhs_groups is None and rhs_groups is None
    if ungrouped and _float32_is_native(product):
        return _fence(quantized())
    out = lax.cond(jnp.all(jnp.stack(flags)), lambda: product.bind(*raw), quantized)
    return _fence(out)


@jax.custom_jvp
def _fence(x: jax.Array) -> jax.Array:
    """The identity, which XLA does not fuse across, neither its value nor its cotangent.

    XLA picks the order of a batch reduction (batch norm's statistics, the gradient of a bias) by
    what it fuses into it. With the fence those sums see the product and the cotangent as the float
    program has them, and bypass is bit-exact under ``jit`` as well; without it single sums differ
    in the last place, as they still do on JAX 0.10.2, whose XLA removes fences before it fuses.
    """
    return lax.optimization_barrier(x)


@_fence.defjvp
def _fence_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return lax.optimization_barrier(primals[0]), lax.optimization_barrier(tangents[0])


def _float32_is_native(product: Product) -> bool:
    """Whether multiplying raw operands in float32 at highest precision is the model's own product.

    True for float32 models on CPU, where precision changes nothing; elsewhere the model's own
    equation has to be a branch of its own, or bypass would not be bit-exact.
    """
    dtypes = {product.lhs.dtype, product.rhs.dtype, product.out.dtype}
    return dtypes == {jnp.dtype(jnp.float32)} and jax.default_backend() == "cpu"


def _scaled(
    product: Product, sums: jax.Array, lhs: jax.Array | None, rhs: jax.Array | None
) -> jax.Array:
    factors = [
        blocks.to_output(product, side, factor)
        for side, factor in enumerate((lhs, rhs))
        if factor is not None
    ]
    return _times(sums, functools.reduce(operator.mul, factors)) if factors else sums


@jax.custom_jvp
def _times(sums: jax.Array, factor: jax.Array) -> jax.Array:
    """``sums · factor``, rounded before anything is added to it.

    XLA would contract this product and a bias into one multiply-add in some programs and not in
    others, so that a cell of a sweep differs from that cell alone. It does not look through a
    choice that depends on the data.
    """
    return jnp.where(jnp.isnan(sums), sums, sums * factor)


@_times.defjvp
def _times_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (sums, factor), (dsums, dfactor) = primals, tangents
    return _times(sums, factor), dsums * factor + sums * dfactor


def _grouped_or_folded(product: Product, side: int, operand: Coded) -> tuple[Coded, int | None]:
    """The operand, and its group length where groups of 2 or more share a factor.

    Factors that vary along a window, or entry by entry along the sum, are multiplied into the
    operand: no integer product can have them.
    """
    if operand.factor is None:
        return operand, None
    shape, factor = operand.values.shape, operand.factor
    free, contracted, _ = product.axes(side)
    channels = product.contraction_size() // product.taps()
    length = group_length(shape, factor.shape, contracted, channels)
    spread = [a for a in range(len(shape)) if factor.shape[a] != 1 and a not in free]
    if not spread:
        return operand, None
    if set(spread) <= set(contracted) and length is not None and length > 1:
        return operand, length
    return operand._replace(values=operand.values * expand(factor, shape), factor=None), None


def _sums(
    product: Product, sizing: Sizing, lhs: jax.Array, rhs: jax.Array, any_bypass: jax.Array
) -> jax.Array:
    """``Σ lhs · rhs`` in float32, through int32 where float32 alone would round."""
    if sizing.exactness is not Exactness.CHUNKED:
        return product.in_float32(lhs, rhs)

    def chunked(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        parts = blocks.split(product, lhs, rhs, sizing.block)

        def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + parts.multiply(*part).astype(jnp.int32), None

        shape = jax.eval_shape(parts.multiply, parts.lhs[0], parts.rhs[0]).shape
        start = jnp.zeros(shape, jnp.int32)
        total, _ = lax.scan(add, start, (parts.lhs, parts.rhs))
        return parts.finish(total).astype(jnp.float32)

    @jax.custom_jvp
    def total(lhs: jax.Array, rhs: jax.Array, any_bypass: jax.Array) -> jax.Array:
        plain = any_bypass | _sums_fit(product, sizing, lhs, rhs)
        return lax.cond(plain, product.in_float32, chunked, lhs, rhs)

    @total.defjvp
    def total_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (lhs, rhs, flag), (dlhs, drhs, _) = primals, tangents
        tangent = product.in_float32(dlhs, rhs) + product.in_float32(lhs, drhs)
        return total(lhs, rhs, flag), tangent

    return total(lhs, rhs, any_bypass)


def _sums_fit(product: Product, sizing: Sizing, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Whether no sum can leave float32's exact integers, judged by the codes of one operand.

    ``max Σ |code|`` of the smaller operand, usually the weight, times the other's bound. Weights
    are far from their bound on the whole, so sums several times longer than the worst case fit.
    """
    side = 0 if lhs.size < rhs.size else 1
    _, contracted, window = product.axes(side)
    longest = jnp.max(jnp.sum(jnp.abs((lhs, rhs)[side]), axis=contracted + window))
    return longest * float(sizing.bounds[1 - side]) <= 0.999 * FLOAT32_EXACT


def _sum_of_groups(
    product: Product, lhs: Coded, rhs: Coded, lengths: tuple[int | None, int | None]
) -> jax.Array:
    """``Σ_groups (Σ lhs · rhs) · (s_lhs · s_rhs)``, groups added in order."""
    length = math.gcd(*(n for n in lengths if n is not None))
    parts = blocks.split(product, lhs.values, rhs.values, length * product.taps())
    count = parts.lhs.shape[0]
    factors = []
    for side, operand in enumerate((lhs, rhs)):
        factor = jnp.ones((1,) * operand.values.ndim) if operand.factor is None else operand.factor
        factors.append(blocks.factors_by_block(product, side, factor, operand.values.shape, count))

    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        left, right, left_factor, right_factor = part
        return total + _times(parts.multiply(left, right), left_factor * right_factor), None

    shape = jax.eval_shape(parts.multiply, parts.lhs[0], parts.rhs[0]).shape
    start = jnp.zeros(shape, jnp.float32)
    total, _ = lax.scan(add, start, (parts.lhs, parts.rhs, *factors))
    return parts.finish(total)


def sum_length(contraction: int, taps: int, lengths: Sequence[int | None]) -> int:
    """How many products one float32 sum holds, given each operand's group length."""
    known = [n for n in lengths if n is not None and n > 1]
    return math.gcd(*known) * taps if known else contraction
