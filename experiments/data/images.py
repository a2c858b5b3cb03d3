"""Sets of labelled images: idx files, files of records, and scikit-learn's digits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from experiments.data.files import find, in_folder, place, read
from experiments.data.formats import (
    Labels,
    Pixels,
    class_labels,
    parse_idx,
    parse_records,
    read_members,
    unzipped,
)
from experiments.data.sources import IdxSource, RecordSource

DIGITS_MAXIMUM = 16  # of a pixel of scikit-learn's digits, which count dots in blocks of 4 × 4


class ImageSet(NamedTuple):
    """Images ``(n, h, w, c)``, uint8 in 0..``maximum``; labels ``(n,)``, int32. All read-only.

    Integers, because they are exact and a quarter of float32; :func:`unit` makes floats of a batch.

    Attributes:
      maximum: what a white pixel has: 255, and 16 in the digits.
      classes: labels are smaller than this.
      digest: of the four arrays; of the digits, the one of :class:`experiments.digits.data.Digits`.
    """

    train_images: Pixels
    train_labels: Labels
    test_images: Pixels
    test_labels: Labels
    maximum: int
    classes: int
    digest: str


def unit(images: Pixels, maximum: int) -> npt.NDArray[np.float32]:
    """The images as float32 in 0..1.

    >>> unit(np.array([0, 51, 255], np.uint8), 255).tolist()
    [0.0, 0.20000000298023224, 1.0]
    """
    return images.astype(np.float32) / np.float32(maximum)


def load_idx(
    source: IdxSource, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> ImageSet:
    """A set of four gzipped idx files; in a folder too they are checked against their checksums.

    Raises:
      DataUnavailableError: neither folder nor mirror has it.
      DataFileError: a file has another checksum, header, size, or a label out of range.
    """
    parts = (
        (source.train_images, (source.train_count, *source.shape)),
        (source.train_labels, (source.train_count,)),
        (source.test_images, (source.test_count, *source.shape)),
        (source.test_labels, (source.test_count,)),
    )
    layout = [file.path for file, _ in parts]
    at = place(source.name, layout, data_dir=data_dir, cache_dir=cache_dir)
    paths = [(find(file, at), shape) for file, shape in parts]
    arrays = [parse_idx(unzipped(path), shape, str(path)) for path, shape in paths]
    train, test = (
        (images[..., None], class_labels(labels, source.classes, source.name))
        for images, labels in (arrays[:2], arrays[2:])
    )
    return _image_set(train, test, source.classes)


def load_records(
    source: RecordSource, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> ImageSet:
    """A set of files of records: from a folder as they are, else out of the archive.

    The archive is checked against its checksum, and nothing of it is unpacked onto the disk. Files
    in a folder have no checksums of their own; their sizes and labels are checked.

    Raises:
      DataUnavailableError: neither folder nor mirror has it.
      DataFileError: the archive lacks a file, or a file has another size or a label out of range.
    """
    names = [f"{source.folder}/{name}" for name in (*source.train, *source.test)]
    at = place(source.name, names, data_dir=data_dir, cache_dir=cache_dir)
    if at.folder is None:
        archive = find(source.archive, at)
        files: Mapping[str, bytes] = read_members(archive, names)
        where = f"{archive}: "
    else:
        paths = {name: in_folder(name, at.folder, at) for name in names}
        files = {name: read(path) for name, path in paths.items()}
        where = f"{at.folder}/"
    parsed = [parse_records(files[name], source, where + name) for name in names]
    split = len(source.train)
    return _image_set(_joined(parsed[:split]), _joined(parsed[split:]), source.classes)


def load_digits(
    *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> ImageSet:
    """The digits of :mod:`experiments.digits.data`, in its split; they come with scikit-learn.

    Folder and cache are taken so that all loaders are called alike, and are not looked at.
    """
    from experiments.digits.data import load

    del data_dir, cache_dir
    digits = load()
    train, test = (
        (np.rint(images * np.float32(DIGITS_MAXIMUM)).astype(np.uint8), labels)
        for images, labels in (
            (digits.train_images, digits.train_labels),
            (digits.test_images, digits.test_labels),
        )
    )
    return _image_set(train, test, classes=10)._replace(
        maximum=DIGITS_MAXIMUM, digest=digits.digest
    )


def _joined(parts: Sequence[tuple[Pixels, Labels]]) -> tuple[Pixels, Labels]:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _image_set(train: tuple[Pixels, Labels], test: tuple[Pixels, Labels], classes: int) -> ImageSet:
    """The set of two halves, in arrays of their own that nobody can write to, with their digest."""
    images = [np.array(half[0], np.uint8, order="C") for half in (train, test)]
    labels = [np.array(half[1], np.int32, order="C") for half in (train, test)]
    digest = hashlib.sha256()
    for array in (images[0], labels[0], images[1], labels[1]):
        array.setflags(write=False)
        digest.update(array)
    return ImageSet(
        train_images=images[0],
        train_labels=labels[0],
        test_images=images[1],
        test_labels=labels[1],
        maximum=255,
        classes=classes,
        digest=digest.hexdigest()[:16],
    )
