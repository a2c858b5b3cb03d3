"""What may stand between a product and its bias: the sum's entries in another place.

``jax.vmap`` of a layer transposes the result of its product, or cuts its leading axis, ahead of the
addition. Each move has an inverse, so a sum can be handled in the product's own layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex_core

from quantjax._compat import bind_in_context

Moves = tuple[jex_core.JaxprEqn, ...]
"""Equations of one operand each, the first of them that of the product's result."""


def is_move(eqn: jex_core.JaxprEqn) -> bool:
    """Whether the equation gives its one operand another shape or order, and keeps each entry once.

    On meshes with explicit axes a change of shape that names a sharding is none.
    """
    if len(eqn.invars) != 1 or eqn.params.get("sharding") is not None:
        return False
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        before, after = (_shape(atom.aval) for atom in (eqn.invars[0], eqn.outvars[0]))
        return bool(math.prod(before) == math.prod(after))
    return name in {"transpose", "squeeze", "reshape"}


def moved_forth(moves: Moves, x: jax.Array) -> jax.Array:
    """From the product's layout to that of the addition, in the context at hand."""
    for eqn in moves:
        (x,) = bind_in_context(eqn, x)
    return x


def moved_back(moves: Sequence[jex_core.JaxprEqn], x: jax.Array) -> jax.Array:
    """From the layout of the addition to the product's."""
    for eqn in reversed(moves):
        turned, shape = _turned(eqn), _shape(eqn.invars[0].aval)
        x = lax.reshape(x, shape if turned is None else tuple(shape[axis] for axis in turned))
        if turned is not None:
            x = lax.transpose(x, tuple(map(int, np.argsort(turned))))
    return x


def _turned(eqn: jex_core.JaxprEqn) -> tuple[int, ...] | None:
    """The order of axes that the equation begins with; a ``reshape`` may have one as well."""
    order = eqn.params.get("permutation") or eqn.params.get("dimensions")
    return order if eqn.primitive.name in {"transpose", "reshape"} else None


Axes = frozenset[int] | None
"""Along which an array has different entries; None where that is not known."""


def axes_forth(eqn: jex_core.JaxprEqn, axes: Axes) -> Axes:
    """Axes of the result, given those of the first operand."""
    if axes is None:
        return None
    if eqn.primitive.name == "broadcast_in_dim":
        return frozenset(eqn.params["broadcast_dimensions"][axis] for axis in axes)
    turned = _turned(eqn)
    if turned is not None:
        axes = frozenset(place for place, axis in enumerate(turned) if axis in axes)
    if eqn.primitive.name == "transpose":
        return axes
    places = _places(eqn)
    return None if places is None else frozenset(places[axis] for axis in axes)


def axes_back(moves: Moves, axes: Axes) -> Axes:
    """Axes in the product's layout, given those in the layout of the addition."""
    for eqn in reversed(moves):
        if axes is None:
            return None
        turned = _turned(eqn)
        if eqn.primitive.name != "transpose":
            places = _places(eqn)
            if places is None:
                return None
            back = {after: before for before, after in places.items()}
            axes = frozenset(back[axis] for axis in axes)
        if turned is not None:
            axes = frozenset(turned[axis] for axis in axes)
    return axes


def _places(eqn: jex_core.JaxprEqn) -> dict[int, int] | None:
    """Where each axis of more than one entry goes; None where axes are cut or joined.

    Of a ``reshape`` that turns its operand first, axes of what was turned.
    """
    before, after = (_shape(atom.aval) for atom in (eqn.invars[0], eqn.outvars[0]))
    before = tuple(before[axis] for axis in _turned(eqn) or range(len(before)))
    kept, found = ([a for a, size in enumerate(shape) if size != 1] for shape in (before, after))
    if [before[axis] for axis in kept] != [after[axis] for axis in found]:
        return None
    return dict(zip(kept, found, strict=True))


def _shape(aval: Any) -> tuple[int, ...]:
    return tuple(aval.shape)
