"""Images to calibrate on, for ``quantjax calibrate MODEL fashion-mnist`` and its like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.data.images import unit
from experiments.data.registry import SetName, load_images

IMAGES = 512  # the first ones of the training half


def _images(name: SetName, data_dir: Path | str | None) -> npt.NDArray[np.float32]:
    found = load_images(name, data_dir=data_dir)
    return unit(found.train_images[:IMAGES], found.maximum)


def mnist(data_dir: Path | str | None = None) -> npt.NDArray[np.float32]:
    """512 training images of MNIST, ``(512, 28, 28, 1)`` in 0..1."""
    return _images(SetName.MNIST, data_dir)


def fashion_mnist(data_dir: Path | str | None = None) -> npt.NDArray[np.float32]:
    """512 training images of Fashion-MNIST, ``(512, 28, 28, 1)`` in 0..1."""
    return _images(SetName.FASHION_MNIST, data_dir)


def cifar10(data_dir: Path | str | None = None) -> npt.NDArray[np.float32]:
    """512 training images of CIFAR-10, ``(512, 32, 32, 3)`` in 0..1; a model may want its own mean
    and deviation taken from them first."""
    return _images(SetName.CIFAR10, data_dir)
