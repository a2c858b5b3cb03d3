"""Every set by the name that a command line knows it by."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar

from experiments.data import sources
from experiments.data.errors import DataUnavailableError
from experiments.data.images import ImageSet, load_digits, load_idx, load_records
from experiments.data.texts import Stories, Text, load_stories, load_text

Loaded = TypeVar("Loaded", covariant=True)


class SetName(enum.Enum):
    """The sets; the values are their names on a command line."""

    DIGITS = "digits"
    MNIST = "mnist"
    FASHION_MNIST = "fashion-mnist"
    CIFAR10 = "cifar-10"
    TINY_SHAKESPEARE = "tinyshakespeare"
    TINY_STORIES = "tinystories"


class Loader(Protocol[Loaded]):
    """How a set is loaded.

    Args:
      data_dir: a folder that holds the set in its official layout; nothing is downloaded then.
        Left out, the folder that the environment variable QUANTJAX_DATA names, if it is set.
      cache_dir: keeps downloads; left out, the system's cache folder.
    """

    def __call__(
        self, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
    ) -> Loaded: ...


IMAGE_LOADERS: Mapping[SetName, Loader[ImageSet]] = MappingProxyType(
    {
        SetName.DIGITS: load_digits,
        SetName.MNIST: partial(load_idx, sources.MNIST),
        SetName.FASHION_MNIST: partial(load_idx, sources.FASHION_MNIST),
        SetName.CIFAR10: partial(load_records, sources.CIFAR10),
    }
)
LOADERS: Mapping[SetName, Loader[ImageSet | Text | Stories]] = MappingProxyType(
    {
        **IMAGE_LOADERS,
        SetName.TINY_SHAKESPEARE: partial(load_text, sources.TINY_SHAKESPEARE),
        SetName.TINY_STORIES: partial(load_stories, sources.TINY_STORIES),
    }
)
NAMES = tuple(name.value for name in SetName)


def named(name: str) -> SetName:
    """The set of that name.

    Raises:
      DataUnavailableError: there is none.

    >>> named("mnist")
    <SetName.MNIST: 'mnist'>
    """
    if name not in NAMES:
        raise DataUnavailableError(
            f"no set is called {name}", where=f"known: {', '.join(NAMES)}", fix="one of these"
        )
    return SetName(name)


def _member(name: SetName) -> SetName:
    """The member itself; text in its place is refused."""
    if not isinstance(name, SetName):
        raise DataUnavailableError(
            f"{name!r:.80} is no SetName", where="the set to load", fix='named("mnist")'
        )
    return name


def load(
    name: SetName, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> ImageSet | Text | Stories:
    """Any set; the arguments are those of :class:`Loader`.

    Raises:
      DataUnavailableError: neither folder nor mirror has it, or ``name`` is no member.
      DataFileError: a file of it is damaged or another one.
    """
    return LOADERS[_member(name)](data_dir=data_dir, cache_dir=cache_dir)


def load_images(
    name: SetName, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> ImageSet:
    """A set of images; the arguments are those of :class:`Loader`.

    Raises:
      DataUnavailableError: neither folder nor mirror has it, or it is a set of text.
      DataFileError: a file of it is damaged or another one.
    """
    if _member(name) not in IMAGE_LOADERS:
        raise DataUnavailableError(
            f"{name.value} is no set of images",
            where=f"sets of images: {', '.join(image.value for image in IMAGE_LOADERS)}",
            fix="one of these",
        )
    return IMAGE_LOADERS[name](data_dir=data_dir, cache_dir=cache_dir)
