"""Follow what products return through a program, as long as it is affine channel by channel."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import numpy as jnp
from jax.extend import core as jex_core

from quantjax.folding.chains import Chain, Root, Step, StepOp
from quantjax.folding.channels import channels_of_result
from quantjax.folding.values import (
    MOVES,
    Flow,
    Value,
    dissolved,
    joined,
    origin_of,
    plain,
    shape_of,
)
from quantjax.interpreter import Op, Origin, OriginKind, Program, provenance
from quantjax.interpreter.containers import Container, ContainerKind, container_of
from quantjax.interpreter.product import product_of
from quantjax.interpreter.provenance import Loop
from quantjax.interpreter.sites import Location

STEPS: Mapping[str, tuple[StepOp, StepOp | None]] = {
    "add": (StepOp.ADD, StepOp.ADD),
    "sub": (StepOp.SUBTRACT, StepOp.SUBTRACT_FROM),
    "mul": (StepOp.MULTIPLY, StepOp.MULTIPLY),
    "div": (StepOp.DIVIDE, None),
}
"""By primitive: what a chain's value is to it on the left, and on the right."""
RETURNED: Location = (-1,)
"""Where a parameter flows that the function returns as it is."""
INLINED = (ContainerKind.JIT, ContainerKind.REMAT, ContainerKind.INLINED)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a walk has come upon.

    Attributes:
      chains: all, each longer one after the one that it extends.
      batch: products that are normalized by statistics of the batch.
      precedes: by root: the product that it flows into.
      sinks: where a parameter meets the data: locations, by path.
    """

    chains: list[Chain]
    batch: dict[Root, Location]
    precedes: dict[Root, str]
    sinks: dict[str, set[Location]]


def follow(program: Program, param_paths: Sequence[str]) -> Found:
    """Walk a program whose first inputs are the parameters at ``param_paths``."""
    found = Found([], {}, {}, collections.defaultdict(set))
    jaxpr = program.jaxpr
    inputs: list[Value] = [provenance.leaf(path) for path in param_paths]
    inputs += [Flow()] * (len(jaxpr.jaxpr.invars) - len(inputs))
    outputs = _Walk(program, found).run(jaxpr, inputs, ())
    for output in outputs:
        if isinstance(output, Origin):
            _sink(found, [output], RETURNED if output.kind is OriginKind.LEAF else ())
    return found


class _Walk:
    """One program's sites, and what is found."""

    def __init__(self, program: Program, found: Found) -> None:
        self._sites, self._weights, self._found = program.sites, program.weights, found

    def run(
        self, closed: jex_core.ClosedJaxpr, inputs: Sequence[Value], location: Location
    ) -> list[Value]:
        jaxpr = closed.jaxpr
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, constant in zip(jaxpr.constvars, closed.consts, strict=True):
            env[var] = provenance.constant(constant)
        uses = _uses(jaxpr)

        def read(atom: Any) -> Value:
            if isinstance(atom, jex_core.Literal):
                return provenance.constant(atom.val)
            value = env[atom]
            if isinstance(value, Flow) and uses[atom] > 1 and not value.shared:
                return dataclasses.replace(value, shared=True)
            return value

        for index, eqn in enumerate(jaxpr.eqns):
            values = [read(atom) for atom in eqn.invars]
            outputs = self._outputs(eqn, values, (*location, index))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _outputs(
        self, eqn: jex_core.JaxprEqn, values: Sequence[Value], here: Location
    ) -> list[Value]:
        site = self._sites.get(here)
        container = None if site is not None else container_of(eqn)
        if container is not None:
            return self._enter(container, list(values), here)
        if eqn.primitive.name == "optimization_barrier":
            return list(values)
        origins = [origin_of(value) for value in values]
        results = provenance.results(eqn, origins)
        if results and results[0].kind is not OriginKind.DATA:
            return list(results)
        _sink(self._found, origins, here)
        if site is not None:
            return self._product(eqn, values, here)
        step = self._step(eqn, values, here)
        if step is not None:
            return [step]
        return [dissolved(eqn, values)] * len(eqn.outvars)

    def _product(
        self, eqn: jex_core.JaxprEqn, values: Sequence[Value], here: Location
    ) -> list[Value]:
        """A new chain, if a parameter is its kernel."""
        site, product = self._sites[here], product_of(eqn)
        assert product is not None
        for value in values:
            for root in value.all_tags if isinstance(value, Flow) else ():
                self._found.precedes.setdefault(root, site.name)
        weight = site.weight
        grouped = product.op is Op.CONV and product.params["batch_group_count"] > 1
        left = weight is not None and weight.side == 0 and product.op is Op.CONV
        if weight is None or product.op not in (Op.DOT, Op.CONV) or (grouped and left):
            return [Flow(behind=site.name, made_by=product.op.value)]
        numbers = channels_of_result(product, weight.side)
        channels = int(np.prod([weight.shape[axis] for axis in weight.free]))
        origin = self._weights[site.name]
        root = Root(here, channels, site, product, weight.side, origin)
        chain = Chain(root, numbers)
        self._found.chains.append(chain)
        made_by = product.op.value
        return [Flow(chain, (root, numbers), behind=site.name, made_by=made_by)]

    def _step(self, eqn: jex_core.JaxprEqn, values: Sequence[Value], here: Location) -> Flow | None:
        """The value that goes on with a chain; None where the equation ends it."""
        name = eqn.primitive.name
        flows = [value for value in values if isinstance(value, Flow)]
        if len(flows) == 2 and name in STEPS:
            self._note_batch(flows, here)
        if len(flows) != 1 or not jnp.issubdtype(_dtype(eqn.outvars[0]), jnp.floating):
            return None
        (flow,) = flows
        if name in MOVES and values[0] is flow and len(values) == 1:
            chain = None if flow.chain is None else flow.chain.moved(eqn)
            if chain is None:
                return None
            return dataclasses.replace(dissolved(eqn, values), chain=chain, shared=flow.shared)
        if name == "neg":
            return self._extended(eqn, values, Step(StepOp.NEGATE, None, _none, False, here), flow)
        if name not in STEPS:
            return None
        side = values.index(flow)
        op, operand = STEPS[name][side], values[1 - side]
        grown = shape_of(eqn.invars[side]) != shape_of(eqn.outvars[0])
        if op is None or grown or not isinstance(operand, Origin):
            return None
        return self._extended(eqn, values, Step(op, operand, _none, False, here), flow)

    def _extended(
        self, eqn: jex_core.JaxprEqn, values: Sequence[Value], step: Step, flow: Flow
    ) -> Flow | None:
        chain, shared = flow.chain, flow.shared
        if chain is None:
            chain, shared = _unattached(eqn, step, flow), False
        if chain is None:
            return None
        step = dataclasses.replace(step, numbers=chain.numbers, shared=shared)
        chain = chain.extended(step)
        self._found.chains.append(chain)
        return dataclasses.replace(dissolved(eqn, values), chain=chain)

    def _note_batch(self, flows: Sequence[Flow], here: Location) -> None:
        for flow, other in (flows, flows[::-1]):
            root = other.statistic
            if root is not None and flow.like is not None and flow.like[0] is root:
                self._found.batch.setdefault(root, here)

    def _enter(self, container: Container, values: list[Value], here: Location) -> list[Value]:
        eqn, programs = container.eqn, container.programs
        if container.kind in INLINED:
            return self.run(programs[0], values, (*here, 0))
        inner = [plain(value) for value in values]
        if container.kind is ContainerKind.COND:
            _sink(self._found, [origin_of(inner[0])], here)
            each = [self.run(p, inner[1:], (*here, n)) for n, p in enumerate(programs)]
            return [self._joined(eqn, options, here) for options in zip(*each, strict=True)]
        if container.kind is ContainerKind.SCAN:
            return self._scan(container, inner, here)
        if container.kind is ContainerKind.WHILE:
            conditions, consts, init = container.split(inner)
            body = programs[1]
            carry, results = _settled(
                lambda carry: self.run(body, [*consts, *carry], (*here, 1)), init, self._found
            )
            goes_on = self.run(programs[0], [*conditions, *carry], (*here, 0))
            _sink(self._found, [origin_of(value) for value in goes_on], here)
            return [self._joined(eqn, pair, here) for pair in zip(carry, results, strict=True)]
        _sink(self._found, [origin_of(value) for value in values], here)
        made = provenance.results(eqn, [origin_of(value) for value in values])
        known = bool(made) and made[0].kind is not OriginKind.DATA
        return list(made) if known else [dissolved(eqn, values)] * len(eqn.outvars)

    def _scan(self, container: Container, values: list[Value], here: Location) -> list[Value]:
        consts, init, xs = container.split(values)
        loop = Loop(here, container.length)
        slices = [provenance.step(x, loop) if isinstance(x, Origin) else x for x in xs]
        body = container.programs[0]
        carry, results = _settled(
            lambda carry: self.run(body, [*consts, *carry, *slices], (*here, 0)), init, self._found
        )
        eqn, count = container.eqn, len(carry)
        pairs = zip(carry, results[:count], strict=True)
        outputs = [self._joined(eqn, pair, here) for pair in pairs]
        for result in results[count:]:
            handed = isinstance(result, Origin) and result.is_step and result.loops[-1] == loop
            if handed and isinstance(result, Origin):
                outputs.append(result.operands[0])
            else:
                outputs.append(self._joined(eqn, [result, Flow()], here))
        return outputs

    def _joined(self, eqn: jex_core.JaxprEqn, options: Sequence[Value], here: Location) -> Value:
        """What a branch or a loop returns: parameters in it are used there, or handed on alike."""
        value = joined(eqn, options)
        if isinstance(value, Flow):
            _sink(self._found, [origin_of(option) for option in options], here)
        return value


