"""Gradients of each form of product, against float64: dequantize, then multiply, then STE and LSQ.

The library differentiates a product of codes that is scaled once. The oracle differentiates
``product(s_x (q_x - z_x), s_w (q_w - z_w))`` and puts Esser et al.'s formulas behind it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from tests.models import Case, normal, planned
from tests.oracles.gradients import clipped, gather, straight_through
from tests.oracles.integers import Integers
from tests.products.forms import FORMS, Form, hand_made, plan_of, quantized
from tests.products.terms import cotangents

NAMES = [
    "plain",
    "weight_left",
    "batched",
    "dense_general",
    "reversed_sum",
    "conv_1d",
    "strided",
    "uneven_padding",
    "lhs_dilated",
    "depthwise",
    "channels_first",
]


def gradients(case: Case, plan: qj.Plan, qstate: Any, g: Any, x: Any = None) -> Any:
    """By the library: with respect to qstate, parameters and inputs."""
    fake = qj.fake_quantize(case.f, plan)

    def total(qstate: Any, params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(fake(qstate, params, x) * jnp.asarray(g, jnp.float32))

    return jax.jit(jax.grad(total, (0, 1, 2)))(qstate, case.params, case.x if x is None else x)


class Want(NamedTuple):
    """Gradients of one operand in float64, and how large the parts are that a scale's sums up.

    LSQ's ``q - z - x/s`` is at most a half; ``q - z`` and ``x/s`` are some hundred times that, and
    each is rounded before the difference is made, entry by entry.
    """

    x: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    parts: np.ndarray


def assert_close(got: Any, want: np.ndarray, parts: Any = 0.0) -> None:
    """Equal but for float32 arithmetic, on the scale of the whole array."""
    floor = 2e-5 * max(np.abs(want).max(), 1e-6) + 6e-8 * np.asarray(parts)
    assert np.shape(got) == np.shape(want)
    assert (np.abs(np.asarray(got) - want) <= floor).all(), (got, want)


def oracle(form: Form, case: Case, qparams: Any, g: np.ndarray, slope: Any = clipped) -> Any:
    """``{operand: Want}``."""
    terms = form.terms()
    x = quantized(case.x, qparams["activation"], signed=False)
    w = quantized(form.weight(case.params), qparams["weight"], signed=True)
    x_hat, w_hat = x.centered * np.float64(x.scale), w.centered * np.float64(w.scale)
    to_x, to_w = cotangents(terms, x_hat, w_hat, g)
    found = {}
    for key, cotangent, values, centered in (
        ("activation", to_x, np.asarray(case.x), x.centered),
        ("weight", to_w, form.weight(case.params), w.centered),
    ):
        scale, zero = (np.asarray(a) for a in (qparams[key].scale, qparams[key].zero_point))
        exact = slope(cotangent, values, scale, zero, Integers(8, key == "weight"))
        found[key] = Want(*exact, gather(np.abs(cotangent * centered), scale.shape))
    return found


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_form(name):
    form = FORMS[name]
    case = form.case()
    case = case._replace(x=3.0 * case.x, params={"w": 2.0 * case.params["w"]})
    plan = plan_of(case)
    qstate = hand_made(plan)
    g = np.random.default_rng(5).normal(size=form.terms().shape)
    to_qstate, to_params, to_x = gradients(case, plan, qstate, g)
    want = oracle(form, case, qstate["w"], np.float64(np.float32(g)))
    assert_close(to_x, want["activation"].x)
    assert_close(form.weight(to_params), want["weight"].x)
    for key in ("activation", "weight"):
        assert_close(to_qstate["w"][key].scale, *want[key][1::2])
        assert float(to_qstate["w"][key].bits) == 0.0
        # Some entries are clipped and some are not, or one of the formulas would go untested.
        assert 0.02 < np.mean(want[key].x == 0) < 0.9
    assert_close(to_qstate["w"]["activation"].zero_point, want["activation"].zero_point)


@pytest.mark.parametrize("name", ["plain", "strided"])
def test_gradients_straight_through(name):
    form = FORMS[name]
    case = form.case()
    estimator = qj.estimators.STRAIGHT_THROUGH
    plan = plan_of(
        case,
        qj.weight_quantizer(estimator=estimator),
        qj.activation_quantizer(estimator=estimator),
    )
    qstate = hand_made(plan)
    g = np.random.default_rng(6).normal(size=form.terms().shape)
    to_qstate, to_params, to_x = gradients(case, plan, qstate, g)
    want = oracle(form, case, qstate["w"], np.float64(np.float32(g)), slope=straight_through)
    assert_close(to_x, want["activation"].x)
    assert_close(form.weight(to_params), want["weight"].x)
    for key in ("activation", "weight"):
        assert_close(to_qstate["w"][key].scale, *want[key][1::2])


@pytest.mark.parametrize("name", ["plain", "batched", "strided"])
def test_gradients_with_weights_per_group(name):
    form = FORMS[name]
    size = 7 if name != "strided" else 3
    case = form.case()
    plan = plan_of(case, qj.weight_quantizer(granularity=qj.PerGroup(size)))
    qstate = hand_made(plan)
    g = np.random.default_rng(7).normal(size=form.terms().shape)
    to_qstate, to_params, to_x = gradients(case, plan, qstate, g)
    want = oracle(form, case, qstate["w"], np.float64(np.float32(g)))
    assert_close(to_x, want["activation"].x)
    assert_close(form.weight(to_params), want["weight"].x)
    assert to_qstate["w"]["weight"].scale.shape == qstate["w"]["weight"].scale.shape
    assert_close(to_qstate["w"]["weight"].scale, *want["weight"][1::2])
    assert_close(to_qstate["w"]["activation"].scale, *want["activation"][1::2])


def test_gradients_with_activations_per_channel():
    """The scale is multiplied into the operand, and its gradient is the same formula."""
    form = FORMS["plain"]
    case = form.case()
    per_channel = qj.activation_quantizer(granularity=qj.PerChannel())
    plan = plan_of(case, activations=per_channel)
    qstate = hand_made(plan)
    g = np.random.default_rng(8).normal(size=form.terms().shape)
    to_qstate, _, to_x = gradients(case, plan, qstate, g)
    want = oracle(form, case, qstate["w"], np.float64(np.float32(g)))
    assert_close(to_x, want["activation"].x)
    assert to_qstate["w"]["activation"].scale.shape == (1, 7)
    assert_close(to_qstate["w"]["activation"].scale, *want["activation"][1::2])
    assert_close(to_qstate["w"]["activation"].zero_point, want["activation"].zero_point)


@pytest.mark.parametrize("name", ["plain", "conv_1d"])
@pytest.mark.parametrize("granularity", [None, qj.PerGroup(1)], ids=str)
def test_forward_mode_agrees_with_reverse_mode(name, granularity):
    form = FORMS[name]
    case = form.case()
    plan = plan_of(case, qj.weight_quantizer(granularity=granularity))
    qstate = hand_made(plan)
    fake = qj.fake_quantize(case.f, plan)
    arguments = (qstate, case.params, case.x)
    leaves, tree = jax.tree.flatten(arguments)
    tangents = [normal(40 + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    out, pushed = jax.jit(lambda a, t: jax.jvp(fake, a, t))(
        arguments, jax.tree.unflatten(tree, tangents)
    )
    g = normal(39, *out.shape)
    pulled = jax.tree.leaves(jax.jit(lambda a, g: jax.vjp(fake, *a)[1](g))(arguments, g))
    left = np.vdot(np.float64(g), np.float64(pushed))
    right = sum(
        np.vdot(np.float64(p), np.float64(t)) for p, t in zip(pulled, tangents, strict=True)
    )
    np.testing.assert_allclose(left, right, rtol=1e-4)
    assert abs(left) > 1.0


@pytest.mark.parametrize("bypassed", ["weight", "activation"])
def test_a_bypassed_operand_has_the_models_own_gradient(bypassed):
    """And none for its scale, while the other operand's stay as they were."""
    form = FORMS["plain"]
    case = form.case()
    plan = plan_of(case)
    qstate = hand_made(plan)
    other = "activation" if bypassed == "weight" else "weight"
    qstate["w"][bypassed] = qstate["w"][bypassed]._replace(bits=jnp.float32(0))
    g = np.random.default_rng(9).normal(size=form.terms().shape)
    to_qstate, to_params, to_x = gradients(case, plan, qstate, g)
    assert not np.any(to_qstate["w"][bypassed].scale)
    assert not np.any(to_qstate["w"][bypassed].zero_point)
    assert np.any(to_qstate["w"][other].scale)
    terms, g = form.terms(), np.float64(np.float32(g))
    if bypassed == "weight":
        x = quantized(case.x, qstate["w"]["activation"], signed=False)
        _, want = cotangents(terms, x.centered * np.float64(x.scale), np.zeros(form.w), g)
        assert_close(to_params["w"], want)
    else:
        w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
        want, _ = cotangents(terms, np.zeros(form.x), w.centered * np.float64(w.scale), g)
        assert_close(to_x, want)


