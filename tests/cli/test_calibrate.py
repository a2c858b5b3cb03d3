"""``quantjax calibrate``, as a user types it."""

import csv
import struct
from pathlib import Path

import numpy as np
import pytest

from quantjax import cli
from quantjax.calibration import RULES, RuleName, calibration_report, collect
from quantjax.cli import calibrate as command
from quantjax.policy import uniform_policy
from tests.calibration import tiny

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = "tests.calibration.tiny:model", "tests.calibration.tiny:batches"
FEW = ["--rules", "min-max", "sigma-3"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(folder, *arguments, model=MODEL, data=DATA):
    """The status, and the lines of the CSV file."""
    status = cli.main(["calibrate", model, data, *FEW, "--output", str(folder), *arguments])
    if status:
        return status, []
    with (folder / "ranges.csv").open(newline="") as file:
        return status, list(csv.DictReader(file))


def test_the_command_prints_a_table_and_writes_figures_and_pictures(tmp_path, capsys):
    status, lines = run(tmp_path, "--weight-bits", "4")
    out = capsys.readouterr().out
    assert status == 0
    assert [(line["site"], line["operand"], line["rule"]) for line in lines] == [
        (site, operand, rule)
        for site in ("first", "second")
        for operand in ("activation", "weight")
        for rule in ("min_max", "sigma(3)")
    ]
    assert "first activation: uint8/tensor, 432 values, from " in out
    assert "second weight: int4/channel, 24 values in 3 groups" in out
    assert "4 operands, 2 rules, 3 batches" in out
    assert f"ranges      {tmp_path / 'ranges.csv'}" in out
    assert "histograms (4 pictures)" in out
    pictures = sorted((tmp_path / "histograms").iterdir())
    assert [path.name for path in pictures] == [
        "first_activation.png",
        "first_weight.png",
        "second_activation.png",
        "second_weight.png",
    ]
    for path in pictures:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == 1320
        assert 500 < height < 1320


def test_figures_are_those_of_the_python_call(tmp_path):
    _, lines = run(tmp_path, "--weight-bits", "3", "--activation-bits", "5")
    model = tiny.model()
    policy = uniform_policy(weight_bits=3, activation_bits=5)
    collected = collect(model, [(batch,) for batch in tiny.batches()], policy)
    rules = [RULES[RuleName.MIN_MAX], RULES[RuleName.SIGMA_3]]
    report = calibration_report(collected.plan, collected.state, model.params, rules=rules)
    for line in lines:
        operand = report[line["site"], line["operand"]]
        found = operand[line["rule"]]
        assert int(line["bits"]) == operand.bits == (3 if line["operand"] == "weight" else 5)
        assert float(line["sqnr_db"]) == found.sqnr
        assert float(line["saturated"]) == found.saturated
        assert np.float32(line["high"]) == np.median(found.high)


def test_progress_says_what_is_done(tmp_path, capsys):
    run(tmp_path)
    out = capsys.readouterr().out
    for task in (f"loading {MODEL}", "observing", "deriving ranges", "drawing", "left"):
        assert task in out


@pytest.mark.parametrize(
    ("arguments", "batches", "values"),
    [
        (["--batches", "2"], 2, 2 * 144),
        (["--batch-size", "10"], 9, 432),
        (["--batch-size", "10", "--batches", "4"], 4, 34 * 6),
    ],
)
def test_how_much_is_observed(tmp_path, capsys, arguments, batches, values):
    _, lines = run(tmp_path, *arguments)
    assert f"{batches} batches" in capsys.readouterr().out
    assert int(lines[0]["values"]) == values


def test_data_without_end_is_read_as_far_as_asked(tmp_path, capsys):
    endless = "tests.calibration.tiny:infinitely_many"
    assert run(tmp_path, "--batches", "2", data=endless)[0] == 0
    assert "2 batches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "batches"), [("rows.npy", 2), ("rows.npz", 2), ("both.npz", 2), ("named.npz", 2)]
)
def test_arrays_in_files(tmp_path, capsys, name, batches):
    """72 rows are cut by 64; several arrays of a file are arguments."""
    path, model = tmp_path / name, MODEL
    if name == "rows.npy":
        np.save(path, tiny.array)
    elif name == "rows.npz":
        np.savez(path, tiny.array)
    else:
        arrays = [tiny.array, np.full((72, 1), 2.0, np.float32)]
        named = {"x": arrays[0], "by": arrays[1]}
        np.savez(
            path, *([] if name == "named.npz" else arrays), **(named if name[0] == "n" else {})
        )
        model = "tests.calibration.tiny:scaled"
    _, lines = run(tmp_path / "out", data=str(path), model=model)
    assert f"{batches} batches" in capsys.readouterr().out
    factor = 1.0 if name.startswith("rows") else 2.0
    assert float(lines[0]["seen_high"]) == factor * tiny.array.max()


