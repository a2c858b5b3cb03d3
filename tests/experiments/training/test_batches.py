"""Batches and keys are functions of the seed and the step; configurations are checked."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import (
    Best,
    Direction,
    Entry,
    RunMismatchError,
    TaskError,
    TrainerConfig,
    TrainerConfigError,
    best_step,
    feed,
    series,
    steps_in,
)
from experiments.training.identity import claim, identity
from tests.experiments.training import tiny


def rows(batches, steps):
    return [np.asarray(batches.at(step)[0]).tolist() for step in steps]


def test_every_epoch_is_a_permutation_without_the_rows_left_over():
    batches = feed(np.arange(23), batch=5, seed=0)
    for epoch in range(4):
        seen = [row for batch in rows(batches, range(4 * epoch, 4 * epoch + 4)) for row in batch]
        assert len(seen) == len(set(seen)) == 20
        assert set(seen) <= set(range(23))


def test_epochs_and_seeds_differ():
    first, other = (feed(np.arange(20), batch=20, seed=seed) for seed in (0, 1))
    orders = [*rows(first, range(3)), *rows(other, range(3))]
    assert len({tuple(order) for order in orders}) == 6


def test_steps_may_be_asked_for_in_any_order():
    forward = feed(np.arange(23), batch=5, seed=0)
    backward = feed(np.arange(23), batch=5, seed=0)
    steps = list(range(11))
    assert rows(forward, steps) == rows(backward, steps[::-1])[::-1]


def test_keys_are_all_different():
    batches = feed(np.arange(6), batch=2, seed=0)
    keys = [batches.init_key, *(batches.at(step)[1] for step in range(30))]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 31


def test_rows_of_all_leaves_stay_together():
    data = {"x": np.arange(12.0).reshape(12, 1) * np.ones(3), "y": np.arange(12, dtype=np.int8)}
    batch, _ = feed(data, batch=4, seed=1).at(5)
    assert batch["x"].shape == (4, 3)
    assert batch["x"].dtype == jnp.float32
    assert batch["y"].dtype == jnp.int8
    np.testing.assert_array_equal(batch["x"][:, 0], batch["y"])


def test_numpy_and_jax_data_give_the_same_batches():
    data = np.arange(12, dtype=np.float32)
    assert rows(feed(data, batch=4, seed=1), range(6)) == rows(
        feed(jnp.asarray(data), batch=4, seed=1), range(6)
    )


def test_one_batch_may_be_all_the_data():
    (batch,) = rows(feed(np.arange(4), batch=4, seed=0), [0])
    assert sorted(batch) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros(3), np.zeros(4)), r"(?s)no common leading axis.*data\[0\] 3, data\[1\] 4"),
        ((np.zeros(3), np.float32(1)), r"data\[1\] scalar"),
        ({}, "no arrays"),
        (np.zeros(3), "3 rows, a batch 4"),
    ],
)
def test_data_that_cannot_be_cut_into_batches(data, message):
    with pytest.raises(TaskError, match=message):
        feed(data, batch=4, seed=0)


def test_steps_of_epochs():
    assert steps_in(tiny.data(), epochs=3, batch=7) == 15
    assert steps_in({"a": jnp.zeros((8, 2))}, epochs=1, batch=8) == 1
    with pytest.raises(TaskError):
        steps_in((), epochs=1, batch=8)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"batch": -1}, {"log_every": 0}, {"evaluate_every": 0}, {"keep": 0}],
)
def test_counts_below_one_are_refused(changes):
    (name,) = changes
    with pytest.raises(TrainerConfigError, match=f"{name} is .* less than 1"):
        TrainerConfig(**{"steps": 1, **changes})


def test_configurations_are_values():
    config = TrainerConfig(steps=3, best=Best(metric="eval/accuracy"))
    assert config == dataclasses.replace(config)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 4
    with pytest.raises(TypeError):
        TrainerConfig(3)


def entries(*values):
    return tuple(Entry(step, {"a": value}) for step, value in enumerate(values, 1))


@pytest.mark.parametrize(
    ("direction", "values", "among", "best"),
    [
        (Direction.HIGHER, (1.0, 3.0, 2.0), None, 2),
        (Direction.LOWER, (1.0, 3.0, 2.0), None, 1),
        (Direction.HIGHER, (3.0, 3.0), None, 1),
        (Direction.LOWER, (3.0, 3.0), None, 1),
        (Direction.HIGHER, (1.0, 3.0, 2.0), (1, 3), 3),
        (Direction.HIGHER, (float("nan"), -1.0), None, 2),
        (Direction.HIGHER, (float("nan"),), None, None),
        (Direction.HIGHER, (1.0, 2.0), (), None),
        (Direction.HIGHER, (), None, None),
    ],
)
def test_the_best_step(direction, values, among, best):
    criterion = Best(metric="a", direction=direction)
    assert best_step(entries(*values), criterion, among=among) == best
    assert best_step(entries(*values), Best(metric="absent")) is None


def test_series_leaves_out_entries_without_the_metric():
    history = (*entries(5.0, 6.0), Entry(3, {"b": 1.0}))
    assert series(history, "a") == ([1, 2], [5.0, 6.0])
    assert series(history, "b") == ([3], [1.0])
    assert series(history, "c") == ([], [])


def test_the_identity_holds_what_decides_and_nothing_else():
    found = identity(tiny.TASK, tiny.data(), tiny.CONFIG, 3)
    assert set(found) == {"trainer", "data", "task"}
    assert found["trainer"]["seed"] == 3
    assert "keep" not in found["trainer"]
    assert found == json.loads(json.dumps(found))
    assert found == identity(tiny.TASK, tuple(map(jnp.asarray, tiny.data())), tiny.CONFIG, 3)
    assert found != identity(tiny.TASK, tiny.data(5), tiny.CONFIG, 3)


def test_digests_tell_shapes_dtypes_and_values_apart():
    arrays = [
        np.zeros(4, np.float32),
        np.zeros(4, np.int32),
        np.zeros((2, 2), np.float32),
        np.array([0, 0, 0, -0.0], np.float32),
    ]
    found = [identity(tiny.TASK, array, tiny.CONFIG, 0)["data"][""] for array in arrays]
    assert len(set(found)) == 4
    turned = np.arange(6.0).reshape(2, 3).T
    assert identity(tiny.TASK, turned, tiny.CONFIG, 0) == identity(
        tiny.TASK, turned.copy(), tiny.CONFIG, 0
    )


def test_a_claim_is_filed_once_and_lists_ten_differences(tmp_path):
    wanted = {"task": {f"p{i}": i for i in range(14)}}
    claim(tmp_path, wanted)
    before = (tmp_path / "run.json").read_bytes()
    claim(tmp_path, wanted)
    with pytest.raises(RunMismatchError) as refused:
        claim(tmp_path, {"task": {f"p{i}": i + 1 for i in range(14)}})
    assert refused.value.why.count(" in the folder") == 10
    assert refused.value.why.endswith("and 4 more")
    assert (tmp_path / "run.json").read_bytes() == before
