"""A folder that another process replaces while it is read: the old tree or the new one."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, formats, storage
from quantjax.storage import frozen
from tests.models import normal
from tests.refused import refused

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"k": normal(0, 16, 8)}


def coded(format):
    """The same shapes and dtypes of codes, which mean other numbers."""
    weights = qj.weight_quantizer(format=format, granularity=qj.PerChannel(1))
    return qj.quantize_params(
        WEIGHTS, qj.Policy([qj.rule(qj.path("k"), qj.Scheme(weights=weights))])
    )


OLD, NEW = coded(formats.NF4), coded(formats.E2M1)


def numbers(tree):
    return np.asarray(qj.dequantize_params(tree)["k"])


def test_a_folder_that_is_replaced_between_its_files_is_read_again(tmp_path, monkeypatch):
    """The document of one save and the arrays of another were a tree that nobody wrote."""
    path, read, left = tmp_path / "params", frozen.read_document, [NEW, OLD, NEW]
    storage.save_params(path, OLD)

    def replaced_behind(*arguments, **named):
        found = read(*arguments, **named)
        if left:
            storage.save_params(path, left.pop(), overwrite=True)
        return found

    monkeypatch.setattr(frozen, "read_document", replaced_behind)
    assert np.array_equal(numbers(storage.load_params(path)), numbers(NEW))
    assert left == []


def test_one_that_is_replaced_all_the_time_is_refused(tmp_path, monkeypatch):
    path, read = tmp_path / "params", frozen.read_document
    storage.save_params(path, OLD)

    def replaced_behind(*arguments, **named):
        found = read(*arguments, **named)
        storage.save_params(path, NEW, overwrite=True)
        return found

    monkeypatch.setattr(frozen, "read_document", replaced_behind)
    monkeypatch.setattr(frozen, "ATTEMPTS", 3)
    with refused(errors.StorageError, "replaced over and over", "nothing saves"):
        storage.load_params(path)


AT_THE_SAME_TIME = """
import sys, threading
import numpy as np
from quantjax import storage
from tests.storage.test_replaced import NEW, OLD, numbers

path, done, found = sys.argv[1], threading.Event(), []
storage.save_params(path, OLD)

def write():
    try:
        for number in range(12):
            storage.save_params(path, (NEW, OLD)[number % 2], overwrite=True)
    finally:
        done.set()

writer = threading.Thread(target=write)
writer.start()
while not done.is_set():
    found.append(numbers(storage.load_params(path)))
writer.join()
whole = [numbers(tree) for tree in (OLD, NEW)]
assert found and all(any(np.array_equal(read, tree) for tree in whole) for read in found)
print("whole")
"""


def test_a_writer_and_a_reader_at_the_same_time(tmp_path):
    """In a process of their own: a read that fails and is repeated leaves orbax's tasks behind."""
    command = [sys.executable, "-c", AT_THE_SAME_TIME, str(tmp_path / "params")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("whole\n"), done.stderr[-3000:]


def test_what_a_killed_save_left_is_named_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "params"
    storage.save_params(path, {"b": jnp.ones(2)})
    path.rename(tmp_path / ".params.0123456789ab.tmp")
    monkeypatch.setattr(frozen, "PAUSE_SECONDS", 0.0)
    with refused(errors.StorageError, ".params.0123456789ab.tmp", "unless a save is still at work"):
        storage.load_params(path)
    with refused(errors.StorageError, "no such folder", "check the path"):
        storage.load_params(tmp_path / "other")


@pytest.mark.parametrize("damage", ["quantjax.json", "arrays"])
def test_a_damaged_folder_is_told_at_once(tmp_path, monkeypatch, damage):
    """It is the same at each look."""
    path, looks = tmp_path / "params", []
    storage.save_params(path, OLD)
    for file in [path / damage, *(path / damage).rglob("*")]:
        if file.is_file():
            file.write_bytes(file.read_bytes()[:9])
    loaded = frozen._loaded
    monkeypatch.setattr(frozen, "_loaded", lambda *given: looks.append(given) or loaded(*given))
    with refused(errors.StorageError):
        storage.load_params(path)
    assert len(looks) == 1
