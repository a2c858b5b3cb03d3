"""Plans that round at random: keys go in, each site and each visit has its own, integers agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax import errors
from quantjax.rounding import STOCHASTIC
from tests.models import Case, assert_same_bits, dense, mlp, normal, policy, ready
from tests.refused import refused

ACTIVATIONS = policy(qj.weight_quantizer(), qj.activation_quantizer(bits=3, rounding=STOCHASTIC))
WEIGHTS = policy(qj.weight_quantizer(bits=3, rounding=STOCHASTIC))
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def network():
    case = mlp()
    return case, ready(case, ACTIVATIONS)


def test_a_plan_without_a_key_is_refused(network):
    case, done = network
    for call in (qj.fake_quantize(case.f, done.plan), qj.compare(case.f, done.plan)):
        with refused(errors.KeyMissingError, "activation", "key=jax.random.key(0)"):
            call(done.qstate, case.params, case.x)
    with refused(errors.KeyMissingError, "activation"):
        qj.execute(case.f, done.plan)(
            done.qstate, qj.freeze(done.plan, done.qstate, case.params), case.x
        )


def test_a_deterministic_plan_needs_none_and_takes_one():
    case = dense()
    done = ready(case, qj.uniform_policy())
    fake = qj.fake_quantize(case.f, done.plan)
    without = fake(done.qstate, case.params, case.x)
    assert_same_bits(fake(done.qstate, case.params, case.x, key=KEY), without)


def test_the_same_key_gives_the_same_and_another_another(network):
    case, done = network
    fake = jax.jit(qj.fake_quantize(case.f, done.plan))
    run = lambda key: fake(done.qstate, case.params, case.x, key=key)  # noqa: E731
    assert_same_bits(run(KEY), run(KEY))
    assert not np.array_equal(run(KEY), run(jax.random.key(8)))
    raw = jax.random.key_data(KEY)
    assert run(raw).shape == run(KEY).shape  # keys of the old kind


def test_integers_round_as_the_simulation_does(network):
    case, done = network
    qparams = qj.freeze(done.plan, done.qstate, case.params)
    executed = jax.jit(qj.execute(case.f, done.plan))(done.qstate, qparams, case.x, key=KEY)
    simulated = jax.jit(qj.fake_quantize(case.f, done.plan))(
        done.qstate, case.params, case.x, key=KEY
    )
    assert_same_bits(executed, simulated)


def test_the_mean_over_keys_is_the_model_with_float_activations(network):
    case = dense(rows=3, features=8, out=4)
    done = ready(case, ACTIVATIONS)
    case = case._replace(x=0.8 * case.x)  # nothing is clipped
    keys = jax.random.split(KEY, 4000)
    fake = jax.jit(
        jax.vmap(
            lambda key: qj.fake_quantize(case.f, done.plan)(
                done.qstate, case.params, case.x, key=key
            )
        )
    )
    outputs = np.asarray(fake(keys), np.float64)
    weights_only = qj.calibrate(done.plan, done.state, case.params, activation_bits=0)
    exact = qj.fake_quantize(case.f, done.plan)(weights_only, case.params, case.x, key=KEY)
    error = np.abs(outputs.mean(0) - exact)
    assert (error < 5 * outputs.std(0) / np.sqrt(len(keys)) + 1e-5).all()
    assert outputs.std(0).min() > 0.01


def test_each_step_of_a_loop_draws_anew():
    """The same product on the same operand at each of 64 steps: the sums differ, but for chance."""

    def f(params, x):
        return lax.scan(lambda c, _: (c, x @ params["w"]), 0.0, None, length=64)[1]

    case = Case(f, {"w": normal(1, 6, 5)}, normal(2, 3, 6))
    done = ready(case, ACTIVATIONS)
    steps = jax.jit(qj.fake_quantize(f, done.plan))(done.qstate, case.params, case.x, key=KEY)
    assert len({step.tobytes() for step in np.asarray(steps)}) > 56


def test_each_layer_of_a_stack_draws_anew():
    def f(params, x):
        return lax.scan(lambda x, w: (x, x @ w), x, params["w"])[1]

    same = jnp.broadcast_to(normal(3, 6, 5), (8, 6, 5))
    case = Case(f, {"w": same}, normal(4, 3, 6))
    done = ready(case, ACTIVATIONS)
    layers = jax.jit(qj.fake_quantize(f, done.plan))(done.qstate, case.params, case.x, key=KEY)
    assert len({layer.tobytes() for layer in np.asarray(layers)}) > 6


def test_frozen_weights_are_drawn_once_and_need_a_key():
    case = dense(features=16, out=16)
    done = ready(case, WEIGHTS)
    with refused(errors.KeyMissingError, "weight", "key=jax.random.key(0)"):
        qj.freeze(done.plan, done.qstate, case.params)
    frozen = [
        qj.freeze(done.plan, done.qstate, case.params, key=jax.random.key(seed))["w"]
        for seed in (0, 0, 1)
    ]
    assert_same_bits(frozen[0].codes, frozen[1].codes)
    assert not np.array_equal(frozen[0].codes, frozen[2].codes)
    scaled = np.asarray(case.params["w"]) / np.asarray(frozen[0].qparams.scale)
    for tensor in frozen:
        off = np.abs(np.asarray(tensor.codes) - np.clip(scaled, -4, 3))
        assert off.max() < 1.0
    run = jax.jit(qj.execute(case.f, done.plan))
    run(done.qstate, {"w": frozen[0]}, case.x)  # codes that are there need no key


def test_gradients_pass_as_for_nearest_rounding(network):
    case, done = network

    def loss(params):
        fake = qj.fake_quantize(case.f, done.plan)
        return jnp.sum(fake(done.qstate, params, case.x, key=KEY) ** 2)

    gradients = jax.jit(jax.grad(loss))(case.params)
    assert all(
        np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradients["params"])
    )
