"""Arrays for files: float32 numbers as text with the same bits, and which leaves are arrays."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax.printing import shape_text
from quantjax.storage.codec import Json
from quantjax.storage.tree import check_keys

_INFINITY = 0x7F800000
_SPECIAL = {"nan": 0x7FC00000, "inf": _INFINITY, "-inf": 0x80000000 | _INFINITY}
_SPECIAL_NAMES = {bits: name for name, bits in _SPECIAL.items()}


def known_array(leaf: Any, at: str) -> np.ndarray:
    """The numbers of a leaf, as they are.

    Raises:
      StorageError: a tracer, a key of ``jax.random``, or what is no array of numbers.
    """
    if isinstance(leaf, jax.core.Tracer):
        raise errors.StorageError(
            "a traced array has no values that could be written",
            where=at,
            fix="save outside of jax.jit, jax.vmap and jax.grad",
        )
    if isinstance(leaf, np.ndarray | np.generic | jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise errors.StorageError(
                f"{leaf.dtype} is no dtype of numbers", where=at, fix="jax.random.key_data(key)"
            )
        if leaf.dtype == bool or jax.dtypes.issubdtype(leaf.dtype, np.number):
            return np.asarray(leaf)
    raise errors.StorageError(
        f"a {type(leaf).__name__} is no array of numbers",
        where=at,
        fix="jnp.asarray(value), or leave it out of the tree",
    )


def encode_array(leaf: Any, at: str) -> Json:
    """``{"shape": ..., "values": ...}`` of a float32 array, with its values in row-major order.

    Raises:
      StorageError: another dtype, a tracer, or no array.

    >>> encode_array(np.array([[0.1, -0.0, np.inf]], np.float32), "x")
    {'shape': [1, 3], 'values': [0.1, -0.0, 'inf']}
    """
    array = known_array(leaf, at)
    if array.dtype != np.float32:
        raise errors.StorageError(
            f"{array.dtype} numbers where QParams hold float32",
            where=at,
            fix="jax.tree.map(lambda x: x.astype(jnp.float32), qstate)",
        )
    flat = array.reshape(-1)
    return {"shape": list(array.shape), "values": _numbers(np.ascontiguousarray(flat))}


def _numbers(flat: np.ndarray) -> list[float | str]:
    """The shortest JSON values with these bits: numbers, ``"inf"`` or ``"nan:7fc00001"``.

    All at once, since groups have millions of scales.
    """
    finite = np.isfinite(flat)
    known = np.where(finite, flat, np.float32(0.0))
    short = known.astype("U32").astype(np.float64)
    exact = short.astype(np.float32).view(np.uint32) == known.view(np.uint32)
    values: list[float | str] = np.where(exact, short, known.astype(np.float64)).tolist()
    for place in np.flatnonzero(~finite).tolist():
        bits = int(flat[place].view(np.uint32))
        values[place] = _SPECIAL_NAMES.get(bits, f"nan:{bits:08x}")
    return values


def decode_array(data: Json, at: str) -> jax.Array:
    """The array that :func:`encode_array` wrote, with the same bits.

    Raises:
      StorageError: another number of values than the shape has, or one that is no float32.

    >>> decode_array({"shape": [2], "values": [0.5, "nan"]}, "x").tolist()
    [0.5, nan]
    """
    check_keys(data, ("shape", "values"), at)
    shape, values = data["shape"], data["values"]
    lists = isinstance(shape, list) and isinstance(values, list)
    if not lists or any(type(n) is not int or n < 0 for n in shape):
        raise errors.StorageError(
            "shape and values are lists, of sizes and of numbers",
            where=at,
            fix="write the file again, or correct it where it was edited by hand",
        )
    if len(values) != math.prod(shape):
        raise errors.StorageError(
            f"{len(values)} values for an array of shape {shape_text(shape)}",
            where=at,
            fix="give one value an entry, in row-major order",
        )
    found = _all_numbers(values)
    if found is None:
        found = np.array([_bits_of(value, at) for value in values], np.uint32).view(np.float32)
    return jnp.asarray(found.reshape(shape))


def _all_numbers(values: list[Any]) -> np.ndarray | None:
    """The values as float32 where each is a finite number; else they are looked at one by one."""
    if not set(map(type, values)) <= {int, float}:
        return None
    try:
        with np.errstate(over="ignore"):
            found = np.array(values, np.float64).astype(np.float32)
    except OverflowError:
        return None
    return found if np.isfinite(found).all() else None


def _bits_of(value: Any, at: str) -> int:
    if isinstance(value, str):
        if value in _SPECIAL:
            return _SPECIAL[value]
        if re.fullmatch("nan:[0-9a-fA-F]{8}", value):
            bits = int(value[4:], 16)
            if bits & 0x7FFFFFFF > _INFINITY:
                return bits
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            with np.errstate(over="ignore"):
                number = np.float32(float(value))
        except OverflowError:
            number = np.float32(np.inf)
        if np.isfinite(number):
            return int(number.view(np.uint32))
    raise errors.StorageError(
        f"{value!r:.40} is no float32 number",
        where=at,
        fix='a number, "inf", "-inf", "nan", or "nan:" with its eight hexadecimal digits',
    )
