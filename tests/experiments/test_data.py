"""What the loaders return, from a folder of small files of every kind, and what they refuse."""

import re
from pathlib import Path

import numpy as np
import pytest

from experiments.data import (
    DataFileError,
    DataUnavailableError,
    ImageSet,
    SetName,
    load,
    unit,
)
from experiments.data.formats import parse_idx, parse_records, read_members
from experiments.data.images import load_digits, load_idx, load_records
from experiments.data.texts import load_stories, load_text, split_stories
from experiments.digits import data as digits_data
from tests.experiments.small_sets import (
    ARCHIVE,
    COLOR,
    COLOR_LABELS,
    GRAY,
    GRAY_LABELS,
    IDX_FILES,
    KINDS,
    RECORD_FILES,
    STORIES,
    STORIES_TEXT,
    TEXT,
    gzipped,
    idx,
    idx_source,
    md5,
    record_source,
    same,
    stories_source,
    tar,
    text_source,
)

pytestmark = pytest.mark.usefixtures("bare")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def gray(tmp_path: Path, **changed: np.ndarray) -> ImageSet:
    """The small gray set with other arrays, checksums of those included."""
    files = IDX_FILES | {
        f"{name.replace('_', '-')}.gz": gzipped(idx(array)) for name, array in changed.items()
    }
    folder = tmp_path / "gray"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return load_idx(idx_source(files=files), data_dir=tmp_path)


def test_idx_files_give_gray_images(tmp_path):
    loaded = gray(tmp_path)
    np.testing.assert_array_equal(loaded.train_images, GRAY[7][..., None])
    np.testing.assert_array_equal(loaded.train_labels, GRAY_LABELS[7])
    np.testing.assert_array_equal(loaded.test_images, GRAY[3][..., None])
    np.testing.assert_array_equal(loaded.test_labels, GRAY_LABELS[3])
    assert (loaded.maximum, loaded.classes) == (255, 10)


def test_records_give_color_images_with_channels_last(tmp_path):
    loaded = load_records(record_source(), data_dir=KINDS["records"].write(tmp_path))
    np.testing.assert_array_equal(loaded.train_images, COLOR[:2].reshape(4, 4, 5, 3))
    np.testing.assert_array_equal(loaded.train_labels, COLOR_LABELS[:2].reshape(4))
    np.testing.assert_array_equal(loaded.test_images, COLOR[2])
    np.testing.assert_array_equal(loaded.test_labels, COLOR_LABELS[2])
    assert (loaded.maximum, loaded.classes) == (255, 10)


@pytest.mark.parametrize("name", ["idx", "records"])
def test_images_are_bytes_and_labels_int32_in_arrays_that_stay_as_they_are(name, tmp_path):
    kind = KINDS[name]
    loaded = kind.load(kind.source(), data_dir=kind.write(tmp_path))
    for field in ARRAYS:
        array = getattr(loaded, field)
        assert array.dtype == (np.uint8 if field.endswith("images") else np.int32)
        assert array.ndim == (4 if field.endswith("images") else 1)
        assert array.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@EVERY_KIND
def test_two_loads_are_equal_and_the_digest_is_short_hex(kind, tmp_path):
    folder = kind.write(tmp_path)
    first, second = (kind.load(kind.source(), data_dir=folder) for _ in range(2))
    assert same(first, second)
    assert re.fullmatch(r"[0-9a-f]{16}", first.digest)


def test_the_digest_tells_any_change(tmp_path):
    images, labels = GRAY[3].copy(), GRAY_LABELS[3].copy()
    images[2, 4, 3] ^= 1
    labels[0] = (labels[0] + 1) % 10
    digests = {
        gray(tmp_path).digest,
        gray(tmp_path, test_images=images).digest,
        gray(tmp_path, test_labels=labels).digest,
    }
    assert len(digests) == 3


