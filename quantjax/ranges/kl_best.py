"""The clip with the smallest divergence among those that a first look cannot tell apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax._compat import varying_like

TOGETHER = 4  # clips that are looked at again at once


class _Found(NamedTuple):
    """The best clip so far, and what of the others is still to be looked at."""

    clip: jax.Array
    value: jax.Array
    rough: jax.Array


def best_of(
    values: Callable[..., jax.Array],
    operands: Any,
    rough: jax.Array,
    enough: jax.Array,
    *,
    takes_last: bool | jax.Array = False,
) -> jax.Array:
    """``argmin`` of the divergences, the first of equals; the last of all where none is finite.

    One that the first look alone has below ``enough`` is taken at its word. Of several, all are
    looked at again, a few at a time: one outlier makes a plateau of a hundred.

    Args:
      values: from ``operands`` and int32 places ``[n]`` to divergences ``[n]``, with all digits.
      rough: ``[clips]``, those of the first look; infinite for what is no candidate.
      enough: what the best has to have at most in the first look.
      takes_last: whether the last of equals is taken, and not the first; may be traced.
    """
    last = rough.shape[0] - 1
    several = jnp.sum(rough <= enough, dtype=jnp.int32) > 1
    first = jnp.where(jnp.min(rough) < jnp.inf, jnp.argmin(rough).astype(jnp.int32), last)
    # One histogram after another: each has its own number of rounds.
    return jax.custom_batching.sequential_vmap(functools.partial(_looked_at_again, values))(
        operands, rough, enough, several, first, jnp.asarray(takes_last)
    )


def _looked_at_again(
    values: Callable[..., jax.Array],
    operands: Any,
    rough: jax.Array,
    enough: jax.Array,
    several: jax.Array,
    first: jax.Array,
    takes_last: jax.Array,
) -> jax.Array:
    last = rough.shape[0] - 1

    def goes_on(state: _Found) -> jax.Array:
        next_one = jnp.min(state.rough)
        return (next_one <= enough) & (next_one < jnp.inf)

    def some_more(state: _Found) -> _Found:
        left, some = lax.top_k(-state.rough, min(TOGETHER, last + 1))
        some = some.astype(jnp.int32)
        found = jnp.where(jnp.isfinite(left), values(operands, some), jnp.inf)
        found = jnp.append(found, state.value)
        clips = jnp.append(some, state.clip)
        least = jnp.min(found)
        earliest = jnp.min(jnp.where(found == least, clips, last))
        latest = jnp.max(jnp.where(found == least, clips, 0))
        best = jnp.where(takes_last, latest, earliest)
        return _Found(best, least, state.rough.at[some].set(jnp.inf))

    def best() -> jax.Array:
        start = _Found(jnp.int32(last), jnp.float32(jnp.inf), rough)
        start = varying_like(start, (operands, rough, enough))
        return lax.while_loop(goes_on, some_more, start).clip

    # XLA takes out of a loop what does not change in it, and computes that for no rounds too.
    return lax.cond(several, best, lambda: first)
