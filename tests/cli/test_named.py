"""What names stand for."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantjax import errors
from quantjax.calibration import Model
from quantjax.cli import named
from tests.calibration import tiny
from tests.refused import refused

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests.calibration.tiny"


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["model", "ready", "pair", "scaled"])
def test_a_model_is_one_or_a_pair_or_what_a_function_returns(name):
    found = named.find_model(f"{TINY}:{name}")
    assert isinstance(found, Model)
    assert callable(found.apply)
    np.testing.assert_array_equal(found.params["first"], tiny.params()["first"])


def test_an_attribute_of_an_attribute():
    assert named.find(f"{TINY}:np.pi", named.MODELS) == np.pi


@pytest.mark.parametrize("name", ["batches", "generated"])
def test_data_is_an_iterable_or_what_a_function_returns(name):
    for found, expected in zip(named.find_data(f"{TINY}:{name}"), tiny.batches(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_an_array_is_data():
    assert named.find_data(f"{TINY}:array") is tiny.array


def test_the_folder_goes_to_functions_that_have_an_argument_for_it(tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((2, 3)))
    (found,) = named.find_data(f"{TINY}:from_folder", tmp_path)
    assert found.shape == (2, 3)
    (without,) = named.find_data(f"{TINY}:from_folder")
    assert without.shape == (24, 6)


def test_registered_data_is_found():
    batches = named.find_data("digits")
    assert [batch.shape for batch in batches] == [(64, 8, 8, 1)] * 8


def test_models_and_data_are_registered():
    groups = {group.kind: group for group in (named.STUDIES, named.MODELS, named.DATA)}
    assert set(groups) == {"study", "model", "data"}
    for group in groups.values():
        assert "digits" in importlib.metadata.entry_points(group=group.name).names


def test_a_registered_object_that_cannot_be_imported(monkeypatch):
    broken = importlib.metadata.EntryPoint("broken", "no.such.module:x", "quantjax.models")
    monkeypatch.setattr(named, "entry_points", lambda group: [broken])
    with pytest.raises(errors.UnknownNameError) as caught:
        named.find_model("broken")
    assert "the model broken cannot be loaded" in str(caught.value)
    assert 'pip install "quantjax[experiments]"' in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.npy", b"no array at all"),
        ("empty.npy", b""),
        ("text.npz", b"no archive"),
        ("cut.npz", b"PK\x03\x04 and nothing more"),
    ],
)
def test_files_that_hold_no_arrays(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.DataError) as caught:
        named.find_data(str(tmp_path / name))
    assert f"{name} cannot be read as arrays" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("shape.npy", b"(3, 4)", b"(99999"),  # tokenize.TokenError
        ("quote.npy", b"'shape'", b"'shape "),
        ("letter.npy", b"'descr'", b"0'escr'"),
        ("many.npy", b"(3, 4), }            ", b"(3, 99999999999999), }"),
        ("packed.npz", b"\x08\x00\x00\x00", b"\x63\x00\x00\x00"),  # NotImplementedError
    ],
)
def test_files_whose_head_is_damaged(tmp_path, name, old, new):
    path = tmp_path / name
    with path.open("wb") as file:
        (np.save if path.suffix == ".npy" else np.savez_compressed)(file, np.ones((3, 4)))
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with refused(errors.DataError, f"{name} cannot be read as arrays", "np.save"):
        named.find_data(str(path))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_files_of_python_objects_are_not_unpickled(tmp_path, suffix):
    objects = np.array([{"a": 1}, None], object)
    path = tmp_path / f"objects{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, objects)
    with pytest.raises(errors.DataError) as caught:
        named.find_data(str(path))
    assert "Object arrays cannot be loaded" in str(caught.value)


def test_modules_of_the_current_folder_are_found_and_the_path_is_left_as_it_was(
    tmp_path, monkeypatch
):
    (tmp_path / "own_model_of_a_user.py").write_text("value = [1, 2]\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert named.find("own_model_of_a_user:value", named.DATA) == [1, 2]
    with pytest.raises(errors.UnknownNameError, match="cannot be imported"):
        named.find("own_model_of_a_user:absent", named.DATA)
    assert sys.path == before


@pytest.mark.parametrize("name", [":", ":x", "numpy:", "x:y:z"])
def test_half_names(name):
    with pytest.raises(errors.UnknownNameError, match="cannot be imported"):
        named.find(name, named.DATA)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("./own:value", "own:value"),
        ("own.py:value", "own:value"),
        ("./own.py:value.real", "own:value.real"),
        ("./inner/own.py:value", "inner.own:value"),
        ("inner/own:value", "inner.own:value"),
    ],
)
def test_paths_are_no_modules_and_the_module_is_named(tmp_path, monkeypatch, name, instead):
    """Those with a dot were a TypeError of importlib."""
    (tmp_path / "inner").mkdir()
    for folder in (tmp_path, tmp_path / "inner"):
        (folder / "own.py").write_text("value = [1]\n")
    monkeypatch.chdir(tmp_path)
    for find in (named.find_study, named.find_model, named.find_data, named.find_rule):
        with refused(errors.UnknownNameError, f"{name} cannot be imported", "is a path, no module"):
            find(name)
    with pytest.raises(errors.UnknownNameError) as caught:
        named.find(name, named.DATA)
    assert caught.value.fix == instead
    try:
        assert named.find(instead.removesuffix(".real"), named.DATA) == [1]
    finally:
        for module in ("own", "inner", "inner.own"):
            sys.modules.pop(module, None)


@pytest.mark.parametrize("name", ["./absent:x", "../own:x", "..:x", ".:x", "/own.py:x", "a-b.py:x"])
def test_paths_without_a_module_say_what_is_needed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with refused(errors.UnknownNameError, "cannot be imported", "importable from the current"):
        named.find(name, named.DATA)


def test_a_module_that_is_no_python_is_named_with_its_line(tmp_path, monkeypatch):
    """It was a traceback of ours."""
    (tmp_path / "half_a_model_of_a_user.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.chdir(tmp_path)
    with refused(errors.UnknownNameError, "half_a_model_of_a_user.py, line 2", "invalid syntax"):
        named.find("half_a_model_of_a_user:x", named.DATA)
    broken = importlib.metadata.EntryPoint("broken", "half_a_model_of_a_user:x", "quantjax.models")
    monkeypatch.setattr(named, "entry_points", lambda group: [broken])
    monkeypatch.syspath_prepend(tmp_path)
    with refused(errors.UnknownNameError, "half_a_model_of_a_user.py, line 2", "invalid syntax"):
        named.find_model("broken")


def test_the_module_runs_as_the_command():
    ended = subprocess.run(
        [sys.executable, "-m", "quantjax", "studies"], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert "digits  experiments.digits.study:study" in ended.stdout


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("digitz", "digits, or one of these"),
        ("tests.sweep.tiny.tiny_study", "tests.sweep.tiny:tiny_study, or"),
        ("tests.sweep.tiny:tiny_studi", "tests.sweep.tiny:tiny_study"),
        ("tests.sweep.tiny:elsewhere", "module importable"),
        ("sweep", "one of these, or module:object"),
    ],
)
def test_what_was_meant_is_said(name, meant):
    with pytest.raises(errors.UnknownNameError) as caught:
        named.find(name, named.STUDIES)
    assert meant in caught.value.fix


def needs_folder(data_dir: Path) -> list[np.ndarray]:
    """Data that are not there without a folder."""
    return [np.full((2, 6), len(str(data_dir)), np.float32)]


def test_data_that_need_a_folder_name_the_option(tmp_path):
    with refused(errors.UnknownNameError, "needs a folder", "--data-dir PATH"):
        named.find_data(f"{__name__}:needs_folder")
    (batch,) = named.find_data(f"{__name__}:needs_folder", tmp_path)
    assert batch[0, 0] == len(str(tmp_path))


def test_files_of_other_kinds_are_no_modules(tmp_path, monkeypatch):
    """``x:csv`` was the advice, which names no module."""
    monkeypatch.chdir(tmp_path)
    Path("x.other").write_text("1")
    for name in ("x.csv", "x.other"):
        with pytest.raises(errors.UnknownNameError) as caught:
            named.find_data(name)
        assert "a .npy or .npz file" in str(caught.value)
        assert "x:" not in str(caught.value)


def test_the_end_of_a_file_in_capitals(tmp_path):
    with (tmp_path / "x.NPY").open("wb") as file:
        np.save(file, np.ones((3, 2), np.float32))
    assert named.find_data(str(tmp_path / "x.NPY")).shape == (3, 2)


def needs_a_package():
    import nothing_of_that_name

    return nothing_of_that_name


def test_what_needs_a_package_that_is_not_there_says_which(monkeypatch):
    name = f"{__name__}:needs_a_package"
    with refused(errors.MissingPackageError, "needs nothing_of_that_name", "install nothing_of"):
        named.find_model(name)
    monkeypatch.setattr(named, "find", lambda name, group: needs_a_package)
    with refused(errors.MissingPackageError, "digits needs nothing", "quantjax[experiments]"):
        named.find_data("digits")
