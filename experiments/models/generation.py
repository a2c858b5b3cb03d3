"""Text from a decoder, token by token, in one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Step = Callable[[Int[Array, "b t"], Any, Int[Array, ""]], tuple[Float[Array, "b t v"], Any]]
"""``(tokens, cache, position) -> (logits, cache)``, as ``Decoder.step`` with its variables."""


def greedy(
    step: Step, cache: Any, prompt: Int[Array, "b p"], *, count: int
) -> tuple[Int[Array, "b n"], Any]:
    """The ``count`` tokens that are likeliest one after another, and the cache after them.

    ``t_n = argmax p(t | t_0 .. t_n-1)``, the smallest token where two are equally likely. The
    prompt goes through ``step`` at once, what follows in a scan of one token each; the last token
    is returned and not run.

    Args:
      step: a pure function.
      cache: empty; holds at least ``p + count - 1`` positions.
      prompt: tokens of equal number in all texts.
      count: static, 1 or more.

    Raises:
      ValueError: a smaller ``count``.
    """
    if count < 1:
        raise ValueError(
            f"{count} tokens are no text; the first one comes with the prompt: count=1"
        )
    start = jnp.int32(prompt.shape[1])
    logits, cache = step(prompt, cache, jnp.int32(0))
    first = jnp.argmax(logits[:, -1], axis=-1).astype(prompt.dtype)

    def one(carry: tuple[Any, jax.Array], position: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        cache, token = carry
        logits, cache = step(token[:, None], cache, position)
        following = jnp.argmax(logits[:, 0], axis=-1).astype(token.dtype)
        return (cache, following), following

    positions = start + jnp.arange(count - 1, dtype=jnp.int32)
    (cache, _), rest = jax.lax.scan(one, (cache, first), positions)
    return jnp.concatenate([first[:, None], rest.T], axis=1), cache
