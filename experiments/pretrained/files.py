"""Where files of weights are: in the folders where the data sets are, checked before they are read.

Errors are those of :mod:`experiments.data`: a file that is missing says how to get it.
"""

from __future__ import annotations

from pathlib import Path

from experiments.data.errors import DataFileError, DataUnavailableError
from experiments.data.files import ENVIRONMENT, is_there, named_by, named_folder


def in_data_folder(name: str, *, data_dir: Path | str | None, how: str) -> Path:
    """The path of a file that no mirror serves: in ``data_dir``, else where QUANTJAX_DATA says.

    Args:
      name: below the folder, with ``/`` between the parts.
      how: how to make the file, for the error.

    Raises:
      DataUnavailableError: no folder is named, there is no such folder, it lacks the file, or it
        cannot be looked for.
    """
    folder = named_folder(data_dir)
    if folder is None:
        raise DataUnavailableError(
            f"{name}: no folder is named that holds it",
            why="there is no mirror from which it could be downloaded",
            fix=f"{how}; name the folder by --data-dir (data_dir=) or {ENVIRONMENT}",
        )
    path = folder / name
    if not is_there(path, Path.is_file):
        raise DataUnavailableError(
            f"{name} is missing",
            where=str(folder),
            why=f"the folder is {named_by(data_dir)}",
            fix=how,
        )
    return path


def refuse(path: Path, what: str, why: str) -> DataFileError:
    """The error for a file that is there and is not what it should be."""
    return DataFileError(
        f"{path.name} {what}", where=str(path), why=why, fix="delete it and copy it again"
    )
