"""Where rounded quotients lie in a range, without dividing each entry.

Division and rounding are monotone: ``low <= round(x/s) <= high`` holds between two numbers. They
depend on the scale alone, of which there is one for many entries.
"""

from __future__ import annotations

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
    edges = jnp.stack([(low - 0.5) * scale, (high + 0.5) * scale])[:, None]
    places = jnp.asarray(_PLACES, jnp.int32).reshape(-1, *[1] * scale.ndim)[None]
    bits = lax.bitcast_convert_type(edges, jnp.int32) + places
    candidates = lax.bitcast_convert_type(bits, jnp.float32)
    wide = jnp.broadcast_to(scale[None, None], candidates.shape)
    levels = rounding.apply(divide_by_scale(candidates, wide))
    lies_above, lies_below = levels[0] >= low[None], levels[1] <= high[None]
    first = jnp.min(jnp.where(lies_above, candidates[0], jnp.inf), axis=0)
    last = jnp.max(jnp.where(lies_below, candidates[1], -jnp.inf), axis=0)
    return (x >= first) & (x <= last)
