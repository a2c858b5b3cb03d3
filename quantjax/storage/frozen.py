"""Frozen parameter trees in a folder: arrays by orbax, everything else in one readable JSON file.

A folder of version 1 holds ``quantjax.json``, an object with the keys ``schema``
(``"quantjax.params"``), ``version``, ``arrays`` (dtype and shape of each) and ``tree`` (the
structure, whose leaves are ``{"array": number}``), and the orbax checkpoint ``arrays``, a flat
dictionary ``{"0": array, "1": array, ...}``.
"""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from quantjax import errors
from quantjax.printing import shape_text
from quantjax.storage.arrays import known_array
from quantjax.storage.codec import Json, decode_dtype
from quantjax.storage.document import beside, read_document, write_document, writing
from quantjax.storage.tree import check_keys, decode_tree, encode_tree

PARAMS_SCHEMA = "quantjax.params"
PARAMS_VERSION = 1
DOCUMENT, ARRAYS = "quantjax.json", "arrays"
ATTEMPTS, PAUSE_SECONDS = 50, 0.01  # while another process replaces what is read


def save_params(path: str | os.PathLike[str], qparams: PyTree, *, overwrite: bool = False) -> None:
    """Write a tree of arrays, ``QTensor`` or statistics to a folder, whole or not at all.

    Codes are stored one an entry, in their container's dtype. One process writes; arrays have to be
    addressable from it, and come back on the default device of whoever loads them.

    Args:
      path: the folder, which must not exist; folders above it are made.
      qparams: dictionaries, lists and tuples of arrays and ``QTensor``, from ``qj.quantize_params``
        for instance; or the state of ``qj.observe``, so that what was collected once stays.
      overwrite: replace a folder that :func:`save_params` wrote, once the new one is complete.

    Raises:
      StorageError: the folder exists or cannot be written, or a leaf that is no array of numbers.

    >>> import pathlib, tempfile
    >>> tree = {"bias": jnp.ones(2, jnp.bfloat16)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_params(pathlib.Path(folder) / "params", tree)
    ...     load_params(pathlib.Path(folder) / "params")
    {'bias': Array([1, 1], dtype=bfloat16)}
    """
    path = Path(path).absolute()
    _check_free(path, overwrite=overwrite)
    arrays: list[np.ndarray] = []

    def add(leaf: Any, at: str) -> Json:
        arrays.append(known_array(leaf, at))
        return {"array": len(arrays) - 1}

    tree = encode_tree(qparams, add, at="params")
    listed = [{"dtype": array.dtype.name, "shape": list(array.shape)} for array in arrays]
    stored = {str(i): _as_stored(array) for i, array in enumerate(arrays) if array.size}
    unfinished = beside(path)
    try:
        with writing(path):
            unfinished.mkdir(parents=True)
            if stored:  # orbax has no empty checkpoints and no arrays without entries
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                    checkpointer.save(unfinished / ARRAYS, args=ocp.args.PyTreeSave(stored))
            write_document(
                unfinished / DOCUMENT,
                {"tree": tree, "arrays": listed},
                schema=PARAMS_SCHEMA,
                version=PARAMS_VERSION,
            )
            _put_in_place(unfinished, path, overwrite=overwrite)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_params(path: str | os.PathLike[str], *, extra: Sequence[Any] = ()) -> PyTree:
    """Read the tree that :func:`save_params` wrote: the same structure, dtypes and bits.

    Args:
      path: the folder.
      extra: the user's own formats that a ``QTensor`` has, classes or values.

    Returns:
      The tree, with JAX arrays for leaves: the one that was there when it was begun, or one that
      replaced it in the meantime, and never a part of each.

    Raises:
      StorageError: no such folder, another kind of folder, a newer version, arrays that are missing
        or damaged, a format that is not known, or 64-bit arrays where JAX holds 32 bits.
    """
    path = Path(path).absolute()
    failure = errors.StorageError(
        "the folder is replaced over and over while it is read",
        where=path.name,
        fix="load it when nothing saves to it",
    )
    for _ in range(ATTEMPTS):
        before = _identity(path)
        try:
            found = _loaded(path, extra)
        except errors.StorageError as error:
            failure = error
            # Replaced meanwhile, or between two names right now: by a writer that goes on.
            if before is not None and _identity(path) == before:
                raise
            if before is None and not _left_aside(path):
                raise
        else:
            if before is not None and _identity(path) == before:
                return found
        time.sleep(PAUSE_SECONDS)
    raise failure


def _identity(path: Path) -> tuple[int, bytes] | None:
    """Of the document that is there, by what it says and since when; None without one."""
    try:
        return os.stat(path / DOCUMENT).st_mtime_ns, (path / DOCUMENT).read_bytes()
    except OSError:
        return None


