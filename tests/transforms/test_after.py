"""Outputs and biases that are quantized: what the model computes behind its products."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.estimators import LSQ_FEATURES
from tests.conformance.test_identity import assert_close, fences_hold
from tests.models import Case, assert_same_bits, linen, normal

pytestmark = pytest.mark.thinned(4)

SIGNED = qj.weight_quantizer(bits=8)
ACTIVATIONS = qj.activation_quantizer(bits=8)
DENSE = Case(
    lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]),
    {"w": normal(1, 6, 5), "b": normal(2, 5)},
    normal(3, 4, 6),
)


class Net(nn.Module):
    """Convolutions with and without a bias, attention, a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False)(x))
        x = x.reshape(x.shape[0], -1, 4)
        x = x + nn.MultiHeadDotProductAttention(2)(x, x)
        return nn.Dense(5)(x.mean(axis=1))


def net() -> Case:
    return linen(Net(), normal(4, 2, 4, 4, 3))


def ready(case: Case, scheme: qj.Scheme, **bits: Any) -> Any:
    """Planned for all sites, observed and calibrated."""
    plan = qj.plan(
        qj.Policy([qj.rule(qj.everything(), scheme)]), qj.sites(case.f, case.params, case.x)
    )
    out, state = jax.jit(qj.observe(case.f, plan))(qj.init(plan), case.params, case.x)
    own = jax.jit(case.f)(case.params, case.x)
    # JAX 0.10.2 drops the fences; with 8 floats a vector a tanh in a loop is then fused otherwise.
    (assert_same_bits if fences_hold() else assert_close)(out, own)
    return plan, state, qj.calibrate(plan, state, case.params, **bits)


def simulate(case: Case, plan: qj.Plan, qstate: Any) -> jax.Array:
    return jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)


def fake(x: Any, scale: Any, zero: Any, low: int, high: int) -> np.ndarray:
    """Fake quantization in NumPy: true division, half to even."""
    x, scale = np.asarray(x, np.float32), np.float32(scale)
    codes = np.clip(np.rint(x.astype(np.float64) / np.float64(scale)) + zero, low, high) - zero
    return (codes.astype(np.float32) * scale).astype(np.float32)


def test_an_output_is_quantized_behind_its_bias():
    """Nothing else is: the float product, plus the bias, rounded as its QParams say."""
    plan, _, qstate = ready(DENSE, qj.Scheme(outputs=qj.activation_quantizer(bits=4)))
    (entry,) = plan.quantized
    assert [o.key for o in entry.quantized] == ["output"]
    qparams = qstate["w"]["output"]
    before = np.asarray(DENSE.x @ DENSE.params["w"] + DENSE.params["b"][None])
    low, high = min(before.min(), 0.0), max(before.max(), 0.0)
    np.testing.assert_allclose(qparams.scale, [[(high - low) / 15]], rtol=1e-6)
    rounded = fake(before, qparams.scale.item(), qparams.zero_point.item(), 0, 15)
    np.testing.assert_allclose(simulate(DENSE, plan, qstate), np.tanh(rounded), rtol=1e-6)


def test_a_bias_has_one_scale_of_its_own():
    plan, state, qstate = ready(DENSE, qj.Scheme(biases=qj.bias_quantizer(bits=4)))
    assert state == {}, "its range comes from the parameter"
    qparams, b = qstate["w"]["bias"], np.asarray(DENSE.params["b"])
    assert qparams.scale.shape == (1,)
    np.testing.assert_allclose(qparams.scale, [np.abs(b).max() / 8], rtol=1e-6)
    rounded = {**DENSE.params, "b": jnp.asarray(fake(b, qparams.scale.item(), 0, -8, 7))}
    found = simulate(DENSE, plan, qstate)
    np.testing.assert_allclose(found, DENSE.f(rounded, DENSE.x), rtol=1e-6)


