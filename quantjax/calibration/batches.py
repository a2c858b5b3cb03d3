"""One batch of somebody's data, and somebody's model on it: errors that say which, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from quantjax import errors
from quantjax.printing import shape_text

Arguments = tuple[Any, ...]
"""What a model is given behind its parameters."""

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    FlaxError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What tracing and running somebody's function raises; not an interrupt, and not our own errors."""
_VALUES_NEEDED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_KINDS = {"U": "text", "S": "bytes", "M": "dates", "m": "spans of time", "V": "records"}


def checked(batch: Arguments, where: str) -> Arguments:
    """The batch as JAX arrays, which hold finite numbers, and the integers that were given.

    Args:
      where: which batch it is.

    Raises:
      DataError: as said; nothing in it, or an array without entries.
    """
    leaves = jax.tree.leaves(batch)
    try:
        inputs: Arguments = jax.tree.map(jnp.asarray, batch)
    except (TypeError, ValueError, OverflowError) as error:
        kinds = [_KINDS.get(np.dtype(getattr(leaf, "dtype", "O")).kind) for leaf in leaves]
        held = next((kind for kind in kinds if kind), None)
        raise errors.DataError(
            "a batch holds something else than arrays of numbers",
            where=where,
            why=f"an array holds {held}" if held else first_line(error),
            fix="a batch is an array, a tree of arrays, or a tuple of arguments",
        ) from error
    if not leaves:
        raise errors.DataError(
            "a batch has no array", where=where, fix="an array or a tuple of arguments"
        )
    for index, (given, leaf) in enumerate(zip(leaves, jax.tree.leaves(inputs), strict=True)):
        place = f"{where}, array {index} of shape {shape_text(leaf.shape)}"
        if leaf.size == 0:
            raise errors.DataError("a batch is empty", where=place, fix="one sample or more")
        changed = changed_integers(given, leaf)
        if changed:
            raise errors.DataError(
                f"{changed} integers of a batch do not fit {leaf.dtype}",
                where=place,
                fix="smaller ones, or jax_enable_x64",
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        narrow = np.asarray(leaf, np.complex64 if is_complex else np.float32)
        broken = ~np.isfinite(narrow)
        if not is_complex:  # -inf is in masks that are added to logits; none that is out of range
            broken &= ~np.isneginf(np.asarray(given, np.float64))
        bad = int(np.sum(broken))
        if bad:
            raise errors.DataError(
                f"{bad} values of a batch are NaN or infinite",
                where=place,
                why="a range that has to hold them does not exist",
                fix="drop those samples; a finite float64 beyond 3.4e38 has to be scaled down",
            )
    return inputs


def changed_integers(given: Any, held: jax.Array) -> int:
    """How many integers of 64 bits are others in the array that holds them, which wraps them.

    >>> changed_integers(np.array([1, 2**32]), jnp.array([1, 0], jnp.int32))
    1
    """
    if not jnp.issubdtype(held.dtype, jnp.integer):
        return 0
    return int(np.sum(np.asarray(given) != np.asarray(held)))


@contextlib.contextmanager
def running(inputs: Arguments, where: str) -> Iterator[None]:
    """What the model raises becomes a ``ModelError`` that names the batch."""
    try:
        yield
    except errors.QuantjaxError:
        raise
    except FAULTS as error:
        traced = isinstance(error, _VALUES_NEEDED)
        raise errors.ModelError(
            "the model cannot be traced" if traced else "the model does not run on a batch",
            where=f"{where}: {described(inputs)}",
            why=f"{type(error).__name__}: {first_line(error)}",
            fix="jnp.where or jax.lax.cond in place of Python's if on values"
            if traced
            else "batches of the shapes and dtypes that it takes, a tuple for several inputs",
        ) from error


def described(inputs: Arguments) -> str:
    """Dtypes and shapes: ``float32 24x5, int32 24``."""
    return ", ".join(f"{leaf.dtype} {shape_text(leaf.shape)}" for leaf in jax.tree.leaves(inputs))


def first_line(error: Exception) -> str:
    """What an error says first, cut."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else "no message"
