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
from quantjax.rounding import Rounding

_PLACES = range(-3, 4)
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
    return (x >= first) & (x <= last)


@functools.partial(jax.jit, static_argnums=3)
def _borders(
    scale: jax.Array, low: jax.Array, high: jax.Array, rounding: Rounding
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest number; jitted, to be traced once for all of a shape."""
    scale, low, high = scale[None], low[None], high[None]
    outwards = jnp.asarray([-1.0, 1.0]).reshape(2, *[1] * (scale.ndim - 1))
    bound = jnp.where(outwards < 0.0, low, high)
    edge = (bound + 0.5 * outwards) * scale
    places = jnp.asarray(_PLACES, jnp.int32).reshape(-1, *[1] * edge.ndim)
    bits = lax.bitcast_convert_type(edge, jnp.int32)[None] + places
    candidates = lax.bitcast_convert_type(bits, jnp.float32)
    levels = rounding.apply(divide_by_scale(candidates, jnp.broadcast_to(scale, edge.shape)[None]))
    fits = outwards[None] * (levels - bound[None]) <= 0.0
    reach = jnp.max(jnp.where(fits, outwards[None] * candidates, -jnp.inf), axis=0)
    return -reach[0], reach[1]
