"""What the benchmark scripts share."""

import doctest
import json
from importlib.metadata import version

import jax
import pytest

from experiments import benchmark


def test_doctests():
    assert doctest.testmod(benchmark).failed == 0


def test_a_report_says_what_made_it_and_is_written_where_asked(tmp_path):
    report = {**benchmark.made_by(), "rounds": 3}
    assert report["jax"] == version("jax")
    assert report["backend"] == jax.default_backend()
    benchmark.written(report, tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report
    benchmark.written(report, None)


@pytest.mark.parametrize("rounds", ["0", "-1"])
def test_no_round_measures_nothing(rounds, capsys):
    with pytest.raises(SystemExit):
        benchmark.options("Speed.", rounds=7).parse_args([f"--rounds={rounds}"])
    assert f"{rounds} rounds measure nothing" in capsys.readouterr().err


def test_scripts_without_rounds_have_no_such_option():
    assert vars(benchmark.options("Memory.").parse_args([])) == {"output": None}
    assert benchmark.options("Speed.", rounds=7).parse_args([]).rounds == 7
