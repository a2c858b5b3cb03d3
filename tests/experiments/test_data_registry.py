"""The sets by name, their official descriptions, and, with real files, what they hold."""

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments.data
from experiments.data import (
    IMAGE_LOADERS,
    LOADERS,
    NAMES,
    DataFileError,
    DataUnavailableError,
    ImageSet,
    SetName,
    Stories,
    Text,
    load,
    load_images,
    named,
    sources,
    unit,
)
from quantjax.errors import QuantjaxError
from tests.experiments.small_sets import same

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in Path(experiments.data.__file__).parent.glob("[a-z]*.py"))
IDX = (sources.MNIST, sources.FASHION_MNIST)
FILES = [
    *(
        getattr(source, field)
        for source in IDX
        for field in ("train_images", "train_labels", "test_images", "test_labels")
    ),
    sources.CIFAR10.archive,
    sources.TINY_SHAKESPEARE.file,
    sources.TINY_STORIES.file,
]
EVERY_FILE = pytest.mark.parametrize("file", FILES, ids=lambda file: file.path)
DIGITS_OF = {"md5": 32, "sha256": 64}


def test_every_set_has_a_loader_and_a_name():
    assert set(LOADERS) == set(SetName)
    assert set(IMAGE_LOADERS) < set(SetName)
    assert NAMES == (
        "digits",
        "mnist",
        "fashion-mnist",
        "cifar-10",
        "tinyshakespeare",
        "tinystories",
    )
    assert [named(name) for name in NAMES] == list(SetName)


@pytest.mark.parametrize("name", ["", "mnst", "MNIST", "cifar10"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(DataUnavailableError, match=f"no set is called {name}\n") as caught:
        named(name)
    assert all(known in caught.value.where for known in NAMES)


def test_the_mappings_cannot_be_changed():
    with pytest.raises(TypeError):
        LOADERS[SetName.MNIST] = None
    with pytest.raises(TypeError):
        IMAGE_LOADERS[SetName.MNIST] = None


def test_digits_by_name():
    loaded = load(SetName.DIGITS)
    assert isinstance(loaded, ImageSet)
    assert loaded.train_images.shape == (897, 8, 8, 1)
    assert same(loaded, load_images(SetName.DIGITS))


@pytest.mark.parametrize("loading", [load, load_images])
def test_text_is_no_member(loading):
    with pytest.raises(DataUnavailableError, match="'mnist' is no SetName") as caught:
        loading("mnist")
    assert eval(caught.value.fix, {"named": named}) is SetName.MNIST


@pytest.mark.parametrize("name", [SetName.TINY_SHAKESPEARE, SetName.TINY_STORIES])
def test_a_set_of_text_is_no_set_of_images(name):
    with pytest.raises(DataUnavailableError, match=f"{name.value} is no set of images"):
        load_images(name)


@pytest.mark.parametrize("name", [name for name in SetName if name is not SetName.DIGITS])
def test_an_empty_folder_says_what_belongs_into_it(name, tmp_path):
    with pytest.raises(DataUnavailableError, match=rf"^{name.value}: ") as caught:
        load(name, data_dir=tmp_path)
    documented = inspect.getdoc(experiments.data)
    folders = set(re.findall(r"[\w-]+(?=/)", caught.value.fix))
    assert folders
    assert all(folder in documented for folder in folders)


@EVERY_FILE
def test_a_file_has_a_checksum_and_two_mirrors(file):
    algorithm, _, digest = file.checksum.partition(":")
    assert re.fullmatch(rf"[0-9a-f]{{{DIGITS_OF[algorithm]}}}", digest)
    assert len(set(file.urls)) == len(file.urls) >= 2
    for url in file.urls:
        assert re.match(r"https?://[\w.-]+/", url)
        assert url.rpartition("/")[2] == Path(file.path).name
    assert not Path(file.path).is_absolute()


def test_no_two_files_share_a_checksum_or_a_place():
    assert len({file.checksum for file in FILES}) == len(FILES)
    assert len({file.path for file in FILES}) == len(FILES)


@pytest.mark.parametrize("error", [DataUnavailableError, DataFileError])
def test_errors_are_quantjaxs_and_say_how_to_go_on(error):
    assert issubclass(error, QuantjaxError)
    assert issubclass(error, ValueError)
    first, _, rest = inspect.getdoc(error).partition("\n\n")
    assert first.endswith(".")
    assert re.search(r"\bfails\b", rest)


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(
        importlib.import_module(f"experiments.data.{module}"), optionflags=flags
    )
    assert result.failed == 0


def test_importing_does_no_work():
    code = "import experiments.data, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True
    )
    loaded = set(result.stdout.split())
    assert "experiments.data.registry" in loaded
    assert not loaded & {"pooch", "requests", "sklearn", "experiments.digits.data"}


# The real sets, from the folder that QUANTJAX_DATA names: without it the tests say so and are
# skipped, with it every set has to be there. The figures are the published ones.


@pytest.fixture
def folder() -> Path:
    named_folder = os.environ.get("QUANTJAX_DATA", "")
    if not named_folder:
        # Hundreds of megabytes that no clone has; tests never reach for the network.
        pytest.skip("QUANTJAX_DATA names no folder with the real sets")
    return Path(named_folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train_counts", "mean"),
    [
        (
            SetName.MNIST,
            (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
            (0.1307,),
        ),
        (SetName.FASHION_MNIST, (6000,) * 10, (0.2860,)),
        (SetName.CIFAR10, (5000,) * 10, (0.4914, 0.4822, 0.4465)),
    ],
)
def test_real_images(name, train_counts, mean, folder):
    loaded = load_images(name, data_dir=folder)
    size = (32, 32, 3) if name is SetName.CIFAR10 else (28, 28, 1)
    assert loaded.train_images.shape == (sum(train_counts), *size)
    assert loaded.test_images.shape == (10_000, *size)
    assert tuple(np.bincount(loaded.train_labels)) == train_counts
    assert len(loaded.test_labels) == 10_000
    means = loaded.train_images.reshape(-1, size[2]).mean(0, dtype=np.float64) / loaded.maximum
    np.testing.assert_allclose(means, mean, atol=1e-4)
    assert unit(loaded.test_images[:8], loaded.maximum).max() <= 1.0
    assert same(loaded, load(name))  # the environment names the same folder


@pytest.mark.slow
def test_real_text(folder):
    loaded = load(SetName.TINY_SHAKESPEARE, data_dir=folder)
    assert isinstance(loaded, Text)
    assert (len(loaded.text), len(set(loaded.text))) == (1_115_394, 65)
    assert loaded.text.startswith("First Citizen:\nBefore we proceed any further")


@pytest.mark.slow
def test_real_stories(folder):
    loaded = load(SetName.TINY_STORIES, data_dir=folder)
    assert isinstance(loaded, Stories)
    assert len(loaded.stories) > 1000
    assert all(story and "<|endoftext|>" not in story for story in loaded.stories)
