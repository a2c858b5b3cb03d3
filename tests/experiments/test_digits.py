"""The digits study holds what the README promises; trains three small networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments.digits.data import HELD_OUT, load
from experiments.digits.model import DigitsCNN
from experiments.digits.study import study
from experiments.digits.train import Training, train
from quantjax.sweep import FLOAT_CELL, Cell, Grid, run_sweep, summarize

SEEDS = (0, 1, 2)
BITS = (2, 3, 4, 8)
GRID = Grid(
    weight_bits=BITS,
    activation_bits=BITS,
    rules=(qj.ranges.MIN_MAX, qj.ranges.MOVING_AVERAGE),
    seeds=SEEDS,
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return run_sweep(study(), GRID, tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def means(swept):
    return {summary.cell: summary.mean for summary in summarize(swept.rows)}


def test_half_of_the_digits_are_held_out():
    digits = load()
    assert len(digits.test_labels) == HELD_OUT >= len(digits.train_labels)
    assert len(digits.test_labels) + len(digits.train_labels) == 1797
    images = np.concatenate([digits.train_images, digits.test_images]).reshape(1797, -1)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_no_training_image_is_among_the_held_out():
    """By position, not by value: a few digits of the set are equal to another one."""
    from sklearn.datasets import load_digits

    digits = load()
    everything = load_digits().images.reshape(1797, -1) / 16.0
    split = np.concatenate([digits.train_images, digits.test_images]).reshape(1797, -1)
    np.testing.assert_array_equal(
        everything[np.lexsort(everything.T)].astype(np.float32), split[np.lexsort(split.T)]
    )


def test_both_halves_have_all_classes_in_equal_shares():
    digits = load()
    shares = [
        np.bincount(labels, minlength=10) / len(labels)
        for labels in (digits.train_labels, digits.test_labels)
    ]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.005)


def test_every_cell_was_evaluated_on_all_held_out_digits(swept):
    assert len(swept.rows) == (1 + 2 * 16) * 3
    assert {row.total for row in swept.rows} == {HELD_OUT}


def test_float_accuracy(means):
    assert means[FLOAT_CELL] >= 0.975


@pytest.mark.parametrize("rule", ["min_max", "moving_average"])
def test_eight_bits_lose_at_most_half_a_point(means, rule):
    assert means[FLOAT_CELL] - means[Cell(8, 8, rule)] <= 0.005


@pytest.mark.parametrize("rule", ["min_max", "moving_average"])
def test_two_bits_lose_at_least_ten_points(means, rule):
    assert means[Cell(8, 8, rule)] - means[Cell(2, 2, rule)] >= 0.10


@pytest.mark.parametrize("rule", ["min_max", "moving_average"])
def test_more_weight_bits_help_on_the_whole(means, rule):
    curve = [means[Cell(bits, 8, rule)] for bits in (2, 3, 4, 8)]
    assert curve == sorted(curve) or max(np.diff(curve) * -1) < 0.005


def test_the_float_cell_equals_the_float_model(swept, tmp_path):
    digits, network = load(), study()
    params = network.train(SEEDS[0], lambda steps: None)
    logits = jax.jit(network.apply)(params, jnp.asarray(digits.test_images))
    correct = int(np.sum(np.argmax(logits, axis=-1) == digits.test_labels))
    row = next(r for r in swept.rows if r.seed == SEEDS[0] and r.cell == FLOAT_CELL)
    assert row.correct == correct


def test_training_repeats_itself_and_depends_on_the_seed():
    short = Training(epochs=2)
    runs = [train(DigitsCNN(), load(), short, seed, lambda steps: None) for seed in (7, 7, 8)]
    first, second, other = [jax.tree.leaves(run) for run in runs]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_identity_follows_the_training():
    assert study().fingerprint() == study().fingerprint()
    assert study(Training(epochs=3)).fingerprint() != study().fingerprint()
    assert study(model=DigitsCNN(channels=(8, 8))).fingerprint() != study().fingerprint()
