"""Files from a folder, or from mirrors through a cache; each is checked before anyone reads it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.data.errors import DataFileError, DataUnavailableError
from experiments.data.sources import RemoteFile

ENVIRONMENT = "QUANTJAX_DATA"
TIMEOUT_SECONDS = 30  # without a byte, not for the whole file
CHUNK_BYTES = 1 << 18


class Place(NamedTuple):
    """Where the files of one set are looked for.

    Attributes:
      folder: holds them in the official layout; None to download.
      cache: keeps what was downloaded; None for the system's own cache folder.
      name: of the set, for messages.
      layout: the files that a folder has to hold, for messages.
    """

    folder: Path | None
    cache: Path | None
    name: str
    layout: tuple[str, ...]


def place(
    name: str,
    layout: Sequence[str],
    *,
    data_dir: Path | str | None,
    cache_dir: Path | str | None,
) -> Place:
    """The place of a set: ``data_dir``, else the folder that ``QUANTJAX_DATA`` names, else mirrors.

    With a folder nothing is downloaded, even where the folder lacks a file. Empty text counts as
    unset, of the argument and of ``QUANTJAX_DATA``.

    Raises:
      DataUnavailableError: there is no such folder, or it cannot be looked for.
    """
    folder = named_folder(data_dir)
    if folder is not None and not is_there(folder, Path.is_dir):
        raise DataUnavailableError(
            f"{name}: the data folder does not exist",
            where=str(folder),
            why=named_by(data_dir),
            fix=two_ways(layout),
        )
    return Place(folder, None if cache_dir is None else Path(cache_dir), name, tuple(layout))


def named_folder(data_dir: Path | str | None) -> Path | None:
    """``data_dir``, else the folder that ``QUANTJAX_DATA`` names, which may not be there."""
    given = data_dir or os.environ.get(ENVIRONMENT, "")
    return Path(os.path.expanduser(given)) if given else None  # an unknown ~name stays as it is


def named_by(data_dir: Path | str | None) -> str:
    """Who named the folder, for messages."""
    return f"named by {'data_dir' if data_dir else ENVIRONMENT}"


def is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Whether it is, as ``Path.is_file`` or ``Path.is_dir`` says.

    Raises:
      DataUnavailableError: it cannot be looked for.
    """
    try:
        return kind(path)
    except OSError as error:
        raise unreadable(path, error) from error


def two_ways(layout: Sequence[str]) -> str:
    """The two ways to a set, as advice.

    >>> two_ways(["a.gz", "b.gz"])
    'put a.gz, b.gz into a folder and name it by --data-dir (data_dir=) or QUANTJAX_DATA;
     or leave both unset, with a network, to download'
    """
    return (
        f"put {', '.join(layout)} into a folder and name it by --data-dir (data_dir=) or "
        f"{ENVIRONMENT}; or leave both unset, with a network, to download"
    )


def find(file: RemoteFile, at: Place) -> Path:
    """The path of a file whose checksum has been verified.

    Raises:
      DataUnavailableError: the folder lacks it, or no mirror served it.
      DataFileError: the folder's file has another checksum.
    """
    if at.folder is None:
        return download(file, at)
    path = in_folder(file.path, at.folder, at)
    check(path, file.checksum)
    return path


def in_folder(name: str, folder: Path, at: Place) -> Path:
    """The path of a file in a data folder, unchecked.

    Raises:
      DataUnavailableError: there is no such file, or it cannot be looked for.
    """
    path = folder / name
    if not is_there(path, Path.is_file):
        raise DataUnavailableError(
            f"{at.name}: {name} is missing",
            where=str(folder),
            why="nothing is downloaded where a folder is named",
            fix=two_ways(at.layout),
        )
    return path


def unreadable(path: Path, error: OSError) -> DataUnavailableError:
    """Of a file or folder that is there, and may not be read."""
    return DataUnavailableError(
        f"{path.name} cannot be read",
        where=str(path),
        why=error.strerror or str(error),
        fix="see who may read it, or name another folder by --data-dir (data_dir=)",
    )


def read(path: Path) -> bytes:
    """The content of a file.

    Raises:
      DataUnavailableError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def check(path: Path, checksum: str) -> None:
    """Compare a file with a checksum.

    Raises:
      DataFileError: they differ, as for a file that was cut short.
      DataUnavailableError: the file cannot be read.
    """
    algorithm, _, expected = checksum.partition(":")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(
                file, lambda: hashlib.new(algorithm, usedforsecurity=False)
            ).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    if found != expected.lower():
        raise DataFileError(
            f"{path.name} is damaged, or another file",
            where=str(path),
            why=f"its {algorithm} is {found} instead of {expected}, {path.stat().st_size} bytes",
            fix="delete it and copy or download it again",
        )


def download(file: RemoteFile, at: Place) -> Path:
    """The path of a file in the cache, fetched from the first mirror that serves the right one.

    A cached file is hashed on each call and fetched anew where it is damaged. A download goes into
    a temporary file beside its target and is renamed once its checksum holds, so a failed one
    leaves nothing. Proxies are those of the environment, as the ``requests`` library reads it.

    Raises:
      DataUnavailableError: every mirror failed, the cache cannot be written, or pooch is missing.
    """
    try:
        import pooch
    except ImportError as missing:
        raise DataUnavailableError(
            f"{at.name}: downloads need {missing.name}",
            fix='pip install "quantjax[experiments]"',
        ) from missing
    root = at.cache if at.cache is not None else pooch.os_cache("quantjax") / "data"
    target = root / file.path
    try:
        target = root.expanduser() / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # a RuntimeError is a ~name that nobody has
        raise DataUnavailableError(
            f"{at.name}: the cache cannot be written",
            where=str(target.parent),
            why=str(error),
            fix="another cache_dir=, or a folder that holds the set as --data-dir",
        ) from error
    # Asked for unpacked: requests would undo a gzip encoding, and the checksum is of the .gz file.
    downloader = pooch.HTTPDownloader(
        chunk_size=CHUNK_BYTES, timeout=TIMEOUT_SECONDS, headers={"Accept-Encoding": "identity"}
    )
    reasons = []
    for url in file.urls:
        try:
            pooch.retrieve(
                url,
                known_hash=file.checksum,
                fname=target.name,
                path=target.parent,
                downloader=downloader,
            )
        except (
            OSError,
            ValueError,
        ) as error:  # requests' errors are OSErrors, a hash is a ValueError
            reasons.append(f"{url}: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            return target
    raise DataUnavailableError(
        f"{at.name}: no mirror served {target.name}",
        where=str(target),
        why="; ".join(reasons) or "no mirror is known",
        fix=two_ways(at.layout),
    )
