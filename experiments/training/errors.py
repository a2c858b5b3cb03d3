"""What can go wrong with a training: its configuration, its task, its folder, its numbers.

They derive from quantjax's own base, so that a command line catches them with the others, and live
here because the library raises none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantjax.errors import QuantjaxError

if TYPE_CHECKING:
    from experiments.training.task import TrainResult


class TrainerConfigError(QuantjaxError, ValueError):
    """A configuration that no training can follow.

    ``TrainerConfig(steps=0)`` fails: there would be nothing to do. Use ``steps=1`` or more.
    """


class TaskError(QuantjaxError, ValueError):
    """A task whose functions do not fit together, or data that it cannot be given.

    A ``step`` that returns its state in bfloat16 where it came in float32 fails: a checkpoint could
    not go on as the run would have. Cast the state back in ``step``.
    """


class RunMismatchError(QuantjaxError, ValueError):
    """A folder that holds another run.

    ``train(task, data, config, 1, folder)`` fails where the folder was begun with seed 0; the
    message lists all that differs. Use another folder, or what the folder was begun with.
    """


class CheckpointError(QuantjaxError, ValueError):
    """A checkpoint that is not there or cannot be read.

    ``load(folder, like)`` fails where every checkpoint was cut short. Copy the folder again, or
    train anew in another one.
    """


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over, because it is incomplete or damaged; an older one serves."""


class MissingPackageError(QuantjaxError, ImportError):
    """A sink without the package that writes its files.

    ``tensorboard_sink(folder)`` fails where tensorboardX is not installed. Install
    ``quantjax[experiments]``, or leave the sink out.
    """


class SinkError(QuantjaxError, ValueError):
    """A sink that may not write where it should.

    ``csv_sink("notes.csv")`` fails where that file holds something else. Name another file.
    """


class DivergedError(QuantjaxError, ArithmeticError):
    """A metric of a step that is NaN or infinite.

    ``train(...)`` stops with it where the learning rate is too high. Lower it, and train in another
    folder.

    Attributes:
      step: the first whose metrics are not finite; steps count from 1.
      last: state and history when the metrics were last read and all were finite.
    """

    def __init__(self, what: str, *, where: str, fix: str, step: int, last: TrainResult) -> None:
        super().__init__(what, where=where, fix=fix)
        self.step, self.last = step, last
