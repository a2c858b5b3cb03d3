"""1,797 handwritten digits of 8 x 8 pixels, half of them held out."""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import numpy as np

HELD_OUT = 900


class Digits(NamedTuple):
    """Images ``(n, 8, 8, 1)`` in 0..1, float32; labels ``(n,)``, int32.

    Attributes:
      train_images, train_labels: 897 of them.
      test_images, test_labels: 900, more than half, never trained on or calibrated with.
      digest: of all four.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    digest: str


@functools.cache
def load() -> Digits:
    """The data, split by a fixed permutation that is stratified by class.

    Source: Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI Machine Learning
    Repository, 1998, the test set; as ``sklearn.datasets.load_digits`` ships it.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images[..., None] / 16.0).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    order = _stratified(labels, np.random.default_rng(0))
    test, train = np.sort(order[:HELD_OUT]), np.sort(order[HELD_OUT:])
    arrays = images[train], labels[train], images[test], labels[test]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
    return Digits(*arrays, digest)


def _stratified(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A permutation whose every prefix holds the classes in about their overall shares."""
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + generator.uniform()) / len(members)
    return np.argsort(position, kind="stable")
