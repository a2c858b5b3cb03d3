"""Presets run on dense, convolutional and attention models, and mean what they say."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax.products import Execution
from tests.models import Case, assert_same_bits, linen, normal

pytestmark = pytest.mark.thinned(9)


class Net(nn.Module):
    """A depthwise convolution with batch norm, attention, a table and a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = x.reshape(x.shape[0], -1, 8)
        ids = jnp.argmax(x[..., :5], axis=-1)
        x = x + nn.Embed(5, 8)(ids)
        x = x + nn.MultiHeadDotProductAttention(2)(x, x)
        return nn.Dense(5)(x.mean(axis=1))


PRESETS = {
    "w8a8": (qj.presets.w8a8, 0.05),
    "w8a8_dynamic": (qj.presets.w8a8_dynamic, 0.05),
    "w4a8": (qj.presets.w4a8, 0.4),
    "w4a16_group128": (qj.presets.w4a16_group128, 0.4),
    "fp8": (qj.presets.fp8, 0.2),
    "mxfp4": (qj.presets.mxfp4, 0.6),
    "nvfp4": (qj.presets.nvfp4, 0.6),
    "first_last_8bit": (lambda: qj.presets.first_last_8bit(qj.presets.w4a8()), 0.4),
    "first_last_lsq": (lambda: qj.presets.first_last_8bit(qj.presets.lsq_plus()), 0.5),
}


def net() -> Case:
    return linen(Net(), normal(4, 2, 4, 4, 3))


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_runs_and_is_executed_as_simulated(name):
    make, bound = PRESETS[name]
    case = net()
    plan = qj.plan(make(), qj.sites(case.f, case.params, case.x))
    assert len(plan.quantized) == 8
    out, state = jax.jit(qj.observe(case.f, plan))(qj.init(plan), case.params, case.x)
    qstate = qj.calibrate(plan, state, case.params)
    simulated = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    error = float(jnp.linalg.norm(simulated - out) / jnp.linalg.norm(out))
    assert 0.0 < error < bound
    frozen = qj.freeze(plan, qstate, case.params)
    executed = jax.jit(qj.execute(case.f, plan))(qstate, frozen, case.x)
    integers = {Execution.INTEGER, Execution.ROWS}
    if {entry.form.execution for entry in plan.quantized} <= integers:
        assert_same_bits(executed, simulated)
    else:
        assert jnp.allclose(executed, simulated, rtol=1e-4, atol=1e-5)


def forms(policy: qj.Policy, f: Any, params: Any, x: Any) -> Any:
    return qj.plan(policy, qj.sites(f, params, x))


def widths(plan: qj.Plan) -> dict[str, int]:
    """Of the weights, by site."""
    return {
        entry.site.name: operand.quantizer.bits
        for entry in plan.quantized
        for operand in entry.quantized
        if operand.key == "weight" and operand.quantizer is not None
    }


def test_groups_are_shorter_where_they_do_not_divide():
    f = lambda p, x: x @ p["a"] @ p["b"] @ p["c"]  # noqa: E731
    params = {"a": normal(0, 256, 200), "b": normal(1, 200, 20), "c": normal(2, 20, 3)}
    plan = forms(qj.presets.w4a16_group128(), f, params, normal(3, 2, 256))
    assert [entry.quantized[0].scale_shape for entry in plan.quantized] == [
        (2, 200),
        (2, 20),
        (1, 3),
    ]
    assert all(entry.operands[0].quantizer is None for entry in plan.quantized)


def test_the_edges_of_a_language_model_are_products():
    f = lambda p, i: jnp.tanh(p["table"][i] @ p["w"]) @ p["table"].T  # noqa: E731
    params = {"table": normal(0, 7, 4), "w": normal(1, 4, 4)}
    policy = qj.presets.first_last_8bit(qj.presets.w4a8())
    plan = forms(policy, f, params, jnp.arange(5))
    assert widths(plan) == {"table": 8, "w": 8, "table#1": 8}, "a tied weight has one width"
    _, state = qj.observe(f, plan)(qj.init(plan), params, jnp.arange(5))
    qstate = qj.calibrate(plan, state, params)
    frozen = qj.freeze(plan, qstate, params)
    executed = jax.jit(qj.execute(f, plan))(qstate, frozen, jnp.arange(5))
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, jnp.arange(5))
    assert_same_bits(executed, simulated)


