"""Karpathy's stories260K: a decoder of 260,032 parameters that tells stories, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from experiments.data.files import find, place
from experiments.data.sources import mirrored
from experiments.models.decoder import Decoder
from experiments.pretrained.llama2c import Checkpoint, read_llama2c
from experiments.pretrained.tokenizer import Tokenizer, read_tokenizer

_MIRRORS = (
    "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K/",
    "https://hf-mirror.com/karpathy/tinyllamas/resolve/main/stories260K/",
)
CHECKPOINT = mirrored(
    "stories260K",
    "stories260K.bin",
    "sha256:b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
    _MIRRORS,
)
TOKENIZER = mirrored(
    "stories260K",
    "tok512.bin",
    "sha256:037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
    _MIRRORS,
)


class Storyteller(NamedTuple):
    """A decoder with its tokenizer; its variables are for ``model.apply``."""

    model: Decoder
    variables: dict[str, object]
    tokenizer: Tokenizer


def load_stories260k(
    *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> Storyteller:
    """The decoder and its tokenizer, from a folder with ``stories260K/``, or downloaded.

    Raises:
      DataUnavailableError: neither folder nor mirror has them.
      DataFileError: a file has another checksum.

    Source: Karpathy, llama2.c and tinyllamas, 2023, MIT; trained on Eldan and Li, TinyStories,
    2023; documented validation loss 1.2968 nat a token.
    """
    files = (CHECKPOINT, TOKENIZER)
    layout = [file.path for file in files]
    at = place("stories260K", layout, data_dir=data_dir, cache_dir=cache_dir)
    weights, pieces = (find(file, at) for file in files)
    checkpoint: Checkpoint = read_llama2c(weights)
    model = checkpoint.model
    return Storyteller(model, checkpoint.variables, read_tokenizer(pieces, model.shape.vocabulary))
