"""Find the sites of a program, and give them names."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex_core

from quantjax._compat import name_stack
from quantjax.interpreter import provenance
from quantjax.interpreter.containers import Container, ContainerKind, container_of
from quantjax.interpreter.describe import Around, Result, bias_of, describe, site_of
from quantjax.interpreter.moves import Moves, is_move
from quantjax.interpreter.product import product_of
from quantjax.interpreter.provenance import Loop, Origin, OriginKind
from quantjax.interpreter.sites import Added, Location, Site


class Discovery(NamedTuple):
    """The sites of a program.

    Attributes:
      sites: by location, in program order.
      weights: how each weight is recomputed from the parameters, by site name.
      scans: locations of the scans around a site, outermost first, by site name.
      stacked: those of which each step has QParams of its own.
      repeated: names of weighted sites inside a loop whose steps share the weight.
      others: where a parameter goes besides the weights of sites, by path: primitives.
      biases: how each bias is recomputed, by the name of its site.
      additions: the site whose bias an equation adds, by location.
    """

    sites: Mapping[Location, Site]
    weights: Mapping[str, Origin]
    scans: Mapping[str, tuple[Location, ...]]
    stacked: Mapping[str, tuple[Location, ...]]
    repeated: frozenset[str]
    others: Mapping[str, str]
    biases: Mapping[str, Origin]
    additions: Mapping[Location, Added]


class _Bias(NamedTuple):
    location: Location
    side: int
    origin: Origin
    moves: Moves


@dataclasses.dataclass(frozen=True)
class _Found:
    site: Site
    location: Location
    weight: Origin | None
    loops: tuple[Loop, ...]
    bias: _Bias | None = None


class _Findings(NamedTuple):
    """What a walk has come upon."""

    sites: list[_Found]
    others: dict[str, str]


def discover(jaxpr: jex_core.ClosedJaxpr, param_paths: Sequence[str]) -> Discovery:
    """All sites of a program whose first inputs are the parameters at ``param_paths``."""
    inputs = [provenance.leaf(path) for path in param_paths]
    inputs += [provenance.DATA] * (len(jaxpr.jaxpr.invars) - len(inputs))
    found = _Findings([], {})
    outputs = _walk(jaxpr, inputs, (), Around(), found)
    _note_others(found, "output", outputs)
    layered = {
        loop for item in found.sites if item.weight is not None for loop in item.weight.loops
    }
    seen: collections.Counter[str] = collections.Counter()
    sites: dict[Location, Site] = {}
    weights: dict[str, Origin] = {}
    scans: dict[str, tuple[Location, ...]] = {}
    stacked: dict[str, tuple[Location, ...]] = {}
    repeated: set[str] = set()
    biases: dict[str, Origin] = {}
    additions: dict[Location, Added] = {}
    for item in found.sites:
        positional = item.site.weight is None
        while True:
            count = seen[item.site.name]
            seen[item.site.name] += 1
            name = f"{item.site.name}#{count}" if count or positional else item.site.name
            if name not in scans:  # a parameter may be called w#1
                break
        # What has no weight follows the weights of its scans.
        own = layered if item.weight is None else set(item.weight.loops)
        loops = tuple(loop for loop in item.loops if loop in own)
        steps = tuple(loop.length or 0 for loop in loops)
        sites[item.location] = dataclasses.replace(item.site, name=name, steps=steps)
        if item.bias is not None:
            biases[name] = item.bias.origin
            bias = item.bias
            additions[bias.location] = Added(sites[item.location], bias.side, bias.moves)
        scans[name] = tuple(loop.location for loop in item.loops if loop.length is not None)
        stacked[name] = tuple(loop.location for loop in loops)
        if item.weight is not None:
            weights[name] = item.weight
            if item.weight.derivable and len(loops) < len(item.loops):
                repeated.add(name)
    return Discovery(
        sites, weights, scans, stacked, frozenset(repeated), found.others, biases, additions
    )


def _walk(
    closed: jex_core.ClosedJaxpr,
    inputs: Sequence[Origin],
    location: Location,
    around: Around,
    found: _Findings,
) -> list[Origin]:
    """Follow origins through one program; append the sites found; return the outputs' origins."""
    jaxpr = closed.jaxpr
    origins: dict[Any, Origin] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
        origins[var] = provenance.constant(value)

    def read(atom: Any) -> Origin:
        if isinstance(atom, jex_core.Literal):
            return provenance.constant(atom.val)
        return origins[atom]

    uses = collections.Counter(a for a in _atoms(jaxpr) if not isinstance(a, jex_core.Literal))
    results: dict[Any, Result] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        here = (*location, index)
        operands = [read(atom) for atom in eqn.invars]
        met = [
            None if isinstance(atom, jex_core.Literal) or uses[atom] > 1 else results.get(atom)
            for atom in eqn.invars
        ]
        if eqn.primitive.name == "add":
            _note_bias(found, eqn, operands, here, met)
        elif len(met) == 1 and met[0] is not None and is_move(eqn):
            results[eqn.outvars[0]] = met[0]._replace(moves=(*met[0].moves, eqn))
        scope = "/".join(part for part in (around.scope, name_stack(eqn)) if part)
        product = site_of(eqn, operands)
        container = None if product is not None else container_of(eqn)
        if product is not None:
            site, weight = describe(product, operands, scope, around)
            results[eqn.outvars[0]] = Result(len(found.sites), product.out_batch)
            found.sites.append(_Found(site, here, weight, around.loops))
        if container is None:
            outputs = provenance.results(eqn, operands)
            is_site = product is not None and found.sites[-1].weight is not None
            passed = eqn.primitive.name in provenance.PASSING
            if not is_site and not (passed and any(o.kind is OriginKind.LEAF for o in outputs)):
                _note_others(found, eqn.primitive.name, operands)
        else:
            outputs = _enter(container, operands, here, scope, around, found)
        outputs = provenance.in_scope(scope, eqn.primitive.name, operands, outputs)
        origins.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _atoms(jaxpr: jex_core.Jaxpr) -> list[Any]:
    """All that equations read, and what is handed out."""
    return [*(atom for eqn in jaxpr.eqns for atom in eqn.invars), *jaxpr.outvars]