def test_a_bias_in_units_of_the_sums():
    """``round(b / (s_x s_w)) (s_x s_w)``, another scale for each channel."""
    scheme = qj.Scheme(weights=SIGNED, activations=ACTIVATIONS, biases=qj.AccumulatorBias())
    plan, _, qstate = ready(DENSE, scheme)
    assert set(qstate["w"]) == {"weight", "activation"}
    _, _, other = ready(DENSE, qj.Scheme(weights=SIGNED, activations=ACTIVATIONS))
    scale = qstate["w"]["weight"].scale[0] * qstate["w"]["activation"].scale.reshape(())
    b = np.asarray(DENSE.params["b"])
    codes = np.rint(b.astype(np.float64) / np.asarray(scale, np.float64))
    assert np.abs(codes).max() > 100
    rounded = {**DENSE.params, "b": jnp.asarray(codes.astype(np.float32) * scale)}
    case = DENSE._replace(params=rounded)
    reference = qj.plan(
        qj.Policy([qj.rule(qj.everything(), qj.Scheme(weights=SIGNED, activations=ACTIVATIONS))]),
        qj.sites(case.f, case.params, case.x),
    )
    assert_same_bits(simulate(DENSE, plan, qstate), simulate(case, reference, other))


def test_a_bias_has_no_more_units_than_int32_holds():
    """Of a channel that is nearly dead: an integer program has no larger number to add."""
    params = {"w": DENSE.params["w"].at[:, 2].mul(1e-9), "b": jnp.ones(5)}
    case = DENSE._replace(f=lambda p, x: x @ p["w"] + p["b"][None], params=params)
    scheme = qj.Scheme(weights=SIGNED, activations=ACTIVATIONS, biases=qj.AccumulatorBias())
    plan, _, qstate = ready(case, scheme)
    out = simulate(case, plan, qstate)
    frozen = qj.freeze(plan, qstate, params)
    executed = jax.jit(qj.execute(case.f, plan))(qstate, frozen, case.x)
    assert_same_bits(out, executed)
    scale = qstate["w"]["weight"].scale[0] * qstate["w"]["activation"].scale.reshape(())
    most = (2.0**31 - 2.0**7) * np.float64(scale[2])
    assert most < 0.5
    product = np.abs(np.asarray(case.x) @ np.asarray(params["w"])[:, 2]).max()
    np.testing.assert_allclose(out[:, 2], most, atol=2 * product, rtol=1e-6)


def test_a_bias_in_units_of_the_sums_of_each_row():
    """Rows have scales of their own, and so many codes of the bias."""
    live = qj.activation_quantizer(granularity=qj.PerToken(), range=qj.RangeMode.LIVE)
    case = DENSE._replace(f=lambda p, x: x @ p["w"] + p["b"][None])
    scheme = qj.Scheme(weights=SIGNED, activations=live, biases=qj.AccumulatorBias())
    plan, _, qstate = ready(case, scheme)
    x, b = np.asarray(case.x, np.float64), np.asarray(case.params["b"], np.float64)
    rows = (np.maximum(x.max(-1), 0.0) - np.minimum(x.min(-1), 0.0)) / 255.0
    scale = rows[:, None] * np.asarray(qstate["w"]["weight"].scale[0], np.float64)
    without = case._replace(params={**case.params, "b": jnp.zeros_like(case.params["b"])})
    got = simulate(case, plan, qstate) - simulate(without, plan, qstate)
    np.testing.assert_allclose(got, np.rint(b / scale) * scale, rtol=1e-4, atol=1e-6)


