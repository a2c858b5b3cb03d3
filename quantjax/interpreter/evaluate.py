"""Evaluate a traced program with some of its products replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex_core

from quantjax import errors
from quantjax._compat import (
    bind_equation,
    equation_context,
    is_jit,
    jit_call,
    jit_shardings,
)
from quantjax.interpreter.product import Product, product_of
from quantjax.interpreter.sites import Location, Site
from quantjax.interpreter.trace import Program

Handler = Callable[[Site, Product, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""``(site, product, lhs, rhs, value) -> (result, record)``.

``value`` is the site's entry of ``values`` (None where it has none), ``record`` any pytree or None.
"""

Values = Mapping[str, Any]
Records = dict[str, Any]


def evaluate(
    program: Program, handler: Handler, handled: frozenset[str], values: Values, *arguments: Any
) -> tuple[Any, Records]:
    """Run ``program`` with the products named in ``handled`` computed by ``handler``.

    All else is bound as it was traced; a container that holds no handled site is bound whole.
    ``values`` and records travel through containers as pytrees.

    Args:
      arguments: those of the traced function, ``(params, *inputs)``.

    Returns:
      The function's result and ``{site: record}`` for records that are not None.
    """
    active = {loc: site for loc, site in program.sites.items() if site.name in handled}
    containers = {loc[:depth] for loc in active for depth in range(1, len(loc))}
    flat = jax.tree.leaves(arguments)
    walk = _Walk(handler, active, containers)
    outputs, records = walk.run(program.jaxpr, (), values, flat)
    return jax.tree.unflatten(program.out_tree, outputs), records


class _Walk:
    """The sites of one evaluation, and the loop over equations."""

    def __init__(
        self, handler: Handler, sites: Mapping[Location, Site], containers: set[Location]
    ) -> None:
        self._handler, self._sites, self._containers = handler, sites, containers

    def run(
        self,
        closed: jex_core.ClosedJaxpr,
        location: Location,
        values: Values,
        arguments: Sequence[Any],
    ) -> tuple[list[Any], Records]:
        jaxpr = closed.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))
        last_use = _last_uses(jaxpr)
        records: Records = {}
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*location, index)
            operands = [a.val if isinstance(a, jex_core.Literal) else env[a] for a in eqn.invars]
            site = self._sites.get(here)
            if site is not None:
                outputs, record = self._handle(site, eqn, operands, values.get(site.name))
                if record is not None:
                    records[site.name] = record
            elif here in self._containers:
                outputs, inner = self._rebuild(eqn, here, values, operands)
                records.update(inner)
            else:
                outputs = bind_equation(eqn, *operands)
            env.update(zip(eqn.outvars, outputs, strict=True))
            for var in last_use.get(index, ()):
                env.pop(var, None)
        result = [a.val if isinstance(a, jex_core.Literal) else env[a] for a in jaxpr.outvars]
        return result, records

    def _handle(
        self, site: Site, eqn: jex_core.JaxprEqn, operands: Sequence[Any], value: Any
    ) -> tuple[list[Any], Any]:
        product = product_of(eqn)
        assert product is not None
        with equation_context(eqn):
            out, record = self._handler(site, product, operands[0], operands[1], value)
        expected = product.out
        if tuple(out.shape) != tuple(expected.shape) or out.dtype != expected.dtype:
            raise errors.SiteError(
                f"the handler returned {out.dtype}{tuple(out.shape)}",
                where=f"site {site.name} ({site.op.value}), which has {expected.str_short()}",
                fix="return the equation's own shape and dtype",
            )
        return [out], record

    def _rebuild(
        self,
        eqn: jex_core.JaxprEqn,
        location: Location,
        values: Values,
        operands: Sequence[Any],
    ) -> tuple[list[Any], Records]:
        """Re-issue a jit call around the rewritten program; values and records ride along."""
        assert is_jit(eqn), eqn.primitive.name
        closed, options = jit_call(eqn)
        in_shardings, out_shardings = jit_shardings(eqn)
        inside = {
            site.name for loc, site in self._sites.items() if loc[: len(location)] == location
        }
        carried = {name: value for name, value in values.items() if name in inside}

        def inner(values: Values, arguments: Sequence[Any]) -> tuple[list[Any], Records]:
            arguments = _constrain(arguments, in_shardings)
            outputs, records = self.run(closed, location, values, arguments)
            return _constrain(outputs, out_shardings), records

        inner.__name__ = inner.__qualname__ = str(eqn.params["name"])
        with equation_context(eqn):
            return jax.jit(inner, **options)(carried, list(operands))


def _constrain(arrays: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    pairs = zip(arrays, shardings, strict=True)
    return [a if s is None else lax.with_sharding_constraint(a, s) for a, s in pairs]


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
