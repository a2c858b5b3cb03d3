"""The file formats of image sets: bytes to arrays, with every count and header checked."""

from __future__ import annotations

import gzip
import math
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.data.errors import DataFileError
from experiments.data.files import read
from experiments.data.sources import RecordSource

IDX_UNSIGNED_BYTE = 0x08

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]


def unzipped(path: Path) -> bytes:
    """The content of a gzip file.

    Raises:
      DataFileError: it is none, or was cut short.
    """
    try:
        return gzip.decompress(read(path))
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def parse_idx(data: bytes, shape: tuple[int, ...], where: str) -> Pixels:
    """The array of an idx file of unsigned bytes.

    The header is two zero bytes, the type, the number of dimensions, then each dimension as a
    big-endian uint32.

    Raises:
      DataFileError: another type, other dimensions than ``shape``, or too few or many bytes.

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), (2,), "two labels").tolist()
    [7, 9]
    """
    magic = bytes([0, 0, IDX_UNSIGNED_BYTE, len(shape)])
    expected = magic + b"".join(size.to_bytes(4, "big") for size in shape)
    header = data[: len(expected)]
    if header[:4] != magic:
        raise DataFileError(
            f"not an idx file of unsigned bytes in {len(shape)} dimensions",
            where=where,
            why=f"its magic number is {header[:4].hex() or 'missing'} instead of {magic.hex()}",
            fix="fetch the file again; images and labels may have changed places",
        )
    if header != expected:
        sizes = [int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)]
        raise DataFileError(
            f"an idx file of shape {tuple(sizes)} instead of {shape}",
            where=where,
            fix="fetch the file again, or correct the counts of the source",
        )
    if len(data) != len(expected) + math.prod(shape):
        raise DataFileError(
            "an idx file that was cut short or goes on after its end",
            where=where,
            why=f"{len(data) - len(expected)} bytes instead of {math.prod(shape)} for {shape}",
            fix="fetch the file again",
        )
    return np.frombuffer(data, np.uint8, offset=len(expected)).reshape(shape)


def read_members(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Files of a gzipped tar archive, by name.

    Raises:
      DataFileError: it is no such archive, was cut short, or lacks one of them.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name in names else None
                if content is not None:
                    found[member.name] = content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    if missing := [name for name in names if name not in found]:
        raise DataFileError(
            f"an archive without {', '.join(missing)}",
            where=str(path),
            fix="delete it, so that it is fetched again, or correct the names of the source",
        )
    return found


def parse_records(data: bytes, source: RecordSource, where: str) -> tuple[Pixels, Labels]:
    """Images and labels of one file of records.

    Raises:
      DataFileError: another size than the source asks for, or a label out of range.
    """
    height, width, channels = source.shape
    record = 1 + math.prod(source.shape)
    if len(data) != source.images_each * record:
        raise DataFileError(
            f"{len(data)} bytes are not {source.images_each} records of {record} bytes",
            where=where,
            fix="fetch the file again, the binary version",
        )
    rows = np.frombuffer(data, np.uint8).reshape(source.images_each, record)
    planes = rows[:, 1:].reshape(source.images_each, channels, height, width)
    return planes.transpose(0, 2, 3, 1), class_labels(rows[:, 0], source.classes, where)


def class_labels(labels: Pixels, classes: int, where: str) -> Labels:
    """The labels as int32.

    Raises:
      DataFileError: one of them is not below ``classes``.
    """
    if labels.max(initial=0) >= classes:
        raise DataFileError(
            f"label {labels.max()} in a set of {classes} classes",
            where=where,
            fix="fetch the file again",
        )
    return labels.astype(np.int32)


def _unreadable(path: Path, error: Exception) -> DataFileError:
    return DataFileError(
        f"{path.name} cannot be unpacked",
        where=str(path),
        why=f"{type(error).__name__}: {error}",
        fix="delete it and fetch it again",
    )
