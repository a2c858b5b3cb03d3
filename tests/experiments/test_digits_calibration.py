"""The digits as the command line's model and data."""

import jax
import numpy as np

from experiments.digits import calibration
from experiments.digits.data import load
from experiments.digits.study import study
from experiments.digits.train import Training
from quantjax.calibration import calibration_report, collect
from quantjax.policy import uniform_policy
from quantjax.ranges import MIN_MAX


def test_the_model_is_the_study_s_first_one_and_is_calibrated_on_training_images(monkeypatch):
    # One epoch instead of sixty: the same code, in a second.
    monkeypatch.setattr(calibration, "study", lambda: study(Training(epochs=1)))
    model, batches = calibration.model(), calibration.batches()
    again = study(Training(epochs=1)).train(0, lambda steps: None)
    jax.tree.map(np.testing.assert_array_equal, model.params, again)
    seen = np.concatenate(batches)
    np.testing.assert_array_equal(seen, load().train_images[: len(seen)])
    collected = collect(model, [(batch,) for batch in batches], uniform_policy())
    report = calibration_report(collected.plan, collected.state, model.params, rules=[MIN_MAX])
    assert [one.operand for one in report] == ["activation", "weight"] * 4
    first = report["params/Conv_0/kernel", "activation"]
    assert (first.low, first.high, first.number) == (0.0, 1.0, seen.size)
    assert all(one.best.sqnr > 30.0 for one in report)
