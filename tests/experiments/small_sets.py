"""A small set of every kind: its arrays, the files that hold it, and its description."""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.images import load_idx, load_records
from experiments.data.sources import (
    IdxSource,
    RecordSource,
    RemoteFile,
    StoriesSource,
    TextSource,
    mirrored,
)
from experiments.data.texts import load_stories, load_text

_RNG = np.random.default_rng(0)
GRAY = {n: _RNG.integers(0, 256, (n, 5, 4), np.uint8) for n in (7, 3)}
GRAY_LABELS = {n: _RNG.integers(0, 10, n, np.uint8) for n in (7, 3)}
COLOR = _RNG.integers(0, 256, (3, 2, 4, 5, 3), np.uint8)  # three files of two images
COLOR_LABELS = _RNG.integers(0, 10, (3, 2), np.uint8)
TEXT = "First Citizen:\r\nSpeak — ö.\n\n"
STORIES = ["One day.", "The cat\nsat.", "Ende gut: ä."]
STORIES_TEXT = "\nOne day.\n<|endoftext|>\nThe cat\nsat.<|endoftext|> <|endoftext|>Ende gut: ä.\n"


def md5(data: bytes) -> str:
    return f"md5:{hashlib.md5(data).hexdigest()}"


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def idx(array: np.ndarray) -> bytes:
    """The idx file of an array of bytes, written from the format's description."""
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def records(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Records of a label and the planes of one image each, pixel by pixel."""
    data = bytearray()
    for image, label in zip(images, labels, strict=True):
        data.append(label)
        for channel in range(image.shape[2]):
            for row in image:
                data += bytes(int(pixel[channel]) for pixel in row)
    return bytes(data)


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return gzipped(buffer.getvalue())


IDX_FILES = {
    "train-images.gz": gzipped(idx(GRAY[7])),
    "train-labels.gz": gzipped(idx(GRAY_LABELS[7])),
    "test-images.gz": gzipped(idx(GRAY[3])),
    "test-labels.gz": gzipped(idx(GRAY_LABELS[3])),
}
RECORD_FILES = {
    f"small-bin/{name}": records(COLOR[i], COLOR_LABELS[i])
    for i, name in enumerate(("batch_1.bin", "batch_2.bin", "test.bin"))
}
ARCHIVE = tar({"small-bin/readme.html": b"<html>", **RECORD_FILES})


def idx_source(*bases: str, files: dict[str, bytes] = IDX_FILES) -> IdxSource:
    remote = [mirrored("gray", name, md5(data), bases) for name, data in files.items()]
    return IdxSource("small-gray", *remote, train_count=7, test_count=3, shape=(5, 4), classes=10)


def record_source(*bases: str, archive: bytes = ARCHIVE) -> RecordSource:
    return RecordSource(
        name="small-color",
        archive=RemoteFile("small.tar.gz", md5(archive), tuple(b + "small.tar.gz" for b in bases)),
        folder="small-bin",
        train=("batch_1.bin", "batch_2.bin"),
        test=("test.bin",),
        images_each=2,
        shape=(4, 5, 3),
        classes=10,
    )


def text_source(*bases: str, data: bytes = TEXT.encode()) -> TextSource:
    return TextSource("small-text", mirrored("text/small", "input.txt", md5(data), bases))


def stories_source(*bases: str, data: bytes = STORIES_TEXT.encode()) -> StoriesSource:
    file = mirrored(
        "text/stories", "valid.txt", f"sha256:{hashlib.sha256(data).hexdigest()}", bases
    )
    return StoriesSource("small-stories", file, "<|endoftext|>")


class Kind(NamedTuple):
    """One kind of set.

    Attributes:
      source: its description, from the addresses of mirrors.
      served: what a mirror holds, by name.
      folder: what a data folder holds, by path.
    """

    load: Callable[..., Any]
    source: Callable[..., Any]
    served: dict[str, bytes]
    folder: dict[str, bytes]

    @property
    def cached(self) -> list[str]:
        """What is in the cache after a download, by path."""
        return ["small.tar.gz"] if self.load is load_records else sorted(self.folder)

    def write(self, folder: Path, **changed: bytes) -> Path:
        """Write the data folder; files named in `changed` by their last part have other bytes."""
        for path, data in self.folder.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(changed.get(target.name.partition(".")[0], data))
        return folder


KINDS = {
    "idx": Kind(
        load_idx, idx_source, IDX_FILES, {f"gray/{name}": data for name, data in IDX_FILES.items()}
    ),
    "records": Kind(load_records, record_source, {"small.tar.gz": ARCHIVE}, RECORD_FILES),
    "text": Kind(
        load_text,
        text_source,
        {"input.txt": TEXT.encode()},
        {"text/small/input.txt": TEXT.encode()},
    ),
    "stories": Kind(
        load_stories,
        stories_source,
        {"valid.txt": STORIES_TEXT.encode()},
        {"text/stories/valid.txt": STORIES_TEXT.encode()},
    ),
}


def same(a: Any, b: Any) -> bool:
    """Equal in every field, dtypes included."""
    return type(a) is type(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
        for x, y in zip(a, b, strict=True)
    )