SCHEMES = {
    "outputs": qj.Scheme(
        weights=SIGNED, activations=ACTIVATIONS, outputs=qj.activation_quantizer(bits=6)
    ),
    "live": qj.Scheme(
        weights=SIGNED,
        activations=ACTIVATIONS,
        outputs=qj.activation_quantizer(bits=8, granularity=qj.PerToken(), range=qj.RangeMode.LIVE),
    ),
    "channels": qj.Scheme(
        weights=SIGNED, outputs=qj.activation_quantizer(bits=8, granularity=qj.PerChannel())
    ),
    "biases": qj.Scheme(weights=SIGNED, activations=ACTIVATIONS, biases=qj.bias_quantizer(bits=8)),
    "sums": qj.Scheme(weights=SIGNED, activations=ACTIVATIONS, biases=qj.AccumulatorBias()),
    "rows": qj.Scheme(
        weights=SIGNED,
        activations=qj.activation_quantizer(
            bits=8, granularity=qj.PerToken(), range=qj.RangeMode.LIVE
        ),
        biases=qj.AccumulatorBias(),
    ),
    "both": qj.Scheme(
        weights=SIGNED,
        activations=ACTIVATIONS,
        outputs=qj.activation_quantizer(bits=8),
        biases=qj.AccumulatorBias(),
    ),
}


@pytest.mark.thinned(7)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_whole_net_is_executed_as_it_is_simulated(name):
    case = net()
    plan, state, qstate = ready(case, SCHEMES[name])
    simulated = simulate(case, plan, qstate)
    frozen = qj.freeze(plan, qstate, case.params)
    executed = jax.jit(qj.execute(case.f, plan))(qstate, frozen, case.x)
    assert_same_bits(executed, simulated)
    expected = case.f(case.params, case.x)
    assert float(jnp.linalg.norm(simulated - expected) / jnp.linalg.norm(expected)) < 0.06
    again, seen = jax.jit(qj.fake_quantize(case.f, plan, observe=True))(qstate, case.params, case.x)
    assert_same_bits(again, simulated)
    assert jax.tree.structure(seen) == jax.tree.structure(state)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", ["outputs", "biases", "sums", "rows"])
def test_at_width_zero_the_model_is_the_float_model(name):
    case = net()
    scheme = SCHEMES[name]
    none = {"weight_bits": 0, "activation_bits": 0}
    none |= {"output_bits": 0} if scheme.outputs else {}
    none |= {"bias_bits": 0} if name == "biases" else {}
    plan, _, qstate = ready(case, scheme, **none)
    jitted, as_it_is = simulate(case, plan, qstate), jax.jit(case.f)(case.params, case.x)
    assert_same_bits(jitted, as_it_is)
    eager = qj.fake_quantize(case.f, plan)(qstate, case.params, case.x)
    assert_same_bits(eager, case.f(case.params, case.x))
    loss = lambda f, *a: jnp.sum(jnp.sin(f(*a)))  # noqa: E731
    quantized = lambda p: loss(qj.fake_quantize(case.f, plan), qstate, p, case.x)  # noqa: E731
    grads = jax.jit(jax.grad(quantized))(case.params)
    expected = jax.jit(jax.grad(lambda p: loss(case.f, p, case.x)))(case.params)
    # XLA may add up a bias's gradient in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected
    )


def test_widths_of_outputs_and_biases_are_traced():
    case = DENSE
    scheme = qj.Scheme(outputs=qj.activation_quantizer(bits=8), biases=qj.bias_quantizer(bits=8))
    plan, state, _ = ready(case, scheme)

    def cell(output_bits: jax.Array, bias_bits: jax.Array) -> jax.Array:
        qstate = qj.calibrate(
            plan, state, case.params, output_bits=output_bits, bias_bits=bias_bits
        )
        return qj.fake_quantize(case.f, plan)(qstate, case.params, case.x)

    pairs = jnp.array([2.0, 8.0, 0.0]), jnp.array([4.0, 0.0, 2.0])
    grid = jax.jit(lambda pairs: lax.map(lambda pair: cell(*pair), pairs))(pairs)
    one = jax.jit(lambda pair: cell(*pair))
    for index, pair in enumerate(zip(*pairs, strict=True)):
        np.testing.assert_allclose(grid[index], one(pair), rtol=1e-6)


