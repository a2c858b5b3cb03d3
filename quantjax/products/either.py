"""A choice between two forms of a result, for which ``vmap`` copies no operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_Form = Callable[..., jax.Array]


def either(chosen: jax.Array, yes: _Form, no: _Form, *operands: Any) -> jax.Array:
    """``yes(*operands)`` where ``chosen``, else ``no(*operands)``, as ``lax.cond``.

    Under ``vmap`` over what is chosen, ``lax.cond`` repeats all operands for each lane, a weight
    that the lanes share as well. Here ``yes`` alone runs where all lanes have chosen it, else both,
    and their results are chosen from. Both close over nothing that is traced.

    >>> pick = lambda chosen, x: either(chosen, jnp.negative, jnp.exp, x)
    >>> jax.vmap(pick, (0, None))(jnp.array([True, False]), jnp.zeros(2)).tolist()
    [[-0.0, -0.0], [1.0, 1.0]]
    """
    return _chooser(yes, no)(chosen, *operands)


def _chooser(yes: _Form, no: _Form) -> _Form:
    @jax.custom_batching.custom_vmap
    def one(chosen: jax.Array, *operands: Any) -> jax.Array:
        return lax.cond(chosen, yes, no, *operands)

    @one.def_vmap
    def lanes(size: int, are_batched: Any, chosen: jax.Array, *operands: Any) -> Any:
        differ, *batched = are_batched
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
        both = [jax.vmap(form, axes, axis_size=size) for form in (yes, no)]
        if not differ:
            return _chooser(*both)(chosen, *operands), True

        def some(chosen: jax.Array, *operands: Any) -> jax.Array:
            first, second = (form(*operands) for form in both)
            return jnp.where(chosen.reshape(-1, *[1] * (first.ndim - 1)), first, second)

        def every(chosen: jax.Array, *operands: Any) -> jax.Array:
            del chosen
            return both[0](*operands)

        return _chooser(every, some)(jnp.all(chosen), chosen, *operands), True

    return one
