"""Multiply two operands as codes, and scale the sums once.

``out = Σ (q_x - z_x)(q_w - z_w) · (s_x · s_w)``: the sum is an integer, held exactly, so that this
simulation and an integer program give the same value. Where a scale varies along a contracted axis,
sums are taken within each group and added in float32, one after another.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from quantjax.affine import QParams, is_bypassed
from quantjax.interpreter import Op, Product
from quantjax.products import blocks
from quantjax.products.exactness import FLOAT32_EXACT, Exactness, Sizing
from quantjax.products.groups import (
    Coded,
    grouped_or_folded,
    scaled,
    sum_of_groups,
)
from quantjax.simulation import Arithmetic, centered_codes, prepare


def coded(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Coded:
    """Centered codes and factor of ``x``; at width 0, ``x`` itself and 1."""
    prepared, qparams = prepare(x, qparams, arithmetic)
    bypass = is_bypassed(qparams.bits)
    codes = centered_codes(prepared, qparams, arithmetic, key)
    values = jnp.where(bypass, x.astype(jnp.float32), codes)
    # Without the barrier XLA moves the choice behind the product, onto its whole output, where no
    # fused kernel takes it: two more passes over memory, a forward pass 1.5 times as long.
    factor = lax.optimization_barrier(jnp.where(bypass, 1.0, qparams.scale))
    return Coded(values, factor, bypass)


def in_float(x: Float[Array, "..."]) -> Coded:
    """An operand without a quantizer."""
    return Coded(x.astype(jnp.float32))


def multiply(
    product: Product, raw: tuple[jax.Array, jax.Array], lhs: Coded, rhs: Coded, sizing: Sizing
) -> jax.Array:
    """The product of two coded operands, in the equation's own dtype.

    Args:
      product: the equation.
      raw: its operands as they came; where every width is 0, the equation itself is evaluated.
        Not used where no operand knows of bypass.
      sizing: how the plan splits its sums.
    """
    flags = [side.bypass for side in (lhs, rhs) if side.bypass is not None]
    lhs, lhs_groups = grouped_or_folded(product, 0, lhs)
    rhs, rhs_groups = grouped_or_folded(product, 1, rhs)
    ungrouped = lhs_groups is None and rhs_groups is None

    def quantized() -> jax.Array:
        if ungrouped:
            any_bypass = jnp.any(jnp.stack(flags)) if flags else jnp.zeros((), bool)
            sums = _sums(product, sizing, lhs.values, rhs.values, any_bypass)
            total = scaled(product, sums, lhs.factor, rhs.factor)
        else:
            total = sum_of_groups(product, lhs, rhs, (lhs_groups, rhs_groups))
        return total.astype(product.out.dtype)

    if not flags or (ungrouped and _float32_is_native(product)):
        return _fenced(product, quantized())
    out = lax.cond(jnp.all(jnp.stack(flags)), lambda: product.bind(*raw), quantized)
    return _fenced(product, out)


def _fenced(product: Product, out: jax.Array) -> jax.Array:
    """The result behind a fence, as the matrix that XLA makes of a dot's: how it vectorizes what
    reads the cotangent depends on the shape."""
    if product.op is Op.CONV:
        return _fence(out)
    axes = [blocks.dot_axes(product, side) for side in (0, 1)]
    roles = axes[0].batch, axes[0].free, axes[1].free
    operands = product.lhs, product.lhs, product.rhs
    sizes = [math.prod(x.shape[a] for a in role) for x, role in zip(operands, roles, strict=True)]
    matrix = sizes if roles[0] else sizes[1:]
    return _fence(out.reshape(matrix)).reshape(out.shape)


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
