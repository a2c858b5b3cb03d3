"""The README's code runs as it stands, and its commands exist."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def namespace():
    """Names of the long example, which the short ones build on."""
    complete = next(block for block in BLOCKS if "class MLP" in block)
    names: dict = {"__name__": "readme"}
    exec(compile(complete, "README.md", "exec"), names)
    return names


def test_another_grid_of_the_same_size_is_not_traced_again(namespace):
    names = dict(namespace)
    traces, error = [], names["error"]
    names["error"] = lambda *cell: traces.append(1) or error(*cell)
    complete = next(block for block in BLOCKS if "class MLP" in block)
    call = complete[complete.index("grid = ") :]
    exec(compile(call, "README.md", "exec"), names)
    more = [names[axis] for axis in ("wb", "ab", "rule", "state", "params", "x")]
    np.testing.assert_array_equal(
        names["grid"](more[0][::-1], more[1][::-1], more[2][::-1], *more[3:]), names["errors"][::-1]
    )
    assert len(traces) == 1


def test_the_grid_of_the_example_has_98_cells(namespace):
    assert namespace["errors"].shape == (98,)
    assert np.all(np.isfinite(namespace["errors"]))


def test_more_bits_mean_less_error(namespace):
    error = {
        (int(w), int(a), int(r)): float(e)
        for w, a, r, e in zip(
            namespace["wb"], namespace["ab"], namespace["rule"], namespace["errors"], strict=True
        )
    }
    assert error[2, 2, 0] > 10 * error[4, 4, 0] > 100 * error[8, 8, 0]


@pytest.fixture(scope="module")
def after(namespace):
    """``index -> names`` after a block, run behind the long example and those between the two."""
    complete = next(i for i, block in enumerate(BLOCKS) if "class MLP" in block)
    done: dict[int, dict] = {complete: namespace}

    def run(index: int) -> dict:
        if index not in done:
            names = dict(run(index - 1) if index > complete else namespace)
            with jax.numpy_dtype_promotion("standard"):  # as users have it; optax needs it
                exec(compile(BLOCKS[index], "README.md", "exec"), names)
            done[index] = names
        return done[index]

    return run


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_every_block_runs(after, index):
    names = after(index)
    if "y" in names:
        assert names["y"].shape == (32, 10)
    if "out" in names:
        assert names["out"].shape == (32, 32)
    if "last_in_8_bits" in names:
        plan = names["qj"].plan(names["last_in_8_bits"], names["table"])
        assert "int4/group16" in str(plan)


def test_training_gains_what_the_text_says(after):
    index = next(i for i, block in enumerate(BLOCKS) if "tuned = fit" in block)
    names = after(index)
    f, test = names["f"], names["test"]
    logits = f(names["params"], names["images"][test])
    in_float = float((logits.argmax(-1) == names["labels"][test]).mean())
    before = float(names["accuracy"]((names["params"], names["qstate"])))
    tuned = float(names["accuracy"](names["tuned"]))
    assert before < tuned - 0.05 < in_float
    text = README[README.index("On the 597 digits") :]
    told = [float(number) / 100 for number in re.findall(r"([0-9.]+) %", text)[:3]]
    # Sums differ in the last place from machine to machine, and training goes its own way.
    np.testing.assert_allclose([in_float, before, tuned], told, atol=0.03)


def test_a_teacher_and_a_mask_are_two_lines_more(after):
    index = next(i for i, block in enumerate(BLOCKS) if "pruned = fit" in block)
    names = after(index)
    qj = names["qj"]
    params, qstate = names["pruned"]
    masked = qj.apply_mask(params, names["mask"])
    assert abs(float(qj.pruning.sparsity_of(names["mask"])) - 0.5) < 0.01
    assert float(names["accuracy"]((masked, qstate))) > 0.87
    lines = [line for line in BLOCKS[index - 1].splitlines() if line.strip()]
    assert len(lines) <= 42


def test_the_gradient_of_the_example_is_close(after):
    names = after(len(BLOCKS) - 1)
    exact = names["gradient"](names["params"], *names["batch"])
    for got, want in zip(
        jax.tree.leaves(names["int8_gradient"]), jax.tree.leaves(exact), strict=True
    ):
        cosine = (got * want).sum() / np.sqrt((got**2).sum() * (want**2).sum())
        assert 0.9 < cosine < 0.999999


def test_the_first_example_has_at_most_five_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 5


def test_the_commands_and_files_that_it_names_exist():
    for script in re.findall(r"\./(scripts/\w+)", README):
        assert (ROOT / script).stat().st_mode & 0o111, script
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_options_that_it_names_exist():
    source = "".join(path.read_text() for path in (ROOT / "quantjax" / "cli").glob("*.py"))
    for option in re.findall(r"--([a-z-]+)", "".join(re.findall(r"```sh\n(.*?)```", README, re.S))):
        assert option == "help" or f"    {option.replace('-', '_')}:" in source, option
