"""The notebooks run from the first cell to the last, and say what the README says."""

import importlib.machinery
import json
import re
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    """Code cells; lines for the notebook alone, such as ``%pip``, are left out."""
    cells = json.loads(path.read_text())["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return [re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source) for source in sources]


@pytest.fixture(scope="module")
def executed():
    """``path -> names`` after all cells."""
    matplotlib.use("Agg")
    done: dict[Path, dict] = {}

    def run(path: Path) -> dict:
        if path not in done:
            names: dict = {"__name__": "notebook"}
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                for number, source in enumerate(code_of(path)):
                    exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
            done[path] = names
        return done[path]

    yield run
    plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*non-interactive:UserWarning")
def test_it_runs_from_the_first_cell_to_the_last(executed, path):
    assert len(executed(path)) > 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_clean_and_opens_in_colab(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    (install,) = re.findall(r'%pip install -q "(.*)"', "".join(notebook["cells"][1]["source"]))
    assert install == "./{CLONE}[experiments]"  # a path: `name @ path` is none to pip
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("is_there", [None, False, True], ids=["nothing", "clone", "installed"])
def test_a_clone_beside_the_notebook_is_no_package(path, is_there, tmp_path, monkeypatch):
    """Its folder has the package's name, and would be found as an empty namespace."""
    if is_there is not None:
        (tmp_path / "quantjax").mkdir()
    if is_there:
        (tmp_path / "quantjax" / "__init__.py").touch()
    find = importlib.machinery.PathFinder.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find(name, [str(tmp_path)]))
    first = "".join(json.loads(path.read_text())["cells"][1]["source"])
    installs: list[str] = []
    source = re.sub(r"(?m)^(\s*)%(.*)$", r"\1installs.append('pip')", first)
    exec(compile(source, path.name, "exec"), {"installs": installs})
    assert len(installs) == (not is_there)


@pytest.mark.filterwarnings("ignore:.*non-interactive:UserWarning")
def test_training_is_that_of_the_readme_and_ends_where_it_says(executed):
    path = next(path for path in NOTEBOOKS if path.stem == "qat")
    names = executed(path)
    source = "\n".join(code_of(path))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for block in blocks:
        if "tuned = fit" in block or "pruned = fit" in block:
            lines = [line for line in block.splitlines() if line.strip()]
            assert [line for line in lines if line not in source] == []
    figures = {name: float(share) for name, share in names["figures"].items()}
    assert figures["calibrated"] + 0.05 < figures["trained"] < figures["float"]
    grid = names["grid"].mean(axis=1)
    assert grid[0] > grid[2] > 0.85  # four bits, two bits
    assert bool((names["executed"] == names["simulated"]).all())
