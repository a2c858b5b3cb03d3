"""What was observed goes to disk and comes back: more batches, and ranges, go on from there."""

import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.storage import load_params, save_params
from tests import models
from tests.refused import refused

CASE = models.cnn()
PLAN = models.planned(CASE, qj.uniform_policy())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("bins", [2048, 64, None])
def test_a_state_comes_back_bit_for_bit(tmp_path, bins):
    observe = jax.jit(qj.observe(CASE.f, PLAN))
    _, state = observe(qj.init(PLAN, histogram_bins=bins), CASE.params, CASE.x)
    save_params(tmp_path / "seen", state)
    again = load_params(tmp_path / "seen")
    assert jax.tree.structure(again) == jax.tree.structure(state)
    models.assert_same_bits(again, state)
    more = [observe(one, CASE.params, 2.0 * CASE.x)[1] for one in (again, state)]
    models.assert_same_bits(*more)
    rule = qj.ranges.MSE if bins else qj.ranges.MOVING_AVERAGE
    models.assert_same_bits(
        *(qj.calibrate(PLAN, one, CASE.params, activation_rule=rule) for one in more)
    )


def test_layers_have_their_statistics(tmp_path):
    stacked = models.Case(
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0],
        {"w": models.normal(0, 3, 4, 4)},
        models.normal(1, 5, 4),
    )
    plan = models.planned(stacked, qj.uniform_policy())
    _, state = qj.observe(stacked.f, plan)(qj.init(plan), stacked.params, stacked.x)
    save_params(tmp_path / "seen", {"state": state, "note": jnp.ones(2)})
    models.assert_same_bits(load_params(tmp_path / "seen")["state"], state)


def test_a_record_with_other_fields_is_refused(tmp_path):
    _, state = qj.observe(CASE.f, PLAN)(qj.init(PLAN), CASE.params, CASE.x)
    save_params(tmp_path / "seen", state)
    document = tmp_path / "seen" / "quantjax.json"
    document.write_text(document.read_text().replace('"magnitude"', '"length"'))
    with refused(errors.StorageError, "keys mean, variance, magnitude", "found length"):
        load_params(tmp_path / "seen")
