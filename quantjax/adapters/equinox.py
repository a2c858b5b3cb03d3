"""Equinox modules as pure functions of nested dicts of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.adapters.methods import check_method, check_module
from quantjax.interpreter import leaves_by_path

try:
    import equinox as eqx
except ImportError as error:
    raise errors.MissingPackageError(
        "quantjax.adapters.equinox needs Equinox, which is not installed",
        fix='pip install "quantjax[equinox]"',
    ) from error

Arrays = dict[str, Any]
"""A nested dict with string keys, ``{"layers": {"0": {"weight": array}}}``."""


@final
@dataclasses.dataclass(frozen=True, eq=False)
class ModuleFunction:
    """``f(params, *inputs) -> outputs`` of one module; holds no parameter.

    Attributes:
      like: the module, each parameter replaced by its shape and dtype.
      static: the module without its parameters.
      method: what is called with the module and the inputs.
    """

    like: Any
    static: Any
    method: Callable[..., Any]

    def __call__(self, params: Any, *inputs: Any) -> Any:
        # A copy: eqx.nn.State marks the one that was written to as used up.
        inputs = jax.tree.map(lambda leaf: leaf, inputs)
        return self.method(self.merge(params), *inputs)

    def merge(self, params: Any) -> Any:
        """A new module with these arrays."""
        expected, given = leaves_by_path(self.like), leaves_by_path(params)
        if expected.keys() != given.keys():
            absent, more = sorted(expected.keys() - given), sorted(given.keys() - expected)
            raise errors.AdapterError(
                "the arrays are not those of this module",
                where=f"absent: {absent}, too many: {more}",
                fix="pass a tree with the structure of the params of functional(module); "
                "frozen ones go through qj.execute(f, plan)",
            )
        leaves = [given[name] for name in expected]
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(self.like), leaves), self.static)


class EquinoxFunction(NamedTuple):
    """A module as a function; unpacks to ``f, params``."""

    f: ModuleFunction
    params: Arrays


def functional(
    module: Any,
    *,
    method: Callable[..., Any] | None = None,
    wrt: Callable[[Any], bool] = eqx.is_inexact_array,
) -> EquinoxFunction:
    """A module as ``f(params, *inputs) -> outputs``, pure, with its parameters.

    ``params`` is a nested dict of arrays, a parameter's path in the module being its path there:
    ``layers/0/weight``. Indices of lists are strings, so that a tree survives any file format, and
    leaves may become codes, which fit into no module. A stateful module takes ``eqx.nn.State`` as
    an input and returns it, as ever; the state that goes in may be used again.

    Sharp edges: modules of Equinox are for one example; ``method=lambda m, x: jax.vmap(m)(x)`` maps
    the call, and the weights stay shared. ``eqx.nn.inference_mode(module)`` counts when it is
    called before this function. Arrays that are no parameters (integers, keys) are constants of
    ``f``; pass what varies as an input. ``eqx.nn.SpectralNorm`` computes its weight from its state:
    give ``lambda tree, *x: f(tree["params"], *x, tree["state"])`` and one tree of both, or the
    layer stays float.

    Args:
      module: stays as it is; of ``eqx.nn.make_with_state``, the first of the two.
      method: called as ``method(module, *inputs)``; None calls the module itself.
      wrt: which leaves are parameters.

    Raises:
      AdapterError: no module, one without parameters, or a method that is bound to one; by ``f``,
        where the arrays are not those of this module.

    >>> import equinox as eqx
    >>> import jax.numpy as jnp
    >>> import quantjax as qj
    >>> from quantjax.adapters import equinox as qeqx
    >>> module = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    >>> f, params = qeqx.functional(module, method=lambda m, x: jax.vmap(m)(x))
    >>> f(params, jnp.ones((2, 8))).shape
    (2, 4)
    >>> [site.name for site in qj.sites(f, params, jnp.ones((2, 8)))]
    ['layers/0/weight', 'layers/1/weight']
    """
    check_module(module, adapter="equinox")
    check_method(method, adapter="equinox")
    arrays, static = eqx.partition(module, wrt)
    arrays = jax.tree.map(jnp.asarray, arrays)
    named = leaves_by_path(arrays)
    if not named:
        raise errors.AdapterError(
            f"no parameter in {type(module).__name__}",
            why="no leaf passes the filter wrt",
            fix="pass a module with arrays; for Python numbers, wrt=eqx.is_inexact_array_like",
        )
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
    params: Arrays = {}
    for path, leaf in jax.tree.leaves_with_path(arrays):
        *folders, name = (jax.tree_util.keystr((key,), simple=True) for key in path)
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = leaf
    return EquinoxFunction(ModuleFunction(like, static, method or _call), params)


def restore(model: EquinoxFunction, params: Any) -> Any:
    """A new module of the kind that ``model`` was made from, with these arrays.

    >>> import equinox as eqx
    >>> from quantjax.adapters import equinox as qeqx
    >>> model = qeqx.functional(eqx.nn.Linear(8, 4, key=jax.random.key(0)))
    >>> trained = jax.tree.map(lambda w: 0.5 * w, model.params)
    >>> type(qeqx.restore(model, trained)).__name__
    'Linear'
    """
    return model.f.merge(params)


def _call(module: Any, *inputs: Any) -> Any:
    return module(*inputs)
