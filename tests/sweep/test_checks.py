"""What a sweep refuses ahead of all work: nothing is trained for it, and nothing filed."""

import dataclasses

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.sweep import Grid, run_sweep
from tests.sweep.tiny import Calls, tiny_study

GRID = Grid(weight_bits=(8,), activation_bits=(8,), rules=(qj.ranges.MIN_MAX,), seeds=(0,))
BATCH = jnp.ones((4, 6), jnp.float32)


@pytest.mark.parametrize("blocked", ["", "results.csv", "accuracy_vs_bits.png", "checkpoints"])
def test_an_output_that_cannot_be_written(tmp_path, blocked):
    """It was trained first; then orbax never came back."""
    calls, output = Calls(), tmp_path / "output"
    if blocked in ("", "checkpoints"):
        (output / blocked).parent.mkdir(exist_ok=True)
        (output / blocked if blocked else output).write_text("a note")
    else:
        (output / blocked).mkdir(parents=True)
    with pytest.raises(errors.SweepError, match="nothing can be written") as caught:
        run_sweep(tiny_study(calls), GRID, output)
    assert "another folder" in str(caught.value)
    assert calls.trained == []


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "no calibration batch"), ([BATCH, BATCH.at[1, 2].set(jnp.nan)], "1 values of a batch")],
    ids=["none", "nan"],
)
def test_calibration_data_without_a_range(tmp_path, batches, message):
    calls = Calls()
    study = dataclasses.replace(tiny_study(calls), calibration=lambda: batches)
    with pytest.raises(errors.DataError, match=message):
        run_sweep(study, GRID, tmp_path)
    assert calls.trained == []


def test_calibration_batches_may_come_from_an_iterator(tmp_path):
    study = tiny_study()
    lazy = dataclasses.replace(study, calibration=lambda: iter(study.calibration()))
    found = run_sweep(lazy, GRID, tmp_path / "lazy").rows
    assert found == run_sweep(study, GRID, tmp_path / "list").rows


def test_a_study_that_trains_no_parameters_is_refused(tmp_path):
    study = dataclasses.replace(tiny_study(), train=lambda seed, on_step: {})
    with pytest.raises(errors.SweepError, match="training returned no parameters"):
        run_sweep(study, GRID, tmp_path)
    assert not (tmp_path / "results.csv").exists()


def test_text_among_the_parameters_is_refused(tmp_path):
    """Orbax raised it from a thread of its own."""
    train = lambda seed, on_step: {"w": jnp.ones(3), "name": "mlp"}  # noqa: E731
    study = dataclasses.replace(tiny_study(), train=train)
    with pytest.raises(errors.SweepError, match="returned 'mlp' among the parameters"):
        run_sweep(study, GRID, tmp_path)


def test_a_model_that_another_sweep_saved_meanwhile_is_taken(tmp_path):
    study, found = tiny_study(), []

    def train(seed, on_step):
        found.append(run_sweep(tiny_study(), GRID, tmp_path).rows)
        return study.train(seed, on_step)

    assert run_sweep(dataclasses.replace(study, train=train), GRID, tmp_path).rows == found[0]


def test_two_sweeps_may_save_a_model_at_the_same_time(tmp_path, monkeypatch):
    """Orbax waited five minutes for the other one's folder, and one of the two ended there."""
    real, found = ocp.StandardCheckpointer.save, []

    def save(self, path, params):
        monkeypatch.setattr(ocp.StandardCheckpointer, "save", real)
        real(self, path, params)
        found.append(run_sweep(tiny_study(), GRID, tmp_path).rows)

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", save)
    assert run_sweep(tiny_study(), GRID, tmp_path).rows == found[0]
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert [path.name for path in folder.iterdir()] == ["seed_0"]


def test_an_error_in_a_rule_of_ones_own_names_the_rule(tmp_path):
    def broken(statistics, target):
        raise ZeroDivisionError("of mine")

    for reads in (False, True):
        rule = qj.ranges.RangeRule("my-rule", broken, reads_distribution=reads)
        grid = dataclasses.replace(GRID, rules=(rule,))
        with pytest.raises(ZeroDivisionError, match="of mine") as caught:
            run_sweep(tiny_study(), grid, tmp_path)
        assert "In the range rule my-rule" in caught.value.__notes__


@pytest.mark.parametrize(
    ("test", "kind", "message"),
    [
        (lambda x, y: (x[:0], y[:0]), errors.SweepError, "no test example"),
        (lambda x, y: (x.at[0, 0].set(jnp.nan), y), errors.DataError, "1 values of a batch"),
    ],
    ids=["none", "nan"],
)
def test_test_data_of_which_there_is_no_accuracy(tmp_path, test, kind, message):
    calls = Calls()
    study = tiny_study(calls)
    inputs, labels = study.test()
    changed = dataclasses.replace(study, test=lambda: test(jnp.asarray(inputs), labels))
    with pytest.raises(kind, match=message):
        run_sweep(changed, GRID, tmp_path)
    assert calls.trained == []


@pytest.mark.parametrize("moved", [-1, 1])
def test_labels_that_are_no_class_are_refused(tmp_path, moved):
    """They were all wrong, the float model's too: classes that count from 1."""
    study = tiny_study()
    inputs, labels = study.test()
    wrong = jnp.asarray(labels) + moved
    changed = dataclasses.replace(study, test=lambda: (inputs, wrong))
    with pytest.raises(errors.SweepError, match=r"a label -?\d+ for \d+ classes"):
        run_sweep(changed, GRID, tmp_path)


def test_an_output_may_be_text(tmp_path):
    assert run_sweep(tiny_study(), GRID, str(tmp_path)).rows
    assert (tmp_path / "results.csv").exists()
