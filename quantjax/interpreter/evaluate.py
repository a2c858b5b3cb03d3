"""Evaluate a traced program with some of its products replaced."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
from jax import lax
from jax.extend import core as jex_core
from jax.sharding import get_abstract_mesh

from quantjax import errors
from quantjax._compat import bind_equation, bind_in_context, equation_context, is_jit
from quantjax.interpreter.containers import Carried, Outputs, container_of, rebuild
from quantjax.interpreter.moves import is_move, moved_back, moved_forth
from quantjax.interpreter.product import Product, product_of
from quantjax.interpreter.sites import Added, Location, Site
from quantjax.interpreter.sums import summed
from quantjax.interpreter.trace import Program
from quantjax.interpreter.turns import NO_TURNS, Turned, turned
from quantjax.meshes import automatic, first_as, has_automatic_axes, mesh_of, moved, placed


class Visit(NamedTuple):
    """One product or lookup as the handler meets it.

    Attributes:
      site: its row.
      product: the equation.
      lhs, rhs: its operands; of a lookup, the table and its first index.
      value: the site's entry of ``values``, that of this step where it is stacked; None without.
      state: the site's entry of ``states`` as its last visit left it; None without.
      shared: as given, the same at all sites.
    """

    site: Site
    product: Product
    lhs: jax.Array
    rhs: jax.Array
    value: Any
    state: Any
    shared: Any


class Outcome(NamedTuple):
    """What a handler returns.

    Attributes:
      out: the product, or its sum with a bias.
      state: the site's next one.
      record: or None; that of a bias takes the place of the product's.
      kept: what the handler of the site's bias is told.
    """

    out: jax.Array
    state: Any = None
    record: Any = None
    kept: Any = None


Handler = Callable[[Visit], Outcome]


Settle = Callable[[jax.Array], jax.Array]
"""What a result becomes for all that reads it: the same in every program that computes it."""


class Addition(NamedTuple):
    """The addition of a bias to a product that was handled, as the second handler meets it.

    Attributes:
      site: the row of the product.
      out: what the product's handler returned.
      bias: as it is added, broadcast; both in the layout of the product.
      add: the equation itself, of both.
      value, state, shared: as at a visit; the state is what the product's handler left.
      kept: what the product's handler handed on.
    """

    site: Site
    out: jax.Array
    bias: jax.Array
    add: Callable[[jax.Array, jax.Array], jax.Array]
    value: Any
    state: Any
    shared: Any
    kept: Any


AdditionHandler = Callable[[Addition], Outcome]


class Evaluated(NamedTuple):
    """What an evaluation returns.

    Attributes:
      result: that of the traced function.
      states: of all sites that came with one.
      records: of the sites that have one, with a leading axis for each scan around the site.
    """

    result: Any
    states: dict[str, Any]
    records: dict[str, Any]


NOTHING = Carried({}, {})


def evaluate(
    program: Program,
    handler: Handler,
    handled: frozenset[str],
    carried: Carried,
    *arguments: Any,
    collect: bool = False,
    additions: Additions | None = None,
    settle: Settle | None = None,
) -> Evaluated:
    """Run ``program`` with the products named in ``handled`` computed by ``handler``.

    All else is bound as it was traced; a container that holds no handled site is bound whole, but
    for jitted functions where results are settled, whose equations are bound one by one.

    Args:
      carried: values, states and what is shared. A stacked site (``Site.steps``) has a leading axis
        for each of its scans in value and state.
      arguments: those of the traced function, ``(params, *inputs)``.
      collect: whether the handler returns records.
      additions: how sums of handled products and their biases are computed; None leaves them.
      settle: applied to what equations compute that no handler does; see :data:`Settle`.
    """
    active = {loc: site for loc, site in program.sites.items() if site.name in handled}
    names = handled & additions.names if additions is not None else frozenset()
    after = {loc: added for loc, added in program.additions.items() if added.site.name in names}
    added_by = additions.handler if additions is not None else None
    walk = _Walk(
        (handler, added_by), active, after, program.stacked, collect=collect, settle=settle
    )
    carried = Carried(*placed(tuple(carried.only(handled)), mesh_of(arguments)))
    outputs = walk.run(program.jaxpr, (), carried, jax.tree.leaves(arguments))
    result = jax.tree.unflatten(program.out_tree, outputs.arrays)
    return Evaluated(result, {**carried.states, **outputs.states}, dict(outputs.records))


class Additions(NamedTuple):
    """A handler for the biases of some sites, by name."""

    handler: AdditionHandler
    names: frozenset[str]


class _Earlier(NamedTuple):
    """What the product's handler left: the site's state, and what it handed on."""

    state: Any
    kept: Any


class _Around(NamedTuple):
    """What the other equations of a program say of its products."""

    into_sums: frozenset[Any]
    turned: Turned

    def seen_by(self, product: Product, operands: Sequence[Any]) -> Product:
        """The product with that, and with the operands that are no factors."""
        return dataclasses.replace(
            product,
            is_summed=product.eqn.outvars[0] in self.into_sums,
            turns=self.turned.around(product.eqn) if product.factors == 2 else NO_TURNS,
            rest=tuple(operands[product.factors :]),
        )


class _Walk:
    """The sites of one evaluation, and the loop over equations."""

    def __init__(
        self,
        handlers: tuple[Handler, AdditionHandler | None],
        sites: Mapping[Location, Site],
        additions: Mapping[Location, Added],
        stacked: Mapping[str, tuple[Location, ...]],
        *,
        collect: bool,
        settle: Settle | None,
    ) -> None:
        self._handler, self._add_handler = handlers
        self._sites, self._collect = sites, collect
        self._settle = settle
        self._additions = additions
        inside: dict[Location, set[str]] = collections.defaultdict(set)
        for location, site in sites.items():
            for depth in range(1, len(location)):
                inside[location[:depth]].add(site.name)
        self._inside = {location: frozenset(names) for location, names in inside.items()}
        self._stacked = {
            location: frozenset(name for name in names if location in stacked[name])
            for location, names in self._inside.items()
        }

    def run(
        self,
        closed: jex_core.ClosedJaxpr,
        location: Location,
        carried: Carried,
        arguments: Sequence[Any],
    ) -> Outputs:
        """One program; the states returned are those of the sites in it."""
        jaxpr = closed.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))
        last_use = _last_uses(jaxpr)
        around: _Around | None = None
        states: dict[str, Any] = {}
        records: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*location, index)
            operands = [a.val if isinstance(a, jex_core.Literal) else env[a] for a in eqn.invars]
            site = self._sites.get(here)
            if site is not None:
                around = around or _Around(summed(jaxpr), turned(jaxpr))
                product = product_of(eqn)
                assert product is not None
                outcome = self._handle(site, around.seen_by(product, operands), operands, carried)
                outputs, kept[site.name] = [outcome.out], outcome.kept
                if site.name in carried.states:
                    states[site.name] = outcome.state
                if self._collect and outcome.record is not None:
                    records[site.name] = outcome.record
            elif here in self._additions:
                added = self._additions[here]
                name = added.site.name
                earlier = _Earlier(states.get(name), kept[name])
                outcome = self._add(eqn, added, operands, carried, earlier)
                outputs = [outcome.out if self._settle is None else self._settle(outcome.out)]
                if name in carried.states:
                    states[name] = outcome.state
                if self._collect and outcome.record is not None:
                    records[name] = outcome.record
            elif here in self._inside:
                inner = self._rebuild(eqn, here, carried, operands)
                outputs = list(inner.arrays)
                states.update(inner.states)
                records.update(inner.records)
            else:
                outputs = self._bind(eqn, here, operands)
            env.update(zip(eqn.outvars, outputs, strict=True))
            for var in last_use.get(index, ()):
                env.pop(var, None)
        result = [a.val if isinstance(a, jex_core.Literal) else env[a] for a in jaxpr.outvars]
        return Outputs(result, states, records)

    def _bind(self, eqn: jex_core.JaxprEqn, here: Location, operands: Sequence[Any]) -> list[Any]:
        """An equation that no handler computes, settled one by one inside of jitted functions."""
        if self._settle is None or is_move(eqn):
            return bind_equation(eqn, *operands)
        if is_jit(eqn):
            return list(self._rebuild(eqn, here, NOTHING, operands).arrays)
        pairs = zip(eqn.outvars, bind_equation(eqn, *operands), strict=True)
        is_array = jax.core.ShapedArray  # and no reference to one
        return [self._settle(out) if isinstance(v.aval, is_array) else out for v, out in pairs]

    def _handle(
        self, site: Site, product: Product, operands: Sequence[Any], carried: Carried
    ) -> Outcome:
        value, state = carried.values.get(site.name), carried.states.get(site.name)

        def handled(rest: Any, *met: Any) -> Outcome:
            return self._handler(Visit(site, dataclasses.replace(product, rest=rest), *met))

        met = (operands[0], operands[1], value, state, carried.shared)
        with equation_context(product.eqn):
            outcome = _computed(handled, product.out, product.rest, *met)
        _check_result(site, outcome.out, product.out)
        return outcome

    def _add(
        self,
        eqn: jex_core.JaxprEqn,
        added: Added,
        operands: Sequence[Any],
        carried: Carried,
        earlier: _Earlier,
    ) -> Outcome:
        """The sum of a site's product and its bias, whichever of them stands first."""
        handler = self._add_handler
        assert handler is not None
        name = added.site.name

        def add(out: jax.Array, bias: jax.Array) -> jax.Array:
            """In the product's layout, which is that of the equation but for moves."""
            pair = (out, bias) if added.side == 1 else (bias, out)
            return bind_in_context(eqn, *pair)[0]

        value = carried.values.get(name)
        met = (value, earlier.state, carried.shared, earlier.kept)

        def handled(out: jax.Array, bias: jax.Array, *met: Any) -> Outcome:
            if added.moves:
                bias = lax.broadcast_in_dim(bias, out.shape, range(out.ndim))
                out, bias = (moved_back(added.moves, side) for side in (out, bias))
            outcome = handler(Addition(added.site, out, bias, add, *met))
            return outcome._replace(out=moved_forth(added.moves, outcome.out))

        pair = operands[1 - added.side], operands[added.side]
        with equation_context(eqn):
            outcome = _computed(handled, eqn.outvars[0].aval, *pair, *met)
        _check_result(added.site, outcome.out, eqn.outvars[0].aval)
        return outcome

    def _rebuild(
        self, eqn: jex_core.JaxprEqn, location: Location, carried: Carried, operands: Sequence[Any]
    ) -> Outputs:
        container = container_of(eqn)
        assert container is not None, eqn.primitive.name

        def run(number: int, carried: Carried, arguments: Sequence[Any]) -> Outputs:
            return self.run(container.programs[number], (*location, number), carried, arguments)

        with equation_context(eqn):
            return rebuild(
                container,
                run,
                carried.only(self._inside.get(location, frozenset())),
                operands,
                self._stacked.get(location, frozenset()),
                collect=self._collect,
            )


