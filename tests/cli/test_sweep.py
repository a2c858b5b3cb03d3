"""``quantjax sweep`` and ``quantjax studies``, as a user types them."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantjax import cli, errors
from quantjax.cli import named, sweep

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests.sweep.tiny:tiny_study"
SMALL = ["--weight-bits", "2", "8", "--activation-bits", "8", "--seeds", "0", "1"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_sweep_prints_a_table_and_says_where_the_files_are(tmp_path, capsys):
    arguments = ["sweep", "--study", TINY, *SMALL, "--output", str(tmp_path)]
    assert cli.main([*arguments, "--rules", "min-max"]) == 0
    out = capsys.readouterr().out
    assert "float  " in out
    assert "min_max  A8" in out
    assert "moving_average" not in out
    assert "6 of 6 cells computed, 2 models trained" in out
    for name in ("results.csv", "accuracy_vs_bits.png"):
        assert (tmp_path / "tiny" / name).stat().st_size > 0
        assert name in out
    assert cli.main([*arguments, "--rules", "min-max"]) == 0
    assert "0 of 6 cells computed, 0 models trained" in capsys.readouterr().out


def test_every_named_range_rule_can_be_swept(tmp_path, capsys):
    arguments = ["sweep", "--study", TINY, *SMALL, "--output", str(tmp_path)]
    assert cli.main([*arguments, "--rules", "sigma-3", "aciq-gaussian"]) == 0
    out = capsys.readouterr().out
    assert "sigma(3)  A8" in out
    assert "aciq_gaussian  A8" in out
    assert "min_max" not in out


def test_rules_of_ones_own_stand_beside_the_librarys(tmp_path, capsys):
    arguments = ["sweep", "--study", TINY, *SMALL, "--output", str(tmp_path), "--rules", "min-max"]
    own = ["tests.calibration.tiny:HALF", "tests.calibration.tiny:own_rule"]
    assert cli.main([*arguments, "--own-rules", *own]) == 0
    out = capsys.readouterr().out
    for name in ("min_max", "half", "made"):
        assert f"{name}  A8" in out
    assert cli.main([*arguments[:-2], "--rules", "--own-rules", own[0]]) == 0
    assert "0 of 6 cells computed" in capsys.readouterr().out


def test_progress_bars_have_the_time_left(tmp_path, capsys):
    arguments = ["sweep", "--study", TINY, *SMALL, "--output", str(tmp_path)]
    assert cli.main([*arguments, "--execution", "map"]) == 0
    out = capsys.readouterr().out
    assert "training seed 0" in out
    assert "evaluating seed 1" in out
    assert "left" in out
    assert "tried" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study", "digitz"], "no study is called digitz"),
        (["--own-rules", "tests.calibration.tiny:OWN_FIT"], "own_fit is no range rule"),
        (["--own-rules", "tests.calibration.tiny:array"], "is ndarray, not a quantjax.RangeRule"),
        (["--own-rules", *["tests.calibration.tiny:HALF"] * 2], "the axis rules repeats a value"),
        (["--study", "tests.sweep.tiny:absent"], "cannot be imported"),
        (["--study", "no.such.module:x"], "cannot be imported"),
        (["--study", "tests.sweep.tiny:Calls"], "is Calls, not a quantjax.sweep.Study"),
        (["--study", TINY, "--weight-bits", "9"], "weight widths [9] are outside the format"),
        (["--study", TINY, "--seeds", "1", "1"], "repeats"),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(tmp_path, capsys, arguments, message):
    assert cli.main(["sweep", "--output", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ")
    assert message in captured
    assert "try:" in captured


@pytest.mark.parametrize("budget", ["0", "-5"])
def test_a_budget_of_nothing_is_refused_at_once_in_the_commands_own_words(capsys, budget):
    """Behind the training it was, with the advice to raise memory_budget_bytes."""
    assert cli.main(["sweep", "--study", "no.such:study", "--memory-budget-mib", budget]) == 2
    captured = capsys.readouterr().err
    assert f"a memory budget of {budget} MiB\n  where: --memory-budget-mib" in captured
    assert "memory_budget_bytes" not in captured


@pytest.mark.parametrize("value", ["two", "4.5"])
def test_options_are_typed(capsys, value):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", "--weight-bits", value])
    assert stop.value.code == 2
    assert "INT" in capsys.readouterr().err


def test_studies_are_listed(capsys):
    assert cli.main(["studies"]) == 0
    assert "digits  experiments.digits.study:study" in capsys.readouterr().out


def test_the_registered_study_is_found():
    assert named.find_study("digits").name == "digits"


def test_a_study_object_works_as_well_as_a_function(monkeypatch):
    import tests.sweep.tiny as tiny

    monkeypatch.setattr(tiny, "ready", tiny.tiny_study(), raising=False)
    assert named.find_study("tests.sweep.tiny:ready").name == "tiny"
    with pytest.raises(errors.UnknownNameError):
        named.find_study("tests.sweep.tiny:np")


def test_an_interrupt_says_that_nothing_is_lost(tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_sweep", stop)
    assert cli.main(["sweep", "--study", TINY, "--output", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['tyro'] = None\n"
        "from quantjax.cli import main\n"
        "sys.exit(main(['sweep']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    assert 'pip install "quantjax[experiments]"' in ended.stderr


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in (
        "--weight-bits",
        "--rules",
        "--own-rules",
        "--seeds",
        "--memory-budget-mib",
        "--execution",
    ):
        assert option in out
    assert "min-max" in out
