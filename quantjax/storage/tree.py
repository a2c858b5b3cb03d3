"""The structure of a tree as JSON data; what its leaves become is the caller's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax.affine import QParams
from quantjax.formats import Format
from quantjax.packing import Packing
from quantjax.qtensor import QTensor
from quantjax.statistics import (
    Count,
    Extremes,
    Histogram,
    Moments,
    MovingExtremes,
    Sample,
    Statistics,
)
from quantjax.storage.codec import Json, decode, decode_dtype, encode

SaveLeaf = Callable[[Any, str], Json]
"""``(leaf, place) -> data``; raises ``StorageError`` for what it cannot write."""

LoadLeaf = Callable[[Json, str], Any]
"""``(data, place) -> leaf``."""

TUPLE, LIST, DICT, ITEMS, QPARAMS, QTENSOR = "tuple", "list", "dict", "items", "qparams", "qtensor"


RECORDS: Mapping[str, Any] = {
    record.__name__: record
    for record in (Statistics, Count, Extremes, Histogram, Moments, MovingExtremes, Sample)
}
"""What the state of an observation is made of, by the names of its fields."""


def encode_tree(tree: Any, leaf: SaveLeaf, *, at: str) -> Json:
    """JSON data for a tree of dictionaries, lists, tuples, None, ``QParams``, ``QTensor`` and
    ``Statistics``.

    Args:
      tree: dictionaries have text or whole numbers for keys.
      leaf: what becomes of everything else.
      at: what messages call the tree.

    Raises:
      StorageError: a NamedTuple or a key of another kind; whatever ``leaf`` refuses.

    >>> encode_tree({"a": (1, None)}, lambda leaf, at: leaf, at="tree")
    {'dict': {'a': {'tuple': [1, None]}}}
    """
    if tree is None:
        return None
    if isinstance(tree, QParams):
        check_there(tree._asdict(), at)
        return {QPARAMS: {name: encode_tree(x, leaf, at=f"{at}.{name}") for name, x in _of(tree)}}
    if isinstance(tree, QTensor):
        _check_codes(tree.stored, tree.format, tree.packing, at)
        return {
            QTENSOR: {
                "format": encode(tree.format, at=f"{at}.format"),
                "dtype": np.dtype(tree.dtype).name,
                "packing": encode(tree.packing, at=f"{at}.packing"),
                "stored": encode_tree(tree.stored, leaf, at=f"{at}.stored"),
                **encode_tree(tree.qparams, leaf, at=at),
            }
        }
    if type(tree).__name__ in RECORDS and type(tree) is RECORDS[type(tree).__name__]:
        fields = tree._asdict().items()
        return {type(tree).__name__: {n: encode_tree(x, leaf, at=f"{at}.{n}") for n, x in fields}}
    if type(tree) in (list, tuple):
        parts = [encode_tree(x, leaf, at=f"{at}[{index}]") for index, x in enumerate(tree)]
        return {LIST if type(tree) is list else TUPLE: parts}
    if type(tree) is dict:
        if all(isinstance(key, str) for key in tree):
            return {DICT: {key: encode_tree(x, leaf, at=f"{at}/{key}") for key, x in tree.items()}}
        if all(type(key) in (str, int) for key in tree):
            return {
                ITEMS: [[key, encode_tree(x, leaf, at=f"{at}/{key}")] for key, x in tree.items()]
            }
    if isinstance(tree, Mapping | Sequence) and not isinstance(tree, str | bytes):
        raise errors.StorageError(
            f"a {type(tree).__name__} would not come back as it is",
            where=at,
            why="trees are written as dictionaries (keys: text or whole numbers), lists and tuples",
            fix="convert it first: flax.core.unfreeze for a FrozenDict, _asdict() for a "
            "NamedTuple; orbax keeps the state of an optimizer",
        )
    return leaf(tree, at)


def decode_tree(data: Json, leaf: LoadLeaf, *, extra: Sequence[Any] = (), at: str) -> Any:
    """The tree that :func:`encode_tree` wrote.

    Args:
      leaf: makes a leaf of its data.
      extra: the user's own formats, as for :func:`quantjax.storage.codec.decode`.

    Raises:
      StorageError: data that is none of a tree.

    >>> decode_tree({"dict": {"a": {"tuple": [1, None]}}}, lambda leaf, at: leaf, at="tree")
    {'a': (1, None)}
    """

    def inner(part: Json, at: str) -> Any:
        return decode_tree(part, leaf, extra=extra, at=at)

    if data is None:
        return None
    if not isinstance(data, dict) or len(data) != 1:
        return leaf(data, at)
    ((word, body),) = data.items()
    if word in (LIST, TUPLE) and isinstance(body, list):
        parts = [inner(part, f"{at}[{index}]") for index, part in enumerate(body)]
        return parts if word == LIST else tuple(parts)
    if word == DICT and isinstance(body, dict):
        return {key: inner(part, f"{at}/{key}") for key, part in body.items()}
    if word == ITEMS and isinstance(body, list) and all(map(_is_item, body)):
        _check_once([key for key, _ in body], at)
        return {key: inner(part, f"{at}/{key}") for key, part in body}
    if word == QPARAMS and isinstance(body, dict):
        check_keys(body, QParams._fields, at)
        check_there(body, at)
        return QParams(**{name: inner(part, f"{at}.{name}") for name, part in body.items()})
    if word in RECORDS and isinstance(body, dict):
        check_keys(body, RECORDS[word]._fields, at)
        return RECORDS[word](**{name: inner(part, f"{at}.{name}") for name, part in body.items()})
    if word == QTENSOR and isinstance(body, dict):
        check_keys(body, ("format", "dtype", "packing", "stored", QPARAMS), at)
        format = decode(body["format"], extra=extra, at=f"{at}.format")
        if not isinstance(format, Format):
            raise errors.StorageError(
                f"{format!r:.80} is no format", where=f"{at}.format", fix="write the file again"
            )
        packing = decode(body["packing"], extra=extra, at=f"{at}.packing")
        if not (packing is None or isinstance(packing, Packing)):
            raise errors.StorageError(
                f"{packing!r:.80} is no packing", where=f"{at}.packing", fix="write the file again"
            )
        stored = inner(body["stored"], f"{at}.stored")
        _check_codes(stored, format, packing, at)
        dtype = decode_dtype(body["dtype"], f"{at}.dtype")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise errors.StorageError(
                f"codes stand for {dtype.name} numbers",
                where=f"{at}.dtype",
                why="what is decoded is a float",
                fix='"dtype": "float32", or what the tensor was',
            )
        return QTensor(stored, inner({QPARAMS: body[QPARAMS]}, at), format, dtype, packing)
    return leaf(data, at)


def check_keys(data: Any, names: Sequence[str], at: str) -> None:
    """Raise ``StorageError`` unless ``data`` is an object with these keys and no others."""
    found = set(data) if isinstance(data, dict) else None
    if found != set(names):
        raise errors.StorageError(
            f"an object with the keys {', '.join(names)} should stand here",
            where=at,
            why=f"found {', '.join(sorted(found)) or 'none'}" if found is not None else "",
            fix="write the file again, or correct it where it was edited by hand",
        )


def _check_codes(stored: Any, format: Format, packing: Packing | None, at: str) -> None:
    """Raise unless codes lie as this format's do: read otherwise, they are other numbers."""
    own, found = np.dtype(format.storage_dtype), getattr(stored, "dtype", None)
    if packing is None:
        fits = found == own
    else:
        fits = (packing.bits, packing.dtype, found) == (format.code_bits, own, np.uint8)
    if not fits:
        raise errors.StorageError(
            f"codes are stored as {packing or getattr(stored, 'dtype', type(stored).__name__)}",
            where=at,
            why=f"those of {format.name} have {format.code_bits} bits and are {own.name}",
            fix="codes as qj.encode makes them; correct the file where it was edited by hand",
        )


def check_there(fields: Mapping[str, Any], at: str) -> None:
    """Raise ``StorageError`` where a field of ``QParams`` that has to hold an array is None."""
    for name in ("scale", "zero_point", "bits"):
        if fields[name] is None:
            raise errors.StorageError(
                f"there is no {name}", where=at, fix=f"an array; {name}=0.0 if it is none"
            )


def _check_once(keys: Sequence[Any], at: str) -> None:
    twice = [key for index, key in enumerate(keys) if key in keys[:index]]
    if twice:
        raise errors.StorageError(
            f"the key {twice[0]!r:.40} stands there twice", where=at, fix="write the file again"
        )


def _of(qparams: QParams) -> list[tuple[str, Any]]:
    return list(qparams._asdict().items())


def _is_item(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)
