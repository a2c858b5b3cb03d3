"""Which axes of a product's result are those of its kernel, and where they lie in the parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from quantjax.folding.norms import Place
from quantjax.interpreter import Op, Origin, Product
from quantjax.layout import STEP, Move, moves_of


def out_axes(product: Product, side: int) -> tuple[int, ...]:
    """The axis of the result for each axis of the kernel that reaches it, in the kernel's order."""
    if product.op is Op.CONV:
        spec = product.params["dimension_numbers"].out_spec
        return (spec[side],)
    (contracting, batch) = product.params["dimension_numbers"]
    own, free = batch[side], product.axes(side)[0]
    first = len(own)
    if side == 1:
        first += product.lhs.ndim - len(contracting[0]) - len(batch[0])
    places = dict(zip(own, range(len(own)), strict=True))
    places |= {axis: first + i for i, axis in enumerate(a for a in free if a not in own)}
    return tuple(places[axis] for axis in free)


def channel_shape(product: Product, side: int) -> tuple[int, ...]:
    """Lengths of the kernel's axes that reach the result; their product is how many channels."""
    shape = (product.lhs, product.rhs)[side].shape
    return tuple(shape[axis] for axis in product.axes(side)[0])


def channels_of_result(product: Product, side: int) -> np.ndarray:
    """The channel of each entry of the result: a view, of stride 0 where the channel is one."""
    axes, shape = out_axes(product, side), channel_shape(product, side)
    order = np.argsort(axes, kind="stable")
    numbers = np.arange(math.prod(shape)).reshape(shape).transpose(order)
    wide = [1] * product.out.ndim
    for axis, n in zip(axes, shape, strict=True):
        wide[axis] = n
    return np.broadcast_to(numbers.reshape(wide), product.out.shape)


def compressed(numbers: np.ndarray) -> np.ndarray:
    """One entry for each axis along which nothing changes, as far as strides tell."""
    at = tuple(
        slice(0, 1) if stride == 0 else slice(None)
        for stride, n in zip(numbers.strides, numbers.shape, strict=True)
    )
    return numbers[at]


def kernel_place(
    path: str, shape: Sequence[int], origin: Origin, product: Product, side: int
) -> Place:
    """Where the channels lie in a kernel that is one parameter, moved but not computed with."""
    entries = np.arange(math.prod(shape)).reshape(tuple(shape))
    layers = 0
    for move in moves_of(origin):
        layers += move.name == STEP
        entries = _moved(entries, move, layers)
    steps, own = entries.shape[:layers], (product.lhs, product.rhs)[side].shape
    free = product.axes(side)[0]
    numbers = np.arange(math.prod(steps) * math.prod(own[axis] for axis in free))
    wide = (*steps, *(n if axis in free else 1 for axis, n in enumerate(own)))
    channels = np.empty(math.prod(shape), np.int64)
    channels[entries.ravel()] = np.broadcast_to(numbers.reshape(wide), entries.shape).ravel()
    return place_of(path, channels.reshape(tuple(shape)))


def place_of(path: str, channels: np.ndarray, entries: tuple[int, ...] = ()) -> Place:
    """The place of channels in a parameter, one entry for each axis along which they stay."""
    for axis in range(channels.ndim):
        first = channels.take([0], axis)
        if channels.size and (channels == first).all():
            channels = first
    flat = tuple(int(channel) for channel in channels.ravel())
    return Place(path, tuple(channels.shape), flat, entries)


def _moved(entries: np.ndarray, move: Move, layers: int) -> np.ndarray:
    """One move of entries behind ``layers`` leading axes."""
    if move.name == STEP or move.neutral:
        return entries
    lead = entries.shape[:layers]
    if move.name == "transpose":
        order = (axis + layers for axis in move.params["permutation"])
        return entries.transpose((*range(layers), *order))
    if move.name == "rev":
        return np.flip(entries, tuple(axis + layers for axis in move.params["dimensions"]))
    return entries.reshape((*lead, *move.after))
