"""What has to be alike: the parameters of all seeds, and what is calibrated and tested with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.planning import Plan, first_difference
from quantjax.printing import shape_text
from quantjax.sweep.study import Study
from quantjax.transforms.sites import sites


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


def check_comparable(study: Study, batch: Any, inputs: Any) -> None:
    """Raise ``SweepError`` where a calibration batch has other axes than what is tested.

    Sizes may differ: the model is planned with one, and run on the other.
    """
    ranks = [[jnp.ndim(leaf) for leaf in jax.tree.leaves(tree)] for tree in (batch, inputs)]
    if ranks[0] != ranks[1]:
        raise _not_alike(study, batch, inputs, "")


def check_planned(study: Study, planned: Plan, params: Any, batch: Any, inputs: Any) -> None:
    """Raise ``SweepError`` where the model has other products for what is tested than for the
    batch that it was planned with, for instance where one of them is of integers."""
    tested = sites(study.apply, params, inputs).sites
    different = first_difference((entry.site for entry in planned.sites), tested)
    if different is not None:
        names = [site.name for site in different if site is not None]
        raise _not_alike(study, batch, inputs, f", site {names[0]}")


def _not_alike(study: Study, batch: Any, inputs: Any, where: str) -> errors.SweepError:
    found, wanted = (
        ", ".join(f"{jnp.result_type(a)} {shape_text(jnp.shape(a))}" for a in jax.tree.leaves(t))
        for t in (batch, inputs)
    )
    return errors.SweepError(
        "calibration batches and test inputs are not alike",
        where=f"study {study.name}{where}",
        why=f"the first batch is {found:.80}, the test inputs are {wanted:.80}",
        fix="calibration=lambda: [inputs], a list of batches like those of test",
    )