def test_unit_covers_zero_to_one_in_float32():
    everything = np.arange(256, dtype=np.uint8)
    floats = unit(everything, 255)
    assert floats.dtype == np.float32
    assert (floats[0], floats[-1]) == (0.0, 1.0)
    np.testing.assert_array_equal(floats, (everything / 255.0).astype(np.float32))


def test_digits_are_those_of_the_digits_study():
    loaded, original = load_digits(), digits_data.load()
    for field in ARRAYS:
        array = getattr(loaded, field)
        if field.endswith("images"):
            assert array.dtype == np.uint8
            array = unit(array, loaded.maximum)
        np.testing.assert_array_equal(array, getattr(original, field), strict=True)
    assert (loaded.digest, loaded.maximum, loaded.classes) == (original.digest, 16, 10)


def test_digits_need_no_folder(tmp_path):
    assert same(load_digits(data_dir=tmp_path / "nowhere", cache_dir=tmp_path), load_digits())


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "its magic number is missing instead of 00000803"),
        (b"\0\0", "its magic number is 0000 instead of 00000803"),
        (b"\0\0\x08\x01", "its magic number is 00000801"),  # labels in place of images
        (b"\0\0\x0d\x03", "its magic number is 00000d03"),  # floats
        (b"\x1f\x8b\x08\x00", "its magic number is 1f8b0800"),  # packed twice
        (b"<htm", "its magic number is 3c68746d"),
    ],
)
def test_wrong_magic(head, message):
    with pytest.raises(DataFileError, match=message) as caught:
        parse_idx(head, (2, 2, 2), "a/file.gz")
    assert "where: a/file.gz" in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 5, 4), (7, 4, 5), (7, 5, 5)])
def test_other_dimensions_than_the_source_says(shape):
    with pytest.raises(DataFileError, match=re.escape(f"of shape (7, 5, 4) instead of {shape}")):
        parse_idx(idx(GRAY[7]), shape, "file")


def test_a_header_that_breaks_off():
    with pytest.raises(DataFileError, match=re.escape("shape (7, 5)")):
        parse_idx(idx(GRAY[7])[:12], (7, 5, 4), "file")


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"])
def test_an_idx_file_of_another_length(change):
    with pytest.raises(DataFileError, match=r"(139|141) bytes instead of 140"):
        parse_idx(change(idx(GRAY[7])), (7, 5, 4), "file")


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzipped(idx(GRAY[7]))[:-30], gzipped(b"x" * 99)[:20] + b"\0" * 9],
    ids=["empty", "no gzip", "cut", "damaged"],
)
def test_a_gzip_file_that_cannot_be_unpacked(content, tmp_path):
    """With a checksum of its own, so that the checksum does not find it first."""
    files = IDX_FILES | {"train-images.gz": content}
    kind = KINDS["idx"]._replace(folder={f"gray/{name}": data for name, data in files.items()})
    with pytest.raises(DataFileError, match=r"cannot be unpacked|magic number is missing"):
        load_idx(idx_source(files=files), data_dir=kind.write(tmp_path))


def test_a_label_that_is_no_class(tmp_path):
    labels = GRAY_LABELS[3].copy()
    labels[1] = 10
    with pytest.raises(DataFileError, match="label 10 in a set of 10 classes"):
        gray(tmp_path, test_labels=labels)
    damaged = bytearray(RECORD_FILES["small-bin/test.bin"])
    damaged[0] = 255
    with pytest.raises(DataFileError, match="label 255"):
        parse_records(bytes(damaged), record_source(), "file")


@pytest.mark.parametrize("size", [0, 61, 121, 123, 183])
def test_records_of_another_size(size, tmp_path):
    folder = KINDS["records"].write(tmp_path, batch_2=bytes(size))
    with pytest.raises(DataFileError, match=f"{size} bytes are not 2 records of 61") as caught:
        load_records(record_source(), data_dir=folder)
    assert str(folder / "small-bin" / "batch_2.bin") in str(caught.value)


