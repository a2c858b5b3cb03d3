"""What results are filed by, and what a study has to be before anything is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.sweep import Cell, Execution, Grid, ResultStore, Row, Study, run_sweep, summarize
from quantjax.sweep.grid import filed_name
from quantjax.sweep.runner import compile_cells
from tests.refused import refused
from tests.sweep.tiny import Calls, tiny_study


def reach(statistics, target, k):
    """``k`` times the mean magnitude, on both sides."""
    bound = k * statistics.moments.magnitude
    return qj.ranges.Range(-bound, bound, statistics.batches > 0)


@dataclasses.dataclass(frozen=True)
class Reach:
    """The same, with its number in a field."""

    k: float

    def __call__(self, statistics, target):
        """The range."""
        return reach(statistics, target, self.k)


def by_number(k):
    return qj.ranges.RangeRule("reach", reach, parameters=(k,))


def by_field(k):
    return qj.ranges.RangeRule("reach", Reach(k))


def by_partial(k):
    return qj.ranges.RangeRule("reach", functools.partial(reach, k=k))


@pytest.mark.parametrize("rule_of", [by_number, by_field, by_partial])
def test_rules_that_differ_in_numbers_alone_are_others(tmp_path, rule_of):
    """The second one got the results of the first."""

    def swept(*numbers, output=tmp_path):
        grid = Grid(
            weight_bits=(8,), activation_bits=(3,), rules=tuple(map(rule_of, numbers)), seeds=(0,)
        )
        return run_sweep(tiny_study(), grid, output, execution=Execution.MAP)

    wide, narrow = swept(4.0), swept(0.25)
    assert narrow.computed == 1  # the float baseline is there
    names = [result.rows[-1].rule.replace("4.0", "4") for result in (wide, narrow)]
    assert names == ["reach(4)", "reach(0.25)"]
    both = swept(4.0, 0.25, output=tmp_path / "both")
    assert both.rows[1:] == [wide.rows[-1], narrow.rows[-1]]
    assert wide.rows[-1].correct != narrow.rows[-1].correct
    assert swept(4.0, 0.25).computed == 0


def test_numbers_that_a_name_has_are_not_said_again():
    named = qj.ranges.RangeRule("reach(4)", reach, parameters=(4.0,))
    assert [filed_name(rule) for rule in (by_number(4.0), named)] == ["reach(4)", "reach(4)"]
    near = [by_number(float(np.float32(k))) for k in (1.0000001, 1.0000002)]
    assert len({filed_name(rule) for rule in near}) == 2
    ours = [qj.ranges.MSE, qj.ranges.percentile(0.99), qj.ranges.kl_onnxruntime(bins=513)]
    assert [filed_name(rule) for rule in ours] == [rule.name for rule in ours]
    with refused(errors.SweepError, "an array for a parameter", "filed by names and numbers"):
        filed_name(by_number(jnp.ones(2)))
    same = qj.ranges.RangeRule("reach", print, parameters=(4.0,))
    with refused(errors.SweepError, "repeats a value"):
        Grid(weight_bits=(8,), activation_bits=(3,), rules=(by_number(4.0), same), seeds=(0,))


ROWS = [Row("abc", "s", seed, 8, 8, "min_max", 0.8 + seed / 100, 0, 100) for seed in (0, 1)]


def test_what_another_sweep_filed_is_not_filed_again(tmp_path):
    store = ResultStore(tmp_path / "results.csv")
    store.add(ROWS)
    store.add([*ROWS, ROWS[0]._replace(seed=2), ROWS[0]._replace(fingerprint="other")])
    assert [(row.fingerprint, row.seed) for row in store.rows()] == [
        ("abc", 0),
        ("abc", 1),
        ("abc", 2),
        ("other", 0),
    ]


def test_a_row_that_is_there_twice_is_one_seed():
    (summary,) = summarize([ROWS[0], *ROWS])
    assert (summary.seeds, round(summary.mean, 3)) == (2, 0.805)
    assert summary == summarize(ROWS)[0]


def test_identities_are_not_averaged():
    with refused(errors.SweepError, "rows of 2 studies", "abc, other", "fingerprint()"):
        summarize([*ROWS, ROWS[0]._replace(fingerprint="other")])


@dataclasses.dataclass
class Pair:
    """Parameters in a class of their own."""

    first: jax.Array
    second: jax.Array


jax.tree_util.register_dataclass(Pair, ["first", "second"], [])
TREES = {
    "tuple": (lambda p: (p["first"], p["second"]), lambda t: {"first": t[0], "second": t[1]}),
    "numbers": (
        lambda p: {0: p["first"], 1: p["second"]},
        lambda t: {"first": t[0], "second": t[1]},
    ),
    "class": (lambda p: Pair(**p), lambda t: {"first": t.first, "second": t.second}),
}


@pytest.mark.parametrize("kind", TREES)
def test_parameters_that_no_checkpoint_holds_are_evaluated_all_the_same(tmp_path, kind):
    """They were refused, after all of the training, which was lost."""
    to, back = TREES[kind]
    calls, plain = Calls(), tiny_study()
    own = tiny_study(calls)
    study = dataclasses.replace(
        own,
        train=lambda seed, on_step: to(own.train(seed, on_step)),
        apply=lambda params, x: own.apply(back(params), x),
    )
    grid = Grid(weight_bits=(2,), activation_bits=(4,), rules=(qj.ranges.MIN_MAX,), seeds=(0,))
    found = run_sweep(study, grid, tmp_path / "own", execution=Execution.MAP).rows
    wanted = run_sweep(plain, grid, tmp_path / "plain", execution=Execution.MAP).rows
    assert [row.correct for row in found] == [row.correct for row in wanted]
    assert run_sweep(study, grid, tmp_path / "own").computed == 0
    assert calls.trained == [0]
    checkpoints = tmp_path / "own" / "checkpoints"
    assert not [path for path in checkpoints.rglob("*") if path.name.startswith("seed")]


WRONG = {
    "policy": ({"policy": qj.presets.lsq()}, errors.ArgumentError, "policy is a Scheme"),
    "name": ({"name": ""}, errors.SweepError, "a study called ''"),
    "path": ({"name": "../../elsewhere"}, errors.SweepError, "folder of that name"),
    "root": ({"name": "/elsewhere"}, errors.SweepError, "folder of that name"),
    "line": ({"name": "a\nb"}, errors.SweepError, "'a\\nb'"),
    "steps": ({"train_steps": "3"}, errors.ArgumentError, "train_steps is a str"),
    "train": ({"train": lambda seed: None}, errors.SweepError, "train(seed, on_step)"),
    "apply": ({"apply": None}, errors.SweepError, "apply(params, inputs)"),
    "test": ({"test": lambda split: None}, errors.SweepError, "test()"),
    "calibration": ({"calibration": [1]}, errors.SweepError, "it is list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_study_is_refused_when_it_is_made(name):
    changed, kind, said = WRONG[name]
    with refused(kind, said):
        dataclasses.replace(tiny_study(), **changed)


def test_a_folder_in_a_folder_is_a_name():
    assert dataclasses.replace(tiny_study(), name="digits/small").name == "digits/small"
    assert isinstance(dataclasses.replace(tiny_study(), test=dict), Study)  # has no signature


INPUTS = np.zeros((40, 6), np.float32)
CALIBRATIONS = {
    "one array": (lambda: INPUTS, "float32 6, the test inputs are float32 40x6"),
    "a pair": (lambda: [(INPUTS, INPUTS)], "float32 40x6, float32 40x6"),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_calibration_is_like_what_is_tested_before_anything_is_trained(tmp_path, name):
    batches, said = CALIBRATIONS[name]
    calls = Calls()
    study = dataclasses.replace(tiny_study(calls), calibration=batches)
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=(qj.ranges.MIN_MAX,), seeds=(0,))
    with refused(errors.SweepError, "not alike", said, "a list of batches"):
        run_sweep(study, grid, tmp_path)
    assert calls.trained == []


def test_other_products_for_what_is_tested_are_refused(tmp_path):
    """Integers are not quantized; what apply casts may be of any dtype."""
    integers = lambda: [INPUTS.astype(np.int32)]  # noqa: E731
    plain = tiny_study()
    study = dataclasses.replace(
        plain,
        calibration=integers,
        apply=lambda params, x: (
            (x @ params["first"].astype(x.dtype)).astype(jnp.float32) @ params["second"]
        ),
    )
    grid = Grid(weight_bits=(8,), activation_bits=(8,), rules=(qj.ranges.MIN_MAX,), seeds=(0,))
    with refused(errors.SweepError, "not alike", "site first", "int32 40x6"):
        run_sweep(study, grid, tmp_path / "integers")
    casting = dataclasses.replace(
        plain,
        calibration=integers,
        apply=lambda params, x: plain.apply(params, x.astype(jnp.float32)),
    )
    assert run_sweep(casting, grid, tmp_path / "cast", execution=Execution.MAP).computed == 2


def test_keys_are_an_axis():
    keys = {"key": jax.random.split(jax.random.key(0), 5)}
    program = compile_cells(
        lambda v: jax.random.normal(v["key"]), keys, memory_budget_bytes=1 << 26, cells_per_call=2
    )
    assert program.run(keys).tolist() == jax.vmap(jax.random.normal)(keys["key"]).tolist()
    for axes in ({"a": 2.0}, {"a": {"b": 2.0}}, {"a": {"b": np.ones(2)}, "c": np.ones(3)}):
        with refused(errors.SweepError, "no common length"):
            compile_cells(lambda v: v["a"], axes, memory_budget_bytes=1 << 26)


def test_cells_are_filed_by_the_names_of_their_rules():
    grid = Grid(weight_bits=(8,), activation_bits=(3,), rules=(by_number(0.5),), seeds=(0,))
    assert grid.cells()[1:] == [Cell(8, 3, "reach(0.5)")]
