"""The scripts' own logic: when an environment still fits, and how constraints are merged."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import environment, merge_constraints

ROOT = Path(__file__).resolve().parents[1]
SHELL = sorted(
    path
    for path in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]
    if path.is_file() and path.suffix in ("", ".sh")
)
PROJECT = """
[project]
name = "quantjax"
[project.optional-dependencies]
experiments = ["rich>=13"]
test = ["pytest>=8", "quantjax[experiments]"]
notebooks = ["nbclient"]
dev = ["ruff", "quantjax[test, notebooks]"]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "constraints.txt").write_text("rich==15.0.0\n")
    return tmp_path


@pytest.fixture
def checked(root: Path, monkeypatch: pytest.MonkeyPatch):
    """`environment.py VERB EXTRA…` on that root, with its stamp."""
    monkeypatch.setattr(environment, "ROOT", root)
    return lambda verb, *extras: environment.main([verb, str(root / "stamp"), *extras])


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse_and_can_be_run(path: Path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK) == (path.suffix == "")


def test_closure_follows_extras_of_extras(root: Path):
    implies = environment.implied(root)
    assert environment.closure({"dev"}, implies) == {"dev", "test", "notebooks", "experiments"}
    assert environment.closure({"experiments"}, implies) == {"experiments"}
    assert environment.closure(set(), implies) == set()


def test_no_stamp_fits_nothing(checked):
    assert checked("check") == 1


def test_superset_satisfies_and_subset_does_not(checked):
    assert checked("write", "test") == 0
    assert checked("check", "test") == 0
    assert checked("check", "experiments") == 0
    assert checked("check") == 0
    assert checked("check", "dev") == 1
    assert checked("check", "test", "notebooks") == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_project_asks_for_an_install(checked, root: Path, name: str):
    checked("write", "test")
    with (root / name).open("a") as file:
        file.write("# changed\n")
    assert checked("check", "test") == 1


def test_moved_folder_asks_for_an_install(root: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other")
    for name in ("pyproject.toml", "constraints.txt"):
        (other / name).write_bytes((root / name).read_bytes())
    assert environment.fingerprint(root) != environment.fingerprint(other)


def test_extras_keep_what_is_installed(checked, capsys: pytest.CaptureFixture[str]):
    checked("write", "notebooks")
    checked("extras", "experiments")
    assert capsys.readouterr().out == "experiments,notebooks\n"


def test_unknown_extra_names_the_known_ones(checked):
    assert checked("check", "tests") == 1
    with pytest.raises(SystemExit, match="no extra named tests; there are dev, experiments"):
        checked("extras", "tests")


@pytest.mark.parametrize("text", ["", "one line", "a\nb\nc\n"])
def test_broken_stamp_fits_nothing(checked, root: Path, text: str):
    (root / "stamp").write_text(text)
    assert checked("check") == 1


def test_merge_marks_only_what_differs():
    newer = {"jax": "0.12.0", "rich": "15.0", "new-only": "1"}
    older = {"jax": "0.10.2", "rich": "15.0", "old-only": "2"}
    assert merge_constraints.merge(newer, older) == [
        'jax==0.10.2; python_version < "3.12"',
        'jax==0.12.0; python_version >= "3.12"',
        'new-only==1; python_version >= "3.12"',
        'old-only==2; python_version < "3.12"',
        "rich==15.0",
    ]


def test_pins_normalize_names_and_leave_out_the_project():
    freeze = "# comment\nml_dtypes==0.6.0\n\npip==24.2\n-e git+x#egg=quantjax\nquantjax @ file:x\n"
    assert merge_constraints.pins(freeze) == {"ml-dtypes": "0.6.0"}


def test_pins_refuse_what_nobody_else_can_install():
    with pytest.raises(ValueError, match=r"'mine' is not pinned .* make the environment anew"):
        merge_constraints.pins("rich==15.0\nmine @ file:wheel.whl\n")


def test_constraints_have_a_pin_for_every_requirement():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0] for line in text.splitlines() if "==" in line}
    assert {"jax", "flax", "optax", "pytest", "ruff", "mypy", "pre-commit", "setuptools"} <= pinned
    assert "@" not in text


@pytest.fixture
def handed_to_pytest(tmp_path: Path):
    """What a script hands to pytest: one of a copy of ``scripts/``, where Python prints it."""
    stubs = {"scripts/setup": "true", ".venv/bin/python": "printf '%s\\n' \"$@\""}
    for name in ("scripts/test", "scripts/test_slow", "scripts/common.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name, line in stubs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
    for path in [*tmp_path.glob("scripts/*"), tmp_path / ".venv/bin/python"]:
        path.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "QUANTJAX_VENV"}

    def handed(script: str, *arguments: str) -> list[str]:
        command = [str(tmp_path / "scripts" / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
        lines = done.stdout.splitlines()
        assert lines[:2] == ["-m", "pytest"]
        return lines[lines.index("loadfile") + 1 :]

    return handed


def test_without_arguments_fewer_tests_are_run_and_with_some_those(handed_to_pytest):
    assert handed_to_pytest("test") == ["--thin", "3", "-m", "not slow and not long"]
    assert handed_to_pytest("test", "tests", "-k", "a tie") == ["tests", "-k", "a tie"]
    assert handed_to_pytest("test_slow") == ["-m", "slow"]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'step "tests" scripts/test tests quantjax\n' in ci


@pytest.mark.parametrize("arguments", [["--help"], [], ["check"]])
def test_environment_prints_how_it_is_called(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert environment.main(arguments) == (0 if arguments == ["--help"] else 2)
    assert "environment.py check STAMP" in capsys.readouterr().out


def run(*command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )


def test_a_benchmark_beside_a_peer_says_what_it_needs():
    """Its own help without the peer; in place of a measurement, how to install it."""
    helped = run("scripts/benchmark_peers.py", "--help")
    assert (helped.returncode, "Qwix" in helped.stdout) == (0, True)
    if importlib.util.find_spec("qwix") is None:
        refused = run("scripts/benchmark_peers.py")
        assert (refused.returncode, "pip install --no-deps qwix" in refused.stderr) == (2, True)


def test_nothing_is_measured_without_calibration():
    """Scales of nothing are NaN, whose class is the first: an accuracy of its own."""
    refused = run("scripts/measure_pretrained.py", "--calibration-images", "0")
    assert refused.returncode != 0
    assert "calibration_images is 0" in refused.stderr
    assert "Traceback" not in refused.stderr
