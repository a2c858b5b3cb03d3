"""What is trained, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

State = Any
"""Any pytree of arrays: parameters, batch statistics, QParams, optimizer state, typed keys."""

Batch = Any
"""The data's own tree, with ``batch`` rows in each leaf."""

Metrics = Mapping[str, Any]
"""Scalars by name."""

TRAIN, EVAL = "train/", "eval/"
"""What the names of the metrics of ``step`` and ``evaluate`` begin with once they are filed."""


class Task(NamedTuple):
    """What is trained: pure functions over one state.

    Attributes:
      init: ``key -> state``; called once, outside jit, also where a run goes on.
      step: ``(state, batch, key) -> (state, metrics)``; the trainer jits it. The state keeps its
        structure, shapes and dtypes; every metric is a finite scalar. Tasks that share the function
        object share the compiled program.
      evaluate: ``state -> metrics``, in batches and jitted as the task likes; None for none.
      identity: what the functions were made of (model, learning rate, estimator), as JSON data. A
        folder is only gone on with if it is the same; functions cannot be compared.
    """

    init: Callable[[jax.Array], State]
    step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]]
    evaluate: Callable[[State], Metrics] | None = None
    identity: Mapping[str, Any] = {}  # never written to


class Entry(NamedTuple):
    """The metrics of one moment.

    Attributes:
      step: how many steps had been done.
      scalars: ``train/…``, means over the steps since the last such entry, and ``eval/…``.
    """

    step: int
    scalars: dict[str, float]


History = tuple[Entry, ...]


class TrainResult(NamedTuple):
    """What a training returns.

    Attributes:
      step: how many steps have been done, now and in earlier runs of the folder.
      state: after them.
      history: all metrics from the first step on, those of earlier runs of the folder included.
    """

    step: int
    state: State
    history: History


def series(history: History, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, for a plot.

    >>> series((Entry(1, {"train/loss": 2.0}), Entry(2, {"eval/accuracy": 0.5})), "train/loss")
    ([1], [2.0])
    """
    found = [(entry.step, entry.scalars[name]) for entry in history if name in entry.scalars]
    return [step for step, _ in found], [value for _, value in found]
