"""What ranks weights: the lowest scores are pruned first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from quantjax import errors
from quantjax.arguments import expect_key
from quantjax.interpreter import leaves_by_path
from quantjax.lean import wide
from quantjax.printing import shape_text


class Criterion(NamedTuple):
    """Scores for kernels; carries whatever it needs for that, scores, data or a key.

    Attributes:
      name: what it prints as.
      scores: ``{path: kernel} -> {path: scores}``, of the kernels' shapes; NaN counts as the
        lowest.
    """

    name: str
    scores: Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]]


def magnitude() -> Criterion:
    """``|w|``.

    >>> magnitude().scores({"w": jnp.array([[-2.0, 1.0]])})["w"].tolist()
    [[2.0, 1.0]]

    Source: Han et al., Learning both weights and connections for efficient neural networks, 2015.
    """
    return Criterion("magnitude", _magnitudes)


def _magnitudes(kernels: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    dtype = wide(*(kernel.dtype for kernel in kernels.values()))  # of all, which are compared
    return {name: jnp.abs(kernel.astype(dtype)) for name, kernel in kernels.items()}


def random(key: PRNGKeyArray) -> Criterion:
    """Uniform scores, drawn anew for each kernel: the baseline that a criterion has to beat.

    Args:
      key: may be traced, so that draws are an axis of a sweep.

    Raises:
      ArgumentError: a seed in place of a key.
    """
    expect_key(key, where="qj.pruning.random")

    def scores(kernels: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        return {
            name: jax.random.uniform(jax.random.fold_in(key, number), kernel.shape)
            for number, (name, kernel) in enumerate(kernels.items())
        }

    return Criterion("random", scores)


def scored(scores: PyTree) -> Criterion:
    """Scores from elsewhere: sensitivities, accumulated gradients, a mask that is being trained.

    Args:
      scores: a tree of the parameters' structure; only the scores of kernels are read, as floats:
        of integers above 2^24 neighbours are equal.

    Raises:
      PruningError, on use: a kernel without scores of its shape.

    >>> scored({"w": jnp.array([[0.0, 3.0]])}).scores({"w": jnp.ones((1, 2))})["w"].tolist()
    [[0.0, 3.0]]
    """
    named: dict[str, Any] = dict(leaves_by_path(scores))

    def found(kernels: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        for name, kernel in kernels.items():
            if name not in named or jnp.shape(named[name]) != kernel.shape:
                raise errors.PruningError(
                    f"no scores of {shape_text(kernel.shape)}",
                    where=f"parameter {name}",
                    why=f"there are scores for {', '.join(list(named)[:6]) or 'nothing'}",
                    fix="scores of the structure and shapes of the parameters",
                )
        dtype = wide(*(jnp.result_type(named[name]) for name in kernels))
        return {name: jnp.asarray(named[name], dtype) for name in kernels}

    return Criterion("scored", found)
