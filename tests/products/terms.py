"""Products as a plain list of multiply-adds, in int64 and float64.

Every dot and every convolution is ``out[o] += lhs[l] · rhs[r]`` over index triples. The triples are
written down here from the definition of each operation, without JAX.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PADDING = -1  # the left index of a product with padding, or with a hole of a dilated input


class Terms(NamedTuple):
    """Flat indices of one product, a multiply-add each, and the shape of the result."""

    out: np.ndarray
    lhs: np.ndarray
    rhs: np.ndarray
    shape: tuple[int, ...]


def einsum_terms(spec: str, lhs: Sequence[int], rhs: Sequence[int]) -> Terms:
    """``"mk,kn->mn"``: one term for each value of all letters; sums run in order of the letters."""
    inputs, output = spec.split("->")
    labels = inputs.split(",")
    sizes = dict(zip("".join(labels), (*lhs, *rhs), strict=True))
    letters = list(dict.fromkeys([*output, *"".join(labels)]))
    grid = dict(zip(letters, np.indices([sizes[c] for c in letters]), strict=True))

    def flat(label: str) -> np.ndarray:
        shape = tuple(sizes[c] for c in label)
        index = np.zeros_like(grid[letters[0]])
        for c, n in zip(label, shape, strict=True):
            index = index * n + grid[c]
        return index.ravel()

    shape = tuple(sizes[c] for c in output)
    return Terms(flat(output), flat(labels[0]), flat(labels[1]), shape)


class Window(NamedTuple):
    """How a convolution slides, one entry an axis; layouts as in ``NCHW``, ``OIHW``, ``NHWC``."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    layouts: tuple[str, str, str]
    groups: int = 1


def same(sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> tuple:
    """TensorFlow's SAME: ``ceil(n / stride)`` outputs, the odd pad at the end."""
    pairs = []
    for n, k, s in zip(sizes, kernel, strides, strict=True):
        total = max((math.ceil(n / s) - 1) * s + k - n, 0)
        pairs.append((total // 2, total - total // 2))
    return tuple(pairs)


def _as(shape: Sequence[int], layout: str, order: str) -> np.ndarray:
    """Flat indices of a tensor, its axes brought from ``layout`` into ``order``."""
    axes = [layout.index(c) for c in order]
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes)


def conv_terms(lhs: Sequence[int], rhs: Sequence[int], window: Window) -> Terms:
    """The textbook loops over batch, output channel, position, input channel and tap."""
    space = "DHW"[-len(window.strides) :]
    left = _as(lhs, window.layouts[0], "NC" + space)
    right = _as(rhs, window.layouts[1], "OI" + space)
    batch, out_channels = left.shape[0], right.shape[0]
    channels, taps = right.shape[1], right.shape[2:]
    extent = [
        ((n - 1) * ld + 1 + lo + hi - ((k - 1) * rd + 1)) // s + 1
        for n, k, s, (lo, hi), ld, rd in zip(left.shape[2:], taps, *window[:4], strict=True)
    ]
    sizes = {"N": batch, "C": out_channels, **dict(zip(space, extent, strict=True))}
    shape = tuple(sizes[c] for c in window.layouts[2])
    out = _as(shape, window.layouts[2], "NC" + space)
    triples = []
    for n, o, *p in np.ndindex(out.shape):
        group = o // (out_channels // window.groups)
        for i, *k in itertools.product(range(channels), *map(range, taps)):
            source = PADDING
            at = [
                pp * s + kk * rd - lo
                for pp, kk, s, (lo, _), rd in zip(
                    p, k, window.strides, window.padding, window.rhs_dilation, strict=True
                )
            ]
            inside = all(
                0 <= q <= (size - 1) * ld and q % ld == 0
                for q, size, ld in zip(at, left.shape[2:], window.lhs_dilation, strict=True)
            )
            if inside:
                index = [q // ld for q, ld in zip(at, window.lhs_dilation, strict=True)]
                source = left[(n, group * channels + i, *index)]
            triples.append((out[(n, o, *p)], source, right[(o, i, *k)]))
    columns = np.array(triples).T
    return Terms(columns[0], columns[1], columns[2], shape)


def values(terms: Terms, lhs: np.ndarray, pad: float = 0) -> np.ndarray:
    """The left factor of each term; ``pad`` where there is padding."""
    return np.where(terms.lhs == PADDING, np.asarray(pad, lhs.dtype), lhs.ravel()[terms.lhs])


def product(terms: Terms, lhs: np.ndarray, rhs: np.ndarray, pad: float = 0) -> np.ndarray:
    """``Σ lhs · rhs`` in the operands' own dtype: int64 is exact."""
    out = np.zeros(math.prod(terms.shape), np.result_type(lhs, rhs))
    np.add.at(out, terms.out, values(terms, lhs, pad) * rhs.ravel()[terms.rhs])
    return out.reshape(terms.shape)


def cotangents(
    terms: Terms, lhs: np.ndarray, rhs: np.ndarray, g: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of ``Σ g · product`` with respect to both operands."""
    to_lhs, to_rhs = np.zeros(lhs.size), np.zeros(rhs.size)
    inside = terms.lhs != PADDING
    flat = g.ravel()[terms.out]
    np.add.at(to_lhs, terms.lhs[inside], (flat * rhs.ravel()[terms.rhs])[inside])
    np.add.at(to_rhs, terms.rhs, flat * values(terms, lhs))
    return to_lhs.reshape(lhs.shape), to_rhs.reshape(rhs.shape)


def factors(terms: Terms, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """``s_lhs · s_rhs`` of each output, from scales spread over the operands, in float32."""
    out = np.ones(math.prod(terms.shape), np.float32)
    inside = terms.lhs != PADDING
    scales = lhs.ravel()[terms.lhs] * rhs.ravel()[terms.rhs]
    out[terms.out[inside]] = scales.astype(np.float32)[inside]
    return out.reshape(terms.shape)
