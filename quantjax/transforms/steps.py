"""Layers stacked in a scan: one function over all of their leading axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantjax.interpreter import Program


def over_steps(function: Callable[..., Any], steps: Sequence[int]) -> Callable[..., Any]:
    """``function`` of one layer, mapped over a leading axis for each of ``steps``.

    >>> over_steps(jnp.sum, (2,))(jnp.ones((2, 3))).tolist()
    [3.0, 3.0]
    """
    for _ in steps:
        function = jax.vmap(function)
    return function


def repeat_steps(tree: Any, steps: Sequence[int]) -> Any:
    """The same arrays for each layer.

    >>> repeat_steps(jnp.ones((1, 3)), (2,)).shape
    (2, 1, 3)
    """
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*steps, *jnp.shape(leaf))), tree)


def layers_first(program: Program, name: str, records: Any) -> Any:
    """Records of one site, an axis for each scan around it, with layers ahead of time steps."""
    scans, stacked = program.scans[name], program.stacked[name]
    layers = [axis for axis, location in enumerate(scans) if location in stacked]
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, layers, range(len(layers))), records)