def test_a_width_of_0_leaves_weights_or_activations_out(tmp_path):
    for option, left in (("--weight-bits", "activation"), ("--activation-bits", "weight")):
        _, lines = run(tmp_path, option, "0")
        assert {line["operand"] for line in lines} == {left}


def test_fits_are_rules_of_weights(tmp_path):
    _, lines = run(tmp_path, "--fits", "least-squares", "--weight-bits", "3")
    rules = {
        key: [line["rule"] for line in lines if (line["site"], line["operand"]) == ("first", key)]
        for key in ("activation", "weight")
    }
    assert rules["activation"] == ["min_max", "sigma(3)"]
    assert rules["weight"] == ["min_max", "sigma(3)", "least_squares"]


def test_rules_of_ones_own_stand_beside_the_librarys(tmp_path):
    own = [f"tests.calibration.tiny:{name}" for name in ("HALF", "own_rule", "OWN_FIT")]
    _, lines = run(tmp_path, "--own-rules", *own)
    found = {
        key: {line["rule"]: line for line in lines if line["operand"] == key}
        for key in ("activation", "weight")
    }
    assert list(found["activation"]) == ["min_max", "sigma(3)", "half", "made"]
    assert list(found["weight"]) == ["min_max", "sigma(3)", "half", "made", "own_fit"]
    whole, half = (float(found["activation"][rule]["high"]) for rule in ("min_max", "half"))
    assert half == whole / 2


def test_a_folder_reaches_data_that_asks_for_one(tmp_path, capsys):
    np.save(tmp_path / "rows.npy", 3.0 * tiny.array)
    folder = ["--data-dir", str(tmp_path)]
    _, lines = run(tmp_path, *folder, data="tests.calibration.tiny:from_folder")
    assert float(lines[0]["seen_high"]) == float(np.float32(3.0) * tiny.array.max())
    assert "note" not in capsys.readouterr().err
    run(tmp_path, *folder)
    assert f"note: {DATA} takes no data_dir" in capsys.readouterr().err


