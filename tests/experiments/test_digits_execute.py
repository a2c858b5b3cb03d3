"""The digits network in integers predicts what its simulation predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments.digits.study import study
from experiments.digits.train import Training
from tests.models import assert_same_bits

SEEDS = (0, 1, 2)
GROUPS = qj.uniform_policy(weight_bits=4, weight_granularity=qj.PerGroup(16))
FIRST = qj.rule(qj.path("*/Conv_0/*"), qj.Scheme(weights=qj.weight_quantizer(bits=8)))


@pytest.fixture(scope="module")
def digits():
    return study(Training(epochs=12))


@pytest.fixture(scope="module", params=SEEDS)
def trained(request, digits):
    return digits.train(request.param, lambda _: None)


def frozen_and_simulated(digits, variables, policy):
    """Logits of the 900 held-out digits: in float, simulated, and in integers."""
    images, labels = digits.test()
    plan = qj.plan(policy, qj.sites(digits.apply, variables, images[:1]))
    state, observe = qj.init(plan), jax.jit(qj.observe(digits.apply, plan))
    for batch in digits.calibration():
        _, state = observe(state, variables, batch)
    qstate = qj.calibrate(plan, state, variables)
    frozen = qj.freeze(plan, qstate, variables)
    simulated = jax.jit(qj.fake_quantize(digits.apply, plan))(qstate, variables, images)
    executed = jax.jit(qj.execute(digits.apply, plan))(qstate, frozen, images)
    return labels, simulated, executed, frozen


def accuracy(logits, labels):
    return float(jnp.mean(jnp.argmax(logits, axis=-1) == labels))


@pytest.mark.thinned(3)
def test_w8a8_predicts_as_simulated(digits, trained):
    """Acceptance: at most one prediction of 900 differs. On CPU no logit does."""
    labels, simulated, executed, frozen = frozen_and_simulated(digits, trained, digits.policy)
    assert len(labels) == 900
    differ = jnp.argmax(simulated, axis=-1) != jnp.argmax(executed, axis=-1)
    assert int(differ.sum()) <= 1
    assert_same_bits(executed, simulated)
    assert accuracy(executed, labels) > 0.95
    quantized = [leaf for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.int8]
    assert sum(leaf.size for leaf in quantized) > 0.9 * sum(
        leaf.size for leaf in jax.tree.leaves(trained)
    )


@pytest.mark.thinned(3)
def test_w4a8_in_groups_predicts_as_simulated(digits, trained):
    policy = qj.Policy([FIRST, *GROUPS.rules])  # one input channel makes no group
    labels, simulated, executed, _ = frozen_and_simulated(digits, trained, policy)
    assert_same_bits(executed, simulated)
    assert accuracy(executed, labels) > 0.9
    w8a8 = frozen_and_simulated(digits, trained, digits.policy)[2]
    assert not np.array_equal(executed, w8a8)
