"""Seeds whose models are not alike are told apart ahead of their cells."""

import dataclasses

import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.sweep import Execution, Grid, ResultStore, run_sweep
from quantjax.sweep.alike import check_alike, shapes_of
from tests.refused import refused
from tests.sweep.tiny import Calls, tiny_study

GRID = Grid(weight_bits=(8,), activation_bits=(8,), rules=(qj.ranges.MIN_MAX,), seeds=(0, 1))


def widened(seed, on_step):
    """One hidden unit more for each seed."""
    params = tiny_study().train(seed, on_step)
    wide = jnp.ones((1, 3), jnp.float32)
    return {
        "first": jnp.concatenate([params["first"], *[jnp.ones((6, 1))] * seed], axis=1),
        "second": jnp.concatenate([params["second"], *[wide] * seed], axis=0),
    }


def test_a_seed_of_another_shape_is_named_with_its_leaf(tmp_path):
    """It was a TypeError of JAX."""
    study = dataclasses.replace(tiny_study(), train=widened)
    with refused(
        errors.SweepError,
        "the parameters of seed 1 are not like those of seed 0",
        "where: study tiny, train, first",
        "it is 6x9 float32, and was 6x8 float32",
    ):
        run_sweep(study, GRID, tmp_path, execution=Execution.MAP)
    assert {row.seed for row in ResultStore(tmp_path / "results.csv").rows()} == {0}


def test_what_the_error_says_works(tmp_path):
    study = dataclasses.replace(tiny_study(), train=widened)
    with pytest.raises(errors.SweepError) as caught:
        run_sweep(study, GRID, tmp_path, execution=Execution.MAP)
    assert caught.value.fix.endswith("a sweep of its own with seeds=(1,)")
    assert (
        run_sweep(
            study, dataclasses.replace(GRID, seeds=(1,)), tmp_path, execution=Execution.MAP
        ).trained
        == 0
    )
    assert len(run_sweep(study, GRID, tmp_path, execution=Execution.MAP).rows) == 4


W = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("first", "other", "where", "why"),
    [
        ({"w": W}, {"w": W.T}, "train, w", "it is 3x2 float32, and was 2x3 float32"),
        ({"w": W}, {"w": W.astype(jnp.bfloat16)}, "train, w", "2x3 bfloat16, and was 2x3 float32"),
        ({"w": W}, {"w": W, "b": W}, "train, b", "it is 2x3 float32, and was not there"),
        ({"a": {"w": W}}, {"a": {"v": W}}, "train, a/w", "it is not there, and was 2x3"),
        ({"a": [W, W]}, {"a": [W]}, "train, a/1", "it is not there"),
        ({"0": W}, [W], "train, the tree", "its containers are others"),
    ],
    ids=["shape", "dtype", "more", "name", "fewer", "container"],
)
def test_the_first_leaf_that_differs_is_named(first, other, where, why):
    study = tiny_study()
    check_alike(study, (0, shapes_of(first)), 7, first)
    with refused(errors.SweepError, "seed 7", where, why, "seeds=(7,)"):
        check_alike(study, (0, shapes_of(first)), 7, other)


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_of_nothing_is_refused_ahead_of_training(tmp_path, budget):
    calls = Calls()
    study = tiny_study(calls)
    with refused(errors.SweepError, f"a memory budget of {budget} bytes", "1 << 30"):
        run_sweep(study, GRID, tmp_path, memory_budget_bytes=budget)
    assert calls.trained == []
