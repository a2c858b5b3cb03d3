"""A model observed on batches: what a calibration report starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from quantjax import errors
from quantjax.calibration.batches import Arguments, checked, described, running
from quantjax.planning import Plan, plan
from quantjax.policy import Policy
from quantjax.transforms.observe import State, init, observe
from quantjax.transforms.sites import sites

ROWS = 64  # at once, of an array that holds all of the data


@dataclasses.dataclass(frozen=True)
class Model:
    """A function ``apply(params, *inputs)`` and its parameters."""

    apply: Callable[..., Any]
    params: Any


class Collected(NamedTuple):
    """What was observed.

    Attributes:
      plan, state: for ``calibration_report``, ``qj.calibrate`` and all others.
      batches: how many there were.
    """

    plan: Plan
    state: State
    batches: int


def collect(
    model: Model,
    batches: Iterable[Arguments],
    policy: Policy,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Collected:
    """Plan a model by its first batch, and observe it on all of them, one after another.

    Args:
      model: any JAX function with its parameters.
      batches: the arguments after the parameters, each time; see :func:`batched`.
      policy: where to quantize, and how.
      on_batch: called with 1 after each of them.

    Raises:
      DataError: no batch, an empty one, NaN or infinity in one, or other shapes than in the first.
      ModelError: a model that cannot be traced, or does not take the batches.
      PolicyError: a policy that does not fit the model.
    """
    planned: Plan | None = None
    number = 0
    for number, batch in enumerate(batches, 1):
        inputs = checked(batch, f"batch {number}")
        if planned is None:
            first = inputs
            with running(inputs, f"batch {number}"):
                table = sites(model.apply, model.params, *inputs)
            planned = plan(policy, table)
            observing, state = jax.jit(observe(model.apply, planned)), init(planned)
        _check_alike(first, inputs, number)
        with running(inputs, f"batch {number}"):
            _, state = observing(state, model.params, *inputs)
        if on_batch is not None:
            on_batch(1)
    if planned is None:
        raise errors.DataError(
            "the data has no batch",
            why="ranges are derived from what is observed, and nothing is",
            fix="an iterable with at least one batch; a generator that ran before is empty",
        )
    return Collected(planned, state, number)


def batched(data: Any, *, rows: int | None = None, most: int | None = None) -> Iterator[Arguments]:
    """The arguments of one call after another.

    Args:
      data: an iterable of batches, each an array, another tree of arrays, or a tuple of arguments;
        or a single array, whose first axis runs over samples.
      rows: split what has more; left out, batches stay as they are and an array is cut by 64.
      most: stop after so many.

    Raises:
      DataError: fewer than one row or batch is asked for, or data that is no iterable.

    >>> [batch[0].shape for batch in batched(np.zeros((5, 2)), rows=3)]
    [(3, 2), (2, 2)]
    """
    for asked, what in ((rows, "rows in a batch"), (most, "batches")):
        if asked is not None and asked < 1:
            raise errors.DataError(f"{asked} {what} are asked for", fix="one or more")
    if isinstance(data, Mapping):
        raise errors.DataError(
            "a dictionary is one batch, and the data has to be several",
            where=f"keys {', '.join(map(repr, list(data)[:4]))}",
            fix="[data], a list of batches",
        )
    if is_array(data):
        whole: Iterable[Any] = [(data,)]
        rows = rows or ROWS
    elif isinstance(data, Iterable):
        whole = data
    else:
        raise errors.DataError(
            f"{type(data).__name__} is no data",
            why="it cannot be iterated over",
            fix="a list or generator of batches, or one array of samples",
        )
    every = (part for batch in whole for part in _split(batch, rows))
    return islice(every, most)


def is_array(data: Any) -> bool:
    """Whether something is one array, and not many of them."""
    return hasattr(data, "shape") and hasattr(data, "dtype")


def _split(batch: Any, rows: int | None) -> Iterator[Arguments]:
    arguments = batch if isinstance(batch, tuple) else (batch,)
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(arguments) if np.ndim(leaf)]
    if rows is None or not sizes or max(sizes) <= rows:
        yield arguments
        return
    if len(set(sizes)) > 1:
        raise errors.DataError(
            f"arrays whose first axes are {', '.join(map(str, sizes))} long cannot be cut alike",
            why="the first axis runs over samples",
            fix="batches that are made beforehand, without rows=",
        )
    for start in range(0, sizes[0], rows):
        yield jax.tree.map(
            lambda leaf, at=start: leaf[at : at + rows] if np.ndim(leaf) else leaf, arguments
        )


def _check_alike(first: Arguments, inputs: Arguments, number: int) -> None:
    """Only the first axis, of samples, may change from batch to batch."""
    if _outline(first) == _outline(inputs):
        return
    raise errors.DataError(
        "a batch is not like the first one",
        where=f"batch {number}",
        why=f"it has {described(inputs)}, the first one {described(first)}",
        fix="the same arrays and shapes each time, but for the number of samples",
    )


def _outline(inputs: Arguments) -> Any:
    leaves, tree = jax.tree.flatten(inputs)
    return tree, [(leaf.dtype, leaf.ndim, leaf.shape[1:]) for leaf in leaves]