def _note_bias(
    found: _Findings,
    eqn: jex_core.JaxprEqn,
    operands: Sequence[Origin],
    here: Location,
    results: Sequence[Result | None],
) -> None:
    """Give a site the bias that is added to its result, if the equation does that.

    Args:
      results: of operands that are the result of a site and nothing else's.
    """
    for side, result in enumerate(results):
        if result is None:
            continue
        item, added = found.sites[result.place], operands[1 - side]
        aval: Any = eqn.invars[1 - side].aval
        bias = bias_of(item.site, item.weight, added, aval.shape, result)
        if bias is not None:
            site = dataclasses.replace(item.site, bias=bias)
            noted = _Bias(here, 1 - side, added, result.moves)
            found.sites[result.place] = dataclasses.replace(item, site=site, bias=noted)


def _holds_products(program: jex_core.ClosedJaxpr, *, with_lookups: bool = False) -> bool:
    for eqn in program.jaxpr.eqns:
        product = product_of(eqn)
        if product is not None and (with_lookups or not product.op.is_lookup):
            return True
        container = container_of(eqn)
        inner = () if container is None else container.programs
        if any(_holds_products(program, with_lookups=with_lookups) for program in inner):
            return True
    return False


def _note_others(found: _Findings, primitive: str, operands: Sequence[Origin]) -> None:
    for operand in operands:
        if operand.kind is OriginKind.LEAF:
            found.others.setdefault(operand.paths[0], primitive)


def _note_lost(
    found: _Findings, name: str, before: Sequence[Origin], after: Sequence[Origin]
) -> None:
    """Note parameters that go into, or come out of, a loop or a branch as something else."""
    pairs = zip(before, after, strict=True)
    _note_others(found, name, [one for one, other in pairs if other.kind is not OriginKind.LEAF])


_OWN_RULES = {
    "custom_jvp_call": ("custom_jvp", "derivative"),
    "custom_vmap_call": ("custom_vmap", "batching"),
}


