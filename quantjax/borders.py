"""Where rounded quotients lie in a range, without dividing each entry.

Division and rounding are monotone: ``low <= round(x/s) <= high`` holds between two numbers. They
depend on the scale alone, of which there is one for many entries.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax.formats import divide_by_scale
from quantjax.lean import select, spread
from quantjax.rounding import Rounding

_PLACES = 3
"""How many last places ``(n + 1/2) · s`` may be off, rounded twice as it is."""


def rounds_between(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    rounding: Rounding,
) -> Bool[Array, "..."]:
    """``low <= round(x/s) <= high``, bit for bit as :func:`divide_by_scale` and rounding have it.

    Args:
      scale: positive, of the rank of ``x``, and so are the bounds: integers below 2^22.
      rounding: one to the nearest.

    NaN, in ``x`` or in a scale, lies nowhere.

    >>> import jax.numpy as jnp
    >>> from quantjax.rounding import HALF_EVEN
    >>> x, one = jnp.array([-2.5, -1.5, 2.5, 2.6]), jnp.ones(1)
    >>> rounds_between(x, one, -2.0 * one, 2.0 * one, HALF_EVEN).tolist()
    [True, True, True, False]
    """
    first, last = _borders(*map(lax.stop_gradient, (scale, low, high)), rounding)
    return (x >= spread(first, x.shape)) & (x <= spread(last, x.shape))


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _borders(
    scale: jax.Array, low: jax.Array, high: jax.Array, rounding: Rounding
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest number; jitted, to be traced once for all of a shape."""
    shape = (2 * _PLACES + 1, 2, *scale.shape)
    over = lambda array: spread(array, shape)  # noqa: E731
    # Numbered and not listed: constants are arguments of a kernel, and kernels that differ in the
    # order of their arguments are compiled one by one.
    side = lax.broadcasted_iota(jnp.float32, shape[1:], 0)
    bound = select(side == 0.0, spread(low, side.shape), spread(high, side.shape))
    edge = (bound + (side - 0.5)) * spread(scale, side.shape)
    places = lax.broadcasted_iota(jnp.int32, shape, 0) - _PLACES
    candidates = lax.bitcast_convert_type(
        over(lax.bitcast_convert_type(edge, jnp.int32)) + places, jnp.float32
    )
    outwards = 2.0 * over(side) - 1.0
    levels = rounding.apply(divide_by_scale(candidates, over(scale)))
    fits = outwards * (levels - over(bound)) <= 0.0
    reach = jnp.max(select(fits, outwards * candidates, -jnp.inf), axis=0)
    return -reach[0], reach[1]