def test_stacked_layers_have_outputs_and_biases_each():
    params = {"w": 0.4 * normal(5, 3, 6, 6), "b": normal(6, 3, 6)}

    def f(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, q: (jnp.tanh(x @ q["w"] + q["b"][None]), None), x, p)[0]

    case = Case(f, params, normal(7, 4, 6))
    scheme = qj.Scheme(
        weights=SIGNED, outputs=qj.activation_quantizer(bits=8), biases=qj.bias_quantizer(bits=8)
    )
    plan, _, qstate = ready(case, scheme)
    assert qstate["w"]["output"].scale.shape == (3, 1, 1)
    np.testing.assert_allclose(
        qstate["w"]["bias"].scale.ravel(), np.abs(params["b"]).max(axis=1) / 128, rtol=1e-6
    )
    frozen = qj.freeze(plan, qstate, params)
    executed = jax.jit(qj.execute(f, plan))(qstate, frozen, case.x)
    assert_same_bits(executed, simulate(case, plan, qstate))


def test_a_mask_leaves_padding_out_of_an_output():
    plan, _, _ = ready(DENSE, qj.Scheme(outputs=ACTIVATIONS))
    padded = jnp.concatenate([DENSE.x, 1e3 * DENSE.x])
    where = jnp.arange(8) < 4
    _, masked = qj.observe(DENSE.f, plan)(qj.init(plan), DENSE.params, padded, where=where)
    _, alone = qj.observe(DENSE.f, plan)(qj.init(plan), DENSE.params, DENSE.x)
    np.testing.assert_allclose(
        masked["w"]["output"].extremes.low, alone["w"]["output"].extremes.low, rtol=1e-6
    )


def test_gradients_pass_straight_through_and_stop_at_the_clip():
    scheme = qj.Scheme(outputs=qj.activation_quantizer(bits=8), biases=qj.bias_quantizer(bits=8))
    plan, _, qstate = ready(DENSE, scheme)
    linear = Case(lambda p, x: x @ p["w"] + p["b"][None], DENSE.params, DENSE.x)
    grad = jax.grad(lambda p: jnp.sum(qj.fake_quantize(linear.f, plan)(qstate, p, linear.x)))
    clipped = qstate["w"]["bias"]._replace(scale=0.5 * qstate["w"]["bias"].scale)
    qstate = {"w": {**qstate["w"], "bias": clipped}}
    codes = np.asarray(DENSE.params["b"]) / np.asarray(clipped.scale)
    inside = (codes >= -128.5) & (codes <= 127.5)
    assert 0 < inside.sum() < 5
    found = grad(DENSE.params)["b"]
    np.testing.assert_allclose(found, np.where(inside, 4.0, 0.0), rtol=1e-6)


def test_the_scale_of_an_output_is_learned():
    scheme = qj.Scheme(outputs=qj.activation_quantizer(bits=3, estimator=LSQ_FEATURES))
    plan, _, qstate = ready(DENSE, scheme)
    loss = lambda q: jnp.mean(  # noqa: E731
        (qj.fake_quantize(DENSE.f, plan)(q, DENSE.params, DENSE.x) - DENSE.f(DENSE.params, DENSE.x))
        ** 2
    )
    grad = jax.grad(loss)(qstate)["w"]["output"].scale
    assert float(jnp.abs(grad).max()) > 0.0


def test_random_roundings_draw_each_their_own():
    rounding = qj.rounding.STOCHASTIC
    scheme = qj.Scheme(outputs=qj.activation_quantizer(bits=3, rounding=rounding))
    linear = DENSE._replace(f=lambda p, x: x @ p["w"] + p["b"][None])
    plan, _, qstate = ready(linear, scheme)
    run = jax.jit(qj.fake_quantize(linear.f, plan))
    with pytest.raises(qj.errors.KeyMissingError, match="output"):
        run(qstate, DENSE.params, DENSE.x)
    draws = [run(qstate, DENSE.params, DENSE.x, key=jax.random.key(n)) for n in (0, 0, 1)]
    assert_same_bits(draws[0], draws[1])
    assert not (draws[0] == draws[2]).all()
    mean = jnp.mean(
        jax.vmap(lambda k: run(qstate, DENSE.params, DENSE.x, key=k))(
            jax.random.split(jax.random.key(2), 400)
        ),
        axis=0,
    )
    scale = qstate["w"]["output"].scale.item()
    expected = DENSE.x @ DENSE.params["w"] + DENSE.params["b"][None]
    zero = qstate["w"]["output"].zero_point.item()
    expected = jnp.clip(expected, -zero * scale, (7 - zero) * scale)
    assert float(jnp.max(jnp.abs(mean - expected))) < 0.15 * scale


