"""A convolution of int8 as one dot of what its window sees, for backends without a better form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.integers.direct import Lowering


def conv_of_patches(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    dot: Lowering,
) -> jax.Array:
    """A convolution of int8 into int32 as one dot of all patches; the patches are int8 too.

    With one input channel in a group there is nothing to add up but the window: products are then
    taken element by element in int32.
    """
    x, w, back = channels_last(lhs, rhs, dimension_numbers)
    x = dilated(x, padding, lhs_dilation)
    *window, channels, outputs = w.shape
    patches = _patches(x, window, window_strides, rhs_dilation)  # places of the window × (N, *S, C)
    batch = patches[0].shape[:-1]
    number, groups = math.prod(batch), feature_group_count
    w = w.reshape(len(patches), channels, groups, outputs // groups)
    if groups > 1 and channels == 1:
        sums = jnp.zeros((number, groups, outputs // groups), jnp.int32)
        for patch, kernel in zip(patches, w[:, 0], strict=True):
            taken = patch.reshape(number, groups, 1).astype(jnp.int32)
            sums = sums + taken * kernel[None].astype(jnp.int32)
    elif groups > 1:
        rows = jnp.stack(patches, axis=-2).reshape(number, len(patches), groups, channels)
        length = len(patches) * channels
        rows = rows.transpose(2, 0, 1, 3).reshape(groups, number, length)
        w = w.transpose(2, 0, 1, 3).reshape(groups, length, outputs // groups)
        sums = dot(rows, w, dimension_numbers=(((2,), (1,)), ((0,), (0,))))
        sums = jnp.moveaxis(sums, 0, 1)
    else:
        length = len(patches) * channels
        rows = jnp.concatenate(patches, axis=-1).reshape(number, length)
        w = w.reshape(length, outputs)
        sums = dot(rows, w, dimension_numbers=(((1,), (0,)), ((), ())))
    return lax.transpose(sums.reshape(*batch, outputs), back)


class ChannelsLast(NamedTuple):
    """``(N, *space, C)`` and ``(*window, C, outputs)``, and what brings the result back."""

    x: jax.Array
    w: jax.Array
    back: tuple[int, ...]


def channels_last(lhs: jax.Array, rhs: jax.Array, spec: lax.ConvDimensionNumbers) -> ChannelsLast:
    """The operands of a convolution with channels last; ``back`` is a transposition."""
    batch, channels, *space = spec.lhs_spec
    outputs, inputs, *window = spec.rhs_spec
    x = lax.transpose(lhs, (batch, *space, channels))
    w = lax.transpose(rhs, (*window, inputs, outputs))
    batch, channels, *space = spec.out_spec
    return ChannelsLast(x, w, tuple(map(int, np.argsort((batch, *space, channels)))))


def dilated(x: jax.Array, padding: Sequence[tuple[int, int]], by: Sequence[int]) -> jax.Array:
    """``x``, channels last, with zeros around and between its entries."""
    edges = [(low, high, step - 1) for (low, high), step in zip(padding, by, strict=True)]
    return lax.pad(x, np.int8(0), [(0, 0, 0), *edges, (0, 0, 0)])


def _patches(
    x: jax.Array, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> list[jax.Array]:
    """What each place of the window sees, in ``(batch, *outputs, channels)``."""
    outputs = [
        max(0, (size - (taps - 1) * by - 1) // stride + 1)
        for size, taps, by, stride in zip(x.shape[1:-1], window, dilation, strides, strict=True)
    ]
    places = list(np.ndindex(*window))
    if not all(outputs):  # smaller than the window
        return [jnp.zeros((x.shape[0], *outputs, x.shape[-1]), x.dtype)] * len(places)
    found = []
    for place in places:
        start = [index * by for index, by in zip(place, dilation, strict=True)]
        stop = [
            first + (number - 1) * stride + 1
            for first, number, stride in zip(start, outputs, strides, strict=True)
        ]
        limits = (x.shape[0], *stop, x.shape[-1])
        found.append(lax.slice(x, (0, *start, 0), limits, (1, *strides, 1)))
    return found
