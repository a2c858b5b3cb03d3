"""A trainer for any task: checkpoints that resume bit for bit, progress, CSV and TensorBoard.

::

    task = Task(init, step, evaluate, identity={"model": "resnet20", "learning_rate": 0.1})
    config = TrainerConfig(steps=steps_in(data, epochs=20, batch=128), batch=128, log_every=100)
    result = train(task, data, config, seed, folder, sinks=file_sinks(folder))

The same call goes on where the folder's run stopped, and returns at once where it has finished.
With ``folder=None`` nothing is written.
"""

from experiments.training.batches import Feed, feed
from experiments.training.checkpoints import Saved, load, recover, save, saved_steps
from experiments.training.config import Best, Direction, TrainerConfig, best_step, steps_in
from experiments.training.errors import (
    CheckpointError,
    CheckpointWarning,
    DivergedError,
    MissingPackageError,
    RunMismatchError,
    SinkError,
    TaskError,
    TrainerConfigError,
)
from experiments.training.metrics import (
    OpenSink,
    Sink,
    Start,
    csv_sink,
    file_sinks,
    progress_sink,
    read_csv,
    tensorboard_sink,
)
from experiments.training.task import Entry, History, Task, TrainResult, series
from experiments.training.trainer import CHECKPOINTS, train

__all__ = [
    "train",
    "Task",
    "TrainerConfig",
    "TrainResult",
    "steps_in",
    "Best",
    "Direction",
    "best_step",
    "Entry",
    "History",
    "series",
    "Sink",
    "OpenSink",
    "Start",
    "file_sinks",
    "csv_sink",
    "tensorboard_sink",
    "progress_sink",
    "read_csv",
    "CHECKPOINTS",
    "Saved",
    "save",
    "load",
    "recover",
    "saved_steps",
    "Feed",
    "feed",
    "CheckpointError",
    "CheckpointWarning",
    "DivergedError",
    "MissingPackageError",
    "RunMismatchError",
    "SinkError",
    "TaskError",
    "TrainerConfigError",
]