def test_compare_has_rows_for_both():
    case = net()
    scheme = qj.Scheme(
        weights=SIGNED,
        activations=ACTIVATIONS,
        outputs=qj.activation_quantizer(bits=4),
        biases=qj.bias_quantizer(bits=8),
    )
    plan, _, qstate = ready(case, scheme)
    report = jax.jit(qj.compare(case.f, plan))(qstate, case.params, case.x)
    first = report["params/Conv_0/kernel"]
    assert set(first.operands) == {"weight", "activation", "output", "bias"}
    assert float(first.operands["output"].sqnr) < float(first.operands["bias"].sqnr)
    assert "output dB" in str(report)
    assert "bias" not in report["params/Conv_1/kernel"].operands


def test_schemes_print_and_are_kept_apart():
    scheme = SCHEMES["both"]
    assert str(scheme) == "w=int8/channel a=uint8/tensor o=uint8/tensor b=int32/sums"
    assert hash(scheme) != hash(SCHEMES["sums"])


REFUSED = {
    "floats": (qj.Scheme(weights=SIGNED, biases=qj.AccumulatorBias()), "none in common"),
    "groups": (
        qj.Scheme(
            weights=qj.weight_quantizer(bits=4, granularity=qj.PerGroup(2)),
            activations=ACTIVATIONS,
            biases=qj.AccumulatorBias(),
        ),
        "none in common",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bias_without_sums_of_one_scale_is_refused(name):
    scheme, message = REFUSED[name]
    policy = qj.Policy([qj.rule(qj.everything(), scheme)])
    with pytest.raises(qj.errors.PolicyError, match=message):
        qj.plan(policy, qj.sites(DENSE.f, DENSE.params, DENSE.x))


def test_a_bias_with_scales_by_channel_is_refused():
    scheme = qj.Scheme(biases=qj.weight_quantizer(bits=8))
    policy = qj.Policy([qj.rule(qj.everything(), scheme)])
    with pytest.raises(qj.errors.GranularityError, match="a bias with scales channel"):
        qj.plan(policy, qj.sites(DENSE.f, DENSE.params, DENSE.x))


def test_an_output_with_a_fixed_scale_for_each_row_is_refused():
    outputs = qj.activation_quantizer(bits=8, granularity=qj.PerChannel(axis=0))
    policy = qj.Policy([qj.rule(qj.everything(), qj.Scheme(outputs=outputs))])
    with pytest.raises(qj.errors.GranularityError, match="scale for each row"):
        qj.plan(policy, qj.sites(DENSE.f, DENSE.params, DENSE.x))


def test_widths_that_nothing_takes_are_refused():
    plan, state, _ = ready(DENSE, qj.Scheme(weights=SIGNED))
    with pytest.raises(qj.errors.PolicyError, match="no output is quantized"):
        qj.calibrate(plan, state, DENSE.params, output_bits=4)


def test_rows_of_a_table_have_outputs_too():
    table = {"table": normal(8, 7, 5)}
    f = lambda p, i: p["table"][i]  # noqa: E731
    case = Case(f, table, jnp.array([1, 4, 6]))
    plan, _, qstate = ready(case, qj.Scheme(outputs=qj.activation_quantizer(bits=4)))
    rows = np.asarray(table["table"])[[1, 4, 6]]
    qparams = qstate["table"]["output"]
    expected = fake(rows, qparams.scale.item(), qparams.zero_point.item(), 0, 15)
    np.testing.assert_array_equal(simulate(case, plan, qstate), expected)