def test_an_archive_that_lacks_a_member(tmp_path):
    path = tmp_path / "small.tar.gz"
    path.write_bytes(tar({"small-bin/test.bin": b"x"}))
    assert read_members(path, ["small-bin/test.bin"]) == {"small-bin/test.bin": b"x"}
    with pytest.raises(DataFileError, match=r"without small-bin/batch_1\.bin, small-bin/b"):
        read_members(path, list(RECORD_FILES))


@pytest.mark.parametrize("content", [b"", b"no archive", ARCHIVE[: len(ARCHIVE) // 2]])
def test_an_archive_that_cannot_be_read(content, tmp_path):
    path = tmp_path / "small.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=r"small\.tar\.gz cannot be unpacked"):
        read_members(path, list(RECORD_FILES))


def test_a_text_keeps_its_line_ends(tmp_path):
    loaded = load_text(text_source(), data_dir=KINDS["text"].write(tmp_path))
    assert loaded.text == TEXT
    assert "\r\n" in loaded.text


@pytest.mark.parametrize("name", ["text", "stories"])
def test_text_that_is_no_utf8(name, tmp_path):
    kind, data = KINDS[name], "<|endoftext|> ä".encode("latin-1")
    path = next(iter(kind.folder))
    folder = kind._replace(folder={path: data}).write(tmp_path)
    with pytest.raises(DataFileError, match=r"not text in UTF-8\n.*\n.*at byte 14") as caught:
        kind.load(kind.source(data=data), data_dir=folder)
    assert str(folder / path) in str(caught.value)


def test_stories_of_all_files_in_the_order_of_their_names(tmp_path):
    folder = KINDS["stories"].write(tmp_path)
    alone = load_stories(stories_source(), data_dir=folder)
    assert alone.stories == STORIES
    (folder / "text/stories/a.txt").write_text("Before.<|endoftext|>", encoding="utf-8")
    (folder / "text/stories/z.txt").write_text("<|endoftext|>After.", encoding="utf-8")
    (folder / "text/stories/notes.md").write_text("not a story")
    loaded = load_stories(stories_source(), data_dir=folder)
    assert loaded.stories == ["Before.", *STORIES, "After."]
    assert loaded.digest != alone.digest


def test_where_one_story_ends_is_part_of_the_digest(tmp_path):
    digests = set()
    for i, text in enumerate(["ab<|endoftext|>c", "a<|endoftext|>bc"]):
        folder = KINDS["stories"].write(tmp_path / str(i), valid=text.encode())
        digests.add(load_stories(stories_source(), data_dir=folder).digest)
    assert len(digests) == 2


def test_a_folder_without_stories(tmp_path):
    (tmp_path / "text" / "stories").mkdir(parents=True)
    with pytest.raises(DataUnavailableError, match=r"there is no \.txt file") as caught:
        load_stories(stories_source(), data_dir=tmp_path)
    assert "text/stories/*.txt" in caught.value.fix


def test_a_file_without_separator_holds_no_stories(tmp_path):
    folder = KINDS["stories"].write(tmp_path, valid=b"<html>moved</html>")
    with pytest.raises(DataFileError, match=r"valid\.txt holds no stories"):
        load_stories(stories_source(), data_dir=folder)


def test_splitting_strips_and_drops_empty_stories():
    assert split_stories(STORIES_TEXT, "<|endoftext|>") == STORIES
    assert split_stories("<|endoftext|>\n\n<|endoftext|>", "<|endoftext|>") == []


def test_the_small_files_have_the_checksums_that_their_sources_state():
    assert idx_source().train_images.checksum == md5(IDX_FILES["train-images.gz"])
    assert md5(b"") == "md5:d41d8cd98f00b204e9800998ecf8427e"


def test_folders_may_be_named_by_text(tmp_path, monkeypatch):
    monkeypatch.delenv("QUANTJAX_DATA", raising=False)
    with pytest.raises(DataUnavailableError, match="does not exist"):
        load(SetName.MNIST, data_dir=str(tmp_path / "nowhere"))
