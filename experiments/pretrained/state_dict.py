"""ResNets of CIFAR-10 between PyTorch's arrays and linen's variables.

PyTorch has kernels as ``(out, in, height, width)`` and names such as
``layer1.0.bn2.running_var``; linen has ``(height, width, in, out)`` and
``batch_stats/layer1_0/bn2/var``.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from experiments.data.errors import DataFileError
from experiments.data.files import unreadable
from experiments.models.resnet import ResNet
from experiments.pretrained.files import refuse

Arrays = Mapping[str, npt.NDArray[np.float32]]

_CONV_AXES = (2, 3, 1, 0)  # OIHW -> HWIO
_LEAVES = {
    ("bn", "weight"): ("params", "scale"),
    ("bn", "bias"): ("params", "bias"),
    ("bn", "running_mean"): ("batch_stats", "mean"),
    ("bn", "running_var"): ("batch_stats", "var"),
    ("conv", "weight"): ("params", "kernel"),
    ("linear", "weight"): ("params", "kernel"),
    ("linear", "bias"): ("params", "bias"),
}
_IGNORED = "num_batches_tracked"  # a count that newer PyTorch saves beside the statistics


class Imported(NamedTuple):
    """A network and its variables.

    Attributes:
      model: as many blocks, classes and channels as the arrays have.
      variables: ``params`` and ``batch_stats``, for ``model.apply``.
    """

    model: ResNet
    variables: dict[str, Any]


def _place(name: str) -> tuple[str, ...] | None:
    """Where linen has the array that PyTorch calls ``name``; None for a name that no ResNet has.

    >>> _place("layer1.0.bn2.running_var"), _place("linear.weight")
    (('batch_stats', 'layer1_0', 'bn2', 'var'), ('params', 'linear', 'kernel'))
    """
    match = re.fullmatch(r"(?:(layer[123])\.(\d+)\.)?((conv|bn|linear)[12]?)\.(\w+)", name)
    if match is None or (match[4], match[5]) not in _LEAVES:
        return None
    collection, leaf = _LEAVES[match[4], match[5]]
    block = (f"{match[1]}_{match[2]}",) if match[1] else ()
    return (collection, *block, match[3], leaf)


def from_state_dict(arrays: Arrays, path: Path) -> Imported:
    """The network of a state_dict, as linen has it.

    Args:
      arrays: by the names of PyTorch, without a leading ``module.``.
      path: of the file, for errors.

    Raises:
      DataFileError: a name that no ResNet has, an array that is missing, or one of another shape
        or dtype, or with a number that is not finite.
    """
    used = {name: array for name, array in arrays.items() if not name.endswith(_IGNORED)}
    strange = [name for name in used if _place(name) is None]
    if strange:
        raise refuse(path, "holds arrays that no ResNet of CIFAR has", ", ".join(strange[:6]))
    flat = {_place(name): _to_linen(name, array) for name, array in used.items()}
    model = _model_of(used, path)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    expected = flax.traverse_util.flatten_dict(dict(shapes))
    faults = [f"{'/'.join(key)} is missing" for key in expected if key not in flat]
    faults += [f"{'/'.join(key or ())} is too many" for key in flat if key not in expected]
    for key, array in flat.items():
        wanted = expected.get(key)
        if wanted is not None and (array.shape != wanted.shape or array.dtype != np.float32):
            faults.append(f"{'/'.join(key or ())} is {array.dtype}{list(array.shape)}")
            faults[-1] += f" instead of float32{list(wanted.shape)}"
        elif not np.all(np.isfinite(array)):
            faults.append(f"{'/'.join(key or ())} has numbers that are not finite")
    if faults:
        raise refuse(path, f"is no {6 * model.blocks + 2}-layer ResNet", "; ".join(faults[:6]))
    tree = flax.traverse_util.unflatten_dict({k: jnp.asarray(a) for k, a in flat.items()})
    return Imported(model, tree)


def _model_of(arrays: Arrays, path: Path) -> ResNet:
    """Sizes, as the arrays have them."""
    names = ("conv1.weight", "linear.weight")
    absent = [n for n in names if n not in arrays or arrays[n].ndim != (4 if "conv" in n else 2)]
    blocks = len({name.split(".")[1] for name in arrays if name.startswith("layer1.")})
    if absent or not blocks:
        raise refuse(path, "is no ResNet", f"no kernel {', '.join(absent) or 'of layer1'}")
    classes, channels = arrays["linear.weight"].shape[0], arrays["conv1.weight"].shape[0]
    return ResNet(blocks, classes, channels)


def _to_linen(name: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return array.transpose(_CONV_AXES) if array.ndim == 4 else array.T if array.ndim == 2 else array


def to_state_dict(variables: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """The inverse of :func:`from_state_dict`: PyTorch's names and layouts."""
    leaves = {(kind, *place): torch for (kind, torch), place in _LEAVES.items()}
    arrays = {}
    for key, value in flax.traverse_util.flatten_dict(dict(variables)).items():
        collection, *block, part, leaf = key
        name = leaves[part.rstrip("12"), collection, leaf]
        folders = [folder.replace("_", ".") for folder in block]
        arrays[".".join([*folders, part, name])] = _to_torch(np.asarray(value))
    return arrays


def _to_torch(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.ndim == 4:
        return array.transpose(np.argsort(_CONV_AXES))
    return array.T if array.ndim == 2 else array


def read_resnet(path: Path) -> Imported:
    """A ResNet of a ``.npz`` file with the arrays of a state_dict.

    Raises:
      DataUnavailableError: it is not there, or may not be read.
      DataFileError: no such file format, a damaged one, or arrays of no ResNet.
    """
    try:
        # Opened here: numpy leaves a file open that proves to be no archive.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise refuse(path, "is no .npz file", "it holds one array without a name")
            arrays = {name: loaded[name] for name in loaded.files}
    except DataFileError:
        raise
    except (PermissionError, IsADirectoryError, FileNotFoundError) as error:
        raise unreadable(path, error) from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise refuse(path, "is no .npz file, or damaged", str(error)) from error
    return from_state_dict(arrays, path)


def write_resnet(path: Path, variables: Mapping[str, Any]) -> None:
    """Write the file that :func:`read_resnet` reads."""
    arrays: Any = to_state_dict(variables)
    np.savez(path, **arrays)