def test_products_that_stay_in_float_are_named(tmp_path, capsys):
    assert run(tmp_path, model="tests.calibration.tiny:with_a_product_of_inputs")[0] == 0
    out = capsys.readouterr().out
    assert "not quantized: dot_general" in out
    assert "(float: no rule matches)" in out


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("digitz", DATA, "no model is called digitz\n  where: registered: "),
        ("tests.calibration.tiny:absent", DATA, "cannot be imported"),
        ("tests.calibration.tiny:number", DATA, "is int, not a quantjax.calibration.Model"),
        ("tests.calibration.tiny:apply", DATA, "cannot be called without arguments"),
        (MODEL, "digitz", "no data is called digitz\n  where: registered: "),
        (MODEL, "no.such.module:x", "cannot be imported"),
        (MODEL, "tests.calibration.tiny:number", "is int, not an iterable of batches"),
        (MODEL, "tests.calibration.tiny:texts", "is str, not an iterable of batches"),
        (MODEL, "tests.calibration.tiny:needs", "missing a required argument: 'argument'"),
        (MODEL, "absent.npy", "there is no file absent.npy"),
        (MODEL, "README.md.npz", "there is no file README.md.npz"),
        (MODEL, "tests.calibration.tiny:nothing", "the data has no batch"),
        (MODEL, "tests.calibration.tiny:without_rows", "a batch is empty"),
        (MODEL, "tests.calibration.tiny:with_nan", "NaN or infinite\n  where: batch 2"),
        (MODEL, "tests.calibration.tiny:narrower", "not like the first one\n  where: batch 2"),
        (MODEL, "tests.calibration.tiny:too_narrow", "the model does not run on a batch"),
        (MODEL, "tests.calibration.tiny:strings", "something else than arrays of numbers"),
        ("tests.calibration.tiny:branching", DATA, "the model cannot be traced"),
        (
            "tests.calibration.tiny:dividing_by_zero",
            DATA,
            "an observed activation is NaN or infinite\n  where: site second, activation",
        ),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(tmp_path, capsys, model, data, message):
    assert run(tmp_path / "new" / "folder", model=model, data=data)[0] == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ")
    assert message in captured
    assert "try:" in captured
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight-bits", "17"], "17 bits do not fit a container of 16"),
        (["--weight-bits", "-1"], "-1 bits are no width of int"),
        (["--weight-bits", "0", "--activation-bits", "0"], "are both left out"),
        (["--batches", "0"], "0 batches are asked for"),
        (["--batch-size", "0"], "0 rows in a batch are asked for"),
        (["--rules", "min-max", "min-max"], "min_max is asked for twice"),
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments)[0] == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--weight-bits", "4.5"], ["--rules", "minmax"], ["--fits", "twn"], ["--batches", "all"]],
)
def test_options_are_typed(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", MODEL, DATA, *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_model_and_data_are_required(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", MODEL])
    assert stop.value.code == 2
    assert "DATA" in capsys.readouterr().err


def test_help_names_every_option_and_rule(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "MODEL DATA" in out
    for option in (
        "--weight-bits",
        "--activation-bits",
        "--rules",
        "--fits",
        "--own-rules",
        "--batches",
        "--batch-size",
        "--output",
        "--data-dir",
    ):
        assert option in out
    text = "".join(out.replace("│", "").split())
    for name in RuleName:
        assert name.value in text


def test_an_interrupt_says_that_nothing_is_kept(tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "collect", stop)
    assert run(tmp_path)[0] == 130
    assert "stopped; the same command starts anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "min-max", "min-max"], "min_max is asked for twice"),
        (["--weight-bits", "0", "--fits", "admm", "--rules"], "fits serve weights"),
        (["--own-rules", "tests.calibration.tiny:array"], "is ndarray, not a quantjax.RangeRule"),
        (["--own-rules", "tests.calibration.tiny:absent"], "tiny:absent cannot be imported"),
        (["--own-rules", "mse"], "mse cannot be imported"),
        (["--output", __file__], "nothing can be written"),
    ],
)
def test_what_cannot_end_well_ends_before_the_work(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "collect", None)  # calling it would be a TypeError
    status = cli.main(["calibrate", MODEL, DATA, "--output", str(tmp_path), *arguments])
    assert status != 0
    assert message in capsys.readouterr().err


def test_a_table_that_is_a_folder_is_found_ahead_of_the_work(tmp_path, capsys):
    (tmp_path / "ranges.csv").mkdir()
    assert run(tmp_path)[0] == 2
    captured = capsys.readouterr()
    assert "nothing can be written" in captured.err
    assert "observing" not in captured.out


def test_a_folder_of_pictures_that_is_none_is_found_ahead_of_the_work(tmp_path, capsys):
    (tmp_path / "histograms").write_text("a note")
    assert run(tmp_path)[0] == 2
    captured = capsys.readouterr()
    assert "nothing can be written" in captured.err
    assert "observing" not in captured.out
    assert (tmp_path / "histograms").read_text() == "a note"
    assert not (tmp_path / "ranges.csv").exists()


def test_pictures_of_earlier_runs_are_told_from_those_of_this_one(tmp_path, capsys):
    assert run(tmp_path)[0] == 0
    assert "(4 pictures)" in capsys.readouterr().out
    assert run(tmp_path, "--weight-bits", "0")[0] == 0
    assert "(2 pictures; 2 more are of earlier runs)" in capsys.readouterr().out
