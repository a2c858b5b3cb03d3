"""Registered sets as data of ``quantjax calibrate``."""

import os
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from experiments.data import calibration
from experiments.data.errors import DataUnavailableError
from experiments.data.registry import SetName
from tests.refused import refused

ROOT = Path(__file__).resolve().parents[2]
SETS = {
    SetName.MNIST: (calibration.mnist, (28, 28, 1)),
    SetName.FASHION_MNIST: (calibration.fashion_mnist, (28, 28, 1)),
    SetName.CIFAR10: (calibration.cifar10, (32, 32, 3)),
}


def test_every_set_of_images_is_registered_under_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    registered = project["entry-points"]["quantjax.data"]
    assert set(registered) == {"digits", *(name.value for name in SETS)}
    for name, (function, _) in SETS.items():
        module, _, attribute = registered[name.value].partition(":")
        assert getattr(import_module(module), attribute) is function


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_not_there_says_so(name, tmp_path, bare):
    with refused(DataUnavailableError, name.value):
        SETS[name][0](data_dir=tmp_path)


def test_images_are_the_first_of_the_training_half_in_the_unit_interval():
    images = calibration._images(SetName.DIGITS, None)
    assert images.shape == (512, 8, 8, 1)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0.0, 1.0)


@pytest.mark.slow
@pytest.mark.skipif("QUANTJAX_DATA" not in os.environ, reason="QUANTJAX_DATA names no folder")
@pytest.mark.parametrize("name", SETS)
def test_the_real_sets(name):
    function, shape = SETS[name]
    images = function()
    assert images.shape == (512, *shape)
    assert (images.min(), images.max()) == (0.0, 1.0)
