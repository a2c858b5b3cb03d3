"""Tangents of rules that know which of their arguments are differentiated.

Under ``jax.custom_jvp`` with ``symbolic_zeros=True`` the tangent of an argument that is not
differentiated is a symbolic zero; nothing needs to be computed or kept for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def with_tangent(
    x: jax.Array, factor: jax.Array, change: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """``x``, whose tangent is ``change(tangent, factor)``.

    >>> from operator import mul
    >>> float(jax.grad(with_tangent)(2.0, 3.0, mul))
    3.0
    """
    del factor, change
    return x


@with_tangent.defjvp
def _with_tangent(change: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return with_tangent(*primals, change), change(tangents[0], primals[1])


@jax.custom_jvp
def moving_as_product(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x``, whose tangent is that of ``x · factor``.

    >>> [float(g) for g in jax.grad(moving_as_product, (0, 1))(2.0, 3.0)]
    [3.0, 2.0]
    """
    del factor
    return x


@moving_as_product.defjvp
def _moving_as_product(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, factor), (dx, dfactor) = primals, tangents
    return moving_as_product(x, factor), dx * factor + x * dfactor


def sum_of(terms: list[jax.Array], like: jax.Array) -> jax.Array:
    """Their sum; zeros where there are none."""
    return functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(like)