def _computed(handled: Callable[..., Outcome], result: Any, *met: Any) -> Outcome:
    """The outcome on a mesh with explicit axes: the result as the equation has it, copies of else.

    Where the equation itself lies in a part of the program with automatic axes (``auto_axes``, a
    lookup with ``out_sharding``), what comes from around it goes there and back.
    """
    mesh = mesh_of(met)
    if mesh is None or not has_automatic_axes():
        return cast(Outcome, automatic(handled, *met, specs=first_as(result)))
    outcome = handled(*moved(met, get_abstract_mesh()))
    return Outcome(outcome.out, *moved(tuple(outcome[1:]), mesh))


def _check_result(site: Site, out: jax.Array, expected: Any) -> None:
    if tuple(out.shape) != tuple(expected.shape) or out.dtype != expected.dtype:
        raise errors.SiteError(
            f"the handler returned {out.dtype}{tuple(out.shape)}",
            where=f"site {site.name} ({site.op.value}), which has {expected.str_short()}",
            fix="return the equation's own shape and dtype",
        )


def _last_uses(jaxpr: jex_core.Jaxpr) -> dict[int, list[Any]]:
    """Variables by the index of the last equation that reads them; outputs are never listed."""
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, jex_core.Literal):
                last[atom] = index
    for atom in jaxpr.outvars:
        if not isinstance(atom, jex_core.Literal):
            last.pop(atom, None)
    by_index: dict[int, list[Any]] = {}
    for var, index in last.items():
        by_index.setdefault(index, []).append(var)
    return by_index