def test_a_table_of_its_own_is_no_edge():
    f = lambda p, i: jnp.tanh(p["table"][i] @ p["w"]) @ p["head"]  # noqa: E731
    params = {"table": normal(0, 7, 4), "w": normal(1, 4, 4), "head": normal(2, 4, 7)}
    plan = forms(qj.presets.first_last_8bit(qj.presets.w4a8()), f, params, jnp.arange(5))
    assert widths(plan) == {"table": 4, "w": 8, "head": 8}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["saved", "checkpoint"])
def test_the_edges_of_a_gradient_are_those_of_its_model(wrap):
    @wrap
    def model(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    params = {name: normal(n, 4, 4) for n, name in enumerate("abc")}
    gradient = jax.grad(lambda p, x: jnp.sum(model(p, x) ** 2))
    plan = forms(qj.presets.first_last_8bit(qj.presets.w4a8()), gradient, params, normal(3, 2, 4))
    found = widths(plan)
    assert len(found) > 3
    assert {name: bits for name, bits in found.items() if bits != 8} == {
        name: 4 for name in found if name.split("#")[0] == "b"
    }


def test_a_model_that_is_all_edges():
    f = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params = {"a": normal(0, 4, 4), "b": normal(1, 4, 4)}
    plan = forms(qj.presets.first_last_8bit(qj.presets.w4a8()), f, params, normal(2, 2, 4))
    assert [str(entry.operands[1].quantizer) for entry in plan.sites] == ["int8/channel"] * 2


def test_they_are_data():
    assert qj.presets.w8a8() == qj.uniform_policy()
    assert qj.presets.mxfp4() == qj.presets.mxfp4()
    assert hash(qj.presets.first_last_8bit(qj.presets.w4a8())) is not None
    mine = qj.rule(qj.path("*head*"), qj.Scheme())
    policy = qj.Policy([mine, *qj.presets.w4a8().rules])
    assert policy.rules[1:] == qj.presets.w4a8().rules


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sawb_has_the_levels_that_its_coefficients_are_for(bits):
    """On Gaussian weights its range is as good as the best one of its format."""
    weights = qj.presets.pact_sawb(weight_bits=bits).weights
    best = dataclasses.replace(weights, rule=qj.ranges.MSE)
    w = normal(0, 200, 100)

    def error(quantizer: qj.Quantizer) -> float:
        policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=quantizer))])
        f = lambda params, x: x @ params["w"]  # noqa: E731
        plan = qj.plan(policy, qj.sites(f, {"w": w}, jnp.eye(200)))
        qstate = qj.calibrate(plan, {}, {"w": w})
        return float(jnp.mean((qj.fake_quantize(f, plan)(qstate, {"w": w}, jnp.eye(200)) - w) ** 2))

    assert error(weights) <= 1.02 * error(best)


def test_live_ranges_of_tokens_leave_each_entry_its_gradient():
    """The largest entry of a token has a level of its own, so that nothing is clipped."""
    f = lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"]  # noqa: E731
    params, x = {"a": normal(0, 16, 24), "b": normal(1, 24, 8)}, normal(2, 32, 16)
    plan = forms(qj.presets.w8a8_dynamic(), f, params, x)
    qstate = qj.calibrate(plan, {}, params)

    def of(g, *given):
        return jax.jit(jax.grad(lambda x: jnp.sum(g(*given, x) ** 2)))(x)

    got, want = of(qj.fake_quantize(f, plan), qstate, params), of(f, params)
    assert not jnp.any(got == 0.0)
    assert jnp.vdot(got, want) > 0.999 * jnp.linalg.norm(got) * jnp.linalg.norm(want)
