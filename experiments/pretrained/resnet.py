"""The ResNets that Idelbayev trained on CIFAR-10, from a data folder."""

from __future__ import annotations

import enum
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from experiments.pretrained.files import in_data_folder
from experiments.pretrained.state_dict import Imported, read_resnet

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

_HOW = (
    "put resnet_cifar10/{0}.npz into a data folder: the arrays of the published {0} by "
    "numpy.savez, under the names of its state_dict without 'module.' "
    "(akamaster/pytorch_resnet_cifar10, pretrained_models)"
)


class Pretrained(enum.Enum):
    """The networks; the values are the names of their files.

    Errors on the test set, as published: 8.27 %, 7.37 %, 6.61 %.
    """

    RESNET20 = "resnet20"
    RESNET32 = "resnet32"
    RESNET56 = "resnet56"


def load_resnet(name: Pretrained, *, data_dir: Path | str | None = None) -> Imported:
    """A network and its variables from ``resnet_cifar10/resnet20.npz`` and its like.

    Raises:
      DataUnavailableError: no folder is named, or it lacks the file.
      DataFileError: the file is damaged or holds another network.

    Source: He, Zhang, Ren and Sun, Deep residual learning for image recognition, 2016, section 4.2;
    the weights by Idelbayev, pytorch_resnet_cifar10, 2018, BSD-2-Clause.
    """
    file = f"resnet_cifar10/{name.value}.npz"
    how = _HOW.format(name.value)
    return read_resnet(in_data_folder(file, data_dir=data_dir, how=how))


def normalized(images: UInt8[Array, "n h w 3"]) -> Float[Array, "n h w 3"]:
    """What these networks read: ``(x / 255 - mean) / deviation`` of each channel, float32.

    Mean and deviation are those of ImageNet, with which the networks were trained.

    >>> import numpy as np
    >>> [round(float(v), 4) for v in normalized(np.full((1, 1, 1, 3), 255, np.uint8)).ravel()]
    [2.2489, 2.4286, 2.64]
    """
    pixels = jnp.asarray(images).astype(jnp.float32) / 255.0
    mean, deviation = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (MEAN, DEVIATION))
    return jax.lax.div(pixels - mean, jnp.broadcast_to(deviation, pixels.shape))
