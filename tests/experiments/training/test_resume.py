"""The law: N steps at once, and N steps with interruptions, are the same, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.training import (
    CHECKPOINTS,
    CheckpointError,
    CheckpointWarning,
    RunMismatchError,
    csv_sink,
    load,
    read_csv,
    saved_steps,
)
from tests.experiments.training import tiny

pytestmark = pytest.mark.thinned(2)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def whole():
    return tiny.run()


def assert_same(result, whole):
    assert result.step == whole.step == tiny.CONFIG.steps
    assert result.history == whole.history
    assert tiny.same(result.state, whole.state)


def test_a_folder_changes_nothing(tmp_path, whole):
    assert_same(tiny.run(tmp_path), whole)


# Before the first step, in an epoch, between log entries, at checkpoints, at ends of epochs.
@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 7, 10, 12])
def test_an_interrupt_and_a_second_call_are_one_run(tmp_path, monkeypatch, whole, done):
    tiny.stop_before(monkeypatch, done)
    with pytest.raises(KeyboardInterrupt) as stop:
        tiny.run(tmp_path)
    assert stop.value.__notes__ == [f"{tmp_path.name} has a checkpoint of step {done}"]
    assert saved_steps(tmp_path / CHECKPOINTS)[-1] == done
    tiny.go_on(monkeypatch)
    assert_same(tiny.run(tmp_path), whole)


def test_many_interrupts_are_one_run(tmp_path, monkeypatch, whole):
    for done in (2, 3, 7, 8, 12):
        tiny.stop_before(monkeypatch, done)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path, sinks=[csv_sink(tmp_path / "metrics.csv")])
    tiny.go_on(monkeypatch)
    assert_same(tiny.run(tmp_path, sinks=[csv_sink(tmp_path / "metrics.csv")]), whole)
    assert read_csv(tmp_path / "metrics.csv") == whole.history


def test_an_interrupt_at_once_after_going_on_is_no_error(tmp_path, monkeypatch, whole):
    tiny.stop_before(monkeypatch, 6)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path)
    tiny.go_on(monkeypatch)
    assert_same(tiny.run(tmp_path), whole)


@pytest.fixture
def interruptible():
    """A shell starts what it sends to the background with SIGINT ignored, and Python keeps that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_evaluating_repeats_the_step_and_evaluates(tmp_path, whole):
    def evaluate(state):
        if int(state.count) == 10:
            signal.raise_signal(signal.SIGINT)
        return tiny.evaluate(state)

    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, task=tiny.TASK._replace(evaluate=evaluate))
    assert saved_steps(tmp_path / CHECKPOINTS)[-1] == 9
    assert_same(tiny.run(tmp_path), whole)


