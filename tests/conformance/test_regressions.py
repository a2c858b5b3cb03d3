"""What a review by fresh eyes found: wrong without a word once, each by its smallest program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import quantjax as qj
from quantjax import errors
from tests.models import Case, assert_same_bits, normal, policy, ready
from tests.refused import refused

PARAMS = {"w": normal(1, 6, 6)}
X = normal(0, 3, 6)
UNIFORM = qj.uniform_policy()
# Narrow codes clip no weight, so that every entry has its gradient.
NARROW = policy(qj.weight_quantizer(format=qj.integer(narrow=True)), qj.activation_quantizer())


def dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def over_time(weight: Any) -> Any:
    """A recurrent function of ``weight(w)``."""

    def f(p: Any, x: jax.Array) -> jax.Array:
        step = lambda h, row: (jnp.tanh(h @ weight(p["w"]) + row), None)  # noqa: E731
        return lax.scan(step, jnp.zeros((1, 6)), x[:, None])[0]

    return f


def weight_gradient(f: Any) -> jax.Array:
    return jax.grad(lambda p: jnp.sum(f(p) ** 2))(PARAMS)["w"]


@pytest.mark.parametrize("widths", [{"weight_bits": 0}, {"activation_bits": 0}])
def test_width_zero_is_never_executed(widths):
    """There are no codes: refused where it is known, NaN where it is not."""
    plan, state, _ = ready(Case(dense, PARAMS, X), UNIFORM)
    qstate = qj.calibrate(plan, state, PARAMS, **widths)
    with refused(errors.FreezeError, "0 bits"):
        qj.execute(dense, plan)(qstate, PARAMS, X)
    assert np.isnan(jax.jit(qj.execute(dense, plan))(qstate, PARAMS, X)).all()


def test_a_frozen_width_of_zero_is_nan_under_a_trace():
    plan, state, _ = ready(Case(dense, PARAMS, X), UNIFORM)
    qstate = qj.calibrate(plan, state, PARAMS, weight_bits=0)
    frozen = jax.jit(lambda q: qj.freeze(plan, q, PARAMS))(qstate)
    assert np.isnan(qj.dequantize_params(frozen)["w"]).all()


def test_a_weight_behind_stop_gradient_is_not_trained():
    f = over_time(lax.stop_gradient)
    plan, _, qstate = ready(Case(f, PARAMS, X), UNIFORM)
    assert not weight_gradient(lambda p: qj.fake_quantize(f, plan)(qstate, p, X)).any()
    calibrated = jax.grad(lambda p: jnp.sum(qj.calibrate(plan, {}, p)["w"]["weight"].scale))
    weights_only = qj.uniform_policy(activation_bits=None)
    plan = ready(Case(f, PARAMS, X), weights_only).plan
    assert not calibrated(PARAMS)["w"].any()
    assert qj.freeze(plan, qj.calibrate(plan, {}, PARAMS), PARAMS)["w"].codes.shape == (6, 6)


@jax.custom_jvp
def rounded(w: jax.Array) -> jax.Array:
    return jnp.round(w * 4.0) / 4.0


rounded.defjvp(lambda p, t: (rounded(p[0]), t[0]))


def test_a_weights_own_derivative_rule_is_kept():
    f = over_time(rounded)
    plan, _, qstate = ready(Case(f, PARAMS, X), NARROW)
    got = weight_gradient(lambda p: qj.fake_quantize(f, plan)(qstate, p, X))
    want = weight_gradient(lambda p: f(p, X))
    assert float(jnp.linalg.norm(got - want)) < 0.1 * float(jnp.linalg.norm(want))


def test_second_derivatives_are_those_of_the_straight_through_estimator():
    """``Σ q(x)²`` has the gradient ``2 q(x)``, whose derivative along 1 is 2 inside the range."""
    gradient = jax.grad(lambda x: jnp.sum(qj.fake_quant(x, 0.1) ** 2))
    _, tangent = jax.jvp(gradient, (X,), (jnp.ones_like(X),))
    np.testing.assert_allclose(tangent, 2.0)
    plan, _, qstate = ready(Case(dense, PARAMS, X), NARROW)
    loss = lambda p: jnp.sum(jnp.tanh(qj.fake_quantize(dense, plan)(qstate, p, X)) ** 2)  # noqa: E731
    own = lambda p: jnp.sum(jnp.tanh(dense(p, X)) ** 2)  # noqa: E731
    got, want = (jax.jvp(jax.grad(f), (PARAMS,), (PARAMS,))[1]["w"] for f in (loss, own))
    assert float(jnp.linalg.norm(got - want)) < 0.1 * float(jnp.linalg.norm(want))


def test_a_plan_follows_the_length_of_sums_over_tokens():
    f = lambda p, x: x @ x.T  # noqa: E731
    plan, _, qstate = ready(Case(f, {}, normal(0, 3, 64)), policy(None, qj.activation_quantizer()))
    for x in (jnp.ones((3, 40000)), normal(2, 3, 4096)):
        executed = jax.jit(qj.execute(f, plan))(qstate, {}, x)
        assert_same_bits(executed, jax.jit(qj.fake_quantize(f, plan))(qstate, {}, x))
        assert float(executed[0, 0]) > 0.9 * float(f({}, jnp.clip(x, -2.0, 2.0))[0, 0])


def test_scales_frozen_finer_than_planned_are_refused_and_coarser_ones_repeated():
    case = Case(dense, PARAMS, X)
    channels = ready(case, UNIFORM)
    tensor = ready(case, qj.uniform_policy(weight_granularity=qj.PerTensor()))
    frozen = [qj.freeze(r.plan, r.qstate, PARAMS) for r in (channels, tensor)]
    activation = {"w": {"activation": tensor.qstate["w"]["activation"]}}
    with refused(errors.FreezeError, "scales of shape 1x6", "1x1"):
        qj.execute(dense, tensor.plan)(activation, frozen[0], X)
    got = qj.execute(dense, channels.plan)(activation, frozen[1], X)
    assert_same_bits(got, qj.execute(dense, tensor.plan)(tensor.qstate, frozen[1], X))


def test_another_computation_of_the_weight_is_refused():
    plan, _, qstate = ready(Case(dense, PARAMS, X), UNIFORM)
    with refused(errors.PlanMismatchError, "computed otherwise", "site w"):
        qj.fake_quantize(lambda p, x: x @ p["w"].T, plan)(qstate, PARAMS, X)
    masks = [jnp.asarray(normal(i, 6, 6) > 0, jnp.float32) for i in (3, 4)]
    masked = [lambda p, x, m=m: x @ (p["w"] * m) for m in masks]
    plan, _, qstate = ready(Case(masked[0], PARAMS, X), UNIFORM)
    with refused(errors.PlanMismatchError, "constant that it closes over"):
        qj.fake_quantize(masked[1], plan)(qstate, PARAMS, X)
    # Traced, a constant cannot be compared: it is the caller's.
    run = jax.jit(
        lambda m: qj.fake_quantize(lambda p, x: x @ (p["w"] * m), plan)(qstate, PARAMS, X)
    )
    want = jax.jit(qj.fake_quantize(masked[0], plan))(qstate, PARAMS, X)
    np.testing.assert_allclose(run(masks[0]), want, rtol=1e-5)


def test_an_integer_parameter_is_not_stored():
    params = {"w": jnp.arange(36, dtype=jnp.int8).reshape(6, 6)}
    f = lambda p, x: x @ p["w"].astype(jnp.float32)  # noqa: E731
    plan, _, qstate = ready(Case(f, params, X), UNIFORM)
    assert "not storable" in str(plan)
    assert qj.freeze(plan, qstate, params)["w"].dtype == jnp.int8
    want = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X)
    assert_same_bits(jax.jit(qj.execute(f, plan))(qstate, params, X), want)


def test_a_scalar_parameter_is_stored():
    params = {"s": jnp.float32(2.0)}
    f = lambda p, x: x @ p["s"].reshape(1, 1)  # noqa: E731
    plan, _, qstate = ready(Case(f, params, X[:, :1]), UNIFORM)
    assert qj.freeze(plan, qstate, params)["s"].codes.shape == ()


def test_a_recipe_may_be_long():
    f = lambda p, x: x @ functools.reduce(lambda w, _: w * 1.001, range(1200), p["w"])  # noqa: E731
    plan, _, _ = ready(Case(f, PARAMS, X), UNIFORM)
    assert [entry.site.name for entry in plan.quantized] == ["f(w)"]


def test_taps_of_the_quantized_model():
    plan, _, qstate = ready(Case(dense, PARAMS, X), UNIFORM)
    taps = qj.fake_quantize(qj.tap(dense, qj.path("w")), plan)(qstate, PARAMS, X)
    assert_same_bits(taps["w"], qj.fake_quantize(dense, plan)(qstate, PARAMS, X))


def test_a_plan_made_outside_serves_inside_shard_map():
    plan, _, qstate = ready(Case(dense, PARAMS, X), UNIFORM)
    mesh, split = Mesh(np.array(jax.devices()[:1]), ("i",)), PartitionSpec("i")
    sharded = jax.shard_map(
        lambda q, p, x: qj.fake_quantize(dense, plan)(q, p, x),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), split),
        out_specs=split,
    )
    want = jax.jit(qj.fake_quantize(dense, plan))(qstate, PARAMS, X)
    np.testing.assert_allclose(jax.jit(sharded)(qstate, PARAMS, X), want, rtol=1e-6)


def test_live_groups_of_a_padded_convolution():
    numbers = ("NHWC", "HWIO", "NHWC")
    f = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x, p["k"], (1, 1), "SAME", dimension_numbers=numbers
    )
    params, x = {"k": normal(1, 3, 3, 4, 2)}, normal(2, 1, 5, 5, 4)
    live = qj.activation_quantizer(granularity=qj.PerGroup(2), range=qj.RangeMode.LIVE)
    plan = qj.plan(policy(qj.weight_quantizer(), live), qj.sites(f, params, x))
    qstate = qj.calibrate(plan, {}, params)
    want = jax.jit(qj.fake_quantize(f, plan))(qstate, params, x)
    assert_same_bits(jax.jit(qj.execute(f, plan))(qstate, params, x), want)
