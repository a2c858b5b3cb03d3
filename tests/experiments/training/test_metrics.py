"""Sinks: what stands in the files, after one run and after several."""

import os
import sys

import numpy as np
import pytest

from experiments.training import (
    Entry,
    MissingPackageError,
    SinkError,
    Start,
    csv_sink,
    file_sinks,
    progress_sink,
    read_csv,
    tensorboard_sink,
)
from quantjax.cli.progress import RichProgress
from quantjax.sweep.progress import Progress
from tests.experiments.training import tiny
from tests.experiments.training.events import Scalar, events, scalars

FRESH = Start(0, 100, ())
HISTORY = (Entry(2, {"train/loss": 0.1}), Entry(4, {"train/loss": 1 / 3, "eval/accuracy": 0.5}))


def listed(history):
    return [
        Scalar(entry.step, name, float(np.float32(value)))
        for entry in history
        for name, value in entry.scalars.items()
    ]


def write_all(open_sink, start, entries):
    sink = open_sink(start)
    for entry in entries:
        sink.write(*entry)
    sink.close()


def test_csv_has_a_row_an_entry_and_a_column_a_metric(tmp_path):
    path = tmp_path / "deeper" / "metrics.csv"
    write_all(csv_sink(path), FRESH, HISTORY)
    assert path.read_text() == ("step,train/loss,eval/accuracy\n2,0.1,\n4,0.3333333333333333,0.5\n")
    assert read_csv(path) == HISTORY


def test_csv_rows_are_on_the_disk_at_once(tmp_path):
    path = tmp_path / "metrics.csv"
    sink = csv_sink(path)(FRESH)
    for count, entry in enumerate(HISTORY, 1):
        sink.write(*entry)
        assert read_csv(path) == HISTORY[:count]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_csv_goes_on_after_the_history_and_drops_later_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    write_all(csv_sink(path), FRESH, [*HISTORY, Entry(6, {"train/loss": 9.0, "late": 1.0})])
    new = Entry(6, {"train/loss": 0.25})
    write_all(csv_sink(path), Start(5, 100, HISTORY), [new])
    assert read_csv(path) == (*HISTORY, new)
    assert "late" not in path.read_text()


def test_csv_begins_anew_with_a_fresh_start(tmp_path):
    path = tmp_path / "metrics.csv"
    write_all(csv_sink(path), FRESH, HISTORY)
    write_all(csv_sink(path), FRESH, HISTORY[:1])
    assert read_csv(path) == HISTORY[:1]


def test_csv_is_complete_where_the_sink_came_later(tmp_path):
    path = tmp_path / "metrics.csv"
    write_all(csv_sink(path), Start(4, 100, HISTORY), [])
    assert read_csv(path) == HISTORY


def test_csv_takes_a_new_column_in_the_midst(tmp_path):
    path = tmp_path / "metrics.csv"
    entries = [Entry(1, {"a": 1.0}), Entry(2, {"b": 2.0}), Entry(3, {"c": 3.0, "a": 4.0})]
    write_all(csv_sink(path), FRESH, entries)
    assert path.read_text() == "step,a,b,c\n1,1.0,,\n2,,2.0,\n3,4.0,,3.0\n"
    write_all(csv_sink(path), Start(2, 100, tuple(entries[:2])), [Entry(3, {"d": 5.0})])
    assert path.read_text() == "step,a,b,d\n1,1.0,,\n2,,2.0,\n3,,,5.0\n"


def test_csv_quotes_names_and_keeps_values_that_are_not_finite(tmp_path):
    path = tmp_path / "metrics.csv"
    entry = Entry(1, {'a,"b"': float("inf"), "ü": float("nan"), "tiny": 5e-324})
    write_all(csv_sink(path), FRESH, [entry])
    (found,) = read_csv(path)
    assert list(found.scalars) == list(entry.scalars)
    assert found.scalars['a,"b"'] == float("inf")
    assert np.isnan(found.scalars["ü"])
    assert found.scalars["tiny"] == 5e-324


def test_csv_leaves_out_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "metrics.csv"
    write_all(csv_sink(path), FRESH, HISTORY)
    path.write_text(path.read_text()[:-3])
    assert read_csv(path) == HISTORY[:1]
    write_all(csv_sink(path), Start(2, 100, HISTORY[:1]), HISTORY[1:])
    assert read_csv(path) == HISTORY


