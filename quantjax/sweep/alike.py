"""Models of several seeds are one program only if their parameters have the same shapes."""

from __future__ import annotations

from typing import Any

import jax

from quantjax import errors
from quantjax.printing import shape_text
from quantjax.sweep.study import Study


def shapes_of(params: Any) -> Any:
    """The tree with shapes and dtypes alone, which hold no memory."""
    return jax.eval_shape(lambda tree: tree, params)


def check_alike(study: Study, first: tuple[int, Any], seed: int, params: Any) -> None:
    """Raise unless the parameters of a seed have the leaves that those of the first one have.

    Args:
      first: a seed, and the shapes of its parameters.

    Raises:
      SweepError: names the seed, and the first leaf that differs.
    """
    other, expected = first
    wanted, found = _leaves(expected), _leaves(shapes_of(params))
    different = [path for path in {**wanted, **found} if wanted.get(path) != found.get(path)]
    # Trees may differ where no leaf does: a list for a dict.
    if not different and str(jax.tree.structure(params)) == str(jax.tree.structure(expected)):
        return
    path = different[0] if different else "the tree"
    now, before = found.get(path, "not there"), wanted.get(path, "not there")
    raise errors.SweepError(
        f"the parameters of seed {seed} are not like those of seed {other}",
        where=f"study {study.name}, train, {path}",
        why=f"it is {now}, and was {before}" if different else "its containers are others",
        fix=f"the same shapes for every seed, or a sweep of its own with seeds=({seed},)",
    )


def _leaves(shapes: Any) -> dict[str, str]:
    """``8x3 float32``, by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{shape_text(x.shape)} {x.dtype}"
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    }
