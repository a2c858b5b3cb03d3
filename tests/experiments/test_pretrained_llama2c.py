"""Decoders in llama2.c's format: written byte by byte, read, and run against NumPy."""

import re
import struct
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.errors import DataFileError, DataUnavailableError
from experiments.models.decoder import Decoder, DecoderShape
from experiments.pretrained import load_stories260k, read_llama2c, write_llama2c
from experiments.pretrained.llama2c import parts_of
from experiments.pretrained.stories260k import CHECKPOINT, TOKENIZER
from tests.experiments.models.oracles import llama, tokens, variables_of


class Sizes(NamedTuple):
    """The header."""

    dim: int = 12
    hidden: int = 10
    layers: int = 2
    heads: int = 3
    kv_heads: int = 3
    vocabulary: int = 9
    positions: int = 8


GROUPED = Sizes(dim=16, heads=4, kv_heads=2)
SHAPE = DecoderShape(width=16, hidden=10, layers=2, heads=4, kv_heads=2, vocabulary=9, positions=8)


def weights_of(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays at random, in the file's order and layouts, as export.py writes them."""
    d, h, n, v = sizes.dim, sizes.hidden, sizes.layers, sizes.vocabulary
    head = d // sizes.heads
    kv = sizes.kv_heads * head
    shapes = {
        "tok_emb": (v, d),
        "attn_norm": (n, d),
        "wq": (n, d, d),
        "wk": (n, kv, d),
        "wv": (n, kv, d),
        "wo": (n, d, d),
        "ffn_norm": (n, d),
        "w1": (n, h, d),
        "w2": (n, d, h),
        "w3": (n, h, d),
        "final_norm": (d,),
    }
    rng = np.random.default_rng(seed)
    arrays = {
        name: (
            rng.uniform(0.5, 1.5, shape) if "norm" in name else rng.normal(size=shape) / np.sqrt(d)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }
    angles = np.outer(np.arange(sizes.positions), 1e4 ** (-np.arange(0, head, 2) / head))
    tables = {"cos": np.cos(angles), "sin": np.sin(angles)}
    return arrays | {name: table.astype(np.float32) for name, table in tables.items()}


def official(sizes: Sizes, arrays: dict[str, np.ndarray]) -> bytes:
    return struct.pack("<7i", *sizes) + b"".join(a.tobytes() for a in arrays.values())


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


DATA = official(GROUPED, weights_of(GROUPED))


@pytest.mark.parametrize("sizes", [Sizes(), GROUPED], ids=["all-heads", "grouped"])
def test_the_imported_decoder_is_that_of_numpy(sizes: Sizes, tmp_path: Path):
    arrays = weights_of(sizes)
    model, variables = read_llama2c(written(tmp_path / "model.bin", official(sizes, arrays)))
    text = tokens(3, sizes.vocabulary, 2, 7)
    expected = [llama(arrays, sizes.heads, sizes.kv_heads, row) for row in text]
    logits = jax.jit(model.apply)(variables, text)
    np.testing.assert_allclose(logits, np.stack(expected), atol=2e-5)


def test_the_header_is_the_shape(tmp_path: Path):
    assert read_llama2c(written(tmp_path / "model.bin", DATA)).model == Decoder(SHAPE)


def test_there_and_back_is_the_same_file(tmp_path: Path):
    model, variables = read_llama2c(written(tmp_path / "model.bin", DATA))
    write_llama2c(tmp_path / "again.bin", model.shape, variables)
    again = (tmp_path / "again.bin").read_bytes()
    tables = 2 * 4 * GROUPED.positions * 2
    assert again[:-tables] == DATA[:-tables]
    ours, theirs = (np.frombuffer(data[-tables:], "<f4") for data in (again, DATA))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_back_and_there_are_the_same_variables(tmp_path: Path):
    variables = variables_of(Decoder(SHAPE), jnp.zeros((1, 2), jnp.int32))
    write_llama2c(tmp_path / "model.bin", SHAPE, variables)
    again = read_llama2c(tmp_path / "model.bin").variables
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_the_parts_are_all_parameters_and_two_tables():
    shape = DecoderShape()
    parts = parts_of(shape)
    assert sum(np.prod(part.shape) for part in parts if part.path) == 260_032
    assert [part.shape for part in parts if not part.path] == [(512, 4), (512, 4)]


def _with_header(**changed: int) -> bytes:
    return struct.pack("<7i", *GROUPED._replace(**changed)) + DATA[28:]


def _with_float(index: int, value: float) -> bytes:
    at = 28 + 4 * index
    return DATA[:at] + struct.pack("<f", value) + DATA[at + 4 :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short for a header"),
        (DATA[:27], "27 bytes, 28 needed"),
        (DATA[:-4], f"has {len(DATA) - 4} bytes instead of {len(DATA)}"),
        (DATA + b"\0", f"has {len(DATA) + 1} bytes instead of {len(DATA)}"),
        (b"<html>" + DATA, "no checkpoint of llama2.c"),
        (_with_header(vocabulary=-9), "classifier that is not the embedding"),
        (_with_header(layers=0), "no checkpoint of llama2.c"),
        (_with_header(layers=3), "bytes instead of"),
        (_with_header(heads=5), "describes no decoder"),
        (_with_header(kv_heads=3), "describes no decoder"),
        (_with_float(17, np.nan), "float 17 after the header"),
        (_with_float(0, np.inf), "float 0 after the header"),
        (_with_float((len(DATA) - 28) // 4 - 1, 0.5), "other rotations"),
    ],
    ids=str,
)
def test_other_files_are_refused(data: bytes, message: str, tmp_path: Path):
    path = written(tmp_path / "model.bin", data)
    with pytest.raises(DataFileError, match=message) as caught:
        read_llama2c(path)
    assert str(path) in str(caught.value)
    assert "try:" in str(caught.value)


def test_another_file_in_the_folder_is_refused_by_its_checksum(
    tmp_path: Path, bare: pytest.MonkeyPatch
):
    (tmp_path / "stories260K").mkdir()
    for file in (CHECKPOINT, TOKENIZER):
        written(tmp_path / file.path, DATA)
    with pytest.raises(DataFileError, match=r"stories260K.bin is damaged, or another file"):
        load_stories260k(data_dir=tmp_path)


@pytest.mark.parametrize("present", [(), (CHECKPOINT,)], ids=["nothing", "weights-alone"])
def test_a_folder_that_lacks_a_file_is_named(present, tmp_path: Path, bare: pytest.MonkeyPatch):
    (tmp_path / "stories260K").mkdir()
    bare.setenv("QUANTJAX_DATA", str(tmp_path))
    with pytest.raises(DataUnavailableError, match=re.escape(str(tmp_path))) as caught:
        load_stories260k()
    assert "stories260K/stories260K.bin, stories260K/tok512.bin" in str(caught.value)
