"""Equations that hold programs: what they are, and how to issue them anew around rewritten ones.

Rebuilt from public functions, with pytrees for operands, so that what a rewritten program needs and
what it collects travels along: values in, states in and out, records out.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex_core

from quantjax._compat import (
    as_closed,
    is_jit,
    jit_call,
    jit_shardings,
    programs_in,
    remat_call,
    scan_operands,
)


class ContainerKind(enum.Enum):
    """What an equation does with the programs that it holds."""

    JIT = "jit"
    REMAT = "remat"
    SCAN = "scan"
    COND = "cond"
    PLATFORM = "platform_dependent"
    WHILE = "while"
    INLINED = "custom_jvp"
    OPAQUE = "opaque"


PRIMITIVES = {
    "remat2": ContainerKind.REMAT,
    "checkpoint": ContainerKind.REMAT,
    "scan": ContainerKind.SCAN,
    "cond": ContainerKind.COND,
    "while": ContainerKind.WHILE,
    "custom_jvp_call": ContainerKind.INLINED,
    "custom_vmap_call": ContainerKind.INLINED,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Container:
    """An equation and its programs; a ``while`` has its condition first, its body second.

    Of programs for several platforms it has the one of the backend in use.
    """

    kind: ContainerKind
    eqn: jex_core.JaxprEqn
    programs: tuple[jex_core.ClosedJaxpr, ...]

    @property
    def length(self) -> int:
        """How often a scan runs its body; in an exported program it may be symbolic."""
        length: int = self.eqn.params["length"]
        return length

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Operands of a scan: constants, carry, and what it iterates over.

        Those of a ``while``: constants of its condition, constants of its body, and its carry.
        """
        if self.kind is ContainerKind.SCAN:
            first, second = scan_operands(self.eqn)
        else:
            first, second = self.eqn.params["cond_nconsts"], self.eqn.params["body_nconsts"]
        operands = list(operands)
        return operands[:first], operands[first : first + second], operands[first + second :]


def container_of(eqn: jex_core.JaxprEqn) -> Container | None:
    """The container that the equation is; None where it holds no program."""
    params = eqn.params
    kind = PRIMITIVES.get(eqn.primitive.name, ContainerKind.OPAQUE)
    if is_jit(eqn):
        return Container(ContainerKind.JIT, eqn, (jit_call(eqn)[0],))
    if kind is ContainerKind.REMAT or kind is ContainerKind.SCAN:
        return Container(kind, eqn, (as_closed(params["jaxpr"]),))
    if kind is ContainerKind.COND:
        branches = tuple(map(as_closed, params["branches"]))
        platforms = params.get("branches_platforms")
        if platforms is None:
            return Container(kind, eqn, branches)
        return Container(ContainerKind.PLATFORM, eqn, (branches[_branch_here(platforms)],))
    if kind is ContainerKind.WHILE:
        pair = as_closed(params["cond_jaxpr"]), as_closed(params["body_jaxpr"])
        return Container(kind, eqn, pair)
    if kind is ContainerKind.INLINED:
        is_jvp = "call_jaxpr" in params
        return Container(kind, eqn, (as_closed(params["call_jaxpr" if is_jvp else "call"]),))
    programs = tuple(map(as_closed, programs_in(params)))
    return Container(ContainerKind.OPAQUE, eqn, programs) if programs else None


def _branch_here(platforms: Sequence[Sequence[str] | None]) -> int:
    """Which of the branches by platform is that of the backend in use; None is the default's."""
    numbers = {
        platform: functools.partial(np.int32, number)
        for number, names in enumerate(platforms)
        for platform in names or ()
    }
    default = functools.partial(np.int32, len(platforms) - 1) if None in platforms else None
    with jax.ensure_compile_time_eval():
        return int(lax.platform_dependent(default=default, **numbers))


class Carried(NamedTuple):
    """What travels into containers, by site name.

    Attributes:
      values: read by the handler; one slice a step where the site is stacked.
      states: handed from one visit of the site to the next.
      shared: the same for every site and step.
    """

    values: Mapping[str, Any]
    states: Mapping[str, Any]
    shared: Any = None

    def only(self, names: frozenset[str]) -> Carried:
        """Those of some sites."""
        values = {name: value for name, value in self.values.items() if name in names}
        states = {name: state for name, state in self.states.items() if name in names}
        return Carried(values, states, self.shared)

    def split(self, names: frozenset[str]) -> tuple[Carried, Carried]:
        """Those of some sites, and those of all others."""
        known = frozenset(self.values) | frozenset(self.states)
        return self.only(names), self.only(known - names)


class Outputs(NamedTuple):
    """What a rewritten program returns: its own outputs, and states and records by site."""

    arrays: list[Any]
    states: Mapping[str, Any]
    records: Mapping[str, Any]


Run = Callable[[int, Carried, Sequence[Any]], Outputs]
"""``(number, carried, arguments)``: a program of the container, rewritten."""


