"""NNX modules through the verbs of quantjax, their state an input."""

import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax.adapters import nnx as qnnx
from tests.adapters.modules import CASES, CNN, MLP, Deep, X, assert_same, loss
from tests.models import normal


def policy(weight_bits=8, activation_bits=8):
    return qj.uniform_policy(weight_bits=weight_bits, activation_bits=activation_bits)


def test_sites_have_the_names_of_the_module():
    for make, x, expected in (
        (MLP, X, ["linear1/kernel", "linear2/kernel"]),
        (CNN, normal(2, 4, 8, 8, 3), ["conv1/kernel", "conv2/kernel", "head/kernel"]),
        (Deep, X, [f"layers/{i}/kernel" for i in range(12)]),
    ):
        f, params, state = qnnx.functional(make())
        assert [site.name for site in qj.sites(f, params, state, x)] == expected


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("make", "x"), [CASES["mlp"], CASES["cnn"], CASES["list"]])
def test_quantized_from_end_to_end(make, x):
    f, params, state = qnnx.functional(make())
    plan = qj.plan(policy(), qj.sites(f, params, state, x))
    (y, after), seen = jax.jit(qj.observe(f, plan))(qj.init(plan), params, state, x)
    assert_same((y, after), jax.jit(f)(params, state, x))

    qstate = qj.calibrate(plan, seen, params)
    quantized = jax.jit(qj.fake_quantize(f, plan))
    y8, after8 = quantized(qstate, params, state, x)
    assert jax.tree.structure(after8) == jax.tree.structure(state)
    error = jnp.linalg.norm(y8 - y) / jnp.linalg.norm(y)
    assert 0 < error < 0.1
    assert_same(after8.get("dropout"), after.get("dropout"))

    bypass = qj.calibrate(plan, seen, params, weight_bits=0, activation_bits=0)
    assert_same(quantized(bypass, params, state, x), (y, after))


def test_quantized_training_moves_parameters_and_state():
    f, params, state = qnnx.functional(MLP())
    plan = qj.plan(policy(4, 4), qj.sites(f, params, state, X))
    _, seen = jax.jit(qj.observe(f, plan))(qj.init(plan), params, state, X)
    qstate = qj.calibrate(plan, seen, params)
    quantized = qj.fake_quantize(f, plan)

    @jax.jit
    def step(params, state):
        def objective(params):
            y, after = quantized(qstate, params, state, X)
            return loss(y), after

        (value, after), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), after, value

    values = []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0]
    assert int(state["dropout"]["rngs"]["count"]) == 20