def _enter(
    container: Container,
    operands: list[Origin],
    here: Location,
    scope: str,
    around: Around,
    found: _Findings,
) -> list[Origin]:
    """Walk the programs of a container; the origins of its outputs."""
    kind, name = container.kind, container.eqn.primitive.name
    programs = container.programs
    if kind is ContainerKind.JIT:
        return _walk(programs[0], operands, (*here, 0), around.within(scope, ""), found)
    if kind is ContainerKind.REMAT:
        return _walk(programs[0], operands, (*here, 0), around.within(scope, "remat"), found)
    if kind is ContainerKind.INLINED and not _holds_products(programs[0]):
        _note_others(found, name, operands)
        return provenance.results(container.eqn, operands)  # its own rule is kept
    if kind is ContainerKind.INLINED:
        own, rule = _OWN_RULES[name]
        note = f"inside {own}: inlined, so that its own {rule} rule is not used"
        inside = around.within(scope, own, note=note)
        return _walk(programs[0], operands, (*here, 0), inside, found)
    if kind is ContainerKind.PLATFORM and _holds_products(programs[0], with_lookups=True):
        note = "inside platform_dependent: the branch of the backend in use stands for all"
        inside = around.within(scope, "", note=note)
        return _walk(programs[0], operands[1:], (*here, 0), inside, found)
    outputs = provenance.results(container.eqn, operands)
    if kind is ContainerKind.SCAN:
        return _enter_scan(container, operands, outputs, here, scope, around, found)
    if kind is ContainerKind.WHILE:
        return _enter_while(container, operands, outputs, here, scope, around, found)
    if kind is ContainerKind.COND:
        inside = around.within(scope, "cond")
        each = [
            _walk(program, operands[1:], (*here, number), inside, found)
            for number, program in enumerate(programs)
        ]
        for index, (first, *others) in enumerate(zip(*each, strict=True)):
            if first.derivable and all(first.signature == other.signature for other in others):
                outputs[index] = first
            _note_lost(found, name, [first, *others], [outputs[index]] * len(each))
        return outputs
    _note_others(found, name, operands)
    inside = around.within(scope, name, opaque=f"inside {name}, which is not rewritten")
    for number, program in enumerate(programs):
        unknown = [provenance.DATA] * len(program.jaxpr.invars)
        known = operands if len(operands) == len(unknown) else unknown
        _walk(program, known, (*here, number), inside, found)
    return outputs


def _enter_scan(
    container: Container,
    operands: list[Origin],
    outputs: list[Origin],
    here: Location,
    scope: str,
    around: Around,
    found: _Findings,
) -> list[Origin]:
    consts, init, xs = container.split(operands)
    loop = Loop(here, container.length)
    inside = around.within(scope, f"scan×{loop.length}").looped(loop)
    slices = [provenance.step(source, loop) for source in xs]
    body = container.programs[0]

    def run(carry: list[Origin]) -> list[Origin]:
        return _walk(body, [*consts, *carry, *slices], (*here, 0), inside, found)

    carry, results = _settle(run, init, outputs, here, found)
    for index, result in enumerate(results[len(carry) :], len(carry)):
        if result.is_step and result.loops[-1] == loop:  # handed out as it came in
            outputs[index] = result.operands[0]
    _note_lost(found, "scan", [*init, *results], [*carry, *outputs])
    return outputs


def _enter_while(
    container: Container,
    operands: list[Origin],
    outputs: list[Origin],
    here: Location,
    scope: str,
    around: Around,
    found: _Findings,
) -> list[Origin]:
    cond_consts, body_consts, init = container.split(operands)
    condition, body = container.programs
    by_row = condition.out_avals[0].ndim > 0  # under jax.vmap
    note = "rows that have ended are observed until the last one does" if by_row else ""
    inside = around.within(scope, "while", note=note).looped(Loop(here, None))

    def run(carry: list[Origin]) -> list[Origin]:
        return _walk(body, [*body_consts, *carry], (*here, 1), inside, found)

    mark = len(found.sites)
    carry, results = _settle(run, init, outputs, here, found)
    _note_lost(found, "while", [*init, *results], [*carry, *outputs])
    in_body, found.sites[mark:] = found.sites[mark:], []
    refused = dataclasses.replace(
        inside, opaque=around.opaque or "in the condition of a while loop, which is not rewritten"
    )
    _walk(condition, [*cond_consts, *carry], (*here, 0), refused, found)
    found.sites.extend(in_body)
    return outputs


def _settle(
    run: Callable[[list[Origin]], list[Origin]],
    init: list[Origin],
    outputs: list[Origin],
    here: Location,
    found: _Findings,
) -> tuple[list[Origin], list[Origin]]:
    """Walk a loop's body until the origins of its carry hold for every iteration.

    Outputs of the loop that are a carry which does not change get its origin.

    Returns:
      The carry's origins, those of ``init`` where it does not change, and the body's results.
    """
    carry, mark, others = list(init), len(found.sites), dict(found.others)
    while True:
        results = run(carry)
        settled = True
        for index, (before, after) in enumerate(zip(carry, results, strict=False)):
            if before.signature == after.signature or before is provenance.COTANGENT:
                continue
            if before.kind is OriginKind.DATA and after is not provenance.COTANGENT:
                continue
            known = before.signature == f"carry{here}.{index}"
            no_more = after.kind <= before.kind and {*after.paths} <= {*before.paths}
            if known and no_more and after.made >= before.made:
                continue
            carry[index] = provenance.changing(before, after, f"carry{here}.{index}")
            settled = False
        if settled:
            unchanged = [before is after for before, after in zip(init, carry, strict=True)]
            outputs[: len(carry)] = [
                origin if same else output
                for origin, output, same in zip(carry, outputs, unchanged, strict=False)
            ]
            return carry, results
        del found.sites[mark:]
        found.others.clear()
        found.others.update(others)