def test_an_interrupt_in_the_midst_of_a_save_saves_after_all(tmp_path, monkeypatch, whole):
    real, calls = ocp.JsonCheckpointHandler.async_save, []

    def save(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", save)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path)
    assert len(calls) > 3
    folder = tmp_path / CHECKPOINTS
    assert set(os.listdir(folder)) == {str(step) for step in saved_steps(folder)} == {"6", "9"}
    assert_same(tiny.run(tmp_path), whole)


def test_any_other_error_saves_too(tmp_path, monkeypatch, whole):
    tiny.stop_before(monkeypatch, 7, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        tiny.run(tmp_path)
    tiny.go_on(monkeypatch)
    assert saved_steps(tmp_path / CHECKPOINTS)[-1] == 7
    assert_same(tiny.run(tmp_path), whole)


def test_a_second_error_does_not_hide_the_first(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    tiny.stop_before(monkeypatch, 2)
    monkeypatch.setattr(tiny.trainer.checkpoints, "save", full)
    with pytest.raises(KeyboardInterrupt) as stop:
        tiny.run(tmp_path)
    assert stop.value.__notes__ == ["no checkpoint could be saved: no space left"]


def test_a_process_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path, whole):
    """A real kill, after rows have been written that the next run has to write again."""
    code = f"""
import os, signal
from experiments.training import Sink, csv_sink
from tests.experiments.training import tiny

def killer(start):
    def write(step, scalars):
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
    return Sink(write, lambda: None)

tiny.run({str(tmp_path)!r}, sinks=[csv_sink({str(tmp_path / "metrics.csv")!r}), killer])
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert saved_steps(tmp_path / CHECKPOINTS) == (3, 6)
    assert [entry.step for entry in read_csv(tmp_path / "metrics.csv")] == [4, 5, 8]
    assert_same(tiny.run(tmp_path, sinks=[csv_sink(tmp_path / "metrics.csv")]), whole)
    assert read_csv(tmp_path / "metrics.csv") == whole.history


def test_a_finished_run_returns_without_a_step(tmp_path, monkeypatch, whole):
    tiny.run(tmp_path)
    tiny.stop_before(monkeypatch, 0)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert_same(tiny.run(tmp_path), whole)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_the_first_evaluation_is_not_repeated(tmp_path, monkeypatch):
    first = tiny.run(evaluate_first=True)
    assert first.history[0].step == 0
    tiny.stop_before(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, evaluate_first=True)
    tiny.go_on(monkeypatch)
    assert_same(tiny.run(tmp_path, evaluate_first=True), first)


@pytest.fixture
def at_nine(tmp_path, monkeypatch):
    """A folder with checkpoints of steps 6 and 9."""
    tiny.stop_before(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path)
    tiny.go_on(monkeypatch)
    assert saved_steps(tmp_path / CHECKPOINTS) == (6, 9)
    return tmp_path


def cut_short(folder):
    """Cut each array file in half."""
    for file in (folder / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(name):
    return lambda folder: shutil.rmtree(folder / name)


@pytest.mark.parametrize("damage", [cut_short, without("state"), without("record")])
def test_a_damaged_checkpoint_is_passed_over(at_nine, whole, damage):
    damage(at_nine / CHECKPOINTS / "9")
    with pytest.warns(CheckpointWarning, match=r"checkpoints/9 cannot be read .*_damaged/9-"):
        result = tiny.run(at_nine)
    assert_same(result, whole)
    assert [name[:2] for name in os.listdir(at_nine / "checkpoints_damaged")] == ["9-"]
    assert_same(tiny.run(at_nine), whole)  # and is not mentioned again


def test_an_incomplete_checkpoint_is_passed_over(at_nine, whole):
    folder = at_nine / CHECKPOINTS
    (folder / "9").rename(folder / "9.orbax-checkpoint-tmp-1")
    with pytest.warns(CheckpointWarning, match="9.orbax-checkpoint-tmp-1 is incomplete"):
        assert_same(tiny.run(at_nine), whole)


def test_without_a_readable_checkpoint_nothing_is_trained(at_nine):
    for step in ("6", "9"):
        shutil.rmtree(at_nine / CHECKPOINTS / step / "record")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints can be read"):
        tiny.run(at_nine)
    assert saved_steps(at_nine / CHECKPOINTS) == (6, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "trainer.seed: 0 in the folder, 1 now"),
        ({"steps": 14}, "trainer.steps: 13 in the folder, 14 now"),
        ({"batch": 4}, "trainer.batch: 8 in the folder, 4 now"),
        ({"log_every": 2}, "trainer.log_every: 4 in the folder, 2 now"),
        ({"evaluate_every": None}, "trainer.evaluate_every: 5 in the folder, null now"),
        (
            {"task": tiny.TASK._replace(identity={"learning_rate": 0.2, "layers": [8, 3]})},
            "task.learning_rate: 0.1 in the folder, 0.2 now",
        ),
        ({"task": tiny.TASK._replace(identity={})}, "task.layers: [8, 3] in the folder, absent"),
    ],
)
def test_another_run_is_refused_and_the_folder_stays(at_nine, whole, changes, message):
    with pytest.raises(RunMismatchError) as refused:
        tiny.run(at_nine, **changes)
    assert message in str(refused.value)
    assert at_nine.name in refused.value.where
    assert_same(tiny.run(at_nine), whole)


def test_other_data_is_refused(at_nine):
    inputs, labels = tiny.data()
    inputs[3, 2] += np.float32(1e-3)
    with pytest.raises(RunMismatchError, match=r"data\.\[0\]: \"float32 40x6"):
        tiny.train(tiny.TASK, (inputs, labels), tiny.CONFIG, 0, at_nine)


def test_another_state_is_refused_and_what_differs_is_listed(at_nine, whole):
    def init(key):
        state = tiny.init(key)
        return state._replace(params={**state.params, "third": state.running_mean})

    with pytest.raises(RunMismatchError) as refused:
        tiny.run(at_nine, task=tiny.TASK._replace(init=init))
    assert "params/third: absent in the checkpoint, float32[6] now" in str(refused.value)
    assert_same(tiny.run(at_nine), whole)


def test_how_checkpoints_are_kept_may_change(at_nine, whole):
    assert_same(tiny.run(at_nine, checkpoint_every=2, keep=3), whole)
    assert saved_steps(at_nine / CHECKPOINTS) == (10, 12, 13)


def test_a_typed_key_goes_on_where_it_was(at_nine):
    like = tiny.init(jax.random.key(0))
    saved = load(at_nine / CHECKPOINTS, like)
    assert saved.state.key.dtype == like.key.dtype
    uninterrupted = tiny.run(steps=9)
    assert tiny.same(saved.state.key, uninterrupted.state.key)
