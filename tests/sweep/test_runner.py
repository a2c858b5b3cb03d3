"""One compiled program for many cells."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.sweep import CellProgram, Execution, Trial, compile_cells, runner

BUDGET = 1 << 28


def cell(values, matrix):
    return {"sum": jnp.sum(matrix) * values["a"], "row": matrix[0] + values["b"]}


def grid(count):
    return {
        "a": np.arange(count, dtype=np.float32),
        "b": np.arange(count, dtype=np.float32)[::-1].copy(),
    }


@pytest.fixture
def matrix():
    return jnp.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("execution", [Execution.MAP, Execution.VMAP, None])
@pytest.mark.parametrize("count", [1, 2, 5, 7, 14, 15, 29])
def test_every_cell_comes_back_in_order(matrix, execution, count):
    values = grid(count)
    program = compile_cells(cell, values, matrix, memory_budget_bytes=BUDGET, execution=execution)
    result = program.run(values, matrix)
    np.testing.assert_array_equal(result["sum"], 15.0 * np.arange(count))
    np.testing.assert_array_equal(
        result["row"], np.arange(3.0)[None] + np.arange(count)[::-1][:, None]
    )


def test_the_remainder_is_padded_and_dropped(matrix):
    values = grid(9)
    program = compile_cells(
        cell, values, matrix, memory_budget_bytes=BUDGET, execution=Execution.MAP, cells_per_call=4
    )
    assert program.chosen.cells_per_call == 3
    lengths = [len(part["sum"]) for part in program.calls(grid(7), matrix)]
    assert lengths == [3, 3, 1]


def test_one_program_serves_other_shared_arrays_and_fewer_cells(matrix):
    traces = []

    def counted(values, matrix):
        traces.append(1)
        return cell(values, matrix)

    values = grid(6)
    program = compile_cells(
        counted, values, matrix, memory_budget_bytes=BUDGET, execution=Execution.MAP
    )
    before = len(traces)
    first = program.run(values, matrix)
    second = program.run(grid(2), 2.0 * matrix)
    assert len(traces) == before == 1
    np.testing.assert_array_equal(second["sum"], 2.0 * first["sum"][:2])


def test_both_executions_agree_bit_for_bit():
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(16, 8)), jnp.float32)
    w = jnp.asarray(generator.normal(size=(8, 4)), jnp.float32)

    def scaled(values, x, w):
        return jnp.round(x * values["s"]) @ jnp.round(w * values["s"])

    values = {"s": np.linspace(1, 9, 11).astype(np.float32)}
    results = [
        compile_cells(scaled, values, x, w, memory_budget_bytes=BUDGET, execution=execution).run(
            values, x, w
        )
        for execution in Execution
    ]
    np.testing.assert_array_equal(*results)


def test_vmap_shrinks_until_it_fits():
    x = jnp.ones((64, 1024), jnp.float32)

    def wide(values, x):
        return jnp.sum(jnp.sort(x * values["a"], axis=1)[:, ::2])

    values = {"a": np.arange(16, dtype=np.float32)}
    roomy = compile_cells(
        wide, values, x, memory_budget_bytes=1 << 30, execution=Execution.VMAP, cells_per_call=16
    )
    budget = roomy.chosen.bytes_per_call // 3
    tight = compile_cells(
        wide, values, x, memory_budget_bytes=budget, execution=Execution.VMAP, cells_per_call=16
    )
    assert tight.chosen.cells_per_call < roomy.chosen.cells_per_call == 16
    assert tight.chosen.bytes_per_call <= budget
    np.testing.assert_array_equal(tight.run(values, x), roomy.run(values, x))


def test_a_candidate_over_the_budget_is_left_out():
    x = jnp.ones((64, 1024), jnp.float32)

    def wide(values, x):
        return jnp.sum(jnp.sort(x * values["a"], axis=1)[:, ::2])

    values = {"a": np.arange(16, dtype=np.float32)}
    in_turn = compile_cells(wide, values, x, memory_budget_bytes=1 << 30, execution=Execution.MAP)
    budget = in_turn.chosen.bytes_per_call
    both = compile_cells(wide, values, x, memory_budget_bytes=budget)
    assert all(trial.bytes_per_call <= budget for trial in both.trials)


def test_the_trial_decides_by_time_per_cell(monkeypatch, matrix):
    def times(trials, values, shared):
        seconds = {Execution.MAP: 2.0, Execution.VMAP: 1.0}
        return [
            (Trial(t.execution, t.cells_per_call, t.bytes_per_call, seconds[t.execution]), compiled)
            for t, compiled in trials
        ]

    monkeypatch.setattr(runner, "_timed", times)
    program = compile_cells(cell, grid(4), matrix, memory_budget_bytes=BUDGET)
    assert program.chosen.execution is Execution.VMAP
    assert {trial.execution for trial in program.trials} == set(Execution)


def test_the_trial_measures(matrix):
    program = compile_cells(cell, grid(4), matrix, memory_budget_bytes=BUDGET)
    assert isinstance(program, CellProgram)
    assert all(trial.seconds_per_cell > 0 for trial in program.trials)


def test_one_cell_over_the_budget_raises(matrix):
    with pytest.raises(errors.SweepError, match=r"needs [0-9,]+ bytes, the budget is 1 bytes") as e:
        compile_cells(cell, grid(4), matrix, memory_budget_bytes=1)
    assert "4 cells" in e.value.where


@pytest.mark.parametrize("values", [{}, {"a": np.zeros(0)}, {"a": np.zeros(2), "b": np.zeros(3)}])
def test_axes_without_a_common_length_raise(values, matrix):
    with pytest.raises(errors.SweepError, match="no common length"):
        compile_cells(cell, values, matrix, memory_budget_bytes=BUDGET)


def test_shared_arrays_are_arguments_not_constants(matrix):
    program = compile_cells(
        cell, grid(3), matrix, memory_budget_bytes=BUDGET, execution=Execution.MAP
    )
    with pytest.raises(TypeError):
        program.run(grid(3))
    doubled = program.run(grid(3), matrix * 2)
    np.testing.assert_array_equal(doubled["sum"], 30.0 * np.arange(3))


class Clip(NamedTuple):
    low: np.ndarray
    high: np.ndarray


TREES = {
    "as many fields as cells": Clip(np.array([1.0, 2.0]), np.array([10.0, 20.0])),
    "fewer fields than cells": Clip(np.linspace(-1.0, 0.0, 5), np.linspace(0.0, 1.0, 5)),
    "parts of a width": qj.FloatBits(np.arange(2.0, 6.0), 7.0 - np.arange(2.0, 6.0)),
}


@pytest.mark.parametrize("execution", list(Execution))
@pytest.mark.parametrize("name", TREES)
def test_an_axis_may_be_a_tree_as_vmap_has_it(name, execution):
    """Fields were taken for cells, and came out in each other's place."""
    axis = jax.tree.map(np.float32, TREES[name])

    def one(values):
        first, second = values["axis"]
        return first + 100.0 * second

    program = compile_cells(
        one, {"axis": axis}, memory_budget_bytes=BUDGET, execution=execution, cells_per_call=3
    )
    np.testing.assert_array_equal(program.run({"axis": axis}), jax.vmap(one)({"axis": axis}))


