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
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from quantjax._compat import names_axes, opened

AT_ONCE = 1 << 18  # entries of the largest operand, times the lanes that are taken together

_Branch = Callable[..., list[jax.Array]]


def choose(
    index: jax.Array, branches: Sequence[Callable[[], Any]], *, apart: int, entries: int = 1
) -> Any:
    """``branches[index]()``, as ``lax.switch``; under ``vmap`` each lane runs its branch alone.

    ``lax.switch`` computes every branch for every lane once they differ in ``index``. Here lanes
    are ordered by branch and taken some at a time: a grid of 16 rules costs what 16 rules cost.
    Branches may close over what is traced, batched or differentiated. Derivatives take all branches
    for all lanes, and so do branches with collectives, and a number of lanes that is symbolic.

    Args:
      index: int32 scalar, within the branches.
      branches: alike in what they return.
      apart: into how many parts of equal size lanes are expected to fall; a part goes together.
      entries: how many numbers a branch makes, where no operand has as many.

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
    if any(names_axes(program) for program, _ in traced):
        return lax.switch(index, branches)  # a collective is of all lanes, whatever they chose
    consts = [const for program, _ in traced for const in program.consts]
    operands = list({id(const): const for const in consts}.values())
    places = {id(operand): place for place, operand in enumerate(operands)}
    programs = [
        functools.partial(_evaluated, opened(program), [places[id(c)] for c in program.consts])
        for program, _ in traced
    ]
    sizes = [entries, *(math.prod(jnp.shape(operand)) for operand in operands)]
    symbolic = [size for size in sizes if not isinstance(size, int)]
    largest = symbolic[0] if symbolic else max(sizes)
    found = _differentiable(programs, apart, largest)(index, *operands)
    return jax.tree.unflatten(trees[0], found)


def _evaluated(program: Any, places: Sequence[int], *operands: jax.Array) -> list[jax.Array]:
    return jax.core.eval_jaxpr(program, (), *(operands[place] for place in places))


def _differentiable(branches: Sequence[_Branch], apart: int, entries: int) -> _Branch:
    """What batches by a rule of its own has no gradient by itself."""
    chosen = jax.custom_jvp(_switch(branches, apart, entries))

    @functools.partial(chosen.defjvp, symbolic_zeros=True)
    def differentiated(primals: Any, tangents: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        (index, *operands), (_, *tangents) = primals, tangents
        # A branch is differentiated by what moves alone: it may hold what has no derivative.
        moving = [n for n, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]
        out = chosen(*primals)
        moved = [zero_from_primal(leaf) for leaf in out]
        # Not by a switch: under vmap JAX 0.12 puts what cannot be transposed on its tangents.
        for place, branch in enumerate(branches if moving else ()):

            def of_moving(*some: jax.Array, branch: _Branch = branch) -> list[jax.Array]:
                given = dict(zip(moving, some, strict=True))
                return branch(*(given.get(n, operand) for n, operand in enumerate(operands)))

            here = index == place
            at, along = [operands[n] for n in moving], [_if(here, tangents[n]) for n in moving]
            found = jax.jvp(of_moving, at, along)[1]
            moved = [_sum(a, _if(here, b)) for a, b in zip(moved, found, strict=True)]
        return out, moved

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
        if not (isinstance(size, int) and isinstance(entries, int)):  # symbolic, for an export
            each = jax.vmap(lambda i, *some: lax.switch(i, branches, *some), _axes(are_batched))
            found = each(index, *operands)
        elif differ:
            together = min(max(AT_ONCE // max(entries, 1), 1), -(-size // apart))
            found = _by_lanes(branches, together, entries, index, axes, operands)
        else:
            mapped = [_mapped(branch, axes, size) for branch in branches]
            found = _switch(mapped, apart, entries * size)(index, *operands)
        return found, [True] * len(found)

    return chosen


def _mapped(branch: _Branch, are_batched: Sequence[bool], size: int) -> _Branch:
    """A branch for many lanes, of which operands may all be the same."""
    each = jax.vmap(lambda _, *operands: branch(*operands), _axes([True, *are_batched]))
    return lambda *operands: each(jnp.arange(size), *operands)


def _axes(are_batched: Sequence[bool]) -> tuple[int | None, ...]:
    return tuple(0 if batched else None for batched in are_batched)


def _by_lanes(
    branches: Sequence[_Branch],
    together: int,
    entries: int,
    index: jax.Array,
    are_batched: Sequence[bool],
    operands: Sequence[jax.Array],
) -> list[jax.Array]:
    """Every lane by its own branch: ``together`` of one branch at a time, the last ones filled up.

    Where ``n`` lanes fall into parts of ``n_f``, they are ``Σ ⌈n_f / together⌉`` such groups, which
    is not more than ``⌊n / together⌋ + branches``; the groups that are too many do nothing.
    """
    index = jnp.asarray(index)
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
        return one_of(kind, *taken(some))

    # Of more lanes around these, which differ in their index too, each runs its own again.
    one_of = _switch([*mapped, nothing], kinds, entries * together)
    found = lax.map(group, jnp.arange(lanes // together + kinds, dtype=jnp.int32))
    within = rank - first_lane[index]
    place = first_group[index] + within // together, within % together
    return [leaf[place] for leaf in found]
