"""The QAT study on digits: cells, resuming, paired intervals, the page."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import quantjax as qj
from experiments.data import SetName
from experiments.models.cnn import SmallCNN
from experiments.qat import methods, report, study
from experiments.qat.__main__ import Options, main, setting_of, write
from experiments.qat.floats import float_accuracy, images_of, train_float
from experiments.qat.learner import Distillation, Recipe, inner_bits, learner, plan_entries
from experiments.qat.results import Results, Row
from experiments.training.errors import RunMismatchError

pytestmark = pytest.mark.thinned(21)

RECIPE = Recipe(steps=12, batch=64, calibration=128)
EVERY = (*methods.METHODS, *methods.LEARNED_WIDTHS, *methods.BINARY)


@pytest.fixture(scope="module")
def data():
    found = images_of(SetName.DIGITS)
    return found._replace(test=(found.test[0][:300], found.test[1][:300]))


@pytest.fixture(scope="module")
def model():
    return SmallCNN(channels=(6, 8), strides=(2, 2))  # one inner layer: what compiles counts


@pytest.fixture(scope="module")
def floats(data, model):
    return train_float(model, data, steps=80, batch=64, seed=0, rate=1e-2)


def stepped(learned, state, data, steps):
    step = jax.jit(learned.step)
    for i in range(steps):
        at = slice(64 * i % 512, 64 * i % 512 + 64)
        batch = data.train[0][at], data.train[1][at]
        state, metrics = step(state, batch, jax.random.key(i))
    return state, metrics


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name.replace(" ", "-"))
def test_every_method_trains(method, data, model, floats):
    """Finite, what it learns has moved, what it does not learn has not."""
    learned = learner(model, floats, data.train[0], method, RECIPE)
    bits = 1 if method in methods.BINARY else 3
    start = learned.start(floats, jnp.asarray(data.train[0][:128]), bits, activation_bits=3)
    state, metrics = stepped(learned, start, data, 6)
    assert np.isfinite(float(metrics["loss"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.qstate)))
    moved: set[str] = set()
    for name, operands in state.qstate.items():
        for key, qparams in operands.items():
            before = start.qstate[name][key]
            assert (qparams.bits == before.bits).all()
            if (qparams.scale != before.scale).any():
                moved.add("scale")
            for entry, value in (qparams.theta or {}).items():
                if (value != before.theta[entry]).any():
                    moved.add(entry)
    scheduled = {"sharpness"} if method.name == "error decay" else set()
    assert set(method.learned) <= moved
    assert moved <= {*method.learned, *scheduled, *(["scale"] if method.learns_scale else [])}


def test_widths_and_seeds_share_one_compilation(data, model, floats):
    learned = learner(model, floats, data.train[0], methods.METHODS[2], RECIPE)
    traces = []

    @jax.jit
    def step(state, batch, key):
        traces.append(1)
        return learned.step(state, batch, key)

    batch = data.train[0][:64], data.train[1][:64]
    for bits in (4, 3, 2):
        state = learned.start(floats, jnp.asarray(data.train[0][:128]), bits)
        step(state, batch, jax.random.key(0))
    assert len(traces) == 1


def test_the_first_and_last_layer_have_8_bits(data, model, floats):
    learned = learner(model, floats, data.train[0], methods.METHODS[2], RECIPE)
    state = learned.start(floats, jnp.asarray(data.train[0][:128]), 2, activation_bits=3)
    names = list(state.qstate)
    assert set(inner_bits(learned.plan, 2)) == set(names[1:-1])
    for name, operands in state.qstate.items():
        weight, activation = (8, 8) if name in (names[0], names[-1]) else (2, 3)
        assert float(operands["weight"].bits) == weight
        assert float(operands["activation"].bits) == activation


def test_or_they_have_the_width_of_all(data, model, floats):
    method = methods.METHODS[2]
    learned = learner(model, floats, data.train[0], method, RECIPE, exempt=False)
    state = learned.start(floats, jnp.asarray(data.train[0][:128]), 2)
    for operands in state.qstate.values():
        assert all(float(qparams.bits) == 2 for qparams in operands.values())


def test_entries_are_those_of_the_kernels(data, model, floats):
    learned = learner(model, floats, data.train[0], methods.METHODS[2], RECIPE)
    kernels = [leaf for leaf in jax.tree.leaves(floats["params"]) if leaf.ndim >= 2]
    assert sum(plan_entries(learned.plan).values()) == sum(leaf.size for leaf in kernels)


def test_a_mask_stays_through_training_with_a_teacher(data, model, floats):
    learned = learner(
        model, floats, data.train[0], methods.METHODS[2], RECIPE, distillation=Distillation()
    )
    mask = study._mask(floats)
    images = jnp.asarray(data.train[0][:128])
    start = learned.start(floats, images, 4, mask=mask, teacher_variables=floats)
    state, _ = stepped(learned, start, data, 4)
    kept = qj.apply_mask(state.params, mask)
    zeros = sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(kept) if leaf.ndim >= 2)
    total = sum(leaf.size for leaf in jax.tree.leaves(kept) if leaf.ndim >= 2)
    assert abs(zeros / total - study.SPARSITY) < 0.02
    for leaf, teacher in zip(jax.tree.leaves(state.teacher), jax.tree.leaves(floats), strict=True):
        np.testing.assert_array_equal(leaf, teacher)  # it learns nothing itself


def test_float_networks_learn_and_repeat(data, model, floats):
    assert float_accuracy(model, floats, data) > 0.8
    again = train_float(model, data, steps=80, batch=64, seed=0, rate=1e-2)
    for a, b in zip(jax.tree.leaves(floats), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def small(tmp_path_factory, data) -> tuple[study.Setting, Results, Path]:
    """Two methods at one width on two tiny networks, run once."""
    folder = tmp_path_factory.mktemp("qat")
    tiny = SmallCNN(channels=(4, 8), strides=(2, 2))
    setting = study.Setting(
        model=tiny,
        student=SmallCNN(channels=(2, 4), strides=(2, 2)),
        data=data,
        recipe=RECIPE,
        float_steps=60,
        seeds=(0, 1),
        more_seeds=(),
        widths=(2,),
        methods=methods.METHODS[1:3],
    )
    results = Results(folder / "results.csv", setting.fingerprint)
    floats = {
        seed: study._float(setting, results, folder, seed, lambda text: None) for seed in (0, 1)
    }
    for method in setting.methods:
        study._trained(setting, results, floats, (study.QAT, method, (2,)), lambda text: None)
    return setting, results, folder


def test_further_seeds_are_of_lsq_and_the_rules_alone(small, monkeypatch):
    setting, results, _ = small
    setting = setting._replace(more_seeds=(7, 8), methods=methods.METHODS[2:4])
    asked = []
    monkeypatch.setattr(study, "_float", lambda setting, results, folder, seed, note: seed)
    monkeypatch.setattr(study, "_taught", lambda setting, *_: asked.append(("kd", setting.seeds)))
    monkeypatch.setattr(
        study,
        "_calibrated",
        lambda setting, results, floats, table, note: asked.append((table, setting.seeds)),
    )
    monkeypatch.setattr(
        study,
        "_trained",
        lambda setting, results, floats, job, note: asked.append(
            (job[0], job[1].name, setting.seeds)
        ),
    )
    study.run(setting, results, None, lambda text: None)
    few, many = (0, 1), (0, 1, 7, 8)
    assert {entry[:-1] for entry in asked if entry[-1] == many} == {
        (study.PTQ,), (study.PTQ_WHOLE,), (study.QAT, "LSQ"), (study.QAT_WHOLE, "LSQ"),
    }  # fmt: skip
    assert {entry[-1] for entry in asked} == {few, many}
    assert (study.QAT, "LSQ+", few) in asked
    assert ("kd", few) in asked
    asked.clear()
    without = setting._replace(methods=methods.METHODS[3:4])
    study.run(without, results, None, lambda text: None)
    assert {entry[-1] for entry in asked} == {few}  # nothing to compare with


def test_a_second_run_computes_nothing(small, monkeypatch):
    setting, results, folder = small
    again = Results(folder / "results.csv", setting.fingerprint)
    assert again.rows == results.rows
    assert len(again.rows) == 2 + 2 * 2

    def refuse(*args, **kwargs):
        raise AssertionError("it was there already")

    monkeypatch.setattr(study, "train", refuse)
    for method in setting.methods:
        study._trained(setting, again, {}, (study.QAT, method, (2,)), lambda text: None)
    monkeypatch.undo()
    # The float networks come from their checkpoints.
    said = []
    study._float(setting, again, folder, 0, said.append)
    assert said == []


def test_a_line_that_was_cut_short_is_computed_again(small, tmp_path):
    setting, results, folder = small
    path = tmp_path / "results.csv"
    text = (folder / "results.csv").read_text()
    path.write_text(text[: text.rindex(",") - 3])
    again = Results(path, setting.fingerprint)
    assert again.rows == results.rows[:-1]
    last = results.rows[-1]
    assert not again.has(*last.cell)
    again.add(last)
    assert Results(path, setting.fingerprint).rows == results.rows


def test_results_of_another_recipe_are_refused(small):
    setting, _, folder = small
    other = setting._replace(recipe=dataclasses.replace(RECIPE, rate=0.5))
    assert other.fingerprint != setting.fingerprint
    with pytest.raises(RunMismatchError, match="another recipe"):
        Results(folder / "results.csv", other.fingerprint)


def test_intervals_are_students():
    rng = np.random.default_rng(0)
    first, second = rng.normal(90, 1, 5), rng.normal(88, 1, 5)
    got = report.paired(dict(enumerate(first)), dict(enumerate(second)))
    want = stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose((got.low, got.high), want, rtol=1e-9)
    assert report.interval([1.0]).half == math.inf
    # Only seeds that both have are pairs.
    assert report.paired({0: 2.0, 1: 3.0, 7: 100.0}, {0: 1.0, 1: 2.0}).mean == 1.0


def rows_of(study_name: str = "s") -> list[Row]:
    """A made-up study whose numbers can be read off the page."""

    def row(table, method, bits, seed, accuracy, mean_bits=None):
        mean = float(bits) if mean_bits is None else mean_bits
        return Row(
            study=study_name, table=table, method=method, bits=bits, seed=seed, before=0.0,
            accuracy=accuracy, mean_bits=mean, seconds=1.0,
        )  # fmt: skip

    rows = []
    for seed in (0, 1, 2):
        up = 0.001 * seed
        rows.append(row(study.FLOAT, "float", 32, seed, 0.9 + up))
        for bits in (4, 2):
            rows.append(row(study.PTQ, "bad rule", bits, seed, 0.5 + up))
            rows.append(row(study.PTQ, "good rule", bits, seed, 0.8 + 0.02 * bits + up))
            rows.append(row(study.QAT, "LSQ", bits, seed, 0.87 + 0.01 * bits + up))
            rows.append(row(study.PTQ_WHOLE, "good rule", bits, seed, 0.3 + up))
            rows.append(row(study.QAT_WHOLE, "LSQ", bits, seed, 0.85 + up))
        rows.append(row(study.LEARNED, "rounded width", 4, seed, 0.88 + up, 3.5))
        rows.append(row(study.SIGNS, "clipped", 1, seed, 0.7 + up))
        rows.append(row(study.TAUGHT, study.STUDENT, 32, seed, 0.6 + up))
        rows.append(row(study.TAUGHT, study.STUDENT_KD, 32, seed, 0.65 + 2 * up))
        rows.append(row(study.TAUGHT, study.PRUNED, 4, seed, 0.8))
        rows.append(row(study.TAUGHT, study.PRUNED_KD, 4, seed, 0.81))
    return rows


def test_the_page_says_what_the_rows_say():
    text = report.page(rows_of(), (4, 2), (0, 1, 2), "# head")
    assert text.startswith("# head\n\nFloat: 90.10 % over 3 seeds.")
    assert "| best range rule, not trained | 88.10 (good rule) | −2.00 ± 0.00" in text
    assert "| LSQ | 91.10 | +1.00 ± 0.00 | 89.10 | −1.00 ± 0.00 |" in text
    assert "W4A4 +3.00 ± 0.00, W2A2 +5.00 ± 0.00" in text
    whole = "| W2A2 | 30.10 (good rule) | 85.10 | −5.00 ± 0.00 | +55.00 ± 0.00 |"
    assert whole in text
    assert "| rounded width | 3.50 | 88.10 | −2.00 ± 0.00 |" in text
    assert "| small network | 60.10 | 65.20 | +5.10 ± 0.25 |" in text
    assert "| 80 % pruned, W4A4 | 80.00 | 81.00 | +1.00 ± 0.00 |" in text
    assert "further seeds" not in text


def test_further_seeds_have_a_part_of_their_own():
    text = report.page(rows_of(), (4, 2), (0,), "# head")
    assert "Float: 90.00 % over 1 seeds." in text
    assert "| best range rule, not trained | 88.00 (good rule) |" in text
    assert "## LSQ against the range rules from 3 seeds" in text
    assert "With 2 seeds more" in text
    all_seeds, alone = (
        "| W2A2 | 30.10 (good rule) | 85.10 |",
        "| W2A2 | 30.15 (good rule) | 85.15 |",
    )
    assert text.index("same width, all seeds") < text.index(all_seeds) < text.index(alone)
    assert "| W2A2 | 84.10 (good rule) | 89.10 | −1.00 ± 0.00 | +5.00 ± 0.00 |" in text


def test_options_make_the_setting():
    setting = setting_of(Options(data="digits", methods=("lsq", "pact"), seeds=(3,), steps=7))
    assert [m.name for m in setting.methods] == ["LSQ", "LSQ+", "PACT + SAWB", "PACT + DoReFa"]
    assert setting.recipe.steps == 7
    assert setting.model.strides == (1, 2, 2)
    assert setting.more_seeds == [5, 6, 7, 8, 9]
    assert setting_of(Options(data="digits", seeds=(5, 7))).more_seeds == [6, 8, 9]


def test_the_command_writes_the_page(tmp_path, monkeypatch):
    def run(setting, results, folder, note):
        for row in rows_of(setting.fingerprint):
            results.add(row)

    monkeypatch.setattr("experiments.qat.__main__.run", run)
    page = tmp_path / "README.md"
    options = Options(data="digits", output=tmp_path / "out", report=page, widths=(4, 2))
    text = write(options, note=lambda text: None)
    assert "python -m experiments.qat --data digits --widths 4 2 --report" in text
    assert "At the start it is 4.42" in text, text[text.index("## Learned") :][:300]
    assert page.read_text() == text == (tmp_path / "out" / "tables.md").read_text()
    assert "python -m experiments.qat" in text


def test_method_names_are_unique_within_their_table():
    for table in (methods.METHODS, methods.LEARNED_WIDTHS, methods.BINARY):
        assert len({method.name for method in table}) == len(table)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"float_steps": -1}, "float_steps is -1"),
        ({"widths": (4, 9)}, "a width of 9"),
        ({"seeds": ()}, "no seeds"),
        ({"methods": ("lsq", "nosuch")}, "no method's name has 'nosuch'"),
        ({"data": "nosuch"}, "nosuch"),
        ({"data": "mnist", "data_dir": Path("nowhere")}, "the data folder does not exist"),
    ],
)
def test_what_no_study_can_be_made_of_is_an_error_of_one_line(options, problem, monkeypatch):
    """Ahead of all training, and no traceback on the command line."""
    given = {"data": "digits", **options}
    monkeypatch.setattr("experiments.qat.__main__.tyro.cli", lambda *_, **__: Options(**given))
    monkeypatch.setattr("experiments.qat.__main__.run", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match=f"error: .*{problem}"):
        main()


def test_a_row_that_was_cut_anywhere_is_dropped(tmp_path):
    """Inside the last number too, which would be another one."""
    path = tmp_path / "results.csv"
    results = Results(path, "study")
    first, second = rows_of("study")[:2]
    results.add(first)
    start = len(path.read_text())
    results.add(second)
    text = path.read_text()
    for end in range(start, len(text)):
        path.write_text(text[:end])
        assert Results(path, "study").rows == [first]
    path.write_text(text)
    assert Results(path, "study").rows == [first, second]


def test_widths_that_moved_or_stayed():
    rows = rows_of()
    text = report.page(rows, (4, 2), (0, 1, 2), "# head", 3.5)
    assert "At the start it is 3.50, where the widths of rounded width stayed at this rate." in text
    assert "At the start it is 4.00." in report.page(rows, (4, 2), (0, 1, 2), "# head", 4.0)