def test_a_live_range_passes_gradients_to_the_values_alone():
    """The range follows the values without being differentiated, as an observer does."""
    case = FORMS["plain"].case()
    policy = qj.uniform_policy(activation_granularity=qj.PerToken())
    plan = planned(case, policy)
    qstate = qj.calibrate(plan, qj.init(plan), case.params)
    g = np.ones((3, 5))
    _, _, to_x = gradients(case, plan, qstate, g)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
    want = np.tile((w.centered * np.float64(w.scale)).sum(axis=1), (3, 1))
    assert_close(to_x, want)  # a row's own range clips none of it


@pytest.mark.parametrize("bits", [4, 8, 12, 16])
@pytest.mark.parametrize("side", ["activation", "weight"])
def test_the_gradient_of_a_scale_has_its_digits(side, bits):
    """``Σ g (q - x/s)``, whose two parts are two sums over a batch, thousands of times as large."""
    case = Case(
        lambda p, x: x @ p["w"], {"w": jnp.abs(normal(1, 64, 32))}, jnp.abs(normal(2, 512, 64))
    )
    format, x = qj.integer(max_bits=16), np.asarray(case.x, np.float64)
    quantizers = {
        "activation": {"activations": qj.activation_quantizer(format=format, symmetric=True)},
        "weight": {"weights": qj.weight_quantizer(format=format, granularity=qj.PerTensor())},
    }
    plan = planned(case, qj.Policy([qj.rule(qj.weighted(), qj.Scheme(**quantizers[side]))]))
    real = {"activation": case.x, "weight": case.params["w"]}[side]
    scale = jnp.full((1, 1), jnp.max(jnp.abs(real)) / (2.0 ** (bits - 1) - 1))
    zero = jnp.zeros((1, 1))
    qstate = {"w": {side: qj.QParams(scale, zero, jnp.float32(bits))}}
    g = np.abs(np.asarray(normal(3, 512, 32), np.float64))
    got = gradients(case, plan, qstate, g)[0]["w"][side].scale
    levels = np.float64(np.asarray(real) / np.float32(scale))
    codes = np.clip(np.round(levels), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    inside = codes == np.round(levels)
    cotangent = g @ np.asarray(case.params["w"], np.float64).T if side == "activation" else x.T @ g
    want = np.sum(cotangent * (codes - np.where(inside, np.float64(real) / np.float64(scale), 0)))
    assert abs(float(got[0, 0]) - want) <= 1e-5 * cotangent.sum()
