"""Where rounded quotients lie in a range, without dividing each entry.

Division and rounding are monotone: ``low <= round(x/s) <= high`` holds between two numbers. They
depend on the scale alone, of which there is one for many entries.
"""

from __future__ import annotations

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
    scale, low, high = (lax.stop_gradient(each) for each in (scale, low, high))

    def near(edge: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = jnp.asarray(_PLACES, jnp.int32).reshape(-1, *[1] * edge.ndim)
        bits = lax.bitcast_convert_type(edge, jnp.int32)[None] + places
        candidates = lax.bitcast_convert_type(bits, jnp.float32)
        wide = jnp.broadcast_to(scale[None], candidates.shape)
        return candidates, rounding.apply(divide_by_scale(candidates, wide))

    first, levels = near((low - 0.5) * scale)
    first = jnp.min(jnp.where(levels >= low[None], first, jnp.inf), axis=0)
    last, levels = near((high + 0.5) * scale)
    last = jnp.max(jnp.where(levels <= high[None], last, -jnp.inf), axis=0)
    return (x >= first) & (x <= last)
