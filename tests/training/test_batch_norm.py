"""Running statistics that are estimated anew are the exact mean of those of the batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.training import reestimate
from tests import models
from tests.refused import refused


def affine(momentum):
    """A running mean and variance with a momentum, as every library has it."""

    def update(running, batch):
        seen = {"mean": jnp.mean(batch, axis=0), "var": jnp.var(batch, axis=0)}
        return jax.tree.map(lambda r, b: momentum * r + (1.0 - momentum) * b, running, seen)

    return update


@given(
    momentum=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 0.999]),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_the_mean_of_batches_whatever_the_momentum(momentum, offset, seed):
    draw = np.random.default_rng(seed)
    batches = [np.float32(draw.normal(size=(5, 3)) + offset) for _ in range(4)]
    start = {"mean": jnp.asarray(draw.normal(size=3), jnp.float32), "var": jnp.full(3, 7.0)}
    found = reestimate(affine(momentum), start, batches)
    means = np.mean([np.float64(b).mean(0) for b in batches], axis=0)
    tolerance = 1e-6 + 2e-7 / (1.0 - momentum)
    assert_allclose(found["mean"], means, rtol=tolerance, atol=1e-6)
    if offset != 1e4:  # float32 loses the variance about so large a mean
        variances = np.mean([np.float64(b).var(0) for b in batches], axis=0)
        assert_allclose(found["var"], variances, rtol=tolerance + 1e-5)


def test_where_it_starts_does_not_matter():
    batches = [models.normal(i, 4, 3) for i in range(3)]
    starts = [{"mean": jnp.full(3, v), "var": jnp.full(3, v)} for v in (0.0, 1.0, -1e6, np.nan)]
    found = [reestimate(affine(0.9), start, batches) for start in starts]
    for other in found[1:]:
        models.assert_same_bits(found[0], other)


def test_each_statistic_has_a_momentum_of_its_own():
    momenta = {"mean": 0.5, "var": jnp.array([0.25, 0.75, 0.0])}

    def update(running, batch):
        seen = {"mean": jnp.mean(batch, axis=0), "var": jnp.var(batch, axis=0)}
        return {k: momenta[k] * running[k] + (1.0 - momenta[k]) * seen[k] for k in running}

    batches = [models.normal(i, 4, 3) for i in range(3)]
    found = reestimate(update, {"mean": jnp.zeros(3), "var": jnp.zeros(3)}, iter(batches))
    want = np.mean([np.var(b, axis=0) for b in batches], axis=0)
    assert_allclose(found["var"], want, rtol=1e-6)


def test_each_batch_is_passed_once_and_the_first_twice():
    seen = []

    def update(running, batch):
        seen.append(float(batch[0]))
        return {"mean": 0.5 * running["mean"] + 0.5 * batch}

    reestimate(update, {"mean": jnp.zeros(1)}, [jnp.full(1, float(i)) for i in range(4)])
    assert seen == [0.0, 0.0, 1.0, 2.0, 3.0]


def test_other_leaves_stay():
    def update(running, batch):
        mean = 0.5 * running["mean"] + 0.5 * jnp.mean(batch, axis=0)
        return {"mean": mean, "count": running["count"] + 1}

    start = {"mean": jnp.zeros(3), "count": jnp.int32(7)}
    found = reestimate(update, start, [models.normal(0, 4, 3)])
    assert int(found["count"]) == 7
    assert found["count"].dtype == jnp.int32


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_in_half_precision_are_not_off_by_their_momentum(momentum, dtype):
    """0.99 is 0.98828 in bfloat16: the mean was 15 percent low."""

    def update(running, batch):
        return {"mean": momentum * running["mean"] + (1.0 - momentum) * jnp.mean(batch, axis=0)}

    found = reestimate(update, {"mean": jnp.zeros(1, dtype)}, [jnp.full((2, 1), 3.0)] * 2)
    assert found["mean"].dtype == dtype
    assert_allclose(found["mean"].astype(jnp.float32), [3.0], rtol=2e-3)


def test_an_update_that_rounds_its_statistics_is_refused():
    def update(running, batch):
        return {"mean": (0.9 * running["mean"] + 0.1 * batch.mean(0)).astype(jnp.bfloat16)}

    with refused(errors.TrainingError, "rounds the running statistic mean to bfloat16"):
        reestimate(update, {"mean": jnp.zeros(3, jnp.bfloat16)}, [models.normal(0, 4, 3)])


def test_half_precision():
    def update(running, batch):
        half = jnp.asarray(0.5, running["mean"].dtype)
        return {"mean": half * running["mean"] + half * batch.mean(0).astype(half.dtype)}

    batches = [models.normal(i, 4, 3) for i in range(3)]
    for dtype in (jnp.bfloat16, jnp.float16):
        found = reestimate(update, {"mean": jnp.zeros(3, dtype)}, batches)["mean"]
        assert found.dtype == dtype
        want = np.mean([np.mean(b, axis=0) for b in batches], axis=0)
        assert_allclose(found.astype(jnp.float32), want, atol=0.02)
        # Summed in float32: bfloat16 would stay at 256.
        many = reestimate(update, {"mean": jnp.zeros(3, dtype)}, [jnp.full((2, 3), 2.0)] * 300)
        assert_array_equal(many["mean"].astype(jnp.float32), jnp.full(3, 2.0))


class Norm(nn.Module):
    """A product and a batch norm."""

    momentum: float = 0.99
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5)(x)
        return nn.BatchNorm(use_running_average=not self.train, momentum=self.momentum)(x)


def test_a_quantized_linen_model():
    """Statistics are those of the quantized product, in float64 from its simulated output."""
    case = models.linen_training(Norm(), models.normal(0, 16, 6))
    ready = models.ready(case, qj.uniform_policy(weight_bits=2, activation_bits=3))
    simulated = jax.jit(qj.fake_quantize(case.f, ready.plan))

    def update(stats, x):
        return simulated(ready.qstate, {**case.params, "batch_stats": stats}, x)[1]["batch_stats"]

    batches = [models.normal(i, 16, 6) for i in range(1, 4)]
    found = reestimate(update, case.params["batch_stats"], batches)["BatchNorm_0"]
    dense = case.params["params"]["Dense_0"]

    def product(p, x):
        return x @ p["kernel"] + p["bias"][None]

    (operands,) = ready.qstate.values()
    plan = qj.plan(ready.plan.policy, qj.sites(product, dense, case.x))
    out = [
        np.float64(qj.fake_quantize(product, plan)({"kernel": operands}, dense, x)) for x in batches
    ]
    assert_allclose(found["mean"], np.mean([y.mean(0) for y in out], 0), rtol=1e-4, atol=1e-5)
    assert_allclose(found["var"], np.mean([y.var(0) for y in out], 0), rtol=1e-4)
    float_means = np.mean([np.mean(product(dense, x), axis=0) for x in batches], axis=0)
    assert np.abs(found["mean"] - float_means).max() > 1e-3  # quantization does matter here


def test_under_jit_a_statistic_that_does_not_move_is_nan():
    batches = [models.normal(i, 4, 3) for i in range(2)]
    start = {"mean": jnp.zeros(3), "var": jnp.zeros(3)}

    @jax.jit
    def traced(momentum, batches):
        return reestimate(affine(momentum), start, batches)

    assert np.isnan(traced(jnp.float32(1.0), batches)["mean"]).all()
    found = traced(jnp.float32(0.5), batches)
    assert_allclose(found["mean"], np.mean([np.mean(b, 0) for b in batches], 0), atol=1e-6)


def test_evaluation_mode_is_refused():
    case = models.linen_training(Norm(train=False), models.normal(0, 16, 6))

    def update(stats, x):
        return case.f({**case.params, "batch_stats": stats}, x)[1]["batch_stats"]

    with refused(errors.TrainingError, "BatchNorm_0/mean does not move", "evaluation mode"):
        reestimate(update, case.params["batch_stats"], [case.x])


@pytest.mark.parametrize("batches", [[], iter([])])
def test_no_batches_are_refused(batches):
    with refused(errors.TrainingError, "no batch"):
        reestimate(affine(0.5), {"mean": jnp.zeros(3), "var": jnp.zeros(3)}, batches)


def test_another_tree_is_refused():
    with refused(errors.TrainingError, "another tree", "batch_stats"):
        reestimate(lambda r, x: (r, x), {"mean": jnp.zeros(3)}, [jnp.ones((2, 3))])


def test_the_mean_of_one_batch_is_its_own():
    x = models.normal(0, 6, 3)
    start = {"mean": jnp.zeros(3), "var": jnp.zeros(3)}
    found = reestimate(affine(0.5), start, [x])
    assert_array_equal(found["mean"], jnp.mean(x, axis=0))
