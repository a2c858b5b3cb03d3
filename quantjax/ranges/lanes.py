"""A choice by index that, mapped over the index, costs what was chosen and not all there is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

AT_ONCE = 1 << 18  # entries of the largest operand, times the lanes that are taken together

_Branch = Callable[..., list[jax.Array]]


def choose(index: jax.Array, branches: Sequence[Callable[[], Any]], *, apart: int) -> Any:
    """``branches[index]()``, as ``lax.switch``; under ``vmap`` each lane runs its branch alone.

    ``lax.switch`` computes every branch for every lane once they differ in ``index``. Here lanes
    are ordered by branch and taken some at a time: a grid of 16 rules costs what 16 rules cost.
    Branches may close over what is traced, batched or differentiated; derivatives take all branches
    for all lanes.

    Args:
      index: int32 scalar, within the branches.
      branches: alike in what they return.
      apart: into how many parts of equal size lanes are expected to fall; a part goes together.

    Raises:
      TypeError: branches that return other structures, shapes or dtypes.

    >>> pick = lambda i, x: choose(i, [lambda: x + 1.0, lambda: -x], apart=2)
    >>> jax.vmap(pick)(jnp.array([1, 0, 1]), jnp.array([1.0, 2.0, 3.0])).tolist()
    [-1.0, 3.0, -3.0]
    """
    traced = [jax.make_jaxpr(branch, return_shape=True)() for branch in branches]
    trees = [jax.tree.structure(shape) for _, shape in traced]
    if len(set(trees)) > 1:
        raise TypeError(f"branches return {', '.join(map(str, trees))}")
    operands = list(
        {id(const): const for program, _ in traced for const in program.consts}.values()
    )
    places = {id(operand): place for place, operand in enumerate(operands)}
    programs = [
        functools.partial(_evaluated, program.jaxpr, [places[id(c)] for c in program.consts])
        for program, _ in traced
    ]
    largest = max((math.prod(jnp.shape(operand)) for operand in operands), default=1)
    found = _differentiable(programs, apart, largest)(index, *operands)
    return jax.tree.unflatten(trees[0], found)


def _evaluated(program: Any, places: Sequence[int], *operands: jax.Array) -> list[jax.Array]:
    return jax.core.eval_jaxpr(program, [operands[place] for place in places])


def _differentiable(branches: Sequence[_Branch], apart: int, entries: int) -> _Branch:
    """What batches by a rule of its own has no gradient by itself."""
    chosen = jax.custom_jvp(_switch(branches, apart, entries))

    @chosen.defjvp
    def differentiated(primals: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        (index, *operands), (_, *moved) = primals, tangents
        # Not by a switch: under vmap JAX 0.12 puts what cannot be transposed on its tangents.
        each = [
            jax.jvp(branch, operands, [_if(index == place, tangent) for tangent in moved])[1]
            for place, branch in enumerate(branches)
        ]
        kept = [
            [_if(index == place, tangent) for tangent in some] for place, some in enumerate(each)
        ]
        return chosen(*primals), [functools.reduce(_sum, some) for some in zip(*kept, strict=True)]

    return chosen


def _if(chosen: jax.Array, tangent: jax.Array) -> jax.Array:
    """A tangent of the branch that was chosen, else 0, whatever it is; integers have none."""
    if tangent.dtype == jax.dtypes.float0:
        return tangent
    return jnp.where(chosen, tangent, jnp.zeros_like(tangent))


def _sum(one: jax.Array, other: jax.Array) -> jax.Array:
    return one if one.dtype == jax.dtypes.float0 else one + other


def _switch(branches: Sequence[_Branch], apart: int, entries: int) -> _Branch:
    """The choice at one level of ``vmap``; ``entries`` is how many the levels below have."""

    @jax.custom_batching.custom_vmap
    def chosen(index: jax.Array, *operands: jax.Array) -> list[jax.Array]:
        return lax.switch(index, branches, *operands)

    @chosen.def_vmap
    def batched(
        size: int, are_batched: Sequence[bool], index: jax.Array, *operands: jax.Array
    ) -> tuple[list[jax.Array], list[bool]]:
        differ, *axes = are_batched
        if differ:
            together = min(max(AT_ONCE // entries, 1), -(-size // apart))
            found = _by_lanes(branches, together, jnp.asarray(index), axes, operands)
        else:
            mapped = [_mapped(branch, axes, size) for branch in branches]
            found = _switch(mapped, apart, entries * size)(index, *operands)
        return found, [True] * len(found)

    return chosen


def _mapped(branch: _Branch, are_batched: Sequence[bool], size: int) -> _Branch:
    """A branch for many lanes, of which operands may all be the same."""
    axes = (0, *(0 if batched else None for batched in are_batched))
    each = jax.vmap(lambda _, *operands: branch(*operands), axes)
    return lambda *operands: each(jnp.arange(size), *operands)


def _by_lanes(
    branches: Sequence[_Branch],
    together: int,
    index: jax.Array,
    are_batched: Sequence[bool],
    operands: Sequence[jax.Array],
) -> list[jax.Array]:
    """Every lane by its own branch: ``together`` of one branch at a time, the last ones filled up.

    Where ``n`` lanes fall into parts of ``n_f``, they are ``Σ ⌈n_f / together⌉`` such groups, which
    is not more than ``⌊n / together⌋ + branches``; the groups that are too many do nothing.
    """
    lanes, kinds = index.shape[0], len(branches)
    mapped = [_mapped(branch, are_batched, together) for branch in branches]
    if not lanes:
        return lax.switch(0, mapped, *operands)
    numbers = jnp.zeros(kinds, jnp.int32).at[index].add(1)
    groups = (numbers + together - 1) // together
    first_lane, first_group = (jnp.cumsum(n) - n for n in (numbers, groups))
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    rank = jnp.zeros(lanes, jnp.int32).at[order].set(jnp.arange(lanes, dtype=jnp.int32))

    def taken(some: jax.Array) -> list[jax.Array]:
        return [
            jnp.asarray(operand)[some] if batched else operand
            for operand, batched in zip(operands, are_batched, strict=True)
        ]

    shapes = jax.eval_shape(lambda: mapped[0](*taken(order[:1].repeat(together))))

    def nothing(*operands: jax.Array) -> list[jax.Array]:
        del operands
        return [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]

    def group(number: jax.Array) -> list[jax.Array]:
        kind = jnp.searchsorted(jnp.cumsum(groups), number, side="right").astype(jnp.int32)
        place = first_lane[kind] + (number - first_group[kind]) * together
        some = order[jnp.minimum(place + jnp.arange(together, dtype=jnp.int32), lanes - 1)]
        return lax.switch(kind, [*mapped, nothing], *taken(some))

    found = lax.map(group, jnp.arange(lanes // together + kinds, dtype=jnp.int32))
    within = rank - first_lane[index]
    place = first_group[index] * together + within
    return [leaf.reshape(-1, *leaf.shape[2:])[place] for leaf in found]