def _loaded(path: Path, extra: Sequence[Any]) -> PyTree:
    if not os.path.isfile(path / DOCUMENT):  # Path.is_file raises for a name that is too long
        raise errors.StorageError(
            f"this is no folder that {save_params.__name__} wrote",
            where=path.name[:80],
            why=f"it has no {DOCUMENT}" if os.path.isdir(path) else "there is no such folder",
            fix=_left_aside(path) or "check the path",
        )
    data = read_document(path / DOCUMENT, schema=PARAMS_SCHEMA, version=PARAMS_VERSION)
    check_keys(data, ("tree", "arrays"), f"{path.name}/{DOCUMENT}")
    arrays = _read_arrays(path, data["arrays"])

    def take(data: Json, at: str) -> Any:
        check_keys(data, ("array",), at)
        number = data["array"]
        if type(number) is not int or not 0 <= number < len(arrays):
            raise errors.StorageError(
                f"there is no array {number!r:.40}", where=at, fix="save the parameters again"
            )
        return arrays[number]

    return decode_tree(data["tree"], take, extra=extra, at=f"{path.name}: params")


def _check_free(path: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    ours = os.path.isfile(path / DOCUMENT) and not path.is_symlink()
    if not overwrite or not ours:
        raise errors.StorageError(
            "the path exists already",
            where=path.name,
            why="" if ours else f"it is no folder that {save_params.__name__} wrote, so it stays",
            fix="overwrite=True, or another path" if ours else "another path",
        )


def _put_in_place(unfinished: Path, path: Path, *, overwrite: bool) -> None:
    """Give the folder its name; an older one of that name moves aside and is removed after.

    Another writer may have come in the meantime: what may not be overwritten stays.
    """
    _check_free(path, overwrite=overwrite)
    if not path.exists():
        try:
            os.rename(unfinished, path)  # fails on a folder that is not empty
        except OSError:
            _check_free(path, overwrite=False)
            raise
        return
    aside = beside(path)
    try:
        os.rename(path, aside)
        os.rename(unfinished, path)
    except BaseException:  # an interrupt too, which may come right behind either
        if not path.exists():
            os.rename(aside, path)
        elif aside.exists():
            shutil.rmtree(aside)
        raise
    shutil.rmtree(aside)


def _left_aside(path: Path) -> str:
    """What to do with the folder that a save left which was killed between two renames; or ""."""
    try:
        left = sorted(path.parent.glob(f".{glob.escape(path.name)}.*.tmp/{DOCUMENT}"))
    except OSError:  # a name that no folder has
        left = []
    if not left:
        return ""
    return f"rename {left[-1].parent.name} beside it, unless a save is still at work on it"


def _as_stored(array: np.ndarray) -> np.ndarray:
    """The array, or its bytes where checkpoints may lack the dtype: float8, int4 and the like."""
    if array.dtype.kind in "biufc":
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    return array if array.dtype == jnp.bfloat16 else array.view(np.uint8)


def _read_arrays(path: Path, listed: Json) -> list[Any]:
    where = f"{path.name}/{DOCUMENT}: arrays"
    if not isinstance(listed, list):
        raise errors.StorageError("no list of arrays", where=where, fix="save the parameters again")
    empty = [_empty(spec, f"{where}[{number}]") for number, spec in enumerate(listed)]
    wanted = {str(i): _as_stored(array) for i, array in enumerate(empty) if array.size}
    stored = _restore(path / ARRAYS, wanted) if wanted else {}
    loaded = []
    for number, array in enumerate(empty):
        values = stored[str(number)].view(array.dtype) if array.size else array
        leaf = jnp.asarray(values)
        if leaf.dtype != array.dtype:
            raise errors.StorageError(
                f"JAX holds {array.dtype} numbers as {leaf.dtype}",
                where=f"{path.name}, array {number} of shape {shape_text(array.shape)}",
                fix="jax.config.update('jax_enable_x64', True)",
            )
        loaded.append(leaf)
    return loaded


def _empty(spec: Json, at: str) -> np.ndarray:
    """An array of the dtype and shape that are listed, which takes no memory."""
    check_keys(spec, ("dtype", "shape"), at)
    shape = spec["shape"]
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise errors.StorageError(
            f"{shape!r:.40} is no shape", where=at, fix="save the parameters again"
        )
    one = np.zeros((), decode_dtype(spec["dtype"], f"{at}.dtype"))
    try:
        return np.broadcast_to(one, shape)
    except ValueError as error:
        raise errors.StorageError(
            f"{shape!r:.80} is no shape",
            where=at,
            why=str(error),
            fix="copy the folder again, or save the parameters again",
        ) from None


def _restore(folder: Path, wanted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    where = f"{folder.parent.name}/{folder.name}"
    if not folder.is_dir():
        raise errors.StorageError(
            "the folder's arrays are missing", where=where, fix="save the parameters again"
        )
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise errors.StorageError(
            "the arrays cannot be read",
            where=where,
            why=str(error).partition("\n")[0][:200],
            fix="copy the folder again, or save the parameters again",
        ) from None
    for name, array in wanted.items():
        other = found.get(name)
        if other is None or (other.shape, other.dtype) != (array.shape, array.dtype):
            raise errors.StorageError(
                f"array {name} is not the one that is listed",
                where=where,
                why=f"listed: {array.dtype} of shape {shape_text(array.shape)}",
                fix="copy the folder again, or save the parameters again",
            )
    return dict(found)
