"""Flax NNX modules as pure functions of nested dicts of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quantjax import errors
from quantjax.adapters.methods import check_method, check_module
from quantjax.qtensor import first_quantized, frozen_error

Arrays = dict[str, Any]
"""A nested dict with string keys, ``{"layers": {"0": {"kernel": array}}}``."""
Flat = Sequence[tuple[tuple[Any, ...], Any]]
"""Paths as Flax has them, and what is there."""


@final
@dataclasses.dataclass(frozen=True, eq=False)
class ModuleFunction:
    """``f(params, state, *inputs) -> (outputs, new_state)`` of one module; holds no array.

    Attributes:
      graphdef: the module without its arrays.
      method: what is called with the module and the inputs.
      wrt: which variables are parameters.
      paths: of the variables of ``params``, and of those of ``state``.
    """

    graphdef: nnx.GraphDef[Any]
    method: Callable[..., Any]
    wrt: Any
    paths: tuple[Sequence[tuple[Any, ...]], ...]

    def __call__(self, params: Any, state: Any, *inputs: Any) -> tuple[Any, Arrays]:
        _check_trees(params, state)
        params, state = jax.tree.map(_array, (params, state))
        module = self.merge(params, state)
        outputs = self.method(module, *inputs)
        _, *flat = _split(module, self.wrt)
        new_params, new_state = map(_nested, flat)
        _check_kept({"params": params, "state": state}, {"params": new_params, "state": new_state})
        return outputs, new_state

    def merge(self, params: Any, state: Any) -> Any:
        """A new module with these arrays."""
        flat = [_flat(tree, paths) for tree, paths in zip((params, state), self.paths, strict=True)]
        return nnx.merge(self.graphdef, *(nnx.FlatState(items, sort=False) for items in flat))


class NnxFunction(NamedTuple):
    """A module as a function; unpacks to ``f, params, state``."""

    f: ModuleFunction
    params: Arrays
    state: Arrays


def functional(
    module: nnx.Module, *, method: Callable[..., Any] | None = None, wrt: Any = nnx.Param
) -> NnxFunction:
    """A module as ``f(params, state, *inputs) -> (outputs, new_state)``, pure, with its arrays.

    ``params`` and ``state`` are nested dicts of arrays, a variable's path in the module being its
    path there: ``layers/0/kernel``. Indices of lists are strings, so that a tree survives any file
    format. ``state`` has all that is no parameter: batch statistics, keys and counts of dropout,
    caches. Variables that modules share appear once, at their first path, and stay shared.

    Sharp edges: ``module.train()`` and ``module.eval()`` count when they are called before this
    function, as do all attributes that are no arrays; ``f`` forgets those that the call sets. A
    module that writes to its own parameters (``nnx.WeightNorm``, ``nnx.SpectralNorm``) writes to a
    copy: the parameters stay what they were.

    Args:
      module: stays as it is.
      method: called as ``method(module, *inputs)``; None calls the module itself.
      wrt: the filter of ``flax.nnx`` that says which variables are parameters.

    Raises:
      AdapterError: no module, or a method that is bound to one; by ``f``, where the arrays are not
        those of this module, or where the call creates variables or changes the shape or dtype of
        one.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import quantjax as qj
    >>> from quantjax.adapters import nnx as qnnx
    >>> module = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.relu)
    >>> f, params, state = qnnx.functional(module)
    >>> y, state = f(params, state, jnp.ones((2, 8)))
    >>> [site.name for site in qj.sites(f, params, state, jnp.ones((2, 8)))]
    ['layers/0/kernel']
    """
    check_module(module, adapter="nnx")
    check_method(method, adapter="nnx")
    graphdef, *flat = _split(module, wrt)
    paths = tuple([path for path, _ in items] for items in flat)
    return NnxFunction(
        ModuleFunction(graphdef, method or _call, wrt, paths), *(_nested(items) for items in flat)
    )


def restore(model: NnxFunction, params: Any, state: Any) -> Any:
    """A new module of the kind that ``model`` was made from, with these arrays.

    >>> from flax import nnx
    >>> from quantjax.adapters import nnx as qnnx
    >>> model = qnnx.functional(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> trained = jax.tree.map(lambda w: 0.5 * w, model.params)
    >>> type(qnnx.restore(model, trained, model.state)).__name__
    'Linear'
    """
    return model.f.merge(*jax.tree.map(_array, (params, state)))


def as_state(model: NnxFunction, params: Any) -> Any:
    """Arrays shaped as ``params``, gradients for instance, as the ``nnx.State`` that Flax has.

    It is what ``nnx.grad`` returns, and what ``nnx.Optimizer.update(module, gradients)`` takes.

    >>> from flax import nnx
    >>> from quantjax.adapters import nnx as qnnx
    >>> module = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> model = qnnx.functional(module)
    >>> loss = lambda params: model.f(params, model.state, jnp.ones((2, 8)))[0].sum()
    >>> gradients = qnnx.as_state(model, jax.grad(loss)(model.params))
    >>> gradients["kernel"].shape
    (8, 4)
    """
    module = model.f.merge(*jax.tree.map(_array, (params, model.state)))
    return nnx.state(module, model.f.wrt)


def _check_trees(params: Any, state: Any) -> None:
    """Raise where an input stands for the state, and where codes stand for floats."""
    for name, tree in (("params", params), ("state", state)):
        if not isinstance(tree, dict):
            raise errors.AdapterError(
                f"{name} is no dict, but {type(tree).__name__}",
                why="it is called as f(params, state, *inputs)",
                fix="f, params, state = functional(module), and f(params, state, x)",
            )
    path = first_quantized(params)
    if path is not None:
        raise frozen_error(errors.AdapterError, f"parameter {path}")


def _call(module: Any, *inputs: Any) -> Any:
    return module(*inputs)


def _split(module: Any, wrt: Any) -> tuple[nnx.GraphDef[Any], Flat, Flat]:
    """The module without arrays; its parameters; all else."""
    # graph=True: a variable that is shared is one variable, whatever Flax is configured to.
    graphdef, *states = nnx.split(module, wrt, ..., graph=True)
    params, rest = map(_values, states)
    return graphdef, params, rest


def _values(state: Any) -> Flat:
    # The raw value: what a type of variable does on reading it, it does in the model.
    return [
        (path, jax.tree.map(_array, v.get_raw_value() if isinstance(v, nnx.Variable) else v))
        for path, v in nnx.to_flat_state(state)
    ]


def _array(value: Any) -> Any:
    """As an array that is not weakly typed, so that it may be the carry of a scan."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    if isinstance(value, jax.Ref):
        value = value[...]
    if not isinstance(value, jax.Array):
        return jnp.asarray(np.asarray(value))
    is_weak = jax.typeof(value).weak_type
    return jax.lax.convert_element_type(value, value.dtype) if is_weak else value


def _nested(flat: Flat) -> Arrays:
    tree: Arrays = {}
    for path, value in flat:
        *folders, name = map(str, path)
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return tree


def _flat(tree: Any, paths: Sequence[tuple[Any, ...]]) -> Flat:
    """What is at each of the paths; nothing is elsewhere."""
    absent = object()

    def at(path: tuple[Any, ...]) -> Any:
        value = tree
        for key in map(str, path):
            value = value.get(key, absent) if isinstance(value, dict) else absent
        return value

    flat = [(path, at(path)) for path in paths]
    expected, actual = ({name for name, _ in _named(t)} for t in (_nested(flat), tree))
    if expected != actual or any(value is absent for _, value in flat):
        raise errors.AdapterError(
            "the arrays are not those of this module",
            where=f"absent: {sorted(expected - actual)}, too many: {sorted(actual - expected)}",
            fix="pass trees with the structure of the params and state of functional(module)",
        )
    return flat


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def _check_kept(before: Arrays, after: Arrays) -> None:
    """The call leaves the variables that there were, of the same shapes and dtypes."""
    old, new = ({n: f"{x.dtype}{list(x.shape)}" for n, x in _named(t)} for t in (before, after))
    changed = [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise errors.AdapterError(
            "the call creates, removes or changes the type of variables of the module",
            where=", ".join(changed),
            why="a traced function returns state with the structure and types that it was given",
            fix="call module(*inputs) once before functional(module), or create them in __init__",
        )
