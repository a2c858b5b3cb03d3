"""Data for experiments: downloaded with checksums into a cache, or read from a folder.

``load(SetName.MNIST, data_dir=folder)`` reads ``folder/mnist/train-images-idx3-ubyte.gz`` and its
three neighbours; without ``data_dir`` the environment variable ``QUANTJAX_DATA`` names the folder;
without either the set is downloaded once. A folder holds:

- ``mnist/``, ``fashion_mnist/``: the four ``.gz`` files of each;
- ``cifar-10-batches-bin/``: ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``;
- ``text/tinyshakespeare/input.txt``;
- ``text/tinystories/``: any ``.txt`` files, stories separated by ``<|endoftext|>``.

The digits need neither; they come with scikit-learn.
"""

from experiments.data.errors import DataFileError, DataUnavailableError
from experiments.data.files import ENVIRONMENT
from experiments.data.images import ImageSet, unit
from experiments.data.registry import (
    IMAGE_LOADERS,
    LOADERS,
    NAMES,
    Loader,
    SetName,
    load,
    load_images,
    named,
)
from experiments.data.texts import Stories, Text

__all__ = [
    "SetName",
    "NAMES",
    "named",
    "load",
    "load_images",
    "Loader",
    "LOADERS",
    "IMAGE_LOADERS",
    "ImageSet",
    "unit",
    "Text",
    "Stories",
    "ENVIRONMENT",
    "DataFileError",
    "DataUnavailableError",
]
