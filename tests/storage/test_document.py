"""Files of JSON: whole or not at all, and refused unless they are what is asked for."""

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantjax import errors
from quantjax.storage.document import WIDTH, beside, read_document, render, write_document
from tests.refused import refused

SCHEMA, VERSION = "quantjax.test", 3

scalars = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
finite = scalars.filter(lambda x: not isinstance(x, float) or abs(x) != float("inf"))
json_values = st.recursive(
    finite,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


def write(path, body, version=VERSION):
    write_document(path, body, schema=SCHEMA, version=version)


def read(path):
    return read_document(path, schema=SCHEMA, version=VERSION)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.json"


# Laws


@given(json_values)
def test_rendered_text_is_the_same_data(value):
    back = json.loads(render(value))
    assert back == value
    assert json.dumps(back) == json.dumps(value)  # the order of keys, and 1 is not 1.0


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=60))
def test_lines_of_numbers_are_filled_and_not_too_long(values):
    lines = render({"values": values}).splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    assert all(len(line) > WIDTH - 40 for line in lines[2:-3])


@given(st.dictionaries(st.text().filter(lambda key: key not in ("schema", "version")), json_values))
def test_what_is_written_is_read(tmp_path_factory, body):
    path = tmp_path_factory.mktemp("documents") / "file.json"
    write(path, body)
    assert read(path) == body
    assert list(path.parent.iterdir()) == [path]


def test_texts_stay_readable(path):
    write(path, {"name": "größer × ≤"})
    text = path.read_bytes().decode("utf-8")
    assert "größer × ≤" in text
    assert text.endswith("}\n")
    assert "\r" not in text


def test_the_schema_comes_first(path):
    write(path, {"a": 1})
    assert list(json.loads(path.read_text())) == ["schema", "version", "a"]


# Writing whole or not at all


def test_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    write(path, {"a": 1})
    assert read(path) == {"a": 1}


@pytest.mark.parametrize("body", [{"a": object()}, {"a": float("nan")}, {"a": "\ud800"}])
def test_a_body_that_cannot_be_written_leaves_the_old_file(path, body):
    write(path, {"old": True})
    with pytest.raises((TypeError, ValueError)):
        write(path, body)
    assert read(path) == {"old": True}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file(path, monkeypatch, step):
    write(path, {"old": True})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with refused(errors.StorageError, "the path cannot be written", "No space left"):
        write(path, {"new": True})
    assert read(path) == {"old": True}
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file(path, monkeypatch):
    write(path, {"old": True})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, {"new": True})
    assert read(path) == {"old": True}
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path):
    for place in (tmp_path, Path()):
        with refused(errors.StorageError, "the path is a folder"):
            write_document(place, {"a": 1}, schema="s", version=1)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_say_why(tmp_path):
    """All of them were errors of the system, of five kinds."""
    (tmp_path / "file").write_text("x")
    with refused(errors.StorageError, "cannot be written", "where: a", "File exists", "no files"):
        write(tmp_path / "file" / "a", {})
    with refused(errors.StorageError, "cannot be written", "Not a directory", "no files"):
        write(tmp_path / "file" / "a" / "b", {})
    for long in ("a" * 250, "ä" * 300):
        with refused(errors.StorageError, "cannot be written", "File name too long", "200 bytes"):
            write(tmp_path / long, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    write(tmp_path / ("a" * 200), {"a": 1})
    assert read(tmp_path / ("a" * 200)) == {"a": 1}


def test_half_a_character_is_refused_and_leaves_the_old_file(path):
    write_document(path, {"a": 1}, schema="s", version=1)
    with refused(errors.StorageError, "half a character"):
        write_document(path, {"a": "\ud800"}, schema="s", version=1)
    assert read_document(path, schema="s", version=1) == {"a": 1}


def test_a_new_file_replaces_the_old_one(path):
    write(path, {"old": "x" * 1000})
    write(path, {"new": 1})
    assert read(path) == {"new": 1}


def test_others_may_read_the_file_as_any_other(path):
    write(path, {})
    plain = path.with_name("plain")
    plain.write_text("x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_names_beside_are_new_and_in_the_same_folder(path):
    names = {beside(path) for _ in range(50)}
    assert len(names) == 50
    assert {name.parent for name in names} == {path.parent}


# Refusals


def test_no_file(path, tmp_path):
    with refused(errors.StorageError, "there is no such file", "where: file.json"):
        read(path)
    with refused(errors.StorageError, "there is no such file"):
        read(tmp_path)
    path.write_text("x")
    with refused(errors.StorageError, "there is no such file"):
        read(path / "inside.json")


def test_a_file_that_cannot_be_read_says_why(tmp_path, path, monkeypatch):
    with refused(errors.StorageError, "the file cannot be read", "File name too long"):
        read(tmp_path / ("a" * 300))

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with refused(errors.StorageError, "the file cannot be read", "Permission denied"):
        read(path)


def test_every_file_that_was_cut_short(path):
    write(path, {"a": [1, 2.5, "x", None], "b": {"c": True}})
    whole = path.read_text().rstrip("\n")
    for end in range(len(whole)):
        path.write_text(whole[:end])
        with refused(errors.StorageError, "no JSON document", "cut short", "where: file.json"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x81\x82",
        b"PK\x03\x04",
        b"site,bits\na,4\n",
        b'{"schema": "quantjax.test", "version": 3, "a": NaN}',
        b'{"schema": "quantjax.test", "version": 3, "a": -Infinity}',
        b'{"schema": "quantjax.test", "version": 3, "a": 1, "a": 2}',
        b'{"schema": "quantjax.test", "version": 3} {}',
        b"[" * 100_000,
    ],
    ids=lambda content: content[-12:].decode("latin-1"),
)
def test_files_that_are_no_json(path, content):
    path.write_bytes(content)
    with refused(errors.StorageError, "the file is no JSON document"):
        read(path)


def test_a_repeated_key_is_named(path):
    path.write_text('{"schema": "quantjax.test", "version": 3, "a": {"b": 1, "b": 2}}')
    with refused(errors.StorageError, "the key 'b' stands twice"):
        read(path)


@pytest.mark.parametrize("content", ["{}", "[]", "3", "null", '"quantjax.test"', '{"version": 3}'])
def test_json_without_a_schema(path, content):
    path.write_text(content)
    with refused(errors.StorageError, "the file is no quantjax.test", 'no "schema"'):
        read(path)


def test_json_of_another_schema(path):
    path.write_text('{"schema": "quantjax.other", "version": 3}')
    with refused(errors.StorageError, "is no quantjax.test", "'quantjax.other'", "function"):
        read(path)


def test_a_newer_version(path):
    write(path, {}, version=VERSION + 1)
    with refused(errors.StorageError, "version 4 of quantjax.test", "up to 3", "upgrade quantjax"):
        read(path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_older_versions_are_read(path, version):
    write(path, {"a": 1}, version=version)
    assert read(path) == {"a": 1}


@pytest.mark.parametrize("version", ["null", "true", "3.0", '"3"', "0", "-1", "[3]"])
def test_versions_that_are_none(path, version):
    path.write_text(f'{{"schema": "quantjax.test", "version": {version}}}')
    with refused(errors.StorageError, "the file has no version", '"version": 3'):
        read(path)
