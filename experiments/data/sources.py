"""Where each set comes from, as data: files, mirrors, checksums and counts.

The loaders know formats only and take one of these descriptions, so that tests point them at small
files on a server of their own. A mirror that serves anything else than the checksum says is passed
over, so the order of mirrors decides about speed alone.
"""

from __future__ import annotations

from typing import NamedTuple


class RemoteFile(NamedTuple):
    """One file that mirrors serve.

    Attributes:
      path: below a data folder and below the cache, with ``/`` between the parts.
      checksum: ``algorithm:hex``, as hashlib names the algorithm.
      urls: the mirrors, tried in this order.
    """

    path: str
    checksum: str
    urls: tuple[str, ...]


class IdxSource(NamedTuple):
    """Gray images and labels in four gzipped idx files.

    Attributes:
      shape: height and width.
      classes: labels are smaller than this.
    """

    name: str
    train_images: RemoteFile
    train_labels: RemoteFile
    test_images: RemoteFile
    test_labels: RemoteFile
    train_count: int
    test_count: int
    shape: tuple[int, int]
    classes: int


class RecordSource(NamedTuple):
    """Images in files of records, a record being one label byte and the planes of one image.

    Mirrors serve an archive. A folder holds its members, which are checked by their sizes and
    labels alone.

    Attributes:
      archive: a tar file, gzipped.
      folder: of the members, in the archive and in a data folder.
      train, test: names of the members.
      images_each: in one member.
      shape: height, width and channels.
      classes: labels are smaller than this.
    """

    name: str
    archive: RemoteFile
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    images_each: int
    shape: tuple[int, int, int]
    classes: int


class TextSource(NamedTuple):
    """One text in one file, UTF-8."""

    name: str
    file: RemoteFile


class StoriesSource(NamedTuple):
    """Many texts in one file, UTF-8.

    In a data folder all ``.txt`` files beside the file's own path are read, whatever their names.

    Attributes:
      separator: what stands between two texts.
    """

    name: str
    file: RemoteFile
    separator: str


def mirrored(folder: str, name: str, checksum: str, mirrors: tuple[str, ...]) -> RemoteFile:
    """A file that every mirror has under the same name.

    >>> mirrored("mnist", "a.gz", "md5:00", ("https://one.example/x/", "https://two.example/"))
    RemoteFile(path='mnist/a.gz', checksum='md5:00',
      urls=('https://one.example/x/a.gz', 'https://two.example/a.gz'))
    """
    return RemoteFile(f"{folder}/{name}", checksum, tuple(mirror + name for mirror in mirrors))


_MNIST_MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
_FASHION_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
_CIFAR_MIRRORS = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
_SHAKESPEARE_MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/",
)
_STORIES_REVISION = "roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
_STORIES_MIRRORS = (
    f"https://huggingface.co/datasets/{_STORIES_REVISION}",
    f"https://hf-mirror.com/datasets/{_STORIES_REVISION}",
)


def _mnist_like(
    name: str, folder: str, mirrors: tuple[str, ...], md5: tuple[str, str, str, str]
) -> IdxSource:
    """60,000 and 10,000 images of 28 × 28, with the md5 of the four files in the fields' order."""
    names = (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )
    train_images, train_labels, test_images, test_labels = (
        mirrored(folder, file, f"md5:{digest}", mirrors)
        for file, digest in zip(names, md5, strict=True)
    )
    return IdxSource(
        name,
        train_images,
        train_labels,
        test_images,
        test_labels,
        train_count=60_000,
        test_count=10_000,
        shape=(28, 28),
        classes=10,
    )


# LeCun, Cortes and Burges, The MNIST database of handwritten digits, 1998; CC BY-SA 3.0.
MNIST = _mnist_like(
    "mnist",
    "mnist",
    _MNIST_MIRRORS,
    (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
)

# Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv 1708.07747, 2017; MIT.
FASHION_MNIST = _mnist_like(
    "fashion-mnist",
    "fashion_mnist",
    _FASHION_MIRRORS,
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
)

# Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009, the binary version.
CIFAR10 = RecordSource(
    name="cifar-10",
    archive=RemoteFile(
        "cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
        tuple(mirror + "cifar-10-binary.tar.gz" for mirror in _CIFAR_MIRRORS),
    ),
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test=("test_batch.bin",),
    images_each=10_000,
    shape=(32, 32, 3),
    classes=10,
)

# Karpathy, char-rnn, 2015; the text is in the public domain.
TINY_SHAKESPEARE = TextSource(
    name="tinyshakespeare",
    file=mirrored(
        "text/tinyshakespeare",
        "input.txt",
        "md5:6fb458f1232090904fb40fe944165e91",
        _SHAKESPEARE_MIRRORS,
    ),
)

# Eldan and Li, TinyStories, arXiv 2305.07759, 2023, the validation file of the second version,
# whose stories are all by GPT-4; 22,502,601 bytes; CDLA-Sharing-1.0. The paper gives no checksum:
# this one is what several public repositories state that pin the revision above.
TINY_STORIES = StoriesSource(
    name="tinystories",
    file=mirrored(
        "text/tinystories",
        "TinyStoriesV2-GPT4-valid.txt",
        "sha256:6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
        _STORIES_MIRRORS,
    ),
    separator="<|endoftext|>",
)
