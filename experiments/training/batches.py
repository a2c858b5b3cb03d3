"""Which rows and which key each step gets: a function of the seed and the step, and nothing else.

Hence a run that goes on sees what it would have seen. Three streams are folded from the seed's key:
one for ``init``, one for the order of each epoch, one for the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.training.errors import TaskError
from experiments.training.task import Batch
from quantjax.printing import shape_text

_INIT, _ORDER, _STEP = 0, 1, 2


class Feed(NamedTuple):
    """Where ``init`` and every step have their randomness and data from.

    Attributes:
      init_key: for the task's ``init``.
      at: ``step -> (batch, key)``; ``step`` is how many were done before.
    """

    init_key: jax.Array
    at: Callable[[int], tuple[Batch, jax.Array]]


def feed(data: Batch, *, batch: int, seed: int) -> Feed:
    """Batches by epochs, each a permutation of its own, without the rows left over at its end.

    The data is moved to the default device once, and gathered there: nothing waits for the host.

    Args:
      data: a tree of arrays with one common leading axis.

    Raises:
      TaskError: no common leading axis, or fewer rows than a batch has.
    """
    rows = row_count(data)
    if rows < batch:
        raise TaskError(
            f"the data has {rows} rows, a batch {batch}", fix=f"batch={rows} or less, or more data"
        )
    arrays = jax.tree.map(jnp.asarray, data)
    root = jax.random.key(seed)
    orders, steps = jax.random.fold_in(root, _ORDER), jax.random.fold_in(root, _STEP)
    per_epoch = rows // batch

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> jax.Array:
        return _order(orders, epoch, rows=rows)

    def at(step: int) -> tuple[Batch, jax.Array]:
        epoch, position = divmod(step, per_epoch)
        return _taken(arrays, order(epoch), steps, position * batch, step, batch=batch)

    return Feed(jax.random.fold_in(root, _INIT), at)


def row_count(data: Batch) -> int:
    """The length of the leading axis that all leaves have in common.

    Raises:
      TaskError: no arrays, or no common leading axis.
    """
    found = {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(data)
    }
    lengths = {shape[0] if shape else None for shape in found.values()}
    if len(lengths) != 1 or None in lengths:
        listed = ", ".join(f"data{path} {shape_text(shape)}" for path, shape in found.items())
        raise TaskError(
            "the data has no common leading axis",
            where=listed[:300] or "no arrays",
            fix="arrays of one length, a row a sample, in a tuple or a dictionary",
        )
    return int(lengths.pop() or 0)


@functools.partial(jax.jit, static_argnames="rows")
def _order(keys: jax.Array, epoch: Any, *, rows: int) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(keys, epoch), rows)


@functools.partial(jax.jit, static_argnames="batch")
def _taken(
    arrays: Batch, order: jax.Array, keys: jax.Array, start: Any, step: Any, *, batch: int
) -> tuple[Batch, jax.Array]:
    index = lax.dynamic_slice_in_dim(order, start, batch)
    rows = jax.tree.map(lambda leaf: leaf.at[index].get(mode="promise_in_bounds"), arrays)
    return rows, jax.random.fold_in(keys, step)
