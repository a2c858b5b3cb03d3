"""Choices and bounds of ``jax.numpy`` without a jitted function of their own; what is rounded.

``jnp.where``, ``jnp.clip`` and broadcasting against axes of size 1 are several operations each
until a compiler has simplified them. In the arithmetic of one operand, of which a model has
hundreds, that is most of what there is to trace and to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped


def elementwise(
    op: Callable[..., jax.Array], *operands: Shaped[Array, "..."] | float
) -> Shaped[Array, "..."]:
    """A function of ``jax.lax`` of arrays of one dtype that broadcast against one another.

    A number is cast to the dtype of the first array.

    >>> elementwise(lax.add, jnp.array([[1.0], [2.0]]), jnp.array([0.5]))[:, 0].tolist()
    [1.5, 2.5]
    >>> elementwise(lax.mul, jnp.arange(3), 2).tolist()
    [0, 2, 4]
    """
    dtype = next(x.dtype for x in operands if not isinstance(x, int | float))
    shape = _common(operands)
    return op(*(_full(x, shape, dtype) for x in operands))


def select(
    which: Bool[Array, "..."],
    yes: Float[Array, "..."] | float,
    no: Float[Array, "..."] | float,
) -> Float[Array, "..."]:
    """``yes`` where ``which`` is true, ``no`` elsewhere.

    Arrays broadcast against one another; a number has their dtype, two are float32.

    >>> select(jnp.array([True, False]), 1.0, jnp.array([2.0, 3.0])).tolist()
    [1.0, 3.0]
    """
    shape = _common((which, yes, no))
    arrays = (case for case in (yes, no) if not isinstance(case, int | float))
    dtype = next((case.dtype for case in arrays), jnp.dtype(jnp.float32))
    which = which if which.ndim == 0 else spread(which, shape)
    return lax.select(which, _full(yes, shape, dtype), _full(no, shape, dtype))


def clip(
    x: Shaped[Array, "..."],
    low: Shaped[Array, "..."] | float,
    high: Shaped[Array, "..."] | float,
) -> Shaped[Array, "..."]:
    """``x`` within bounds of its dtype that broadcast against it; NaN stays NaN.

    Numbers are cast to that dtype. Not differentiated by its bounds.

    >>> clip(jnp.array([-2.0, 0.5, 2.0]), jnp.float32(-1.0), jnp.float32(1.0)).tolist()
    [-1.0, 0.5, 1.0]
    """
    if jnp.ndim(low) == jnp.ndim(high) == 0:
        return lax.clamp(_full(low, (), x.dtype), x, _full(high, (), x.dtype))
    return elementwise(lax.clamp, low, x, high)


def rounded_product(x: Float[Array, "..."], y: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """``x · y``, rounded whatever is added to it: no compiler makes a fused multiply-add of both,
    which an eager call does not, so that a value is the same in every program.

    >>> float(rounded_product(jnp.float32(2.0), 3.0))
    6.0
    """
    # A select between product and sum, which depends on the product: one by ``x`` alone, the same
    # in all lanes of a map over ``y``, is taken out of their loop. A barrier stops no compiler.
    product = x * y
    return jnp.where(jnp.isnan(product), x + product, product)


def narrowed(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """``x`` in another dtype, rounded to it whatever is made of it.

    XLA may leave a cast to bfloat16 out where the next operation casts it back, a mean for
    instance: whether it does depends on what it fuses. An operation that rounds stays.

    >>> narrowed(jnp.float32(1.001), jnp.bfloat16).tolist()
    1.0
    """
    if x.dtype == jnp.float32 and jnp.dtype(dtype) == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x`` in float32, of the values that its own dtype has.

    Where a model casts to bfloat16, and this back, XLA may leave out both, in one program and not
    in the next, as for :func:`narrowed`.

    >>> widened(jnp.bfloat16(1.5)).dtype.name
    'float32'
    """
    rounded = x.dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if rounded else x


def settled(x: jax.Array) -> jax.Array:
    """``x`` itself, of the values that bfloat16 has, for all that reads it.

    A result that is read twice, ahead of a product and behind it, may be written out for the one
    and computed anew for the other, with more digits.

    >>> settled(jnp.bfloat16(1.5)).dtype.name
    'bfloat16'
    """
    return narrowed(widened(x), jnp.bfloat16) if x.dtype == jnp.bfloat16 else x


def wide(*dtypes: DTypeLike) -> DTypeLike:
    """float32, or float64 where one of them is.

    >>> wide(jnp.bfloat16, jnp.float32).__name__
    'float32'
    """
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def spread(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """``x`` broadcast to ``shape``, of its rank or larger.

    >>> spread(jnp.array([[1.0], [2.0]]), (2, 3)).tolist()
    [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    shape, first = tuple(shape), len(shape) - x.ndim
    if x.shape == shape:
        return x
    if x.ndim == 0:
        return lax.broadcast_in_dim(x, shape, ())
    kept = [axis for axis, n in enumerate(x.shape) if n != 1]
    squeezed = lax.reshape(x, [x.shape[axis] for axis in kept])
    return lax.broadcast_in_dim(squeezed, shape, [first + axis for axis in kept])


def _common(operands: Sequence[jax.Array | float]) -> tuple[int, ...]:
    shapes = {jnp.shape(x) for x in operands} - {()}
    return next(iter(shapes)) if len(shapes) == 1 else jnp.broadcast_shapes(*shapes)


def _full(x: jax.Array | float, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return lax.full(shape, x, dtype) if isinstance(x, int | float) else spread(x, shape)
