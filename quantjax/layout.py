"""Where a parameter lies in a product: the moves between the two, for codes and for scales.

A weight reaches its product by transposes, reshapes, slices of a scan. Codes follow the same moves;
scales, which have an entry for a block of codes, follow them in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.interpreter import NEUTRAL_MOVES, Origin, eqn_shapes

STEP = "step"


class Move(NamedTuple):
    """One step from a parameter to its product.

    Attributes:
      name: the primitive, or ``step`` where a scan takes a slice of each.
      params: those of the equation.
      before, after: shapes; of a step, ``(length,)`` and ``()``.
    """

    name: str
    params: dict[str, Any]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def neutral(self) -> bool:
        """Whether nothing moves."""
        return self.name in NEUTRAL_MOVES or (self.name == "slice" and self.before == self.after)


def moves_of(origin: Origin) -> list[Move]:
    """From the parameter to the product, in order; for storable weights."""
    path: list[Move] = []
    node = origin
    while node.operands:
        if node.is_step:
            path.append(Move(STEP, {}, (node.loops[-1].length or 0,), ()))
        else:
            assert node.eqn is not None
            before, after = eqn_shapes(node.eqn)
            path.append(Move(node.eqn.primitive.name, node.eqn.params, before, after))
        node = node.operands[0]
    return path[::-1]


def casts(path: Sequence[Move]) -> list[Any]:
    """The floating-point dtypes that the parameter is cast to on its way."""
    return [m.params["new_dtype"] for m in path if m.name == "convert_element_type"]


def codes_in_product(codes: jax.Array, path: Sequence[Move]) -> jax.Array:
    """Codes of a parameter in the layout of its product, behind a leading axis for each step."""
    layers = 0
    for move in path:
        if move.name == STEP:
            layers += 1
        elif not move.neutral:
            codes = _moved(codes, move, layers)
    return codes


def scale_in_product(
    scale: jax.Array, path: Sequence[Move], scale_shape: Sequence[int]
) -> jax.Array:
    """A parameter's scale in the layout of its product, behind a leading axis for each step.

    Args:
      scale: of the parameter's rank.
      scale_shape: what the plan has in the product; at most as fine as what arrives there.
    """
    layers = 0
    for move in path:
        if move.name == STEP:
            scale = jnp.repeat(scale, move.before[0] // scale.shape[layers], axis=layers)
            layers += 1
        elif not move.neutral:
            scale = _moved_scale(scale, move, layers)
    for axis, groups in enumerate(scale_shape, layers):
        have = scale.shape[axis]
        scale = scale[(slice(None),) * axis + (slice(None, None, have // groups),)]
    return scale


def scale_in_parameter(scale: jax.Array, path: Sequence[Move], layers: int) -> jax.Array:
    """The inverse: a scale of the product, behind ``layers`` leading axes, at the parameter.

    Where a move cuts across groups, the result has the coarsest blocks that hold them apart.
    """
    for move in reversed(path):
        if move.name == STEP:
            layers -= 1
        elif not move.neutral:
            scale = _moved_scale(scale, _inverse(move), layers)
    return scale


def _inverse(move: Move) -> Move:
    if move.name == "transpose":
        order = tuple(int(axis) for axis in np.argsort(move.params["permutation"]))
        return move._replace(params={"permutation": order})
    return move._replace(before=move.after, after=move.before)


def _moved(x: jax.Array, move: Move, layers: int) -> jax.Array:
    """One move of an array behind ``layers`` leading axes."""
    if move.name == "transpose":
        order = (axis + layers for axis in move.params["permutation"])
        return x.transpose((*range(layers), *order))
    if move.name == "rev":
        return jnp.flip(x, tuple(axis + layers for axis in move.params["dimensions"]))
    return x.reshape((*x.shape[:layers], *move.after))


def _moved_scale(scale: jax.Array, move: Move, layers: int) -> jax.Array:
    if move.name in ("transpose", "rev"):
        return _moved(scale, move, layers)
    lead, own = scale.shape[:layers], scale.shape[layers:]
    sizes: list[int] = []
    result: list[int] = []
    picks: list[np.ndarray] = []
    for before, after in _segments(move.before, move.after):
        first = own[before.start : before.stop]
        pick = _blocks(move.before[before], first, move.after[after])
        sizes.append(math.prod(first))
        result += pick.shape
        picks.append(pick.ravel())
    scale = scale.reshape((*lead, *sizes))
    for axis, pick in enumerate(picks, layers):
        if not np.array_equal(pick, np.arange(scale.shape[axis])):
            scale = jnp.take(scale, pick, axis=axis)
    return scale.reshape((*lead, *result))


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[slice, slice]]:
    """Runs of axes that a reshape turns into one another, as short as possible."""
    runs: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        runs.append((slice(start[0], i), slice(start[1], j)))
    return runs


def _blocks(before: Sequence[int], groups: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """Which of the flattened groups each block of the reshaped axes belongs to."""
    ids = np.arange(math.prod(groups)).reshape(groups)
    for axis, (n, count) in enumerate(zip(before, groups, strict=True)):
        ids = np.repeat(ids, n // count, axis=axis)
    ids = ids.reshape(tuple(after))
    for axis, n in enumerate(after):
        others = tuple(a for a in range(len(after)) if a != axis)
        changes = 1 + np.flatnonzero(np.any(np.diff(ids, axis=axis) != 0, axis=others))
        length = math.gcd(n, *(int(c) for c in changes))
        ids = ids[(slice(None),) * axis + (slice(None, None, length),)]
    return ids
