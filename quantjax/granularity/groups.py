"""Scales of groups: which numbers of them fit an axis, and the moves between scales and tensors.

Groups are found from the two shapes alone, so that scales survive ``vmap``, ``scan`` and slicing
along other axes: with ``k`` scales along an axis of ``n`` entries, a group has ``⌈n / k⌉``
consecutive entries, the last one what is left. Not every ``k`` has such groups: 4 scales along 6
entries would be 3 runs of 2. ``k`` fits where ``⌈n / ⌈n / k⌉⌉ = k``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax import errors

Reduce = Callable[..., jax.Array]


def group_size(n: int, groups: int) -> int:
    """Entries of a group where ``groups`` scales stand for ``n`` entries; the last may have fewer.

    >>> group_size(70, 3)
    24
    """
    return -(-n // groups) if groups else 1


def _fits(n: int, groups: int) -> bool:
    if groups in (1, n):
        return True
    return 1 <= groups < n and -(-n // group_size(n, groups)) == groups


def check_scale_shape(shape: Sequence[int], scale_shape: Sequence[int]) -> None:
    """Raise ``GranularityError`` unless each axis of the scale stands for groups of the tensor's.

    ``k`` scales fit ``n`` entries where ``⌈n / ⌈n / k⌉⌉ = k``: all divisors of ``n``, 1 and ``n``
    among them, and whatever :class:`Remainder` gives.
    """
    fits = len(shape) == len(scale_shape) and all(map(_fits, shape, scale_shape))
    if not fits:
        raise errors.GranularityError(
            f"a scale of shape {tuple(scale_shape)} does not fit a tensor of {tuple(shape)}",
            why="scales keep the tensor's rank; each axis has size 1, the full size, or a number "
            "of groups that are equally long but for the last",
            fix="reshape the scale with size-1 axes, for instance scale[None, :]",
        )


def expand(scale: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Repeat grouped axes, so that the result broadcasts against a tensor of ``shape``.

    Axes of size 1 stay as they are.

    >>> expand(jnp.array([[1.0], [2.0]]), (5, 3))[:, 0].tolist()
    [1.0, 1.0, 1.0, 2.0, 2.0]
    """
    if scale.ndim == 0:
        return scale
    check_scale_shape(shape, scale.shape)
    for axis, (n, groups) in enumerate(zip(shape, scale.shape, strict=True)):
        if groups not in (1, n):
            scale = repeat_groups(scale, group_size(n, groups), n, axis=axis)
    return scale


def repeat_groups(scale: jax.Array, times: int, n: int, *, axis: int) -> jax.Array:
    """Each entry of an axis ``times`` times, ``n`` in all: the last one may come less often."""
    repeated = jnp.repeat(scale, times, axis=axis)
    return lax.slice_in_dim(repeated, 0, n, axis=axis) if repeated.shape[axis] != n else repeated


def refine(scale: jax.Array, shape: Sequence[int], finer: Sequence[int]) -> jax.Array:
    """A scale of a tensor of ``shape`` at the finer granularity ``finer``.

    >>> refine(jnp.array([1.0, 2.0]), (8,), (4,)).tolist()
    [1.0, 1.0, 2.0, 2.0]

    Raises:
      GranularityError: a group of ``finer`` lies in two groups of the scale.
    """
    check_scale_shape(shape, scale.shape)
    check_scale_shape(shape, finer)
    for axis, (n, groups, wanted) in enumerate(zip(shape, scale.shape, finer, strict=True)):
        coarse, fine = group_size(n, groups), group_size(n, wanted)
        if groups not in (1, wanted) and coarse % fine:
            raise errors.GranularityError(
                f"a scale of shape {scale.shape} is not coarser than one of {tuple(finer)}",
                where=f"tensor of shape {tuple(shape)}, axis {axis}",
                why=f"groups of {fine} entries reach across those of {coarse}",
                fix="one granularity for both",
            )
        if groups != wanted:
            scale = jnp.take(scale, np.arange(wanted) * fine // coarse, axis=axis)
    return scale


def reduce_to(
    x: jax.Array, scale_shape: Sequence[int], reduce: Reduce, **options: object
) -> jax.Array:
    """Reduce ``x`` to ``scale_shape`` by ``reduce`` (``jnp.min``, ``jnp.max``, ...).

    A last group that is shorter is reduced on its own, never filled up, so that any ``reduce``
    will do. ``where`` masks entries; it broadcasts against ``x``.

    >>> reduce_to(jnp.array([[1.0, 2.0], [3.0, 0.0]]), (2, 1), jnp.max).tolist()
    [[2.0], [3.0]]
    """
    check_scale_shape(x.shape, scale_shape)
    where = options.pop("where", None)
    mask = None if where is None else jnp.broadcast_to(jnp.asarray(where), x.shape)
    return _reduced(x, tuple(scale_shape), reduce, mask, options)


def _reduced(
    x: jax.Array,
    scale_shape: tuple[int, ...],
    reduce: Reduce,
    mask: jax.Array | None,
    options: Mapping[str, object],
) -> jax.Array:
    split: list[int] = []
    reduced: list[int] = []
    for axis, (n, groups) in enumerate(zip(x.shape, scale_shape, strict=True)):
        size = group_size(n, groups)
        if groups * size != n:
            parts = []
            for start, stop, count in ((0, n - n % size, groups - 1), (n - n % size, n, 1)):
                rows, masked = (
                    None if a is None else lax.slice_in_dim(a, start, stop, axis=axis)
                    for a in (x, mask)
                )
                assert rows is not None
                part_shape = (*scale_shape[:axis], count, *scale_shape[axis + 1 :])
                parts.append(_reduced(rows, part_shape, reduce, masked, options))
            return jnp.concatenate(parts, axis=axis)
        reduced.append(len(split) + 1)
        split += [groups, size]
    if mask is not None:
        options = {**options, "where": mask.reshape(split)}
    return reduce(x.reshape(split), axis=tuple(reduced), **options).reshape(scale_shape)


def group_counts(shape: Sequence[int], scale_shape: Sequence[int]) -> np.ndarray:
    """How many entries each group has, at the shape of the scale (int64).

    >>> group_counts((5, 3), (2, 1)).tolist()
    [[9], [6]]
    """
    check_scale_shape(shape, scale_shape)
    counts = np.ones((), np.int64)
    for n, groups in zip(shape, scale_shape, strict=True):
        size = group_size(n, groups)
        counts = np.multiply.outer(counts, np.minimum(size, n - size * np.arange(groups)))
    return counts


def groups_last(x: jax.Array, scale_shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The entries of each group along a last axis, ``[*scale_shape, n]``, and where there are some.

    Groups that are shorter are filled up, with what the mask leaves out.

    >>> values, some = groups_last(jnp.array([1.0, 2.0, 3.0]), (2,))
    >>> values.tolist(), some.tolist()
    ([[1.0, 2.0], [3.0, 0.0]], [[True, True], [True, False]])
    """
    check_scale_shape(x.shape, scale_shape)
    sizes = [group_size(n, groups) for n, groups in zip(x.shape, scale_shape, strict=True)]
    missing = [g * s - n for n, g, s in zip(x.shape, scale_shape, sizes, strict=True)]
    split = [length for pair in zip(scale_shape, sizes, strict=True) for length in pair]
    axes = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]

    def gathered(array: jax.Array) -> jax.Array:
        filled = jnp.pad(array, [(0, m) for m in missing]) if any(missing) else array
        return filled.reshape(split).transpose(axes).reshape(*scale_shape, math.prod(sizes))

    return gathered(x), gathered(jnp.ones(x.shape, bool))
