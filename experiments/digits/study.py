"""The digits study: what ``./scripts/sweep`` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

import quantjax as qj
from experiments.digits.data import load
from experiments.digits.model import DigitsCNN
from experiments.digits.train import Training, train
from quantjax.sweep import Study

CALIBRATION_BATCHES = 8
CALIBRATION_BATCH = 64


def study(training: Training = Training(), model: DigitsCNN = DigitsCNN()) -> Study:  # noqa: B008
    """The small CNN on handwritten digits, every product quantized.

    Calibrates with images of the training half; evaluates on the 900 held out.
    """
    data = load()

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply(variables, images))

    def trained(seed: int, on_step: Callable[[int], None]) -> Any:
        return train(model, data, training, seed, on_step)

    def calibration() -> Sequence[jax.Array]:
        size = CALIBRATION_BATCH
        starts = range(0, CALIBRATION_BATCHES * size, size)
        return [jnp.asarray(data.train_images[start : start + size]) for start in starts]

    def test() -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(data.test_images), jnp.asarray(data.test_labels)

    return Study(
        name="digits",
        apply=apply,
        train=trained,
        train_steps=training.epochs,
        calibration=calibration,
        test=test,
        policy=qj.uniform_policy(weight_bits=8, activation_bits=8),
        identity=f"{data.digest} {model} {training} {CALIBRATION_BATCHES}x{CALIBRATION_BATCH}",
    )