_none = np.zeros((), np.int64)


def _settled(
    run: Callable[[list[Value]], list[Value]], init: list[Value], found: Found
) -> tuple[list[Value], list[Value]]:
    """Walk a loop's body until what its carry is holds for every iteration."""
    carry, mark = list(init), len(found.chains)
    while True:
        results = run(carry)
        changed = False
        for index, before in enumerate(carry):
            after = results[index]
            if isinstance(before, Flow):
                continue
            if isinstance(after, Flow) or after.signature != before.signature:
                _sink(found, [before], ())
                carry[index], changed = Flow(made_by="a loop"), True
        if not changed:
            return carry, results
        del found.chains[mark:]


def _uses(jaxpr: jex_core.Jaxpr) -> collections.Counter[Any]:
    """How often a variable is read, by what is needed or by whoever takes the outputs."""
    uses = collections.Counter(a for a in jaxpr.outvars if not isinstance(a, jex_core.Literal))
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(uses[var] for var in eqn.outvars):
            uses.update(a for a in eqn.invars if not isinstance(a, jex_core.Literal))
    return uses


def _unattached(eqn: jex_core.JaxprEqn, step: Step, flow: Flow) -> Chain | None:
    """A chain of a value that no product returned, along the axes that the operand has."""
    operand = step.operand
    if operand is None or operand.kind is OriginKind.CONSTANT:
        return None
    full = shape_of(eqn.outvars[0])
    own = next((shape for shape in map(shape_of, eqn.invars) if shape != full), full)
    own = own if len(own) == len(full) else (1,) * len(full)
    if operand.eqn is not None and operand.eqn.primitive.name == "broadcast_in_dim":
        kept = operand.eqn.params["broadcast_dimensions"]
        own = tuple(n if axis in kept else 1 for axis, n in enumerate(own))
    channels = int(np.prod(own))
    numbers = np.broadcast_to(np.arange(channels).reshape(own), full)
    root = Root(step.location, channels, behind=flow.behind, made_by=flow.made_by)
    return Chain(root, numbers)


def _dtype(atom: Any) -> Any:
    return getattr(atom.aval, "dtype", None)


def _sink(found: Found, origins: Sequence[Origin], here: Location) -> None:
    for origin in origins:
        if origin.kind in (OriginKind.LEAF, OriginKind.FUNCTION):
            for path in origin.paths:
                found.sinks[path].add(here)
