"""A sweep over a tiny study: right numbers, nothing computed twice."""

import contextlib
import csv
import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
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
from tests.refused import refused
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


FORMAT = qj.weight_quantizer(bits=8, format=qj.formats.E4M3FN)
RANDOM = qj.weight_quantizer(bits=8, rounding=qj.rounding.STOCHASTIC)


@pytest.mark.parametrize(
    ("weights", "grid", "error", "what"),
    [
        (FORMAT, {"weight_bits": (2, 8)}, errors.BitsError, r"weight widths \[2\]"),
        (RANDOM, {}, errors.SweepError, "weights are rounded at random"),
        (None, {"rules": (qj.ranges.RangeRule("float", None),)}, errors.SweepError, "baseline"),
        (None, {"rules": (qj.ranges.MSE._replace(name="min_max"),)}, errors.SweepError, "library"),
        (
            None,
            {"rules": (qj.ranges.MSE._replace(name="percentile(0.9)"),)},
            errors.SweepError,
            "family",
        ),
        (
            None,
            {"rules": (qj.ranges.percentile(0.99)._replace(name="percentile(0.9)"),)},
            errors.SweepError,
            "family",
        ),
    ],
    ids=["width", "random", "float", "named", "family", "number"],
)
def test_what_cannot_be_swept_is_refused_before_any_work(tmp_path, weights, grid, error, what):
    calls = Calls()
    study = tiny_study(calls)
    if weights is not None:
        policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
        study = dataclasses.replace(study, policy=policy)
        grid = {"activation_bits": (0,), **grid}
    axes = {"weight_bits": (8,), "activation_bits": (8,), "rules": RULES[:1], "seeds": (0,)}
    with pytest.raises(error, match=what):
        run_sweep(study, Grid(**{**axes, **grid}), tmp_path)
    assert calls.trained == []


def test_rules_of_a_family_are_themselves(tmp_path):
    rules = (qj.ranges.percentile(0.99), qj.ranges.sigma(2.0), qj.ranges.constant(-1.0, 1.0))
    rules = (*rules, qj.ranges.SAWB._replace(name="sigma"))  # no name of the library's
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=rules, seeds=(0,))
    assert run_sweep(tiny_study(), grid, tmp_path).computed == 5


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "behind",
    [{"outputs": qj.activation_quantizer(bits=2)}, {"biases": qj.activation_quantizer(bits=1)}],
    ids=["outputs", "biases"],
)
def test_the_float_cell_is_float_where_outputs_and_biases_are_quantized(tmp_path, behind):
    study = tiny_study()
    params = {**study.train(0, lambda steps: None), "b": jnp.linspace(-3.0, 3.0, 3)}

    def apply(params, x):
        return jnp.tanh(x @ params["first"]) @ params["second"] + params["b"][None]

    inputs, _ = study.test()
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=8), activations=qj.activation_quantizer(bits=8), **behind
    )
    study = dataclasses.replace(
        study,
        apply=apply,
        train=lambda seed, on_step: params,
        test=lambda: (inputs, jnp.argmax(apply(params, inputs), axis=-1).astype(jnp.int32)),
        policy=qj.Policy([qj.rule(qj.weighted(), scheme)]),
    )
    grid = Grid(weight_bits=(0, 8), activation_bits=(8,), rules=RULES[:1], seeds=(0,))
    in_float, *others = run_sweep(study, grid, tmp_path).rows
    assert (in_float.rule, in_float.accuracy) == ("float", 1.0)
    assert min(row.accuracy for row in others) < 1.0


@pytest.mark.parametrize("change", ["column", "one", "two", "floats"])
def test_labels_that_are_not_one_for_each_row_are_refused(tmp_path, change):
    study = tiny_study()
    inputs, labels = study.test()
    wrong = {
        "column": labels[:, None],
        "one": labels[:1],
        "two": jnp.stack([labels, labels], 1),
        "floats": labels.astype(jnp.float32),
    }
    study = dataclasses.replace(study, test=lambda: (inputs, wrong[change]))
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES[:1], seeds=(0,))
    with pytest.raises(errors.SweepError, match="labels of"):
        run_sweep(study, grid, tmp_path)
    assert not (tmp_path / "results.csv").exists()


def test_labels_of_another_kind_are_refused_before_any_work(tmp_path):
    calls = Calls()
    study = tiny_study(calls)
    inputs, labels = study.test()
    floats = dataclasses.replace(study, test=lambda: (inputs, labels.astype(jnp.float32)))
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES[:1], seeds=(0,))
    with pytest.raises(errors.SweepError, match="labels of float32"):
        run_sweep(floats, grid, tmp_path)
    assert calls.trained == []


@pytest.mark.parametrize("kind", [list, np.uint8, np.int64, jnp.int4])
def test_labels_of_any_integers_are_taken(tmp_path, kind):
    study = tiny_study()
    inputs, labels = study.test()
    other = np.asarray(labels).tolist() if kind is list else np.asarray(labels).astype(kind)
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES[:1], seeds=(0,))
    rows = run_sweep(dataclasses.replace(study, test=lambda: (inputs, other)), grid, tmp_path).rows
    assert rows[0].accuracy == 1.0


def test_a_model_that_returns_more_than_logits_is_refused(tmp_path):
    study = tiny_study()
    both = dataclasses.replace(study, apply=lambda params, x: (study.apply(params, x),))
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES[:1], seeds=(0,))
    with pytest.raises(errors.SweepError, match="a tuple for logits"):
        run_sweep(both, grid, tmp_path)


