"""ResNets of CIFAR-10 from PyTorch's arrays: written at random, read, and run against NumPy."""

import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.errors import DataFileError, DataUnavailableError
from experiments.models.resnet import ResNet
from experiments.pretrained import (
    Pretrained,
    from_state_dict,
    load_resnet,
    normalized,
    read_resnet,
    to_state_dict,
    write_resnet,
)
from tests.experiments.models.oracles import images, torch_resnet, variables_of

BLOCKS, CLASSES, CHANNELS = 2, 5, 4
FILE = Path("resnet.npz")
Arrays = dict[str, np.ndarray]


def official(blocks: int = BLOCKS, channels: int = CHANNELS, seed: int = 0) -> Arrays:
    """A state_dict at random, its names and layouts spelled out from PyTorch's modules."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}

    def conv(name: str, out: int, inputs: int) -> None:
        kernel = rng.normal(size=(out, inputs, 3, 3)) / np.sqrt(9 * inputs)
        arrays[f"{name}.weight"] = kernel.astype(np.float32)

    def norm(name: str, out: int) -> None:
        for part in ("weight", "running_var"):
            arrays[f"{name}.{part}"] = rng.uniform(0.5, 1.5, out).astype(np.float32)
        for part in ("bias", "running_mean"):
            arrays[f"{name}.{part}"] = rng.normal(size=out).astype(np.float32)

    conv("conv1", channels, 3)
    norm("bn1", channels)
    inputs = channels
    for stage in range(3):
        for block in range(blocks):
            at, out = f"layer{stage + 1}.{block}", channels << stage
            conv(f"{at}.conv1", out, inputs)
            norm(f"{at}.bn1", out)
            conv(f"{at}.conv2", out, out)
            norm(f"{at}.bn2", out)
            inputs = out
    arrays["linear.weight"] = rng.normal(size=(CLASSES, inputs)).astype(np.float32)
    arrays["linear.bias"] = rng.normal(size=CLASSES).astype(np.float32)
    return arrays


def saved(arrays: Arrays, path: Path) -> Path:
    any_arrays: Any = arrays
    np.savez(path, **any_arrays)
    return path


def test_the_imported_network_is_that_of_numpy(tmp_path: Path):
    arrays = official()
    model, variables = read_resnet(saved(arrays, tmp_path / "resnet14.npz"))
    assert model == ResNet(BLOCKS, CLASSES, CHANNELS)
    x = images(1, 2, 12, 12, 3)
    expected = torch_resnet(arrays, np.asarray(x, np.float64).transpose(0, 3, 1, 2))
    logits = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_there_and_back_is_the_same():
    arrays = official()
    back = to_state_dict(from_state_dict(arrays, FILE).variables)
    assert sorted(back) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_back_and_there_is_the_same(tmp_path: Path):
    model = ResNet(1, CLASSES, CHANNELS)
    variables = variables_of(model, jnp.zeros((1, 8, 8, 3)))
    write_resnet(tmp_path / "resnet.npz", variables)
    again = read_resnet(tmp_path / "resnet.npz")
    assert again.model == model
    assert jax.tree.structure(again.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again.variables, variables)


@pytest.mark.parametrize("blocks", [3, 5, 9])
def test_published_sizes_are_found(blocks: int):
    model, variables = from_state_dict(official(blocks, 16), FILE)
    assert model.blocks == blocks
    leaves = jax.tree.leaves(variables["params"])
    # The published networks have ten classes.
    with_ten = sum(leaf.size for leaf in leaves) + (10 - CLASSES) * 65
    assert with_ten == {3: 269_722, 5: 464_154, 9: 853_018}[blocks]


def test_counts_of_batches_are_ignored():
    arrays = official()
    counted = {**arrays, "bn1.num_batches_tracked": np.array(7)}
    first, other = (from_state_dict(a, FILE).variables for a in (arrays, counted))
    jax.tree.map(np.testing.assert_array_equal, first, other)


def without(name: str) -> Arrays:
    return {key: array for key, array in official().items() if key != name}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without("layer2.1.bn1.bias"), "params/layer2_1/bn1/bias is missing"),
        (without("layer3.0.bn2.running_var"), "batch_stats/layer3_0/bn2/var is missing"),
        (without("conv1.weight"), "no kernel conv1.weight"),
        (without("linear.weight"), "no kernel linear.weight"),
        ({}, "no kernel conv1.weight, linear.weight"),
        ({**official(), "layer4.0.conv1.weight": np.zeros((1, 1, 3, 3))}, "layer4.0.conv1.weight"),
        ({**official(), "module.bn1.bias": np.zeros(4)}, "module.bn1.bias"),
        ({**official(), "layer1.0.bn1.momentum": np.zeros(4)}, "layer1.0.bn1.momentum"),
        ({**official(), "layer1.7.bn1.bias": np.zeros(4, np.float32)}, "layer1_2/.* is missing"),
        ({**official(), "layer2.7.bn1.bias": np.zeros(4, np.float32)}, "layer2_7/bn1/bias is too"),
        (
            {**official(), "layer1.0.conv1.weight": np.zeros((4, 4, 1, 1), np.float32)},
            r"layer1_0/conv1/kernel is float32\[1, 1, 4, 4\] instead of float32\[3, 3, 4, 4\]",
        ),
        ({**official(), "bn1.bias": np.zeros(4)}, r"bn1/bias is float64\[4\] instead of float32"),
        (
            {**official(), "bn1.bias": np.array([0, np.nan, 0, 0], np.float32)},
            "bn1/bias has numbers that are not finite",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_arrays_are_refused(arrays: Arrays, message: str):
    with pytest.raises(DataFileError, match=message) as caught:
        from_state_dict(arrays, FILE)
    assert "resnet.npz" in str(caught.value)
    assert "try:" in str(caught.value)


def _bytes(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    any_arrays: Any = arrays
    np.savez(buffer, **any_arrays)
    return buffer.getvalue()


def _damaged(data: bytes) -> bytes:
    """One byte in the middle of an array is another: the archive's checksum is not."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, objects=np.array([{"a": 1}], dtype=object))
    return buffer.getvalue()


