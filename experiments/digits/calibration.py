"""The digits network and its calibration images, for ``quantjax calibrate digits digits``."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from experiments.digits.study import study
from quantjax.calibration import Model

SEED = 0


def model() -> Model:
    """The network of the study's first seed, trained anew; that takes about ten seconds."""
    digits = study()
    return Model(digits.apply, digits.train(SEED, lambda steps: None))


def batches() -> Sequence[jax.Array]:
    """Eight batches of 64 images, of the half that the network was trained on."""
    return study().calibration()