def test_sequences_have_a_label_at_each_place(tmp_path):
    study = tiny_study()
    inputs, labels = study.test()
    study = dataclasses.replace(
        study,
        apply=lambda params, x: study_of_rows(params, x),
        calibration=lambda: [inputs[:16].reshape(4, 4, 6)],
        test=lambda: (inputs.reshape(10, 4, 6), labels.reshape(10, 4)),
    )
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES[:1], seeds=(0,))
    first = run_sweep(study, grid, tmp_path).rows[0]
    assert (first.correct, first.total, first.accuracy) == (40, 40, 1.0)


def study_of_rows(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def test_cells_that_are_not_finite_do_not_take_the_others_with_them(tmp_path):
    def never(statistics, target):
        del target
        nan = jnp.full(statistics.scale_shape, jnp.nan, jnp.float32)
        return qj.ranges.Range(nan, nan, statistics.batches > 0)

    rules = (*RULES, qj.ranges.RangeRule("never", never, reads_distribution=False))
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=rules, seeds=(0, 1))
    with pytest.raises(errors.SweepError, match="logits of 2 cells are not finite") as caught:
        run_sweep(tiny_study(), grid, tmp_path)
    assert "seed 0, W8 A8, never; seed 1, W8 A8, never" in str(caught.value)
    rows = ResultStore(tmp_path / "results.csv").rows()
    assert len(rows) == 2 * (1 + len(RULES))
    rest = dataclasses.replace(grid, rules=RULES)
    assert run_sweep(tiny_study(), rest, tmp_path).computed == 0


def test_a_float_model_that_is_not_finite_is_what_is_said(tmp_path):
    """The advice was to print what qj.check finds, which is nothing."""
    study = tiny_study()
    masked = dataclasses.replace(
        study, apply=lambda p, x: study.apply(p, x).at[:, 1].set(-jnp.inf), identity="masked"
    )
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES, seeds=(0,))
    with pytest.raises(errors.SweepError, match="float model are not finite") as caught:
        run_sweep(masked, grid, tmp_path)
    assert "W0 A0, float" in str(caught.value)


def test_a_checkpoint_that_cannot_be_read_says_so(tmp_path):
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES[:1], seeds=(0,))
    run_sweep(tiny_study(), grid, tmp_path)
    (tmp_path / "results.csv").unlink()
    (folder,) = (tmp_path / "checkpoints").glob("*/seed_0")
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(errors.SweepError, match="a checkpoint cannot be read"):
        run_sweep(tiny_study(), grid, tmp_path)


def test_weights_with_nan_raise_and_file_nothing(tmp_path):
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=RULES, seeds=(0,))
    with pytest.raises(errors.QuantjaxError, match=r"NaN|finite"):
        run_sweep(tiny_study(poison=True), grid, tmp_path)
    assert ResultStore(tmp_path / "results.csv").rows() == []


@pytest.mark.parametrize(
    ("axis", "values", "what"),
    [
        ("weight_bits", (), "is empty"),
        ("weight_bits", (4, 4.0), "repeats"),
        ("seeds", (1, 1), "repeats"),
        ("rules", (), "is empty"),
    ],
)
def test_a_grid_that_makes_no_sense_raises(axis, values, what):
    axes = {"weight_bits": (8,), "activation_bits": (8,), "rules": RULES, "seeds": (0,)}
    with pytest.raises(errors.SweepError, match=f"{axis} {what}"):
        Grid(**{**axes, axis: values})


@pytest.mark.parametrize(
    "widths", [(2.0, 3.0), np.arange(2, 4), jnp.arange(2.0, 4), range(2, 4), [np.int8(2), 3]]
)
def test_widths_are_pythons_integers(widths):
    """2.0 was filed as text that no later sweep could read."""
    grid = Grid(weight_bits=widths, activation_bits=(8,), rules=qj.ranges.MIN_MAX, seeds=(0,))
    assert grid.weight_bits == (2, 3)
    assert {type(bits) for bits in grid.weight_bits} == {int}
    assert grid.rules == RULES[:1] == (qj.ranges.MIN_MAX,)


@pytest.mark.parametrize("axis", ["weight_bits", "activation_bits", "seeds"])
@pytest.mark.parametrize(
    "values", [4, (True,), (2.5,), ("8",), ((2, 3), 4), None, (np.nan,), (np.inf,)]
)
def test_whatever_is_no_whole_number_is_no_width(axis, values):
    axes = {"weight_bits": (8,), "activation_bits": (8,), "rules": RULES, "seeds": (0,)}
    with refused(errors.SweepError, f"{axis} {values!r}", "by whole numbers"):
        Grid(**{**axes, axis: values})


@pytest.mark.parametrize("rule", ["mse", qj.ranges.ADMM, None], ids=["name", "fit", "none"])
def test_a_grid_is_of_range_rules(rule):
    with pytest.raises(errors.SweepError, match="is no range rule") as caught:
        Grid(weight_bits=(8,), activation_bits=(8,), rules=(*RULES, rule), seeds=(0,))
    assert ("it is a fit" in caught.value.why) == (rule is qj.ranges.ADMM)
    assert len(Grid(weight_bits=(8,), activation_bits=(8,), seeds=(0,), **fixed(caught))) > 1


def fixed(caught):
    """What the edit that an error names gives."""
    return eval(f"dict({caught.value.fix})", {"qj": qj})


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
