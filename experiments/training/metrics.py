"""Where metrics go: CSV files, TensorBoard, a progress bar.

A sink is opened where the run starts or goes on, with the history up to there. What it has written
of later steps is void: the run was interrupted before it filed a checkpoint, and will do those
steps again.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.training.errors import MissingPackageError, SinkError
from experiments.training.task import EVAL, Entry, History
from quantjax.sweep.progress import Progress

STEP = "step"  # the first column


class Start(NamedTuple):
    """Where a run starts or goes on.

    Attributes:
      step: how many steps have been done.
      steps: how many will have been.
      history: the metrics so far.
    """

    step: int
    steps: int
    history: History


class Sink(NamedTuple):
    """Something that metrics are written to.

    Attributes:
      write: given the number of steps done and the scalars of that moment.
      close: called once, also after an error.
    """

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


OpenSink = Callable[[Start], Sink]
"""What ``train`` takes: opens a sink where the run starts or goes on."""


def file_sinks(folder: str | os.PathLike[str]) -> tuple[OpenSink, OpenSink]:
    """``metrics.csv`` and ``tensorboard/`` in a folder.

    Raises:
      MissingPackageError: tensorboardX is not installed.
    """
    return csv_sink(Path(folder) / "metrics.csv"), tensorboard_sink(Path(folder) / "tensorboard")


def csv_sink(path: str | os.PathLike[str]) -> OpenSink:
    """A CSV file with a row an entry and a column a metric; a cell is empty where there is none.

    Opening writes the history so far, so that rows of steps that are done again are gone; a fresh
    start begins the file anew. A metric that comes later adds a column, and the file is replaced as
    a whole. Every row is on the disk before the training goes on.

    Raises:
      SinkError: upon opening, where the file holds something else, or cannot be written.
    """
    path = Path(path)

    def open_sink(start: Start) -> Sink:
        rows = list(start.history)
        names = _names(rows)
        with _said(path):
            _check_ours(path)
            _replace(path, names, rows)

        def write(step: int, scalars: Mapping[str, float]) -> None:
            rows.append(Entry(step, dict(scalars)))
            new = [name for name in scalars if name not in names]
            if new:
                names.extend(new)
                _replace(path, names, rows)
            else:
                _append(path, names, rows[-1])

        return Sink(write, lambda: None)

    return open_sink


def tensorboard_sink(folder: str | os.PathLike[str]) -> OpenSink:
    """Event files for TensorBoard, one for each time that the run is taken up.

    A file that goes on tells TensorBoard to hide what earlier ones have of the steps that are done
    again. A folder without event files is given the whole history.

    Raises:
      MissingPackageError: tensorboardX is not installed.
    """
    folder = Path(folder)
    try:
        import tensorboardX
    except ImportError as error:
        raise MissingPackageError(
            "TensorBoard's event files need tensorboardX, which is not installed",
            why=str(error),
            fix="pip install 'quantjax[experiments]', or leave the sink out",
        ) from None

    def open_sink(start: Start) -> Sink:
        earlier = len(list(folder.glob("*tfevents*")))

        @functools.cache
        def writer() -> Any:
            return tensorboardX.SummaryWriter(
                logdir=str(folder),
                purge_step=(start.history[-1].step + 1 if start.history else 0)
                if earlier
                else None,
                flush_secs=10,
                # names have seconds only: two files of one second would be the same
                filename_suffix=f".{earlier:04d}",
            )

        def write(step: int, scalars: Mapping[str, float]) -> None:
            for name, value in scalars.items():
                writer().add_scalar(name, value, step)

        def close() -> None:
            if writer.cache_info().currsize:
                writer().close()

        for entry in () if earlier else start.history:
            write(*entry)
        return Sink(write, close)

    return open_sink


def progress_sink(progress: Progress, label: str = "training") -> OpenSink:
    """One bar of a :class:`quantjax.sweep.progress.Progress`, and a line for each evaluation.

    It moves when metrics are filed, by the steps that the device has finished. ``progress`` is
    entered by the caller, once around all that it shows::

        with RichProgress() as progress:
            train(task, data, config, seed, folder, sinks=[progress_sink(progress)])
    """

    def open_sink(start: Start) -> Sink:
        task = progress.task(label, start.steps)
        advance = task.__enter__()
        advance(start.step)
        shown = [start.step]

        def write(step: int, scalars: Mapping[str, float]) -> None:
            advance(step - shown[0])
            shown[0] = step
            found = [f"{name} {value:.4g}" for name, value in scalars.items() if EVAL in name]
            if found:
                progress.note(f"{label}, step {step}: {', '.join(found)}")

        return Sink(write, lambda: _leave(task))

    return open_sink


def read_csv(path: str | os.PathLike[str]) -> History:
    """The entries of a file that :func:`csv_sink` wrote; a last line cut short is left out.

    Raises:
      SinkError: a file of another kind, or one that cannot be read.
    """
    path = Path(path)
    with _said(path):
        _check_ours(path)
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    names = next(lines, [STEP])[1:]
    return tuple(
        Entry(
            int(step), {n: float(cell) for n, cell in zip(names, cells, strict=True) if cell != ""}
        )
        for step, *cells in lines
    )


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """What the system refuses, as an error of a sink."""
    try:
        yield
    except OSError as error:
        raise SinkError(
            "a file of metrics cannot be opened",
            where=str(path),
            why=error.strerror or str(error),
            fix="name a file in a folder that may be written to",
        ) from error


def _leave(task: Any) -> None:
    task.__exit__(None, None, None)


def _names(rows: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scalars))


def _cells(names: Sequence[str], row: Entry) -> list[str]:
    found = (row.scalars.get(name) for name in names)
    return [str(row.step), *("" if value is None else repr(float(value)) for value in found)]


def _check_ours(path: Path) -> None:
    """Whether the first column is the step; an empty file is anybody's."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        first = file.readline().rstrip("\r\n")
    if first and first.split(",")[0] != STEP:
        raise SinkError(
            "the file holds no metrics",
            where=path.name,
            why=f"it begins with {first[:40]!r}, and not with a column {STEP!r}",
            fix="name another file",
        )


def _replace(path: Path, names: Sequence[str], rows: Iterable[Entry]) -> None:
    """Write the file anew, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with unfinished.open("x", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([STEP, *names])
            writer.writerows(_cells(names, row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _append(path: Path, names: Sequence[str], row: Entry) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(_cells(names, row))
        file.flush()
        os.fsync(file.fileno())
