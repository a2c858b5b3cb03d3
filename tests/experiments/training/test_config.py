"""What a training is told: counts are whole numbers from 1 on, and directions no text."""

import dataclasses
import re

import numpy as np
import pytest

from experiments.training import (
    Best,
    Direction,
    Task,
    TaskError,
    TrainerConfig,
    TrainerConfigError,
    steps_in,
    train,
)
from tests.experiments.training.test_trainer import counting, numbers


@pytest.mark.parametrize("name", ["steps", "batch", "log_every", "evaluate_every", "keep"])
@pytest.mark.parametrize("value", [0, -3, 2.5, 2.0, True, "2", np.int64(0), np.float32(2.0)])
def test_counts_are_whole_numbers_from_1_on(name, value):
    with pytest.raises(TrainerConfigError, match=f"{name} is ") as caught:
        TrainerConfig(**{"steps": 3, name: value})
    assert re.search(rf"try: +{name}=[1-9]", str(caught.value))


def test_counts_of_numpy_are_kept_as_numbers_of_python(tmp_path):
    config = TrainerConfig(steps=np.int64(4), batch=np.int32(2), keep=np.uint8(1))
    assert {type(getattr(config, name)) for name in ("steps", "batch", "keep")} == {int}
    assert dataclasses.replace(config, evaluate_every=None).evaluate_every is None
    assert train(counting(), numbers(), config, 0, tmp_path).step == 4


@pytest.mark.parametrize("epochs", [1.25, 0, True])
def test_parts_of_an_epoch_have_no_steps(epochs):
    with pytest.raises(TrainerConfigError, match="epochs is "):
        steps_in(numbers(), epochs=epochs, batch=4)


@pytest.mark.parametrize("direction", ["higher", None, True])
def test_a_direction_is_no_text(direction):
    """It was taken for the other one, and the worst checkpoint was kept."""
    with pytest.raises(TrainerConfigError, match="no Direction") as caught:
        Best(metric="eval/loss", direction=direction)
    assert eval(caught.value.fix.partition("=")[2]) is Direction.HIGHER


def test_what_is_said_of_the_best_metric_can_be_written():
    config = TrainerConfig(steps=3, batch=4, best=Best(metric="eval/accuracy"))
    with pytest.raises(TaskError, match="no entry has the metric") as caught:
        train(counting(), numbers(), config, 0, None)
    best = eval(caught.value.fix.partition("=")[2])
    assert best == Best(metric=best.metric)
    assert best.metric in ("eval/count", "train/loss")


@pytest.mark.parametrize("function", ["step", "evaluate"])
def test_metrics_are_scalars_by_name(function):
    plain = counting()
    broken = {
        "step": lambda state, batch, key: (plain.step(state, batch, key)[0], None),
        "evaluate": lambda state: None,
    }
    with pytest.raises(TaskError, match=f"{function} returns a NoneType for its metrics"):
        train(
            Task(**{**plain._asdict(), function: broken[function]}),
            numbers(),
            TrainerConfig(steps=2, batch=4),
            0,
            None,
        )