def _nameless() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"no archive",
        _bytes(official())[:-500],
        _damaged(_bytes(official())),
        _pickled(),
        _nameless(),
    ],
    ids=["empty", "cut", "text", "truncated", "damaged", "pickled", "npy"],
)
def test_other_files_are_refused(data: bytes, tmp_path: Path):
    path = tmp_path / "resnet20.npz"
    path.write_bytes(data)
    with pytest.raises(DataFileError, match=r"resnet20.npz is no .npz file"):
        read_resnet(path)


def test_a_named_folder_is_read(tmp_path: Path, bare: pytest.MonkeyPatch):
    (tmp_path / "resnet_cifar10").mkdir()
    saved(official(3), tmp_path / "resnet_cifar10" / "resnet20.npz")
    found = load_resnet(Pretrained.RESNET20, data_dir=tmp_path)
    bare.setenv("QUANTJAX_DATA", str(tmp_path))
    again = load_resnet(Pretrained.RESNET20)
    assert found.model == again.model == ResNet(3, CLASSES, CHANNELS)
    jax.tree.map(np.testing.assert_array_equal, found.variables, again.variables)


def test_without_a_folder_the_error_says_how(bare: pytest.MonkeyPatch):
    with pytest.raises(DataUnavailableError) as caught:
        load_resnet(Pretrained.RESNET32)
    for part in ("resnet_cifar10/resnet32.npz", "--data-dir", "QUANTJAX_DATA", "numpy.savez"):
        assert part in str(caught.value)


def test_a_folder_without_the_file_is_named(tmp_path: Path, bare: pytest.MonkeyPatch):
    where = re.escape(str(tmp_path))
    with pytest.raises(DataUnavailableError, match=where) as caught:
        load_resnet(Pretrained.RESNET56, data_dir=tmp_path)
    assert "resnet_cifar10/resnet56.npz is missing" in str(caught.value)
    bare.setenv("QUANTJAX_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataUnavailableError, match="named by QUANTJAX_DATA"):
        load_resnet(Pretrained.RESNET56)


@pytest.mark.parametrize("method", ["is_file", "open"])
def test_what_may_not_be_read_is_named(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "resnet_cifar10").mkdir()
    saved(official(3), tmp_path / "resnet_cifar10" / "resnet20.npz")

    def refuse(path: Path, *arguments: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(DataUnavailableError, match="Permission denied") as caught:
        load_resnet(Pretrained.RESNET20, data_dir=str(tmp_path))
    assert "delete it" not in str(caught.value)


@pytest.mark.parametrize("given", ["~nobody-of-that-name/data", Path("~nobody-of-that-name/data")])
def test_the_home_of_nobody_is_no_folder(given: Path | str):
    with pytest.raises(DataUnavailableError, match="missing"):
        load_resnet(Pretrained.RESNET20, data_dir=given)


def test_images_are_normalized_as_in_training():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    x = pixels.astype(np.float64) / 255
    expected = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalized(pixels), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(normalized)(pixels), expected, rtol=1e-5, atol=1e-6)
