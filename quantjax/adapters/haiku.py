"""Functions transformed by Haiku as pure functions of nested dicts of arrays, all of one form."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import jax

from quantjax import errors
from quantjax.interpreter import leaves_by_path

try:
    import haiku as hk
except ImportError as error:
    raise errors.MissingPackageError(
        "quantjax.adapters.haiku needs Haiku, which is not installed",
        fix='pip install "quantjax[haiku]"',
    ) from error

Arrays = dict[str, Any]
"""Haiku's nested dict, ``{"mlp/~/linear_0": {"w": array}}``."""
Transformed = hk.Transformed | hk.TransformedWithState


@final
@dataclasses.dataclass(frozen=True, eq=False)
class TransformedFunction:
    """``f(params, state, key, *inputs) -> (outputs, new_state)``; holds no array.

    Attributes:
      transformed: what Haiku made of the model.
    """

    transformed: Transformed

    def __call__(
        self, params: Any, state: Any, key: jax.Array | None, *inputs: Any
    ) -> tuple[Any, Arrays]:
        has_state = isinstance(self.transformed, hk.TransformedWithState)
        _check_mappings(params, state)
        if state and not has_state:
            raise errors.AdapterError(
                "a model without state was given some",
                where=f"state: {sorted(leaves_by_path(state))}",
                why="hk.transform keeps no state",
                fix="make the model with hk.transform_with_state, or pass {}",
            )
        keys = (key,) if self._takes_key else ()
        if key is not None and not keys:
            raise errors.AdapterError(
                "a model that takes no key was given one",
                why="hk.without_apply_rng drops the key",
                fix="pass None for the key, or leave hk.without_apply_rng out",
            )
        if not has_state:
            return self.transformed.apply(params, *keys, *inputs), {}
        outputs, new_state = self.transformed.apply(params, state, *keys, *inputs)
        new_state = jax.tree.map(_strong, new_state)
        _check_kept(state, new_state)
        return outputs, new_state

    @property
    def _takes_key(self) -> bool:
        """Whether ``apply`` has the key still; ``hk.without_apply_rng`` takes it away."""
        names = list(inspect.signature(self.transformed.apply).parameters)
        place = 2 if isinstance(self.transformed, hk.TransformedWithState) else 1
        return names[place : place + 1] == ["rng"]

    def init(self, key: jax.Array | None, *inputs: Any) -> tuple[Arrays, Arrays]:
        """New parameters and state; without state, an empty dict."""
        if isinstance(self.transformed, hk.TransformedWithState):
            params, state = self.transformed.init(key, *inputs)
            return dict(params), jax.tree.map(_strong, dict(state))
        return dict(self.transformed.init(key, *inputs)), {}


class HaikuFunction(NamedTuple):
    """A transformed function; unpacks to ``f, params, state``."""

    f: TransformedFunction
    params: Arrays
    state: Arrays


def functional(transformed: Transformed, key: jax.Array | None, *inputs: Any) -> HaikuFunction:
    """A model as ``f(params, state, key, *inputs) -> (outputs, new_state)``, with its arrays.

    The same form for ``hk.transform`` and ``hk.transform_with_state``, with and without
    ``hk.without_apply_rng``. A model without state has ``{}`` for it; a model that draws nothing
    takes None for the key. Names are Haiku's: ``mlp/~/linear_0/w``. Arrays that are trained already
    are passed to ``f`` in the place of those returned here.

    Sharp edges: of ``hk.multi_transform``, wrap one function at a time,
    ``hk.Transformed(multi.init, multi.apply.encode)``. No input of a model may be called ``rng``:
    by that name Haiku's own key is known.

    Args:
      transformed: what ``hk.transform`` or ``hk.transform_with_state`` returned.
      key: for the initial parameters.
      inputs: for the initial call, as those of ``f``.

    Raises:
      AdapterError: ``transformed`` is something else; by ``f``, where it is given state or a key
        that the model does not take, and where the call creates state or changes its type.

    >>> import haiku as hk
    >>> import jax.numpy as jnp
    >>> import quantjax as qj
    >>> from quantjax.adapters import haiku as qhaiku
    >>> model = hk.transform(lambda x: hk.nets.MLP([16, 4])(x))
    >>> x = jnp.ones((2, 8))
    >>> f, params, state = qhaiku.functional(model, jax.random.key(0), x)
    >>> y, state = f(params, state, None, x)
    >>> [site.name for site in qj.sites(f, params, state, None, x)]
    ['mlp/~/linear_0/w', 'mlp/~/linear_1/w']
    """
    if not isinstance(transformed, Transformed) or not callable(transformed.apply):
        raise errors.AdapterError(
            f"not a function transformed by Haiku: {type(transformed).__name__}",
            why="its apply and init are what is called",
            fix="pass hk.transform_with_state(f); of a multi_transform, "
            "hk.Transformed(multi.init, multi.apply.encode)",
        )
    f = TransformedFunction(transformed)
    return HaikuFunction(f, *f.init(key, *inputs))


def _strong(value: Any) -> Any:
    """As an array that is not weakly typed, so that it may be the carry of a scan."""
    is_weak = isinstance(value, jax.Array) and jax.typeof(value).weak_type
    return jax.lax.convert_element_type(value, value.dtype) if is_weak else value


def _check_mappings(params: Any, state: Any) -> None:
    for name, tree in (("params", params), ("state", state)):
        if not isinstance(tree, Mapping):
            raise errors.AdapterError(
                f"{name} are no dict: {type(tree).__name__}",
                why="f takes (params, state, key, *inputs), all of them always",
                fix="pass {} for no state and None for no key: f(params, {}, None, x)",
            )


def _check_kept(before: Arrays, after: Arrays) -> None:
    """The call leaves the state that there was, of the same shapes and dtypes."""
    old, new = (
        {name: str(jax.typeof(leaf)) for name, leaf in leaves_by_path(tree).items()}
        for tree in (jax.tree.map(_strong, before), after)
    )
    changed = [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise errors.AdapterError(
            "the call creates, removes or changes the type of state of the model",
            where=", ".join(changed),
            why="a traced function returns state with the structure and types that it was given",
            fix="pass the state that functional returned for the same model",
        )
