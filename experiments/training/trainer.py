"""Train a task: a jitted step in a Python loop, checkpoints that resume, metrics to sinks.

No ``lax.scan``: under it XLA runs the gradients of convolutions 18 times slower on CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.training import checkpoints, leaves
from experiments.training.batches import feed
from experiments.training.checkpoints import Saved
from experiments.training.config import TrainerConfig, best_step
from experiments.training.errors import DivergedError, TaskError
from experiments.training.identity import claim, identity
from experiments.training.metrics import OpenSink, Sink, Start
from experiments.training.task import (
    EVAL,
    TRAIN,
    Batch,
    Entry,
    History,
    Metrics,
    State,
    Task,
    TrainResult,
)
from quantjax.errors import QuantjaxError

CHECKPOINTS = "checkpoints"


class _Point(NamedTuple):
    """Where a run is, after whole steps; one value, so that an interrupt never finds half of it.

    Attributes:
      step: how many steps have been done.
      state: after them.
      history: all that has been filed.
      window: the metrics of each step since the last entry of them, as far as they were read.
      pending: those that are still on the device.
    """

    step: int
    state: State
    history: History = ()
    window: tuple[dict[str, float], ...] = ()
    pending: tuple[Metrics, ...] = ()


class _Run(NamedTuple):
    """What stays the same during a run."""

    config: TrainerConfig
    step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]]
    evaluate: Callable[[State], Metrics] | None
    batch_at: Callable[[int], tuple[Batch, jax.Array]]
    sinks: tuple[Sink, ...]
    checkpoints: Path | None
    start: int


def train(
    task: Task,
    data: Batch,
    config: TrainerConfig,
    seed: int,
    folder: str | os.PathLike[str] | None,
    *,
    sinks: Sequence[OpenSink] = (),
) -> TrainResult:
    """Train from scratch, or go on where the folder's run stopped.

    Batches and keys depend on the seed and the step alone: ``N`` steps at once, and ``N`` steps
    with interruptions, give the same state and history, bit for bit, on one machine and version of
    JAX (on a GPU as far as its kernels are deterministic).

    An interrupt or an error saves a checkpoint and is raised again, with a note that says of which
    step. So does a metric that is not finite; the checkpoint is then of the moment when metrics
    were last read, before the failing step.

    Up to three states are alive at a time: the one at hand, the next, and that of the moment when
    metrics were last read. No buffer is donated, or an interrupt could find none that is whole.

    Args:
      data: a tree of arrays with one leading axis; moved to the default device as a whole.
      seed: of the parameters, the batches and the steps' keys.
      folder: where ``run.json`` and ``checkpoints/`` go; one run at a time. None writes nothing.
      sinks: where metrics go, :func:`experiments.training.file_sinks` for instance.

    Raises:
      TaskError: functions that do not fit together, or data that is too short.
      RunMismatchError: the folder's run has another configuration, seed, data, identity or state.
      CheckpointError: the folder has checkpoints, and none can be read.
      DivergedError: a metric of a step is NaN or infinite.

    Warns:
      CheckpointWarning: a newer checkpoint is incomplete or damaged, and an older one serves.
    """
    batches = feed(data, batch=config.batch, seed=seed)
    root = None if folder is None else Path(folder)
    if root is not None:
        claim(root, identity(task, data, config, seed))
    place = None if root is None else root / CHECKPOINTS
    point = _start(leaves.normalized(task.init(batches.init_key)), place)
    with contextlib.ExitStack() as stack:
        opened = []
        for open_sink in sinks:
            sink = open_sink(Start(point.step, config.steps, point.history))
            stack.callback(sink.close)
            opened.append(sink)
        run = _Run(
            config=config,
            step=jax.jit(task.step),
            evaluate=task.evaluate,
            batch_at=batches.at,
            sinks=tuple(opened),
            checkpoints=place,
            start=point.step,
        )
        return _result(_to_the_end(run, point))


def _start(state: State, place: Path | None) -> _Point:
    saved = None if place is None else checkpoints.recover(place, state)
    if saved is None:
        return _Point(0, state)
    history, window = saved.record
    return _Point(
        saved.step,
        saved.state,
        tuple(Entry(step, scalars) for step, scalars in history),
        tuple(window),
    )


def _to_the_end(run: _Run, point: _Point) -> _Point:
    read = point  # the last whose metrics were read: what is left if later ones are not finite
    try:
        if point.step == 0 and not point.history and run.config.evaluate_first:
            point = read = _filed(run, point, _evaluated(run, point.state))
            _check_best(run, point.history)
            if _checkpoint_is_due(run, point):
                _save(run, point)
        while point.step < run.config.steps:
            point = _turn(run, point, read)
            _check_best(run, point.history[-1:])
            if not point.pending:
                read = point
            if _checkpoint_is_due(run, point):
                _save(run, point)
        _check_best(run, point.history, complete=True)
    except BaseException as error:
        _rescue(run, point, read, error)
        raise
    return point


def _check_best(run: _Run, entries: History, *, complete: bool = False) -> None:
    """Raise ``TaskError`` where entries lack the metric that checkpoints are chosen by.

    Args:
      complete: no other entries will come; else those of its own kind have it, or none will.
    """
    best, filed = run.config.best, {name for entry in entries for name in entry.scalars}
    if best is None or best.metric in filed:
        return
    kind = next((kind for kind in (TRAIN, EVAL) if best.metric.startswith(kind)), "")
    if complete or any(name.startswith(kind) for name in filed):
        raise TaskError(
            f"no entry has the metric '{best.metric}', which the best checkpoint is chosen by",
            where=f"metrics: {', '.join(sorted(filed)) or 'none'}",
            fix=f"best=Best(metric={next(iter(sorted(filed)), EVAL + 'accuracy')!r})",
        )


def _turn(run: _Run, point: _Point, read: _Point) -> _Point:
    """One step, and what is due after it."""
    batch, key = run.batch_at(point.step)
    state, metrics = run.step(point.state, batch, key)
    state = leaves.normalized(state)
    if point.step == run.start:
        leaves.check_kept(point.state, state)
        _check_scalars(metrics, "step")
    config, step = run.config, point.step + 1
    moved = point._replace(step=step, state=state, pending=(*point.pending, metrics))
    last = step == config.steps
    log = last or step % config.log_every == 0
    evaluate = last or _every(config.evaluate_every, step)
    save = run.checkpoints is not None and _every(config.checkpoint_every, step)
    if log or evaluate or save:
        moved = _read(moved, read)
    scalars: dict[str, float] = {}
    if log:
        scalars |= _means(moved.window)
        moved = moved._replace(window=())
    if evaluate:
        scalars |= _evaluated(run, state)
    return _filed(run, moved, scalars)


def _read(point: _Point, read: _Point) -> _Point:
    """The same with all metrics on the host; waits for the device.

    Raises:
      DivergedError: one is not finite; ``read`` is what it says is left.
    """
    values = jax.device_get(point.pending)
    window = tuple({name: float(value) for name, value in one.items()} for one in values)
    for step, scalars in enumerate(window, point.step - len(window) + 1):
        bad = [f"{TRAIN}{n} is {v}" for n, v in scalars.items() if not math.isfinite(v)]
        if bad:
            raise DivergedError(
                "a metric is not finite",
                where=f"step {step}: {', '.join(bad)}",
                fix="a lower learning rate; train from the state before, which .last holds, to "
                "see where it comes from",
                step=step,
                last=_result(read),
            )
    return point._replace(window=point.window + window, pending=())


def _evaluated(run: _Run, state: State) -> dict[str, float]:
    if run.evaluate is None:
        return {}
    metrics = run.evaluate(state)
    _check_scalars(metrics, "evaluate")
    return {EVAL + name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def _filed(run: _Run, point: _Point, scalars: dict[str, float]) -> _Point:
    if not scalars:
        return point
    for sink in run.sinks:
        sink.write(point.step, scalars)
    return point._replace(history=(*point.history, Entry(point.step, scalars)))


def _means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        TRAIN + name: math.fsum(one[name] for one in window) / len(window)
        for name in (window[0] if window else ())
    }


def _checkpoint_is_due(run: _Run, point: _Point) -> bool:
    if run.checkpoints is None:
        return False
    config = run.config
    if point.step == config.steps or _every(config.checkpoint_every, point.step):
        return True
    if config.best is None or not point.history or point.history[-1].step != point.step:
        return False
    among = (*checkpoints.saved_steps(run.checkpoints), point.step)
    return best_step(point.history, config.best, among=among) == point.step


def _save(run: _Run, point: _Point) -> None:
    """File a checkpoint; its metrics have been read."""
    assert run.checkpoints is not None
    config = run.config
    best = None
    if config.best is not None:
        among = (*checkpoints.saved_steps(run.checkpoints), point.step)
        best = best_step(point.history, config.best, among=among)
    record = [[list(entry) for entry in point.history], list(point.window)]
    saved = Saved(point.step, point.state, record)
    checkpoints.save(run.checkpoints, saved, keep=config.keep, best=best)


def _rescue(run: _Run, point: _Point, read: _Point, error: BaseException) -> None:
    """Save what there is before an error goes on its way; a second one does not hide the first."""
    if run.checkpoints is None:
        return
    try:
        try:
            good = read if isinstance(error, DivergedError) else _read(point, read)
        except (QuantjaxError, RuntimeError):  # not finite, or the device has failed
            good = read
        if good.step not in checkpoints.saved_steps(run.checkpoints):
            _save(run, good)
        error.add_note(f"{run.checkpoints.parent.name} has a checkpoint of step {good.step}")
    except (QuantjaxError, RuntimeError, ValueError, OSError) as second:
        error.add_note(f"no checkpoint could be saved: {second}")


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def _check_scalars(metrics: Metrics, function: str) -> None:
    if not isinstance(metrics, Mapping):
        raise TaskError(
            f"{function} returns a {type(metrics).__name__} for its metrics",
            where="metrics are scalars by name",
            fix="{}, or {'loss': loss}",
        )
    bad = {name: jnp.shape(v) for name, v in metrics.items() if jnp.shape(v) != ()}
    if bad:
        raise TaskError(
            f"{function} returns metrics that are no scalars",
            where=", ".join(f"{name}: shape {shape}" for name, shape in bad.items()),
            fix="reduce them, by jnp.mean for instance",
        )


def _result(point: _Point) -> TrainResult:
    return TrainResult(point.step, point.state, point.history)
