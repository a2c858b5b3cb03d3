"""Tangents of rules that know which of their arguments are differentiated.

Under ``jax.custom_jvp`` with ``symbolic_zeros=True`` the tangent of an argument that is not
differentiated is a symbolic zero; nothing needs to be computed or kept for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def moves(tangents: Any) -> bool:
    """Whether anything of a tree of tangents is there at all."""
    return not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(tangents))


def instantiated(tangents: Any) -> Any:
    """The tree with zeros written out."""

    def zeros(leaf: Any) -> Any:
        is_zero = isinstance(leaf, SymbolicZero)
        return jnp.zeros(leaf.shape, leaf.dtype) if is_zero else leaf

    return jax.tree.map(zeros, tangents)


def sum_of(terms: list[jax.Array], like: jax.Array) -> jax.Array:
    """Their sum; zeros where there are none."""
    return functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(like)
