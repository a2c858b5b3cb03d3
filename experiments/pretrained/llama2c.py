"""Decoders in the first file format of llama2.c, between its bytes and linen's variables.

Seven integers, then float32 arrays one after another, layers stacked; matrices are
``(out, in)``. The last two are cosines and sines of the rotations, which the decoder computes: they
are checked and not kept. Everything is little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from experiments.models.attention import rotations
from experiments.models.decoder import Decoder, DecoderShape
from experiments.models.errors import ModelShapeError
from experiments.pretrained.files import refuse

HEADER = 7  # int32 numbers
LARGEST = 1 << 24  # of a header's number; more means that the file is another one
ROTATION_TOLERANCE = 1e-4  # float32 angles of up to 2^10 are off by 2^-15

_LAYER = ("layers",)


class Part(NamedTuple):
    """One array of the file.

    Attributes:
      path: in linen's params; empty for the tables of rotations.
      shape: in the file.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]


class Checkpoint(NamedTuple):
    """A decoder and its variables."""

    model: Decoder
    variables: dict[str, Any]


def parts_of(shape: DecoderShape) -> list[Part]:
    """The arrays of a file, in its order; the classifier is the embedding."""
    layers, width, hidden = shape.layers, shape.width, shape.hidden
    keys, half = shape.kv_heads * shape.head_features, shape.head_features // 2

    def matrix(name: str, outputs: int, inputs: int) -> Part:
        return Part(("layers", name, "kernel"), (layers, outputs, inputs))

    return [
        Part(("embedding", "embedding"), (shape.vocabulary, width)),
        Part(("layers", "attention_norm", "scale"), (layers, width)),
        matrix("query", width, width),
        matrix("key", keys, width),
        matrix("value", keys, width),
        matrix("output", width, width),
        Part(("layers", "mlp_norm", "scale"), (layers, width)),
        matrix("gate", hidden, width),
        matrix("down", width, hidden),
        matrix("up", hidden, width),
        Part(("norm", "scale"), (width,)),
        Part((), (shape.positions, half)),
        Part((), (shape.positions, half)),
    ]


def read_llama2c(path: Path) -> Checkpoint:
    """The decoder of a file.

    Raises:
      DataFileError: a header that describes no decoder, one whose classifier is no embedding,
        another size than the header says, a number that is not finite, or other rotations than
        those of base 10,000.
    """
    data = path.read_bytes()
    shape = _shape_of(data, path)
    parts = parts_of(shape)
    expected = 4 * (HEADER + sum(math.prod(part.shape) for part in parts))
    if len(data) != expected:
        raise refuse(path, f"has {len(data)} bytes instead of {expected}", f"its header is {shape}")
    floats = np.frombuffer(data, "<f4", offset=4 * HEADER)
    if not np.all(np.isfinite(floats)):
        where = int(np.argmin(np.isfinite(floats)))
        raise refuse(path, "holds a number that is not finite", f"float {where} after the header")
    params: dict[str, Any] = {}
    tables = []
    for part, array in zip(parts, _split(floats, parts), strict=True):
        if not part.path:
            tables.append(array)
            continue
        *folders, name = part.path
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = jnp.asarray(_turned(part, array), jnp.float32)
    _check_rotations(shape, tables, path)
    return Checkpoint(Decoder(shape), {"params": params})


def _shape_of(data: bytes, path: Path) -> DecoderShape:
    if len(data) < 4 * HEADER:
        raise refuse(path, "is too short for a header", f"{len(data)} bytes, {4 * HEADER} needed")
    numbers = [int(n) for n in np.frombuffer(data, "<i4", count=HEADER)]
    names = ("width", "hidden", "layers", "heads", "kv_heads", "vocabulary", "positions")
    sizes = dict(zip(names, numbers, strict=True))
    if sizes["vocabulary"] < 0:
        why = "a negative vocabulary in the header means a classifier of its own"
        raise refuse(path, "has a classifier that is not the embedding", why)
    if not all(0 < n < LARGEST for n in numbers):
        raise refuse(path, "is no checkpoint of llama2.c", f"its header would be {sizes}")
    try:
        return DecoderShape(**sizes)
    except ModelShapeError as error:
        raise refuse(path, "describes no decoder", f"{error.what}: {error.why}") from error


def _split(floats: npt.NDArray[np.float32], parts: list[Part]) -> Iterator[Any]:
    start = 0
    for part in parts:
        count = math.prod(part.shape)
        yield floats[start : start + count].reshape(part.shape)
        start += count


def _turned(part: Part, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Kernels are ``(in, out)`` here and ``(out, in)`` there; both ways the same."""
    return array.swapaxes(-1, -2) if part.path[-1] == "kernel" else array


def _rotation_tables(shape: DecoderShape) -> tuple[jax.Array, jax.Array]:
    return rotations(jnp.arange(shape.positions), shape.head_features, shape.rotary_base)


def _check_rotations(shape: DecoderShape, tables: list[Any], path: Path) -> None:
    ours = [np.asarray(table) for table in _rotation_tables(shape)]
    worst = max(float(np.max(np.abs(a - b))) for a, b in zip(ours, tables, strict=True))
    if worst > ROTATION_TOLERANCE:
        raise refuse(
            path,
            "has other rotations than the decoder",
            f"cosines and sines of base {shape.rotary_base:g} differ by {worst:.2g}",
        )


def write_llama2c(path: Path, shape: DecoderShape, variables: Any) -> None:
    """Write the file that :func:`read_llama2c` reads."""
    numbers = (
        *(shape.width, shape.hidden, shape.layers, shape.heads, shape.kv_heads),
        *(shape.vocabulary, shape.positions),
    )
    tables = iter(_rotation_tables(shape))
    chunks = [np.asarray(numbers, "<i4").tobytes()]
    for part in parts_of(shape):
        array: Any = variables["params"] if part.path else next(tables)
        for name in part.path:
            array = array[name]
        array = np.asarray(array)
        chunks.append((_turned(part, array) if part.path else array).astype("<f4").tobytes())
    path.write_bytes(b"".join(chunks))
