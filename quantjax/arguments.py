"""Arguments of another kind than a function takes: refused by name, ahead of any work."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import numbers
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from quantjax import errors
from quantjax._compat import concrete

_MODULES = {
    "flax.linen": "f = lambda params, x: model.apply(params, x), for f and params",
    "flax.nnx": "quantjax.adapters.nnx, which splits a model into f and params",
    "equinox": "f, params = quantjax.adapters.equinox.functional(module)",
}
Row = TypeVar("Row")
NUMBERS = (numbers.Real, jax.Array, np.ndarray, np.generic)
"""What stands for a number that may be traced."""
_NUMBERS: dict[type, str] = {numbers.Real: "number", numbers.Integral: "whole number"}


def first_wrong(value: Any, is_good: Callable[[np.ndarray], np.ndarray]) -> float | None:
    """The first number that is not good, for an error that names it; None, too, where traced.

    >>> first_wrong(np.array([1.0, -2.0, -3.0]), lambda v: v > 0.0)
    -2.0
    """
    known = concrete(value)
    if known is None:
        return None
    wrong = np.flatnonzero(~is_good(known))
    return float(np.ravel(known)[wrong[0]]) if wrong.size else None


def expect(
    value: object, kinds: type | tuple[type, ...], *, argument: str, where: str, fix: str
) -> None:
    """Raise unless ``value`` is of one of these kinds; True and False are no numbers here.

    Raises:
      ArgumentError: naming the argument, what it is and what is needed.

    >>> expect(8, int, argument="bits", where="qj.weight_quantizer", fix="bits=8")
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed):
        return
    names = " or ".join(
        _NUMBERS.get(kind, kind.__name__) for kind in allowed if kind is not type(None)
    )
    raise errors.ArgumentError(
        f"{argument} is {kind_of(value)}, and {_article(names)} is needed", where=where, fix=fix
    )


def undeclared(value: Any) -> list[str]:
    """What a dataclass holds besides its fields, which files do not see, nor its equality."""
    names = {field.name for field in dataclasses.fields(value)}
    return [
        name
        for name in getattr(value, "__dict__", {})
        if name not in names
        and not isinstance(getattr(type(value), name, None), functools.cached_property)
    ]


def expect_declared(value: Any, *, where: str) -> None:
    """Raise where a class is no dataclass itself, but compared as the one that it extends.

    Two values of it that differ in what is no field are equal, and the programs of the first are
    run for the second.

    Raises:
      ArgumentError: naming the class and what it holds.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name in undeclared(value) if _is_compared_as_its_base(type(value)) else ():
            kind = type(value).__name__
            raise errors.ArgumentError(
                f"{kind} holds '{name}', which is no field of it",
                where=where,
                why="values are compared by their fields, and programs are kept by values: another "
                f"{kind} would be taken for this one",
                fix=f"@dataclasses.dataclass(frozen=True) on {kind}, with the field {name}",
            )
        for field in dataclasses.fields(value):
            expect_declared(getattr(value, field.name), where=where)
    elif isinstance(value, tuple):
        for entry in value:
            expect_declared(entry, where=where)


def _is_compared_as_its_base(kind: type) -> bool:
    """Whether its equality is that of the fields of a class that it extends."""
    owner = next(base for base in kind.__mro__ if "__eq__" in vars(base))
    return owner is not kind and "__dataclass_params__" in vars(owner)


def expect_key(key: object, *, where: str) -> None:
    """Raise unless ``key`` is one random key, typed or raw; it may be traced.

    Raises:
      ArgumentError: a seed, an array of keys, or something else.

    >>> expect_key(jax.random.key(0), where="qj.fake_quant")
    """
    found = jax.typeof(key) if isinstance(key, jax.Array | np.ndarray) else None
    is_typed = found is not None and jax.dtypes.issubdtype(found.dtype, jax.dtypes.prng_key)
    if found is not None and (is_typed or found.dtype == np.uint32):
        if found.ndim == (0 if is_typed else 1):
            return
        raise errors.ArgumentError(
            f"key is an array of keys, of shape {found.shape}, and one key is needed",
            where=where,
            fix="jax.vmap(lambda key: ...)(keys), or keys[0]",
        )
    kind = kind_of(key) if found is None else f"an array of {found.dtype}"
    raise errors.ArgumentError(
        f"key is {kind}, and a random key is needed",
        where=where,
        why="randomness comes from explicit keys only",
        fix=f"key=jax.random.key({key})" if isinstance(key, int) else "key=jax.random.key(0)",
    )


def expect_function(f: object, *, where: str, fix: str) -> None:
    """Raise unless ``f`` can be called as ``f(params, *inputs)``, as far as that can be seen.

    Raises:
      ArgumentError: it is no function, or a module of Flax, whose parameters are no argument.
    """
    if not callable(f):
        raise errors.ArgumentError(
            f"f is {kind_of(f)}, and a function f(params, *inputs) is needed", where=where, fix=fix
        )
    homes = [base.__module__ for base in type(f).__mro__]
    for package, instead in _MODULES.items():
        from_there = any(home == package or home.startswith(f"{package}.") for home in homes)
        if from_there and not (package == "equinox" and _takes_parameters(f)):
            raise errors.ArgumentError(
                f"f is a module, {kind_of(f)}, and a function f(params, *inputs) is needed",
                where=where,
                why=f"a module of {package} is not called with its parameters",
                fix=instead,
            )


def why_unwritable(folder: Path, *, files: Sequence[str], folders: Sequence[str]) -> str:
    """Why the folder, or what is to lie in it, could not be made or written; or "".

    What does not exist yet does not exist afterwards: something else may be refused later.

    Args:
      files, folders: their names; those that do not exist yet can be made.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     new = Path(folder) / "new"
    ...     why_unwritable(new, files=["results.csv"], folders=[]), new.exists()
    ('', False)
    """
    made: list[Path] = []
    try:
        made += (place for place in (folder, *folder.parents) if not place.exists())
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, *(folder / name for name in folders)):
            if place.exists():
                with tempfile.TemporaryFile(dir=place):
                    pass
        for file in files:
            if (folder / file).exists():
                with (folder / file).open("ab"):
                    pass
    except OSError as error:
        return str(error)
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it was not made, or is no longer empty
                place.rmdir()
    return ""


def _takes_parameters(f: Callable[..., Any]) -> bool:
    """Whether it can be called with parameters and an input; ``eqx.filter_jit(f)`` is a module."""
    try:
        inspect.signature(f).bind(None, None)
    except TypeError:
        return False
    return True


def row_of(rows: Mapping[Any, Row], key: object, *, kind: str) -> Row:
    """The row of that name.

    Raises:
      NotFoundError: there is none; it says which ones there are, and the closest first.

    >>> row_of({"w": 1, "v": 2}, "v", kind="site")
    2
    """
    for name, row in rows.items():  # which asks for no hash
        if name == key:
            return row
    known = {str(name): name for name in rows}
    close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.3)
    few = dict.fromkeys([*close, *list(known)[:3]])
    more = f", ... ({len(known)} in all)" if len(known) > len(few) else ""
    raise errors.NotFoundError(
        f"no {kind} {key!r}",
        where=f"{kind}s {', '.join(few)}{more}" if few else f"no {kind}s at all",
        fix=f"[{known[next(iter(few))]!r}]" if few else f"a plan that has {kind}s",
    )


def kind_of(value: Any) -> str:
    """``a Policy``, ``an int``, ``None``, ``the class Policy``."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return _article(type(value).__name__)


def _article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
