"""A state as the arrays that a checkpoint holds, and back.

A checkpoint holds the leaves alone, numbered; the structure comes from a state that the task's
``init`` has made. So whatever is a pytree comes back as what it was: NamedTuples such as
``QParams``, optimizer states, classes that are registered. Beside them stands what each leaf is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training.errors import RunMismatchError, TaskError
from experiments.training.task import State

COUNT = "count"  # of the leaves; also what a state without leaves has to file


class Leaf(NamedTuple):
    """What one leaf is.

    Attributes:
      path: ``params/Dense_0/kernel``.
      dtype: its name; that of a typed PRNG key is ``key<...>``.
      shape: as the model sees it.
      implementation: of a typed PRNG key, else empty.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    implementation: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def normalized(state: State) -> State:
    """The same with JAX arrays for leaves, none weakly typed, so that it comes back as it was."""
    return jax.tree.map(_strong, state)


def described(state: State) -> list[Leaf]:
    """What each leaf is, in the order of the tree's leaves."""
    return [
        Leaf(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            str(leaf.dtype),
            tuple(leaf.shape),
            str(jax.random.key_impl(leaf)) if is_key(leaf) else "",
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]


def stored(state: State) -> dict[str, np.ndarray]:
    """The leaves as NumPy arrays under their numbers; empty ones are left out.

    Narrow dtypes that checkpoints may lack (float8, int4) become bytes, keys their numbers.
    """
    arrays = {str(number): _as_stored(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
    kept = {number: array for number, array in arrays.items() if array.size}
    return {COUNT: np.asarray(len(arrays)), **kept}


def stored_names(like: State) -> list[str]:
    """The names that :func:`stored` gives to the leaves of such a state."""
    sizes = [leaf.size for leaf in jax.tree.leaves(like)]
    return [COUNT, *(str(number) for number, size in enumerate(sizes) if size)]


def restored(arrays: Mapping[str, np.ndarray], like: State) -> State:
    """The state whose leaves were stored; ``like`` has its structure, dtypes and shapes.

    Raises:
      ValueError: other leaves; the file is damaged, since ``check_same`` has found them equal.
    """
    leaves, structure = jax.tree.flatten(like)
    if int(arrays[COUNT]) != len(leaves):
        raise ValueError(f"{int(arrays[COUNT])} leaves, and {len(leaves)} are listed")
    values = [_from_stored(arrays.get(str(number)), leaf) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, values)


def check_same(saved: Sequence[Leaf], like: State, *, where: str) -> None:
    """Raise ``RunMismatchError`` where a checkpoint's state is not one like ``like``."""
    lines = differences(saved, described(like), ("in the checkpoint", "now"))
    if lines:
        raise RunMismatchError(
            "the state is not the one of the checkpoint",
            where=where,
            why="; ".join(lines),
            fix="the model, optimizer and plan of that run, or another folder",
        )


def check_kept(before: State, after: State) -> None:
    """Raise ``TaskError`` where a step has changed what the state is."""
    structures: list[Any] = [jax.tree.structure(before), jax.tree.structure(after)]
    if structures[0] == structures[1]:
        lines = differences(described(before), described(after), ("before", "after"))
    else:
        lines = [f"{structures[0]} before, {structures[1]} after"[:400]]
    if lines:
        raise TaskError(
            "the step returns another kind of state than it is given",
            why="; ".join(lines),
            fix="return the same structure, shapes and dtypes; cast where the dtype has changed",
        )


def differences(first: Sequence[Leaf], second: Sequence[Leaf], words: tuple[str, str]) -> list[str]:
    """What differs, a phrase a leaf, five at most."""
    one, other = ({leaf.path: leaf for leaf in leaves} for leaves in (first, second))
    paths = [p for p in dict.fromkeys([*one, *other]) if one.get(p) != other.get(p)]
    lines = [
        f"{path}: {one.get(path, 'absent')} {words[0]}, {other.get(path, 'absent')} {words[1]}"
        for path in paths[:5]
    ]
    return lines + ([f"and {len(paths) - 5} more"] if len(paths) > 5 else [])


def _strong(leaf: Any) -> jax.Array:
    array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    weak = getattr(array, "weak_type", False)
    return jax.lax.convert_element_type(array, array.dtype) if weak else array


def _as_stored(leaf: jax.Array) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
    if array.dtype.kind in "biufc" or array.dtype == jnp.bfloat16:
        return array
    return array.view(np.uint8)


def _from_stored(array: np.ndarray | None, like: jax.Array) -> jax.Array:
    if array is None:
        if like.size:
            raise ValueError("an array is missing")
        return like
    value: jax.Array
    if is_key(like):
        value = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    else:
        value = jnp.asarray(array.view(np.dtype(like.dtype)))
    if value.shape != like.shape:
        raise ValueError(f"an array of {value.shape}, and {like.shape} is listed")
    return jax.device_put(value, like.sharding) if like.committed else value
