"""Whether a folder's files are still those that were written: a list of their sizes and digests.

Asked to read damaged arrays, orbax fails in several threads at once, and those that come second
complain on the terminal long after; so it is only asked once the files are known to be whole.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from quantjax.errors import StorageError
from quantjax.storage.document import read_document, write_document

DOCUMENT = "files.json"
SCHEMA, VERSION = "experiments.training.files", 1


def seal(folder: Path) -> None:
    """List the files of a folder in ``files.json`` there."""
    files = {path: [size, digest] for path, (size, digest) in _found(folder).items()}
    write_document(folder / DOCUMENT, {"files": files}, schema=SCHEMA, version=VERSION)


def check_sealed(folder: Path) -> None:
    """Raise ``ValueError`` where a file is absent or another one than when the folder was sealed.

    A folder without a seal passes: its writer was killed after the last file and before the list.
    Files that came later do not matter.
    """
    if not (folder / DOCUMENT).is_file():
        return
    try:
        listed = read_document(folder / DOCUMENT, schema=SCHEMA, version=VERSION)["files"]
    except StorageError as error:
        raise ValueError(f"{DOCUMENT}: {error.what}") from None
    found = _found(folder)
    for path, (size, digest) in listed.items():
        if path not in found:
            raise ValueError(f"{path} is missing")
        if found[path] != (size, digest):
            raise ValueError(
                f"{path} has {found[path][0]} bytes of {size}"
                if found[path][0] != size
                else f"{path} is not what was written"
            )


def _found(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, _digest(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / DOCUMENT
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
