"""Multiply two operands as codes, and scale the sums once.

``out = Σ (q_x - z_x)(q_w - z_w) · (s_x · s_w)``: the sum is an integer, held exactly, so that this
simulation and an integer program give the same value. Where a scale varies along a contracted axis,
sums are taken within each group and added in float32, one after another; where there is no integer
program (one operand is a float, levels are reals), codes are scaled ahead of one product.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from quantjax._compat import BARRIERS_HOLD, fenced, varying_like
from quantjax.affine import QParams, is_bypassed
from quantjax.arithmetic import Arithmetic
from quantjax.formats import IntegerFormat
from quantjax.granularity import expand
from quantjax.interpreter import Op, Product
from quantjax.interpreter.product import HIGHEST
from quantjax.lean import narrowed, select, widened
from quantjax.products import blocks
from quantjax.products.either import either
from quantjax.products.exactness import BFLOAT16_EXACT, FLOAT32_EXACT, Exactness, Sizing
from quantjax.products.groups import (
    Coded,
    Factors,
    grouped_or_folded,
    in_code_units,
    scaled,
    sum_of_groups,
)
from quantjax.simulation import codes_or_values
from quantjax.symbolic import at_most
from quantjax.tangents import instantiated, moves, sum_of

ALIGNED = 64
"""GPUs take blocks of sums of this length, and multiples of it, as they lie."""


Values = tuple[jax.Array, jax.Array]


class _Flags(NamedTuple):
    """What is only known when a product runs; ``is_narrow`` is None where codes stay float32."""

    any_bypass: jax.Array
    is_narrow: jax.Array | None


def coded(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Coded:
    """Centered codes and factor of ``x``; at width 0, ``x`` itself and 1."""
    return _coded(arithmetic, x, qparams, key)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # one program where it is called eagerly
def _coded(
    arithmetic: Arithmetic, x: jax.Array, qparams: QParams, key: PRNGKeyArray | None
) -> Coded:
    values, qparams = codes_or_values(x, qparams, arithmetic, key)
    # Without the barrier XLA moves the choice behind the product, onto its whole output, where no
    # fused kernel takes it: two more passes over memory, a forward pass 1.5 times as long.
    bypass = is_bypassed(qparams.bits)
    factor = lax.optimization_barrier(select(bypass, 1.0, arithmetic.usable_scale(qparams)))
    mixed = None
    if arithmetic.estimator.chosen is not None:  # entries that are not quantized are no codes
        mixed = jnp.any(lax.stop_gradient(values != jnp.round(values)))
    narrow = _fits_bfloat16(qparams, arithmetic)
    return Coded(values, lax.stop_gradient(factor), bypass, narrow, mixed)


def in_float(x: Float[Array, "..."]) -> Coded:
    """An operand without a quantizer."""
    return Coded(widened(x))


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
    in_float = sizing.exactness is Exactness.FLOAT
    lhs, lhs_groups = grouped_or_folded(product, 0, lhs, in_float=in_float)
    rhs, rhs_groups = grouped_or_folded(product, 1, rhs, in_float=in_float)
    ungrouped = lhs_groups is None and rhs_groups is None

    def quantized() -> jax.Array:
        if ungrouped:
            mixed = [side.is_mixed for side in (lhs, rhs) if side.is_mixed is not None]
            reals = [*flags, *mixed]
            any_bypass = functools.reduce(operator.or_, reals) if reals else jnp.zeros((), bool)
            narrow = [side.fits_bfloat16 for side in (lhs, rhs) if side.fits_bfloat16 is not None]
            is_narrow = operator.and_(*narrow) if len(narrow) == 2 else None
            total = _scaled_sums(product, sizing, lhs, rhs, _Flags(any_bypass, is_narrow))
        else:
            total = _grouped_sums(product, lhs, rhs, (lhs_groups, rhs_groups))
        return narrowed(total, product.out.dtype)

    bypass = functools.reduce(operator.and_, flags) if flags else None
    if bypass is None or (ungrouped and _float32_is_native(product)):
        return _fenced(product, quantized(), bypass)
    out = lax.cond(bypass, lambda: product.bind(*raw), quantized)
    return _fenced(product, out, bypass)


def _fenced(product: Product, out: jax.Array, bypass: jax.Array | None) -> jax.Array:
    """The result behind a fence, as the matrix that XLA makes of a dot's: how it vectorizes what
    reads the cotangent depends on the shape."""
    if product.op is not Op.DOT:
        return _fence(product, out, bypass)
    if product.turns.out:
        return _fence(product, out.T, bypass).T
    axes = [blocks.dot_axes(product, side) for side in (0, 1)]
    roles = axes[0].batch, axes[0].free, axes[1].free
    operands = product.lhs, product.lhs, product.rhs
    sizes = [math.prod(x.shape[a] for a in role) for x, role in zip(operands, roles, strict=True)]
    matrix = sizes if roles[0] else sizes[1:]
    return _fence(product, out.reshape(matrix), bypass).reshape(out.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fence(product: Product, x: jax.Array, bypass: jax.Array | None) -> jax.Array:
    """The identity, across which XLA fuses no cotangent, and no value that is summed afterwards.

    XLA picks the order of a batch reduction (batch norm's statistics, the gradient of a bias) by
    what it fuses into it. With the fence those sums see the product and the cotangent as the float
    program has them, and bypass is bit-exact under ``jit`` as well; without it single sums differ
    in the last place.
    """
    return fenced(x, bypass) if product.is_summed or not BARRIERS_HOLD else x


@_fence.defjvp
def _fence_jvp(product: Product, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, bypass = primals
    return _fence(product, x, bypass), fenced(tangents[0], bypass)


def _float32_is_native(product: Product) -> bool:
    """Whether multiplying raw operands in float32 at highest precision is the model's own product.

    True for float32 models on CPU, where precision changes nothing; elsewhere the model's own
    equation has to be a branch of its own, or bypass would not be bit-exact.
    """
    dtypes = {product.lhs.dtype, product.rhs.dtype, product.out.dtype}
    return dtypes == {jnp.dtype(jnp.float32)} and jax.default_backend() == "cpu"


def _scaled_sums(
    product: Product, sizing: Sizing, lhs: Coded, rhs: Coded, flags: _Flags
) -> jax.Array:
    """``Σ lhs · rhs · (s_lhs · s_rhs)``."""

    def total(product: Product, values: Values, factors: Factors, flags: Any) -> jax.Array:
        lhs_values, rhs_values = _as_they_came(product, values)
        sums = _sums(product, sizing, lhs_values, rhs_values, flags)
        if not product.is_summed:
            # Where no fence stands behind the factors, one stands ahead of them.
            fence = lax.optimization_barrier
            sums = fence(sums.T).T if product.turns.out else fence(sums)
        return scaled(product, sums, *factors)

    return _derived_by_operand(product, lhs, rhs, flags, total)


def _grouped_sums(
    product: Product, lhs: Coded, rhs: Coded, lengths: tuple[int | None, int | None]
) -> jax.Array:
    """``Σ_groups (Σ lhs · rhs) · (s_lhs · s_rhs)``."""

    def total(product: Product, values: Values, factors: Factors, _: Any) -> jax.Array:
        return sum_of_groups(product, values, factors, lengths)

    return _derived_by_operand(product, lhs, rhs, None, total)


def _derived_by_operand(
    product: Product,
    lhs: Coded,
    rhs: Coded,
    flags: _Flags | None,
    total: Callable[[Product, Values, Factors, Any], jax.Array],
) -> jax.Array:
    """``total(product, values, factors, flags)``, whose derivatives are one product each.

    The plain rule multiplies the cotangent, an array of the output's size, by both factors before
    each product of the backward pass, and adds up group by group as the forward pass does. Here a
    factor goes with the tangent of its own operand, where it joins the estimator's slope, and one
    that varies with the other operand, mostly a weight. A derivative is no sum of integers.

    The rule closes over no array: what the product has besides its operands is an argument.
    """

    @jax.custom_jvp
    def derived(operands: Any, flags: Any, rest: Any) -> jax.Array:
        values, factors = operands
        return total(dataclasses.replace(product, rest=rest), values, factors, flags)

    @functools.partial(derived.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        ((values, factors), flags, rest), ((dvalues, dfactors), *_) = primals, tangents
        here = dataclasses.replace(product, rest=rest)
        # From here on each derivative is that of the codes alone.
        values = tuple(map(in_code_units, values, factors))
        terms = [
            _tangent(here, side, values, factors, dvalue)
            for side, dvalue in enumerate(dvalues)
            if moves(dvalue)
        ]
        by_factors = lambda factors: total(here, values, factors, flags)  # noqa: E731
        if not moves(dfactors):
            out = by_factors(factors)
            return out, sum_of(terms, out)
        out, term = jax.jvp(by_factors, (factors,), (instantiated(dfactors),))
        return out, sum_of([*terms, term], out)

    operands = (lhs.values, rhs.values), (lhs.factor, rhs.factor)
    return derived(operands, flags, product.rest)


def _as_they_came(product: Product, values: Sequence[jax.Array]) -> list[jax.Array]:
    """Operands that were transposed with that transposition next to the product again.

    What makes codes of them stands between the two otherwise, and XLA adds up in another order.
    """
    barrier = lax.optimization_barrier
    turns = product.turns.lhs, product.turns.rhs
    return [barrier(x.T).T if turned else x for x, turned in zip(values, turns, strict=True)]


def _tangent(
    product: Product,
    side: int,
    values: Values,
    factors: Factors,
    tangent: jax.Array,
) -> jax.Array:
    """How the scaled sums move with one operand, whose tangent its own factor is part of."""
    other, factor = values[1 - side], factors[1 - side]
    if factor is not None and factor.size == 1:
        tangent = tangent * factor.reshape(())
    elif factor is not None:
        other = other * expand(factor, other.shape)
    operands = (tangent, other) if side == 0 else (other, tangent)
    lhs, rhs = _as_they_came(product, operands)
    # Gradients are no codes: accelerators multiply them at the precision of the model.
    is_cpu = jax.default_backend() == "cpu"
    return product.in_float32(lhs, rhs, HIGHEST if is_cpu else product.params["precision"])


def _sums(
    product: Product, sizing: Sizing, lhs: jax.Array, rhs: jax.Array, flags: _Flags
) -> jax.Array:
    """``Σ lhs · rhs`` in float32, through int32 where float32 alone would round."""
    is_long = sizing.exactness is Exactness.CHUNKED
    if not is_long and flags.is_narrow is None:
        return product.in_float32(lhs, rhs)

    def wide(lhs: jax.Array, rhs: jax.Array, rest: Any) -> jax.Array:
        return dataclasses.replace(product, rest=rest).in_float32(lhs, rhs)

    def narrow(lhs: jax.Array, rhs: jax.Array, rest: Any) -> jax.Array:
        here = dataclasses.replace(product, rest=rest)
        return here.in_float32(*_bfloat16(lhs, rhs), None)

    def split(lhs: jax.Array, rhs: jax.Array, rest: Any) -> jax.Array:
        return _in_chunks(dataclasses.replace(product, rest=rest), sizing.block, lhs, rhs)

    def split_narrow(lhs: jax.Array, rhs: jax.Array, rest: Any) -> jax.Array:
        here = dataclasses.replace(product, rest=rest)
        block = sizing.block // ALIGNED * ALIGNED or sizing.block
        return _in_chunks(here, block, *_bfloat16(lhs, rhs))

    def plain(lhs: jax.Array, rhs: jax.Array, flags: _Flags, rest: Any) -> jax.Array:
        if flags.is_narrow is None:
            return wide(lhs, rhs, rest)
        return either(flags.is_narrow, narrow, wide, lhs, rhs, rest)

    def chunked(lhs: jax.Array, rhs: jax.Array, flags: _Flags, rest: Any) -> jax.Array:
        if flags.is_narrow is None:
            return split(lhs, rhs, rest)
        return either(flags.is_narrow, split_narrow, split, lhs, rhs, rest)

    @jax.custom_jvp
    def total(lhs: jax.Array, rhs: jax.Array, flags: _Flags) -> jax.Array:
        if not is_long:
            return plain(lhs, rhs, flags, product.rest)
        fits = flags.any_bypass | _sums_fit(product, sizing, lhs, rhs)
        return either(fits, plain, chunked, lhs, rhs, flags, product.rest)

    @total.defjvp
    def total_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (lhs, rhs, flags), (dlhs, drhs, _) = primals, tangents
        tangent = product.in_float32(dlhs, rhs) + product.in_float32(lhs, drhs)
        return total(lhs, rhs, flags), tangent

    return total(lhs, rhs, flags)


def _in_chunks(product: Product, block: int, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Sums of blocks in float32, added up in int32."""
    parts = blocks.chunks(product, lhs, rhs, block)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + parts.product(i).astype(jnp.int32)

    start = jnp.zeros(jax.eval_shape(parts.product, jnp.int32(0)).shape, jnp.int32)
    start = varying_like(start, (lhs, rhs))
    return parts.finish(lax.fori_loop(0, parts.n, add, start)).astype(jnp.float32)


def _bfloat16(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)


def _fits_bfloat16(qparams: QParams, arithmetic: Arithmetic) -> jax.Array | None:
    """Whether an operand on a GPU holds codes that bfloat16 has; None where it never does.

    Codes of 8 bits do, centered about a zero point in their range; one that was learned can lie
    elsewhere. Sums are float32 as ever. Float32 at highest precision takes many times as long.
    """
    format, estimator = arithmetic.format, arithmetic.estimator
    if not isinstance(format, IntegerFormat) or format.max_bits > 8 or estimator.chosen:
        return None
    if jax.default_backend() != "gpu":
        return None
    low, high = format.level_range(qparams.bits, estimator.rest(qparams.theta))
    zero = jnp.round(qparams.zero_point)
    reach = jnp.maximum(jnp.max(high - zero), jnp.max(zero - low))
    return ~is_bypassed(qparams.bits) & (reach <= BFLOAT16_EXACT)


def _sums_fit(product: Product, sizing: Sizing, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Whether no sum can leave float32's exact integers, judged by the codes of one operand.

    ``max Σ |code|`` of the smaller operand, usually the weight, times the other's bound. Weights
    are far from their bound on the whole, so sums several times longer than the worst case fit.
    Of a batch of any size that is the operand whose size is known.
    """
    is_right = at_most(rhs.size, lhs.size)
    side = int(isinstance(rhs.size, int) if is_right is None else is_right)
    _, contracted, window = product.axes(side)
    longest = jnp.max(jnp.sum(jnp.abs((lhs, rhs)[side]), axis=contracted + window))
    return longest * float(sizing.bounds[1 - side]) <= 0.999 * FLOAT32_EXACT
