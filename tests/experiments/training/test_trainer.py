"""What a training does and files; what it refuses. That it resumes is in ``test_resume.py``."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import (
    CHECKPOINTS,
    Best,
    Direction,
    DivergedError,
    Entry,
    Sink,
    Task,
    TaskError,
    TrainerConfig,
    best_step,
    load,
    saved_steps,
    series,
    train,
)
from tests.experiments.training import tiny


def counting(step_fails_at=10**6, value=np.nan):
    """A task that counts; its loss is the count, from some step on ``value``."""

    def step(state, batch, key):
        count = state + 1
        bad = jnp.where(count >= step_fails_at, jnp.float32(value), count.astype(jnp.float32))
        return count, {"loss": bad}

    return Task(lambda key: jnp.int32(0), step, lambda state: {"count": state})


def numbers(count=20):
    return np.arange(count, dtype=np.float32)


def recorder():
    """A sink, and the list of what happened to it."""
    events = []

    def open_sink(start):
        events.append(("open", start.step, start.steps, len(start.history)))
        return Sink(
            lambda step, scalars: events.append((step, dict(scalars))),
            lambda: events.append("closed"),
        )

    return open_sink, events


def test_training_lowers_the_loss():
    _, losses = series(tiny.run(steps=100, log_every=10).history, "train/loss")
    assert len(losses) == 10
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_the_state_is_that_of_a_loop_by_hand():
    """Against the plainest loop over the same batches and keys."""
    batches = tiny.feed(tiny.data(), batch=tiny.BATCH, seed=3)
    state, step = tiny.init(batches.init_key), jax.jit(tiny.step)
    for index in range(13):
        state, _ = step(state, *batches.at(index))
    assert tiny.same(tiny.run(seed=3).state, state)


def test_the_seed_decides():
    first, second, other = (tiny.run(seed=seed) for seed in (7, 7, 8))
    assert tiny.same(first.state, second.state)
    assert first.history == second.history
    assert not tiny.same(first.state.params, other.state.params)


def test_history_has_means_over_the_steps_since_the_last_entry():
    config = TrainerConfig(steps=11, batch=5, log_every=4, evaluate_every=3)
    result = train(counting(), numbers(), config, 0, None)
    assert result.step == 11
    assert result.history == (
        Entry(3, {"eval/count": 3.0}),
        Entry(4, {"train/loss": 2.5}),
        Entry(6, {"eval/count": 6.0}),
        Entry(8, {"train/loss": 6.5}),
        Entry(9, {"eval/count": 9.0}),
        Entry(11, {"train/loss": 10.0, "eval/count": 11.0}),
    )


def test_a_last_evaluation_and_entry_are_always_made():
    config = TrainerConfig(steps=3, batch=5, log_every=100)
    history = train(counting(), numbers(), config, 0, None).history
    assert history == (Entry(3, {"train/loss": 2.0, "eval/count": 3.0}),)


def test_an_evaluation_before_the_first_step():
    config = TrainerConfig(steps=2, batch=5, evaluate_first=True)
    history = train(counting(), numbers(), config, 0, None).history
    assert history[0] == Entry(0, {"eval/count": 0.0})
    assert [entry.step for entry in history] == [0, 2]


def test_a_task_needs_neither_metrics_nor_an_evaluation():
    task = Task(lambda key: jnp.zeros(2), lambda state, batch, key: (state + 1.0, {}))
    result = train(task, numbers(), TrainerConfig(steps=5, batch=4), 0, None)
    np.testing.assert_array_equal(result.state, [5.0, 5.0])
    assert result.history == ()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.run()
    assert os.listdir(tmp_path) == []


def test_the_host_reads_metrics_only_when_they_are_due(monkeypatch):
    steps, real = [], jax.device_get
    monkeypatch.setattr(
        tiny.trainer.jax, "device_get", lambda x: (steps.append(len(x)), real(x))[1]
    )
    task = counting()._replace(evaluate=None)
    train(task, numbers(), TrainerConfig(steps=10, batch=5, log_every=4), 0, None)
    assert steps == [4, 4, 2]


def test_trainings_of_one_task_share_the_compiled_step():
    traced = []

    def step(state, batch, key):
        traced.append(1)
        return state + jnp.sum(batch), {}

    task = Task(lambda key: jnp.float32(0), step)
    for seed in range(3):
        train(task, numbers(), TrainerConfig(steps=3, batch=4), seed, None)
    assert len(traced) == 1


def test_weak_types_are_made_strong_and_one_program_serves():
    traced = []

    def step(state, batch, key):
        traced.append(1)
        return {"a": jnp.where(batch[0] > 0, 1.0, 0.0), "b": state["b"] + 1}, {}

    task = Task(lambda key: {"a": 0.5, "b": np.arange(3)}, step)
    result = train(task, numbers(), TrainerConfig(steps=6, batch=4), 0, None)
    assert len(traced) == 1
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(result.state))


def test_sinks_see_every_entry_and_are_closed():
    open_sink, events = recorder()
    result = tiny.run(sinks=[open_sink])
    assert events[0] == ("open", 0, 13, 0)
    assert events[1:-1] == [tuple(entry) for entry in result.history]
    assert events[-1] == "closed"


def test_sinks_are_opened_where_the_run_goes_on(tmp_path, monkeypatch):
    tiny.stop_before(monkeypatch, 7)
    open_sink, events = recorder()
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, sinks=[open_sink])
    assert events[-1] == "closed"
    tiny.go_on(monkeypatch)
    events.clear()
    result = tiny.run(tmp_path, sinks=[open_sink])
    assert events[0] == ("open", 7, 13, 2)
    assert events[1:-1] == [tuple(entry) for entry in result.history[2:]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_metric_that_is_not_finite_stops_the_training(value):
    config = TrainerConfig(steps=100, batch=5, log_every=4)
    open_sink, events = recorder()
    with pytest.raises(DivergedError) as stop:
        train(counting(10, value), numbers(), config, 0, None, sinks=[open_sink])
    assert stop.value.step == 10
    assert f"step 10: train/loss is {value}" in str(stop.value)
    # nothing is lost: what had been read by then is in the error and in the sinks
    assert stop.value.last.step == int(stop.value.last.state) == 8
    assert [entry.step for entry in stop.value.last.history] == [4, 8]
    assert events[-1] == "closed"


@pytest.mark.parametrize("every", [None, 3, 5])
def test_the_state_before_a_nan_is_saved(tmp_path, every):
    config = TrainerConfig(steps=100, batch=5, log_every=4, checkpoint_every=every, keep=9)
    with pytest.raises(DivergedError) as stop:
        train(counting(10), numbers(), config, 0, tmp_path)
    newest = saved_steps(tmp_path / CHECKPOINTS)[-1]
    assert newest == stop.value.last.step == {None: 8, 3: 9, 5: 8}[every]
    assert stop.value.__notes__ == [f"{tmp_path.name} has a checkpoint of step {newest}"]
    assert int(load(tmp_path / CHECKPOINTS, jnp.int32(0)).state) == newest
    with pytest.raises(DivergedError) as again:  # the same call meets the same NaN
        train(counting(10), numbers(), config, 0, tmp_path)
    assert again.value.step == 10


def test_an_interrupt_after_an_unread_nan_saves_the_state_before_it(tmp_path, monkeypatch):
    tiny.stop_before(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        train(counting(10), numbers(), TrainerConfig(steps=99, batch=5, log_every=4), 0, tmp_path)
    assert saved_steps(tmp_path / CHECKPOINTS) == (8,)


def test_a_nan_in_an_evaluation_is_filed(tmp_path):
    task = counting()._replace(evaluate=lambda state: {"loss": jnp.float32(np.nan)})
    result = train(task, numbers(), TrainerConfig(steps=2, batch=5), 0, tmp_path)
    again = train(task, numbers(), TrainerConfig(steps=2, batch=5), 0, tmp_path)
    assert np.isnan(result.history[-1].scalars["eval/loss"])
    assert np.isnan(again.history[-1].scalars["eval/loss"])


def curve(values):
    """A task whose evaluation after step ``n`` gives ``values[n - 1]``."""
    return counting()._replace(
        evaluate=lambda state: {"accuracy": np.float32(values[int(state) - 1])}
    )


@pytest.mark.parametrize(
    ("direction", "values", "best"),
    [
        (Direction.HIGHER, [0.1, 0.8, 0.3, 0.8, 0.2, 0.1], 2),
        (Direction.LOWER, [0.5, 0.4, 0.1, 0.3, 0.2, 0.6], 3),
        (Direction.HIGHER, [np.nan, 0.2, np.nan, 0.1, 0.1, np.nan], 2),
        (Direction.HIGHER, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6),
    ],
)
def test_the_best_checkpoint_is_kept(tmp_path, direction, values, best):
    criterion = Best(metric="eval/accuracy", direction=direction)
    config = TrainerConfig(steps=6, batch=5, evaluate_every=1, keep=1, best=criterion)
    result = train(curve(values), numbers(), config, 0, tmp_path)
    assert saved_steps(tmp_path / CHECKPOINTS) == tuple(sorted({best, 6}))
    assert best_step(result.history, criterion) == best
    assert int(load(tmp_path / CHECKPOINTS, result.state, step=best).state) == best


def test_the_best_checkpoint_outlives_an_interrupt(tmp_path, monkeypatch):
    criterion = Best(metric="eval/accuracy")
    config = TrainerConfig(steps=6, batch=5, evaluate_every=1, keep=1, best=criterion)
    task = curve([0.1, 0.8, 0.3, 0.5, 0.2, 0.1])
    tiny.stop_before(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(task, numbers(), config, 0, tmp_path)
    assert saved_steps(tmp_path / CHECKPOINTS) == (2, 4)
    tiny.go_on(monkeypatch)
    train(task, numbers(), config, 0, tmp_path)
    assert saved_steps(tmp_path / CHECKPOINTS) == (2, 6)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda s, b, k: ({"w": s["w"].astype(jnp.bfloat16)}, {}), r"w: float32\[2\] before, bf"),
        (lambda s, b, k: ({"w": s["w"][:1]}, {}), r"w: float32\[2\] before, float32\[1\] after"),
        (lambda s, b, k: ({"w": s["w"], "v": s["w"]}, {}), "returns another kind of state"),
        (lambda s, b, k: (s, {"loss": b}), r"no scalars\n.*loss: shape \(4,\)"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(step, message):
    task = Task(lambda key: {"w": jnp.zeros(2)}, step)
    with pytest.raises(TaskError, match=message.replace("before, bf", "before, bfloat16")):
        train(task, numbers(), TrainerConfig(steps=2, batch=4), 0, None)


def test_an_evaluation_that_is_no_scalar_is_refused():
    task = counting()._replace(evaluate=lambda state: {"curve": jnp.zeros(3)})
    with pytest.raises(TaskError, match="evaluate returns metrics that are no scalars"):
        train(task, numbers(), TrainerConfig(steps=2, batch=4), 0, None)


def test_an_identity_that_is_no_json_is_refused(tmp_path):
    task = counting()._replace(identity={"model": object()})
    with pytest.raises(TaskError, match="identity is no JSON data"):
        train(task, numbers(), TrainerConfig(steps=2, batch=4), 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_start_may_be_the_best(tmp_path):
    values = [0.9, 0.1, 0.2, 0.3]
    task = counting()._replace(evaluate=lambda state: {"accuracy": np.float32(values[int(state)])})
    criterion = Best(metric="eval/accuracy")
    config = TrainerConfig(
        steps=3, batch=5, evaluate_every=1, evaluate_first=True, keep=1, best=criterion
    )
    result = train(task, numbers(), config, 0, tmp_path)
    assert best_step(result.history, criterion) == 0
    assert saved_steps(tmp_path / CHECKPOINTS) == (0, 3)
    assert int(load(tmp_path / CHECKPOINTS, result.state, step=0).state) == 0


@pytest.mark.parametrize("metric", ["accuracy", "eval/accurate", "train/nothing"])
def test_a_best_metric_that_never_comes_is_an_error(tmp_path, metric):
    config = TrainerConfig(
        steps=6, batch=5, log_every=1, evaluate_every=2, keep=1, best=Best(metric=metric)
    )
    with pytest.raises(TaskError, match=f"no entry has the metric '{metric}'"):
        train(curve([0.1] * 6), numbers(), config, 0, tmp_path)
    assert saved_steps(tmp_path / CHECKPOINTS)[-1] <= 2


def test_without_evaluations_the_best_of_them_is_missed_at_the_end(tmp_path):
    config = TrainerConfig(steps=2, batch=5, best=Best(metric="eval/accuracy"))
    with pytest.raises(TaskError, match="no entry has the metric"):
        train(counting()._replace(evaluate=None), numbers(), config, 0, tmp_path)
    assert saved_steps(tmp_path / CHECKPOINTS) == (2,)
