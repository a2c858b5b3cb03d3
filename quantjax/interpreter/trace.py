"""Trace a function of ``(params, *inputs)`` once, and keep what the trace says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core as jex_core

from quantjax import errors
from quantjax._compat import trace_context
from quantjax.interpreter.containers import container_of
from quantjax.interpreter.discover import discover
from quantjax.interpreter.product import Product, product_of
from quantjax.interpreter.provenance import Origin
from quantjax.interpreter.sites import Added, Location, Site

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function with its sites.

    Attributes:
      jaxpr: the closed program.
      out_tree: the structure of its result.
      sites: site by location.
      weights: how to recompute each weight from the parameters, by site name.
      scans: locations of the scans around a site, outermost first, by site name.
      stacked: those of which each step is a layer of its own.
      repeated: weighted sites in a loop whose iterations share the weight.
      others: where a parameter goes besides the weights of sites: a primitive, by path.
      biases: how to recompute each bias, as it is added, by the name of its site.
      additions: the site whose bias an equation adds, by location.
    """

    jaxpr: jex_core.ClosedJaxpr
    out_tree: jax.tree_util.PyTreeDef
    sites: Mapping[Location, Site]
    weights: Mapping[str, Origin]
    scans: Mapping[str, tuple[Location, ...]]
    stacked: Mapping[str, tuple[Location, ...]]
    repeated: frozenset[str]
    others: Mapping[str, str]
    biases: Mapping[str, Origin]
    additions: Mapping[Location, Added]

    def product_at(self, location: Location) -> Product:
        """The product of the site at a location, through the containers around it."""
        closed, (*around, last) = self.jaxpr, location
        for index, number in zip(around[::2], around[1::2], strict=True):
            container = container_of(closed.jaxpr.eqns[index])
            assert container is not None
            closed = container.programs[number]
        product = product_of(closed.jaxpr.eqns[last])
        assert product is not None
        return product


def leaves_by_path(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves of a tree by path, ``params/Dense_0/kernel``; ``is_leaf`` as JAX's tree functions.

    >>> leaves_by_path({"a": {"w": 1}, "b": [2]})
    {'a/w': 1, 'b/0': 2}
    """
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    named: dict[str, Any] = {}
    for path, value in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise errors.SiteError(
                f"two leaves of the tree have the path {name}",
                why="a key holds a slash, or is equal to another one as text",
                fix="rename one of the keys",
            )
        named[name] = value
    return named


def trace(f: Function, params: Any, *inputs: Any) -> Program:
    """Trace ``f(params, *inputs)`` abstractly and discover its sites; no arithmetic is done."""
    jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(params, *inputs)
    out_tree = jax.tree.structure(shape)
    paths = list(leaves_by_path(params))
    return Program(jaxpr, out_tree, *discover(jaxpr, paths))


class ProgramCache:
    """Traces of one function by structure, shapes and JAX's trace context.

    Belongs to one transformed function, as ``jax.jit``'s own cache does. A program whose constants
    hold tracers is never kept.
    """

    def __init__(self, f: Function) -> None:
        self._f = f
        self._programs: dict[Any, Program] = {}

    def __call__(self, params: Any, *inputs: Any) -> Program:
        """The program for arguments of these shapes."""
        leaves, structure = jax.tree.flatten((params, inputs))
        key = (structure, tuple(jax.typeof(leaf) for leaf in leaves), trace_context())
        program = self._programs.get(key)
        if program is None:
            program = trace(self._f, params, *inputs)
            if not any(isinstance(c, jax.core.Tracer) for c in program.jaxpr.consts):
                self._programs[key] = program
        return program
