"""Rows of a quantized table: looked up first, with their scales, and then quantized or decoded."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from quantjax.affine import QParams
from quantjax.arithmetic import Arithmetic
from quantjax.granularity import expand
from quantjax.interpreter import Op, Product
from quantjax.lean import narrowed
from quantjax.products.groups import times
from quantjax.products.rounded import rounded


def quantized_rows(
    product: Product,
    table: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "..."]:
    """The rows of the quantized table: looked up, and then rounded by their scales.

    An estimator that transforms what it rounds may read all of the table, so that it has all.
    """
    raw = product.bind(table)
    estimator = arithmetic.estimator
    if estimator.transform is not None:
        found = rows(product, rounded(table, qparams, arithmetic, key))
    else:
        resolved = arithmetic.resolved(qparams, jnp.shape(table))
        plain = arithmetic._replace(estimator=estimator._replace(resolve=None))
        found = rounded(raw, qparams_of_rows(product, resolved, plain), plain, key)
    return _filled(product, found, raw)


def decoded_rows(
    product: Product,
    codes: jax.Array,
    zero_point: jax.Array,
    scale: jax.Array,
    *,
    read: Callable[[jax.Array], jax.Array],
) -> Float[Array, "..."]:
    """``(codes - zero_point) · scale`` of the rows alone, where the table is codes already.

    Args:
      read: from codes to their levels.
    """
    levels = read(rows(product, codes)).astype(jnp.float32)
    values = levels - rows_of_scale(product, zero_point)
    found = narrowed(times(values, rows_of_scale(product, scale)), product.out.dtype)
    stated = product.params.get("fill_value")
    outside = jnp.full(found.shape, jnp.nan if stated is None else stated, found.dtype)
    return _filled(product, found, outside)


def qparams_of_rows(product: Product, qparams: QParams, arithmetic: Arithmetic) -> QParams:
    """QParams of the rows at hand."""
    pick = lambda array: rows_of_scale(product, jnp.asarray(array, jnp.float32))  # noqa: E731
    estimator, theta = arithmetic.estimator, qparams.theta
    own = {name: pick(array) for name, array in estimator.own(theta).items()}
    rest = arithmetic.format.map_groups(estimator.rest(theta), pick)
    return QParams(
        pick(qparams.scale),
        pick(qparams.zero_point),
        qparams.bits,
        {**(rest or {}), **own} if own else rest,
    )


def rows(product: Product, x: jax.Array) -> jax.Array:
    """What a lookup takes of ``x``, whose axes along a row may be shorter than the table's.

    An index out of bounds takes the nearest row, whatever the equation does then.

    Args:
      x: of the table's rank, and of its shape along the axes that are chosen from.
    """
    params = product.params
    _, along, _ = product.axes(0)
    sizes = tuple(x.shape[a] if a in along else params["slice_sizes"][a] for a in range(x.ndim))
    if product.op is Op.SLICE:
        return lax.dynamic_slice(x, product.rest, sizes)
    return lax.gather(
        x,
        product.rest[0],
        params["dimension_numbers"],
        sizes,
        unique_indices=params["unique_indices"],
        indices_are_sorted=params["indices_are_sorted"],
        mode=lax.GatherScatterMode.CLIP if product.fills else params["mode"],
    )


def rows_of_scale(product: Product, scale: jax.Array) -> Float[Array, "..."]:
    """A scale for the rows at hand, of the shape of the result or 1 along its rows."""
    if scale.ndim == 0:
        return scale
    chosen, _, _ = product.axes(0)
    pairs = list(zip(product.lhs.shape, scale.shape, strict=True))
    shape = [n if axis in chosen else groups for axis, (n, groups) in enumerate(pairs)]
    by_row = jnp.broadcast_to(expand(scale, shape), shape)
    return expand(rows(product, by_row), product.out.shape)


def _filled(product: Product, values: jax.Array, outside: jax.Array) -> jax.Array:
    """The rows, and ``outside`` where an index is out of bounds and the equation fills."""
    params = product.params
    if not product.fills:
        return values
    chosen, _, _ = product.axes(0)
    shape = tuple(n if a in chosen else 1 for a, n in enumerate(product.lhs.shape))
    inside = lax.gather(
        jnp.ones(shape, jnp.int8),
        product.rest[0],
        params["dimension_numbers"],
        (1,) * len(shape),
        mode=lax.GatherScatterMode.FILL_OR_DROP,
        fill_value=0,
    )
    return jnp.where(inside == 1, values, outside)
