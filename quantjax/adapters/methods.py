"""What an adapter is told to call, looked at where it is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from quantjax import errors


def check_module(module: Any, *, adapter: str) -> None:
    """Raise ``AdapterError`` for a class in place of a module of it, and for a module of linen.

    >>> check_module(object(), adapter="nnx")
    """
    if isinstance(module, type):
        raise errors.AdapterError(
            f"{module.__name__} is a class, and a module is needed",
            where=f"quantjax.adapters.{adapter}.functional",
            fix=f"a module: {module.__name__}(...) with its arguments",
        )
    if isinstance(module, nn.Module):
        raise errors.AdapterError(
            f"a {type(module).__name__} of flax.linen",
            where=f"quantjax.adapters.{adapter}.functional",
            why="modules of linen are functions of their parameters already",
            fix="f = lambda params, x: module.apply(params, x)",
        )


def check_method(method: Callable[..., Any] | None, *, adapter: str) -> None:
    """Raise ``AdapterError`` for a method that is bound to a module already, or no function.

    >>> check_method(lambda module, x: module(x), adapter="equinox")
    """
    if method is None or (callable(method) and not inspect.ismethod(method)):
        return
    name = method.__name__ if callable(method) else str(method)
    shown = name if name.isidentifier() and name != "__call__" else "encode"
    raise errors.AdapterError(
        f"method is {'bound to a module' if callable(method) else 'no function'}",
        where=f"quantjax.adapters.{adapter}.functional, method {name:.40}",
        why="it is called as method(module, *inputs), with a module made of the arrays at hand",
        fix=f"method=lambda module, *inputs: module.{shown}(*inputs)",
    )
