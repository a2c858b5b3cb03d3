"""Where a parameter lies in a product: the moves between the two, for codes and for scales.

A weight reaches its product by transposes, reshapes, slices of a scan. Codes follow the same moves;
scales, which have an entry for a block of codes, follow them in both directions. Where a move cuts
across groups, or turns a last group that is shorter to the front, the scale behind it has finer
blocks: as coarse as their number tells (see :mod:`quantjax.granularity.groups`), an entry for each
code if need be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from quantjax import errors
from quantjax.granularity import group_size, repeat_groups
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
            path += reversed(_of_equation(node.eqn))
        node = node.operands[0]
    return path[::-1]


def _of_equation(eqn: jex_core.JaxprEqn) -> list[Move]:
    """One move, or two: a reshape may take the axes in another order first."""
    (before, after), order = eqn_shapes(eqn), eqn.params.get("dimensions")
    if eqn.primitive.name != "reshape" or order is None:
        return [Move(eqn.primitive.name, eqn.params, before, after)]
    turned = tuple(before[axis] for axis in order)
    return [
        Move("transpose", {"permutation": tuple(order)}, before, turned),
        Move("reshape", {}, turned, after),
    ]


def casts(path: Sequence[Move]) -> list[Any]:
    """The floating-point dtypes that the parameter is cast to on its way."""
    return [m.params["new_dtype"] for m in path if m.name == "convert_element_type"]


def roundings(path: Sequence[Move], dtype: Any) -> list[Any]:
    """Those casts of a parameter of ``dtype`` that cannot hold all of its values."""
    found, known = [], jnp.finfo(dtype)
    for after in casts(path):
        new = jnp.finfo(after)
        if new.nmant < known.nmant or new.maxexp < known.maxexp or new.minexp > known.minexp:
            found.append(after)
        known = new
    return found


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
            length, groups = move.before[0], scale.shape[layers]
            scale = repeat_groups(scale, group_size(length, groups), length, axis=layers)
            layers += 1
        elif not move.neutral:
            scale = _moved_scale(scale, move, layers)
    return _coarsened(scale, _shape_in_product(path), scale_shape, layers)


def _coarsened(
    scale: jax.Array, shape: tuple[int, ...] | None, wanted: Sequence[int], layers: int
) -> jax.Array:
    """A scale that is constant in each group of ``wanted``, one entry a group."""
    for axis, groups in enumerate(wanted):
        found = scale.shape[axis + layers]
        if found == groups:
            continue
        n = 0 if shape is None else shape[axis]
        coarse, fine = group_size(n, groups), group_size(n, found)
        if shape is None or (groups > 1 and coarse % fine):
            raise errors.GranularityError(
                f"scales of {scale.shape[layers:]} do not stand for groups of {tuple(wanted)}",
                where=f"axis {axis} of a weight of shape {shape or 'unknown'}",
                why="a group of one reaches across groups of the other",
                fix="freeze with the plan that is executed: qj.freeze(plan, qstate, params)",
            )
        scale = jnp.take(scale, np.arange(groups) * coarse // fine, axis=axis + layers)
    return scale


def _shape_in_product(path: Sequence[Move]) -> tuple[int, ...] | None:
    """None where nothing but steps lies between parameter and product."""
    shape: tuple[int, ...] | None = None
    for move in path:
        if move.name != STEP:
            shape = move.after
        elif shape is not None:
            shape = shape[1:]
    return shape


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
    if move.name == "transpose":
        return _moved(scale, move, layers)
    lead, own = scale.shape[:layers], scale.shape[layers:]
    if move.name == "rev":
        for axis in move.params["dimensions"]:
            pick = _blocks(np.flip(_ids(move.before[axis : axis + 1], own[axis : axis + 1])))
            scale = scale if pick.size == 1 else jnp.take(scale, pick, axis=axis + layers)
        return scale
    sizes: list[int] = []
    result: list[int] = []
    picks: list[np.ndarray] = []
    for before, after in _segments(move.before, move.after):
        first = own[before.start : before.stop]
        pick = _blocks(_ids(move.before[before], first).reshape(move.after[after]))
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


def _ids(shape: Sequence[int], groups: Sequence[int]) -> np.ndarray:
    """Which of the flattened groups each entry of a tensor of ``shape`` belongs to."""
    ids = np.arange(math.prod(groups)).reshape(tuple(groups))
    for axis, (n, count) in enumerate(zip(shape, groups, strict=True)):
        ids = ids.take(np.arange(n) // group_size(n, count), axis=axis)
    return ids


def _blocks(ids: np.ndarray) -> np.ndarray:
    """The same for blocks of entries, as coarse along each axis as holds unequal ones apart."""
    for axis, n in enumerate(ids.shape):
        others = tuple(a for a in range(ids.ndim) if a != axis)
        changes = 1 + np.flatnonzero(np.any(np.diff(ids, axis=axis) != 0, axis=others))
        ids = ids.take(np.arange(0, n, _block(n, changes)), axis=axis)
    return ids


def _block(n: int, changes: np.ndarray) -> int:
    """The longest block that ends at each change and is what its number along ``n`` tells."""
    common = math.gcd(*map(int, changes))
    if not common:
        return max(n, 1)
    divisors = (d for d in range(common, 0, -1) if common % d == 0)
    return next(d for d in divisors if group_size(n, -(-n // d)) == d)