def rebuild(
    container: Container,
    run: Run,
    carried: Carried,
    operands: Sequence[Any],
    stacked: frozenset[str],
    *,
    collect: bool,
) -> Outputs:
    """Issue the equation anew around its rewritten programs.

    Args:
      stacked: sites that have a value and a state for each step of this scan.
      collect: whether there are records. A scan stacks them; a branch that is not taken leaves
        NaN; a ``while`` keeps those of its last iteration.
    """
    match container.kind:
        case ContainerKind.JIT:
            return _jit(container, run, carried, operands)
        case ContainerKind.REMAT:
            body = lambda carried, arrays: run(0, carried, arrays)  # noqa: E731
            return Outputs(*remat_call(container.eqn, body, carried, list(operands)))
        case ContainerKind.SCAN:
            return _scan(container, run, carried, operands, stacked)
        case ContainerKind.COND:
            return _cond(container, run, carried, operands, collect=collect)
        case ContainerKind.WHILE:
            return _while(container, run, carried, operands, collect=collect)
        case ContainerKind.INLINED:
            return run(0, carried, operands)
        case ContainerKind.PLATFORM:
            return run(0, carried, operands[1:])
    raise AssertionError(container.kind)


def _jit(container: Container, run: Run, carried: Carried, operands: Sequence[Any]) -> Outputs:
    eqn = container.eqn
    _, options = jit_call(eqn)
    in_shardings, out_shardings = jit_shardings(eqn)

    def inner(carried: Carried, arrays: Sequence[Any]) -> Outputs:
        outputs = run(0, carried, _constrain(arrays, in_shardings))
        return outputs._replace(arrays=_constrain(outputs.arrays, out_shardings))

    inner.__name__ = inner.__qualname__ = str(eqn.params["name"])
    return Outputs(*jax.jit(inner, **options)(carried, list(operands)))


def _constrain(arrays: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    pairs = zip(arrays, shardings, strict=True)
    return [a if s is None else lax.with_sharding_constraint(a, s) for a, s in pairs]


def _scan(
    container: Container,
    run: Run,
    carried: Carried,
    operands: Sequence[Any],
    stacked: frozenset[str],
) -> Outputs:
    consts, init, xs = container.split(operands)
    steps, fixed = carried.split(stacked)

    def body(carry: Any, slices: Any) -> tuple[Any, Any]:
        (arrays, states), (xs, values, stacked_states) = carry, slices
        inside = Carried({**fixed.values, **values}, {**states, **stacked_states}, carried.shared)
        outputs = run(0, inside, [*consts, *arrays, *xs])
        after = {**inside.states, **outputs.states}
        split = len(arrays)
        return (
            (outputs.arrays[:split], {name: after[name] for name in states}),
            (
                outputs.arrays[split:],
                {name: after[name] for name in stacked_states},
                outputs.records,
            ),
        )

    options = {k: container.eqn.params[k] for k in ("length", "reverse", "unroll")}
    if not isinstance(container.length, int):  # symbolic, and that of what is iterated over
        del options["length"]
    if container.eqn.params.get("_split_transpose"):
        options["_split_transpose"] = True
    (last, states), (ys, stacked_states, records) = lax.scan(
        body, (init, dict(fixed.states)), (xs, dict(steps.values), dict(steps.states)), **options
    )
    return Outputs([*last, *ys], {**states, **stacked_states}, records)


def _cond(
    container: Container, run: Run, carried: Carried, operands: Sequence[Any], *, collect: bool
) -> Outputs:
    index, *arguments = operands

    def branch(number: int) -> Callable[[Carried, Sequence[Any]], Outputs]:
        def inner(carried: Carried, arrays: Sequence[Any]) -> Outputs:
            outputs = run(number, carried, arrays)
            states = {**carried.states, **outputs.states}
            records = {**_unset(absent), **outputs.records}
            return Outputs(outputs.arrays, states, records)

        return inner

    absent: dict[str, Any] = {}
    branches = [branch(number) for number in range(len(container.programs))]
    if collect:
        shapes = [jax.eval_shape(inner, carried, arguments).records for inner in branches]
        for records in shapes:
            absent.update(records)
    return Outputs(*lax.switch(index, branches, carried, arguments))


def _while(
    container: Container, run: Run, carried: Carried, operands: Sequence[Any], *, collect: bool
) -> Outputs:
    cond_consts, body_consts, init = container.split(operands)

    def goes_on(arrays: Sequence[Any]) -> jax.Array:
        return run(0, Carried({}, {}), [*cond_consts, *arrays]).arrays[0]

    def condition(carry: Any) -> jax.Array:
        return jnp.any(goes_on(carry[0])) if by_row else goes_on(carry[0])

    def body(carry: Any) -> Any:
        arrays, states, _ = carry
        outputs = run(1, carried._replace(states=states), [*body_consts, *arrays])
        after = outputs.arrays
        if by_row:
            rows = goes_on(arrays)
            after = [_where_rows(rows, new, old) for new, old in zip(after, arrays, strict=True)]
        return after, {**states, **outputs.states}, dict(outputs.records)

    # Under jax.vmap each row may end at its own time: the condition then has an entry a row, and a
    # row that has ended stays as it is.
    by_row = container.programs[0].out_avals[0].ndim > 0

    start = init, dict(carried.states)
    records = jax.eval_shape(body, (*start, {}))[2] if collect else {}
    return Outputs(*lax.while_loop(condition, body, (*start, _unset(records))))


def _where_rows(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(rows.shape + (1,) * (old.ndim - rows.ndim)), new, old)


def _unset(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Records of what never ran: NaN, and 0 where there is none."""

    def fill(shape: Any) -> jax.Array:
        inexact = jnp.issubdtype(shape.dtype, jnp.inexact)
        return jnp.full(shape.shape, jnp.nan if inexact else 0, shape.dtype)

    return jax.tree.map(fill, dict(shapes))