def test_csv_does_not_replace_a_file_of_another_kind(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("name,value\nx,1\n")
    for function in (lambda: csv_sink(path)(FRESH), lambda: read_csv(path)):
        with pytest.raises(SinkError, match=r"(?s)holds no metrics.*notes.csv.*'name,value'"):
            function()
    assert path.read_text() == "name,value\nx,1\n"
    path.write_text("")
    write_all(csv_sink(path), FRESH, HISTORY)
    assert read_csv(path) == HISTORY


def test_tensorboard_has_every_scalar_with_its_step(tmp_path):
    write_all(tensorboard_sink(tmp_path), FRESH, HISTORY)
    (path,) = tmp_path.iterdir()
    assert scalars(tmp_path) == listed(HISTORY)
    times = [event.wall_time for event in events(path)]
    assert times == sorted(times)
    assert times[0] > 1.7e9


def test_tensorboard_hides_what_is_done_again(tmp_path):
    voided = [Entry(6, {"train/loss": 9.0}), Entry(8, {"train/loss": 9.5})]
    write_all(tensorboard_sink(tmp_path), FRESH, [*HISTORY, *voided])
    new = [Entry(6, {"train/loss": 0.25}), Entry(8, {"train/loss": 0.125})]
    write_all(tensorboard_sink(tmp_path), Start(5, 100, HISTORY), new)
    assert scalars(tmp_path) == listed([*HISTORY, *new])
    assert len(list(tmp_path.iterdir())) == 2  # both in one second, and neither is overwritten


def test_tensorboard_hides_all_of_before_after_a_fresh_start(tmp_path):
    write_all(tensorboard_sink(tmp_path), FRESH, [Entry(0, {"eval/loss": 7.0}), *HISTORY])
    write_all(tensorboard_sink(tmp_path), FRESH, HISTORY)
    assert scalars(tmp_path) == listed(HISTORY)


def test_tensorboard_is_complete_where_the_sink_came_later(tmp_path):
    new = Entry(6, {"train/loss": 0.25})
    write_all(tensorboard_sink(tmp_path), Start(5, 100, HISTORY), [new])
    assert scalars(tmp_path) == listed([*HISTORY, new])


def test_tensorboard_has_no_file_where_nothing_was_written(tmp_path):
    write_all(tensorboard_sink(tmp_path / "new"), FRESH, [])
    assert not (tmp_path / "new").exists()


def test_tensorboard_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    for make in (tensorboard_sink, file_sinks):
        with pytest.raises(MissingPackageError, match=r"(?s)not installed.*quantjax\[exp"):
            make(tmp_path)
    write_all(csv_sink(tmp_path / "m.csv"), FRESH, HISTORY)  # needs none


@pytest.mark.parametrize("done", [2, 5, 7, 12])
def test_files_of_an_interrupted_training_are_those_of_a_whole_one(tmp_path, monkeypatch, done):
    whole = tiny.run(sinks=file_sinks(tmp_path / "whole"))
    folder = tmp_path / "parts"
    tiny.stop_before(monkeypatch, done)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(folder, sinks=file_sinks(folder))
    tiny.go_on(monkeypatch)
    tiny.run(folder, sinks=file_sinks(folder))
    assert read_csv(folder / "metrics.csv") == whole.history
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    assert scalars(folder / "tensorboard") == listed(whole.history)
    assert scalars(tmp_path / "whole" / "tensorboard") == listed(whole.history)


class Listing(Progress):
    """Writes down what it is told."""

    def __init__(self):
        self.said = []

    def __exit__(self, kind, error, trace):
        self.said.append("left")

    def task(self, label, total):
        said = self.said

        class Task:
            def __enter__(self):
                said.append((label, total))
                return said.append

            def __exit__(self, kind, error, trace):
                said.append("task left")

        return Task()

    def note(self, text):
        self.said.append(text)


def test_progress_moves_by_steps_that_are_done_and_notes_evaluations():
    progress = Listing()
    write_all(progress_sink(progress, "lsq"), Start(1, 9, ()), HISTORY)
    assert progress.said == [
        ("lsq", 9),
        1,
        1,
        2,
        "lsq, step 4: eval/accuracy 0.5",
        "task left",
    ]


def test_progress_ends_at_the_total(tmp_path, monkeypatch):
    tiny.stop_before(monkeypatch, 7)
    for first in (True, False):
        progress = Listing()
        with progress:
            if first:
                with pytest.raises(KeyboardInterrupt):
                    tiny.run(tmp_path, sinks=[progress_sink(progress)])
                tiny.go_on(monkeypatch)
            else:
                tiny.run(tmp_path, sinks=[progress_sink(progress)])
        assert progress.said[-2:] == ["task left", "left"]
    assert sum(said for said in progress.said if isinstance(said, int)) == 13


def test_progress_on_the_terminal(capsys):
    with RichProgress() as progress:
        tiny.run(sinks=[progress_sink(progress, "tiny")])
    text = capsys.readouterr().out
    assert "tiny, step 5: eval/loss" in text
    assert "13/13" in text


def test_what_cannot_be_opened_is_an_error_of_the_sink(tmp_path):
    """A folder in place of the file, a file in place of its folder, nothing at all."""
    (tmp_path / "notes.txt").touch()
    start = Start(0, 1, ())
    for path in (tmp_path, tmp_path / "notes.txt" / "metrics.csv"):
        with pytest.raises(SinkError, match=r"(?s)cannot be opened.*try: "):
            csv_sink(path)(start)
    for path in (tmp_path, tmp_path / "nothing.csv"):
        with pytest.raises(SinkError, match="cannot be opened"):
            read_csv(path)


@pytest.mark.parametrize("name", ["a\nb", "a\r\nb", 'a"b', "a,b", " a", ""])
def test_any_name_of_a_metric_comes_back(tmp_path, name):
    history = (Entry(1, {f"train/{name}": 0.5}), Entry(2, {f"train/{name}": 0.25, "eval/x": 1.0}))
    sink = csv_sink(tmp_path / "metrics.csv")(Start(0, 2, history[:1]))
    sink.write(*history[1])
    assert read_csv(tmp_path / "metrics.csv") == history
