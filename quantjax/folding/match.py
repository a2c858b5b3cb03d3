"""The batch norm that a chain begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from quantjax.folding.chains import Chain, NotPerChannelError, Step
from quantjax.folding.recompute import UnreadableError
from quantjax.folding.roles import (
    OtherFormError,
    Part,
    Played,
    Trial,
    as_folded,
    at_any_size,
    check_form,
    entries_of,
    made_up,
    part_of,
)
from quantjax.interpreter import Origin
from quantjax.interpreter.provenance import Loop

ROOTS = frozenset({"rsqrt", "sqrt", "pow", "integer_pow", "exp"})
"""One of which every standard deviation goes through."""
Shapes = Mapping[str, tuple[int, ...]]
"""Of the parameters, by path."""


class Norm(NamedTuple):
    """The steps of a chain that are a batch norm.

    Attributes:
      first: the step that divides by the standard deviation.
      length: how many steps it has, from the start of the chain.
      parts: what each parameter is to it.
      loops: the scans of which each layer has parameters of its own.
      fault: why it is none that can be folded.
      ends_at: what keeps the next steps of the chain from being steps of it.
    """

    first: int
    length: int
    parts: Mapping[str, Played]
    loops: tuple[Loop, ...]
    fault: str = ""
    ends_at: str = ""


def norm_in(shapes: Shapes, chain: Chain) -> Norm | None:
    """The longest batch norm that a chain begins with."""
    for first, step in enumerate(chain.steps):
        if _has_root(step.operand):
            told = _told(shapes, chain, first + 1)
            if told is not None and told.has_variance:
                return _longest(shapes, chain, first, told)
    return None


class _Told(NamedTuple):
    """What the parameters are to the first steps of a chain, and what contradicts a batch norm."""

    parts: Mapping[str, Played]
    fault: str

    @property
    def has_variance(self) -> bool:
        return any(played.part is Part.VARIANCE for played in self.parts.values())


def _longest(shapes: Shapes, chain: Chain, first: int, told: _Told) -> Norm:
    """The batch norm that divides in step ``first``; steps behind it belong to it while they can.

    Not each longer chain has to be one: μ and β may be added one after the other.
    """
    length, ends_at = first + 1, ""
    for end in range(first + 2, len(chain.steps) + 1):
        if chain.steps[end - 1].shared:
            break
        longer = _told(shapes, chain, end)
        if longer is not None and not longer.fault:
            told, length, ends_at = longer, end, ""
        else:
            ends_at = ends_at or (_unread(chain.steps[end - 1]) if longer is None else longer.fault)
    loops, parts = _loops(chain, length), told.parts
    if told.fault:
        return Norm(first, length, parts, loops, told.fault)
    try:
        parts = _with_entries(shapes, chain, length, parts, loops)
    except OtherFormError as error:
        return Norm(first, length, parts, loops, str(error))
    return Norm(first, length, parts, loops, ends_at=ends_at)


def _unread(step: Step) -> str:
    paths = "" if step.operand is None else ", ".join(step.operand.paths)
    return f"{paths or 'a constant'} enters by a function that is not read"


def _told(shapes: Shapes, chain: Chain, length: int) -> _Told | None:
    """None for steps that cannot be read, or that are not the same for all of a channel."""
    trial = _trial(shapes, chain, length)
    parts: dict[str, Played] = {}
    fault = ""
    try:
        for path in trial.leaves:
            try:
                told = part_of(trial, path)
            except OtherFormError as error:
                fault = fault or str(error)
                continue
            if told is not None:
                part, epsilon = told
                parts[path] = Played(part, entries_of(trial, path, part, epsilon, ()), epsilon)
        for seed in () if fault else (5, 11):
            again = _trial(shapes, chain, length, seed)
            for each in (again, at_any_size(again, parts, seed), as_folded(again, parts)):
                check_form(each, parts)
    except OtherFormError as error:
        fault = str(error)
    except (NotPerChannelError, UnreadableError):
        return None
    return _Told(parts, fault)


def _trial(shapes: Shapes, chain: Chain, length: int, seed: int = 3) -> Trial:
    at = {loop.location: 0 for loop in _loops(chain, length)}
    paths = {path for step in chain.steps[:length] if step.operand for path in step.operand.paths}
    leaves = made_up({path: shapes[path] for path in sorted(paths)}, seed)
    return Trial(chain, length, leaves, at)


def _with_entries(
    shapes: Shapes,
    chain: Chain,
    length: int,
    parts: Mapping[str, Played],
    loops: tuple[Loop, ...],
) -> dict[str, Played]:
    """The same, with the entries of all layers."""
    trial = _trial(shapes, chain, length)
    entries = {
        path: entries_of(trial, path, played.part, played.epsilon, loops)
        for path, played in parts.items()
    }
    return {path: played._replace(entries=entries[path]) for path, played in parts.items()}


def _loops(chain: Chain, length: int) -> tuple[Loop, ...]:
    """The scans of which each step has parameters of its own, outermost first."""
    loops = {loop for step in chain.steps[:length] if step.operand for loop in step.operand.loops}
    if chain.root.weight is not None:
        loops |= set(chain.root.weight.loops)
    return tuple(sorted(loops, key=lambda loop: len(loop.location)))


def _has_root(origin: Origin | None) -> bool:
    """Whether a square root or a power is part of how a value is computed."""
    waiting, seen = [origin] if origin is not None else [], set[int]()
    while waiting:
        node = waiting.pop()
        if node.eqn is not None and node.eqn.primitive.name in ROOTS:
            return True
        fresh = [operand for operand in node.operands if id(operand) not in seen]
        seen.update(map(id, fresh))
        waiting += fresh
    return False
