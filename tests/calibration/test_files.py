"""The table, the CSV file and the names of pictures say what the report says."""

import csv
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.calibration import (
    FITS,
    RULES,
    FitName,
    Model,
    RangeRow,
    RuleName,
    calibration_report,
    collect,
    files,
    rows,
    write_pictures,
    write_ranges,
)
from quantjax.calibration.results import percent
from quantjax.ranges import MIN_MAX, RangeRule, percentile
from tests.calibration import tiny


@pytest.fixture(scope="module")
def report():
    model, _, collected = tiny.seen("relu", bits=3)
    return calibration_report(
        collected.plan, collected.state, model.params, rules=[MIN_MAX, percentile(0.9)]
    )


def test_each_operand_prints_as_a_block_with_the_best_rule_starred(report):
    text = str(report)
    blocks = text.split("\n\n")
    assert len(blocks) == 2
    activation, weight = (block.splitlines() for block in blocks)
    assert activation[0] == (
        f"w activation: uint3/tensor, 8,192 values, from 0 to {report['w', 'activation'].high:.4g}"
    )
    assert activation[1].split() == ["rule", "low", "high", "saturated", "SQNR", "dB"]
    assert activation[2].split()[:3] == ["min_max", "0", activation[0].split()[-1]]
    assert weight[0].startswith("w weight: int3/channel, 192 values in 12 groups, from -")
    assert weight[1].startswith("rule             low, median  high, median  saturated  SQNR dB")
    for operand, block in zip(report, (activation, weight), strict=True):
        starred = [line for line in block if line.endswith("*")]
        assert len(starred) == 1
        assert starred[0].startswith(operand.best.rule)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_lines_stay_within_the_page(report):
    long = dataclasses.replace(report.operands[0], site="params/" + 8 * "encoder_layer/" + "kernel")
    assert all(len(line) <= 120 for line in str(long).splitlines()[1:])


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.104, "10.4 %"),
        (0.12, "12 %"),
        (0.99999, "100 %"),
        (0.0099999, "1 %"),
        (2.5e-5, "0.0025 %"),
        (1.0 / 3.0, "33.3 %"),
        (1.2345e-9, "0.000000123 %"),
    ],
)
def test_shares_have_three_digits(share, text):
    assert percent(share) == text


def test_every_figure_is_in_the_file(report, tmp_path):
    path = tmp_path / "new" / "ranges.csv"
    write_ranges(report, path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == RangeRow._fields
    assert len(lines) == 4
    for line, row in zip(lines, rows(report), strict=True):
        operand = report[line["site"], line["operand"]]
        found = operand[line["rule"]]
        assert line["quantizer"] == operand.quantizer
        assert (int(line["bits"]), int(line["groups"])) == (3, operand.groups)
        assert int(line["values"]) == operand.number
        assert line["layer"] == ""
        # Every digit: what is read is what was computed.
        assert float(line["seen_low"]) == operand.low
        assert float(line["seen_high"]) == operand.high
        assert float(line["sqnr_db"]) == found.sqnr
        assert float(line["saturated"]) == found.saturated
        for end in ("low", "high", "clip_low", "clip_high"):
            assert np.float32(line[end]) == np.median(getattr(found, end))
        assert float(line["widest_low"]) == found.low.min()
        assert float(line["widest_high"]) == found.high.max()
        for name, value in row._asdict().items():
            assert line[name] == str(value)


def test_names_are_written_where_the_locale_lacks_their_letters(tmp_path):
    code = (
        "import dataclasses, pathlib, sys\n"
        "from quantjax.calibration import CalibrationReport, write_ranges\n"
        "from tests.calibration.test_plot import made\n"
        "one = dataclasses.replace(made(0.5), site='gr\\xf6\\xdfe')\n"
        "write_ranges(CalibrationReport((one,)), pathlib.Path(sys.argv[1]))\n"
    )
    path = tmp_path / "ranges.csv"
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, **c_locale},
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )
    assert path.read_text(encoding="utf-8").splitlines()[1].startswith("größe,")


def test_infinite_ratios_are_written_as_such(tmp_path):
    model = Model(tiny.product, {"w": jnp.ones((4, 2))})
    collected = collect(model, [(np.ones((3, 4), np.float32),)], qj.uniform_policy())
    report = calibration_report(collected.plan, collected.state, model.params, rules=[MIN_MAX])
    write_ranges(report, tmp_path / "ranges.csv")
    last = (tmp_path / "ranges.csv").read_text().splitlines()[1].split(",")[-1]
    assert math.isinf(float(last))


def test_layers_have_lines_and_pictures_of_their_own(tmp_path):
    def f(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params["a"]["w"])[0]

    params = {"a": {"w": jnp.asarray(tiny.draws("normal", 2, 4, 4))}}
    only = qj.uniform_policy(activation_bits=None)
    collected = collect(Model(f, params), [(tiny.draws("normal", 8, 4),)], only)
    report = calibration_report(collected.plan, collected.state, params, rules=[MIN_MAX])
    assert [row.layer for row in rows(report)] == ["0", "1"]
    told = []
    paths = write_pictures(report, tmp_path / "new", on_picture=told.append)
    assert [path.name for path in paths] == ["a.w_0_weight.png", "a.w_1_weight.png"]
    assert all(path.stat().st_size > 0 for path in paths)
    assert told == [1, 1]


def test_sites_whose_names_are_one_file_name_have_two(report, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "plot_ranges", lambda operand, path: None)
    sites = ("a b", "a-b", "a/b", "a.b", "c#1")
    twins = dataclasses.replace(
        report,
        operands=tuple(dataclasses.replace(report.operands[0], site=site) for site in sites),
    )
    names = [path.name for path in write_pictures(twins, tmp_path)]
    assert names == [
        "a-b_activation.png",
        "a-b_activation~1.png",
        "a.b_activation.png",
        "a.b_activation~1.png",
        "c-1_activation.png",
    ]


def test_every_named_rule_is_there_once():
    assert list(RULES) == list(RuleName)
    assert list(FITS) == list(FitName)
    names = [rule.name for rule in (*RULES.values(), *FITS.values())]
    assert len(set(names)) == len(names)
    known = [value for value in vars(qj.ranges).values() if isinstance(value, RangeRule)]
    assert {id(rule) for rule in known} <= {id(rule) for rule in RULES.values()}


@pytest.mark.parametrize("letter", ["block_", "层"])
def test_names_longer_than_a_file_s_are_cut_and_told_apart(report, letter, tmp_path):
    """A traceback came behind all the work."""
    sites = [letter * 150 + end for end in ("a", "b")]
    long = [dataclasses.replace(report.operands[0], site=site) for site in sites]
    names = [files.picture_name(one) for one in long]
    assert len(set(names)) == 2
    for name in names:
        assert len(f"{name}~12.png".encode()) <= 255
        assert name.startswith(letter)
        (tmp_path / f"{name}.png").touch()
