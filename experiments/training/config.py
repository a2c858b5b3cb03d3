"""How long, in which batches, and how often something is filed."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import numpy as np

from experiments.training.batches import row_count
from experiments.training.errors import TrainerConfigError
from experiments.training.task import Batch, History


class Direction(enum.Enum):
    """Which of two values of a metric is the better one."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The metric that the best checkpoint is chosen by.

    Attributes:
      metric: with its prefix: ``eval/accuracy``.
      direction: what is better.

    Raises:
      TrainerConfigError: text in place of a direction.
    """

    metric: str
    direction: Direction = Direction.HIGHER

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            raise TrainerConfigError(
                f"direction is {self.direction!r}, no Direction",
                where=type(self).__name__,
                fix=f"direction=Direction.{Direction.HIGHER.name}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a training goes; everything is counted in steps, see :func:`steps_in` for epochs.

    Attributes:
      steps: in total.
      batch: rows a step; what is left over at the end of an epoch is left out of it.
      log_every: steps between entries of ``train/…`` metrics. Only then, and before an evaluation
        or a checkpoint, does the host wait for the device; a NaN is noticed then.
      evaluate_every: steps between evaluations; None for one, after the last step.
      evaluate_first: also before the first step.
      checkpoint_every: steps between checkpoints; None for one, after the last step. One is also
        saved where the run is interrupted or fails.
      keep: how many of the newest checkpoints are kept.
      best: also save and keep the checkpoint that is best by a metric; None for none.

    Raises:
      TrainerConfigError: a count below 1, or that is no integer.
    """

    steps: int
    batch: int = 64
    log_every: int = 50
    evaluate_every: int | None = None
    evaluate_first: bool = False
    checkpoint_every: int | None = None
    keep: int = 2
    best: Best | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_open = field.default is None
            if field.name in ("evaluate_first", "best") or (is_open and value is None):
                continue
            usual = 64 if field.default is dataclasses.MISSING else field.default or 100
            number = count(field.name, value, where=type(self).__name__, usual=usual)
            object.__setattr__(self, field.name, number)


def count(name: str, value: Any, *, where: str, usual: int) -> int:
    """A number of things as an ``int``.

    Raises:
      TrainerConfigError: it is less than 1, or no integer.
    """
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < 1:
        raise TrainerConfigError(
            f"{name} is {value!r}, " + ("which is less than 1" if is_whole else "no integer"),
            where=where,
            fix=f"{name}={usual}",
        )
    return int(value)


def steps_in(data: Batch, *, epochs: int, batch: int) -> int:
    """How many steps some epochs have, for ``TrainerConfig(steps=...)``.

    Raises:
      TrainerConfigError: parts of an epoch, or none.

    >>> import numpy as np
    >>> steps_in((np.zeros((130, 2)), np.zeros(130)), epochs=3, batch=64)
    6
    """
    whole, rows = (
        count(name, value, where="steps_in", usual=usual)
        for name, value, usual in (("epochs", epochs, 3), ("batch", batch, 64))
    )
    return whole * (row_count(data) // rows)


def best_step(history: History, best: Best, *, among: tuple[int, ...] | None = None) -> int | None:
    """The step of the best value of a metric, the first of equals; None where there is none.

    Args:
      among: the steps that count; None for all. NaN never counts.
    """
    sign = 1.0 if best.direction is Direction.HIGHER else -1.0
    found = [
        (sign * entry.scalars[best.metric], -entry.step)
        for entry in history
        if not math.isnan(entry.scalars.get(best.metric, math.nan))
        and (among is None or entry.step in among)
    ]
    return -max(found)[1] if found else None
