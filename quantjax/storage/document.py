"""One JSON document a file, with its schema and version; written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantjax import errors

WIDTH = 100
SCHEMA, VERSION = "schema", "version"


def write_document(path: Path, body: Mapping[str, Any], *, schema: str, version: int) -> None:
    """Write ``body`` under its schema and version, atomically; an older file stays until then.

    Args:
      path: the file; missing folders above it are made.
      body: JSON data, without NaN and infinity.

    Raises:
      StorageError: a path that is a folder or cannot be written, or text that is no Unicode.
    """
    if os.path.isdir(path) or not path.name:  # Path.is_dir raises for a name that is too long
        raise errors.StorageError(
            "the path is a folder", where=path.name or ".", fix='a file: "quantization.json"'
        )
    text = render({SCHEMA: schema, VERSION: version, **body}) + "\n"
    unfinished = beside(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.StorageError(
            "a name holds half a character", where=path.name, why=str(error), fix="another name"
        ) from None
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """The system's errors within, as ``StorageError``: ``path`` could not be written."""
    try:
        yield
    except OSError as error:
        fix = "another path, or see to what stands in the way"
        if error.errno == errno.ENAMETOOLONG:
            fix = "a name of at most 200 bytes"
        elif isinstance(error, FileExistsError | NotADirectoryError):
            fix = "a path whose folders are no files"
        raise errors.StorageError(
            "the path cannot be written",
            where=path.name[:80],
            why=f"{error.strerror or error}, in the folder {str(path.parent)[:160]}",
            fix=fix,
        ) from error


def read_document(path: Path, *, schema: str, version: int) -> dict[str, Any]:
    """What :func:`write_document` was given.

    Args:
      version: the newest that the caller reads.

    Raises:
      StorageError: no file that can be read, no JSON (one that was cut short, for instance),
        another schema, or a newer version.
    """
    where = path.name
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise errors.StorageError(
            "there is no such file", where=where, fix="check the path"
        ) from None
    except OSError as error:
        raise errors.StorageError(
            "the file cannot be read",
            where=where[:80],
            why=error.strerror or str(error),
            fix="check the path, and who may read it",
        ) from error
    except (ValueError, RecursionError) as error:
        raise errors.StorageError(
            "the file is no JSON document",
            where=where,
            why=f"{error}; it may have been cut short, or be a file of another kind",
            fix="write it again, or correct it where it was edited by hand",
        ) from None
    found = data.pop(SCHEMA, None) if isinstance(data, dict) else None
    if found != schema:
        raise errors.StorageError(
            f"the file is no {schema}",
            where=where,
            why=f'its "{SCHEMA}" is {found!r}' if found else f'it has no "{SCHEMA}"',
            fix="another file, or the function that reads this one",
        )
    number = data.pop(VERSION, None)
    if type(number) is not int or number < 1:
        raise errors.StorageError(
            f"the file has no version: {number!r:.40}",
            where=where,
            fix=f'add "{VERSION}": {version}, if it was written by hand',
        )
    if number > version:
        raise errors.StorageError(
            f"the file has version {number} of {schema}",
            where=where,
            why=f"this quantjax reads versions up to {version}",
            fix="upgrade quantjax",
        )
    return dict(data)


def beside(path: Path) -> Path:
    """A name in the same folder that nothing else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def render(value: Any, *, indent: int = 0, used: int = 0) -> str:
    """JSON text in which short things stand on one line and lists of numbers fill theirs.

    Args:
      indent: of the line that the value begins in.
      used: columns of that line that are taken.

    >>> print(render({"type": "PerGroup", "size": 64}))
    {"type": "PerGroup", "size": 64}
    >>> print(render({"low": [0.25] * 9, "name": "x" * 50}))
    {
      "low": [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25],
      "name": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
    }
    """
    if not isinstance(value, dict | list) or not value:
        return _flat(value)
    inner = indent + 2
    if isinstance(value, dict):
        keys = [f"{_flat(key)}: " for key in value]
        parts = [
            key + render(item, indent=inner, used=inner + len(key))
            for key, item in zip(keys, value.values(), strict=True)
        ]
        opening, closing = "{}"
    else:
        are_numbers = set(map(type, value)) <= {int, float}
        parts = (
            _flat(value)[1:-1].split(", ")
            if are_numbers
            else [render(item, indent=inner, used=inner) for item in value]
        )
        opening, closing = "[]"
    line = f"{opening}{', '.join(parts)}{closing}"
    if "\n" not in line and used + len(line) < WIDTH:  # one column is left for a comma
        return line
    margin = "\n" + " " * inner
    if not any(isinstance(item, dict | list) for item in value) and isinstance(value, list):
        rows = _filled(parts, WIDTH - inner)
    else:
        rows = [f"{part}," for part in parts]
    return f"{opening}{margin}{margin.join(rows)[:-1]}\n{' ' * indent}{closing}"


def _flat(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _filled(parts: list[str], width: int) -> list[str]:
    """The parts, each with its comma, in as few lines as they need."""
    rows, row = [], ""
    for part in parts:
        if row and len(row) + len(part) + 2 > width:
            rows.append(row)
            row = ""
        row += f"{' ' if row else ''}{part},"
    return [*rows, row]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice in one object")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")
