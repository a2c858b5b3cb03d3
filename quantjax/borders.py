"""Where rounded quotients leave a range, without dividing each entry.

Division and rounding are monotone: ``low <= round(x/s) <= high`` holds between two numbers. They
depend on the scale alone, of which there is one for many entries.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax.affine import where_bypassed
from quantjax.formats import divide_by_scale
from quantjax.lean import elementwise, spread
from quantjax.rounding import Rounding

_PLACES = 3
"""How many last places ``(n + 1/2) · s`` may be off, rounded twice as it is."""


def rounds_outside(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    bits: Float[Array, ""],
    rounding: Rounding,
) -> Bool[Array, "..."]:
    """``round(x/s) < low`` or ``> high``, bit for bit as :func:`divide_by_scale` and rounding.

    Args:
      scale: positive, of the rank of ``x`` or a scalar, and so are the bounds: integers below 2^22.
      bits: the width in use; at width 0 nothing is outside.
      rounding: to the nearest, and an odd function: half even or half away from zero.

    NaN, in ``x`` or in a scale, is not outside.

    >>> import jax.numpy as jnp
    >>> from quantjax.rounding import HALF_EVEN
    >>> x, one = jnp.array([-2.6, -2.5, 2.5, 2.6]), jnp.ones(1)
    >>> rounds_outside(x, one, -2.0 * one, 2.0 * one, jnp.float32(8), HALF_EVEN).tolist()
    [True, False, False, True]
    """
    scale, low, high, bits = map(lax.stop_gradient, (scale, low, high, bits))
    shape = jnp.broadcast_shapes(scale.shape, low.shape, high.shape)
    scale = spread(scale, shape)
    low, high = (spread(bound, shape) if bound.ndim else bound for bound in (low, high))
    # Flat, so that scales of one number of channels have one kernel, whatever the rank.
    flat = lambda array: lax.reshape(array, [array.size]) if array.ndim else array  # noqa: E731
    scales = lax.optimization_barrier(flat(scale)) if scale.ndim else scale
    borders = _borders(scales, flat(low), flat(high), bits, rounding)
    below, last = (
        lax.reshape(lax.slice_in_dim(borders, side, side + 1), scale.shape) for side in (0, 1)
    )
    too_low = lax.lt(x, spread(lax.neg(below), x.shape))
    return lax.bitwise_or(too_low, lax.gt(x, spread(last, x.shape)))


@functools.partial(jax.jit, static_argnums=4, inline=True)
def _borders(
    scale: jax.Array, low: jax.Array, high: jax.Array, bits: jax.Array, rounding: Rounding
) -> jax.Array:
    """The largest numbers that round to ``-low`` and to ``high`` at most, stacked.

    Roundings to the nearest and quotients are odd functions: negated, the first one is the smallest
    number that rounds to ``low`` at least. Jitted, to be traced once for all of a shape.
    """
    shape = (2 * _PLACES + 1, 2, *scale.shape)
    over = lambda array: spread(array, shape)  # noqa: E731
    bound = lax.concatenate([lax.reshape(b, (1, *b.shape)) for b in (lax.neg(low), high)], 0)
    if bound.ndim < scale.ndim + 1:
        bound = lax.broadcast_in_dim(bound, shape[1:], [0])
    bound = where_bypassed(bits, jnp.inf, bound)
    edge = lax.mul(elementwise(lax.add, bound, 0.5), spread(scale, shape[1:]))
    # Numbered and not listed: constants are arguments of a kernel, and kernels that differ in the
    # order of their arguments are compiled one by one.
    places = elementwise(lax.sub, lax.broadcasted_iota(jnp.int32, shape, 0), _PLACES)
    moved = lax.add(over(lax.bitcast_convert_type(edge, jnp.int32)), places)
    candidates = lax.bitcast_convert_type(moved, jnp.float32)
    fits = lax.le(rounding.apply(divide_by_scale(candidates, over(scale))), over(bound))
    # No number fits a scale that is NaN; then all are NaN.
    least = over(elementwise(lax.mul, scale, -jnp.inf))
    return lax.reduce_max(lax.select(fits, candidates, least), [0])