def test_an_axis_may_be_a_dictionary_a_list_of_numbers_or_keys():
    keys = jax.random.split(jax.random.key(0), 4)
    values = {"keys": keys, "parts": {"w": np.float32([1, 2, 3, 4])}, "bits": [2, 3, 4, 8]}

    def one(v):
        return jax.random.normal(v["keys"]) + v["parts"]["w"] * v["bits"].astype(jnp.float32)

    program = compile_cells(one, values, memory_budget_bytes=BUDGET, execution=Execution.MAP)
    want = jax.vmap(one)({**values, "bits": jnp.asarray(values["bits"])})
    np.testing.assert_allclose(program.run(values), want, rtol=1e-6)
    shorter = {**values, "parts": {"w": np.float32([1, 2])}}
    with pytest.raises(errors.SweepError, match=r"'parts\['w'\]': 2|\"parts\['w'\]\": 2"):
        compile_cells(one, shorter, memory_budget_bytes=BUDGET)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ({"c": [np.zeros(2), np.zeros(2)]}, {}, "the axis c is a list of something else"),
        ({"c": (np.zeros(2), np.zeros(2))}, {}, "the axis c is a tuple of something else"),
        ({"c": {"rule": ["mse", "kl"]}}, {}, "the axis c holds no numbers"),
        (np.arange(3.0), {}, "values is a ndarray"),
        ({"rule": np.array(["mse", "kl"])}, {}, "the axis rule holds no numbers"),
        ({"bits": np.arange(3.0)}, {"memory_budget_bytes": None}, "memory_budget_bytes is None"),
        ({"bits": np.arange(3.0)}, {"cells_per_call": 0}, "0 cells per call"),
        ({"bits": np.arange(3.0)}, {"cells_per_call": 2.5}, "cells_per_call is a float"),
    ],
)
def test_what_is_no_grid_and_no_number_is_refused(values, options, words):
    with pytest.raises(errors.ArgumentError, match=words):
        compile_cells(lambda v: v, values, **{"memory_budget_bytes": 1 << 30, **options})
