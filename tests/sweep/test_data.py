"""What a study returns, and what a sweep is given: looked at ahead of any training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.sweep import Execution, Grid, compile_cells, run_sweep
from tests.refused import refused
from tests.sweep.tiny import Calls, tiny_study

GRID = Grid(weight_bits=(8,), activation_bits=(8,), rules=(qj.ranges.MIN_MAX,), seeds=(0,))
X, Y = tiny_study().test()
WIDE = np.asarray(Y, np.int64) + 2**32
NAN = np.asarray(X).copy()
NAN[3, 1] = np.nan

TESTED = {
    "inputs alone": (lambda: X, errors.SweepError, "for inputs and labels", "study tiny, test"),
    "three": (lambda: (X, Y, 1), errors.SweepError, "a tuple of 3 for inputs", "study tiny, test"),
    "nothing": (lambda: None, errors.SweepError, "None for inputs and labels", "study tiny, test"),
    "text": (lambda: (np.full(40, "a"), Y), errors.DataError, "else than arrays", "holds text"),
    "dates": (
        lambda: (np.full(40, "2020-01-01", "datetime64[D]"), Y),
        errors.DataError,
        "else than arrays",
        "holds dates",
    ),
    "nan": (lambda: (NAN, Y), errors.DataError, "1 values of a batch", "study tiny, test, array 0"),
    "labels of text": (lambda: (X, list("ab") * 20), errors.SweepError, "no array of", "test"),
    "ragged labels": (lambda: (X, [[1], [1, 2]]), errors.SweepError, "no array of", "test"),
    "wide labels": (
        lambda: (X, WIDE),
        errors.SweepError,
        "40 labels do not fit int32",
        "study tiny, test",
    ),
    "wide integers": (
        lambda: (np.full((40, 6), 2**40), Y),
        errors.DataError,
        "240 integers of a batch do not fit int32",
        "study tiny, test, array 0",
    ),
}
CALIBRATED = {
    "none": (lambda: None, errors.SweepError, "None for calibration batches", "calibration"),
    "one dictionary": (lambda: {"x": X}, errors.SweepError, "a dict for calibration", "calibra"),
    "text": (lambda: ["a"], errors.DataError, "else than arrays", "tiny, calibration, batch 1"),
    "nan": (lambda: [X, NAN], errors.DataError, "1 values of a batch", "calibration, batch 2"),
    "an empty one": (lambda: [X, X[:0]], errors.DataError, "is empty", "calibration, batch 2"),
}


@pytest.mark.parametrize("name", TESTED)
def test_what_is_tested_is_looked_at_first(name, tmp_path):
    function, kind, *said = TESTED[name]
    calls = Calls()
    study = dataclasses.replace(tiny_study(calls), test=function)
    with refused(kind, *said):
        run_sweep(study, GRID, tmp_path)
    assert calls.trained == []


@pytest.mark.parametrize("name", CALIBRATED)
def test_what_calibrates_is_looked_at_first(name, tmp_path):
    function, kind, *said = CALIBRATED[name]
    calls = Calls()
    study = dataclasses.replace(tiny_study(calls), calibration=function)
    with refused(kind, *said):
        run_sweep(study, GRID, tmp_path)
    assert calls.trained == []


def test_labels_of_64_bits_that_fit_are_labels(tmp_path):
    study = dataclasses.replace(tiny_study(), test=lambda: (X, np.asarray(Y, np.int64)))
    rows = run_sweep(study, GRID, tmp_path).rows
    assert [row.correct for row in rows] == [
        row.correct for row in run_sweep(tiny_study(), GRID, tmp_path / "narrow").rows
    ]


def test_a_batch_that_the_model_does_not_take_is_named(tmp_path):
    study = dataclasses.replace(tiny_study(), calibration=lambda: [X, X[:, :5]])
    with refused(errors.ModelError, "does not run on a batch", "calibration, batch 2", "40x5"):
        run_sweep(study, GRID, tmp_path)


def test_a_model_that_does_not_run_is_named(tmp_path):
    study = dataclasses.replace(tiny_study(), apply=lambda params, x: x @ params["third"])
    with refused(errors.ModelError, "does not run on a batch", "study tiny", "KeyError: 'third'"):
        run_sweep(study, GRID, tmp_path)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "study": {"study": None},
    "grid": {"grid": {"weight_bits": (8,)}},
    "output": {"output": None},
    "memory_budget_bytes": {"memory_budget_bytes": "1G"},
    "execution": {"execution": "map"},
    "progress": {"progress": True},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_another_kind_are_named(name, tmp_path):
    calls = Calls()
    given: dict[str, Any] = {"study": tiny_study(calls), "grid": GRID, "output": tmp_path}
    with refused(errors.ArgumentError, f"{name} is", "run_sweep"):
        run_sweep(**{**given, **ARGUMENTS[name]})
    assert calls.trained == []


@pytest.mark.parametrize("execution", ["map", "vmap", "nonsense", 0])
def test_an_execution_is_no_text(execution):
    """Text ran under vmap, whatever it said, and was filed as what it said."""
    grid = {"bits": np.arange(3, dtype=np.float32)}
    with refused(errors.ArgumentError, "execution is", "Execution.MAP"):
        compile_cells(lambda v: v["bits"], grid, memory_budget_bytes=1 << 20, execution=execution)


@pytest.mark.parametrize("execution", Execution)
def test_an_execution_is_what_runs(execution):
    grid = {"bits": np.arange(3, dtype=np.float32)}
    program = compile_cells(
        lambda v, x: v["bits"] * x,
        grid,
        jnp.ones(2),
        memory_budget_bytes=1 << 20,
        execution=execution,
    )
    assert program.chosen.execution is execution
    assert program.run(grid, jnp.ones(2)).shape == (3, 2)


def test_a_path_may_be_text(tmp_path):
    found = run_sweep(tiny_study(), GRID, str(tmp_path / "text"))
    assert (Path(tmp_path) / "text" / "results.csv").exists()
    assert len(found.rows) == 2
