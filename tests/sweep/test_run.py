"""A sweep over a tiny study: right numbers, nothing computed twice."""

import contextlib
import csv

import pytest

import quantjax as qj
from quantjax import errors
from quantjax.sweep import (
    FLOAT_CELL,
    Cell,
    Execution,
    Grid,
    Progress,
    ResultStore,
    Silent,
    run_sweep,
)
from tests.sweep.tiny import Calls, alone, tiny_study

RULES = (qj.ranges.MIN_MAX, qj.ranges.MOVING_AVERAGE)
GRID = Grid(weight_bits=(2, 4, 8), activation_bits=(3, 8), rules=RULES, seeds=(0, 1))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    calls = Calls()
    output = tmp_path_factory.mktemp("sweep")
    return calls, output, run_sweep(tiny_study(calls), GRID, output)


def test_every_cell_of_every_seed_has_a_row(swept):
    _, _, result = swept
    assert len(result.rows) == len(GRID) == 26
    assert result.computed == 26
    assert result.trained == 2
    assert [row.cell for row in result.rows if row.seed == 1] == GRID.cells()
    assert {(row.seed, row.cell) for row in result.rows} == {
        (seed, cell) for seed in GRID.seeds for cell in GRID.cells()
    }


def test_cells_equal_the_same_cell_run_alone(swept):
    _, _, result = swept
    rules = {rule.name: rule for rule in RULES}
    for row in result.rows:
        rule = rules.get(row.rule, RULES[0])
        expected = alone(tiny_study(), row.seed, row.weight_bits, row.activation_bits, rule)
        assert (row.correct, row.total) == (expected, 40), row
        assert row.accuracy == expected / 40


def test_the_float_cell_is_the_float_model(swept):
    _, _, result = swept
    floats = [row for row in result.rows if row.cell == FLOAT_CELL]
    assert floats[0].accuracy == 1.0  # seed 0 made the labels
    assert floats[1].accuracy < 1.0


def test_a_second_run_computes_and_trains_nothing(swept):
    calls, output, result = swept
    trained, traced = list(calls.trained), calls.traced
    again = run_sweep(tiny_study(calls), GRID, output)
    assert again.rows == result.rows
    assert (again.computed, again.trained, again.program) == (0, 0, None)
    assert (calls.trained, calls.traced) == (trained, traced)


def test_a_larger_grid_computes_what_is_missing_and_trains_nothing(swept):
    calls, output, result = swept
    larger = Grid(weight_bits=(2, 3, 4, 8), activation_bits=(3, 8), rules=RULES, seeds=(0, 1))
    more = run_sweep(tiny_study(calls), larger, output)
    assert (more.computed, more.trained) == (8, 0)
    assert [row for row in more.rows if row.cell.weight_bits != 3] == result.rows


def test_another_identity_starts_anew(tmp_path):
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES[:1], seeds=(0,))
    run_sweep(tiny_study(), grid, tmp_path)
    other = run_sweep(tiny_study(identity="other"), grid, tmp_path)
    assert (other.computed, other.trained) == (2, 1)
    assert len(ResultStore(tmp_path / "results.csv").rows()) == 4


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    class Stop(Silent):
        def task(self, label, total):
            if label == "evaluating seed 1":
                raise KeyboardInterrupt
            return super().task(label, total)

    calls = Calls()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tiny_study(calls), GRID, tmp_path, progress=Stop())
    assert len(ResultStore(tmp_path / "results.csv").rows()) == 13
    rest = run_sweep(tiny_study(calls), GRID, tmp_path)
    assert (rest.computed, rest.trained) == (13, 0)
    assert calls.trained == [0, 1]


def test_the_file_is_a_plain_table(swept):
    _, output, result = swept
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["seed"], r["weight_bits"], r["activation_bits"], r["rule"]) for r in rows} >= {
        (str(r.seed), str(r.weight_bits), str(r.activation_bits), r.rule) for r in result.rows
    }


def test_all_seeds_share_one_program(tmp_path):
    calls = Calls()
    grid = Grid(weight_bits=(2, 8), activation_bits=(8,), rules=RULES, seeds=(0, 1, 2))
    result = run_sweep(tiny_study(calls), grid, tmp_path, execution=Execution.MAP)
    assert result.program is not None
    assert len(result.program.trials) == 1
    one_seed = Calls()
    run_sweep(
        tiny_study(one_seed),
        Grid(weight_bits=(2, 8), activation_bits=(8,), rules=RULES, seeds=(0,)),
        tmp_path / "one",
        execution=Execution.MAP,
    )
    # each further seed is planned and calibrated, and shares the grid's compiled program
    assert calls.traced - one_seed.traced <= 2 * 2


def test_widths_beyond_the_container_raise_before_any_work(tmp_path):
    calls = Calls()
    grid = Grid(weight_bits=(8,), activation_bits=(8, 9), rules=RULES, seeds=(0,))
    with pytest.raises(errors.BitsError, match="activation widths \\[9\\]"):
        run_sweep(tiny_study(calls), grid, tmp_path)
    assert calls.trained == []
    assert not (tmp_path / "results.csv").exists()


def test_weights_with_nan_raise_and_file_nothing(tmp_path):
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES, seeds=(0,))
    with pytest.raises(errors.QuantjaxError, match=r"NaN|finite"):
        run_sweep(tiny_study(poison=True), grid, tmp_path)
    assert ResultStore(tmp_path / "results.csv").rows() == []


@pytest.mark.parametrize(
    ("axis", "values", "what"),
    [("weight_bits", (), "is empty"), ("seeds", (1, 1), "repeats"), ("rules", (), "is empty")],
)
def test_a_grid_that_makes_no_sense_raises(axis, values, what):
    axes = {"weight_bits": (8,), "activation_bits": (8,), "rules": RULES, "seeds": (0,)}
    with pytest.raises(errors.SweepError, match=f"{axis} {what}"):
        Grid(**{**axes, axis: values})


def test_progress_is_told_of_every_step(tmp_path):
    seen: dict[str, list[int]] = {}

    class Recorder(Silent):
        def task(self, label, total):
            @contextlib.contextmanager
            def entered():
                seen[label] = [total]
                yield seen[label].append

            return entered()

    recorder: Progress = Recorder()
    grid = Grid(weight_bits=(2, 8), activation_bits=(8,), rules=RULES, seeds=(5,))
    run_sweep(tiny_study(), grid, tmp_path, progress=recorder)
    assert set(seen) == {"training seed 5", "calibrating", "evaluating seed 5"}
    assert all(total == sum(steps) for total, *steps in seen.values())
    assert Cell(2, 8, "min_max") in grid.cells()
