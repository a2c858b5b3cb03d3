"""The dampening loss against NumPy in float64, and what it does to weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors, formats
from quantjax.training import dampening_loss, with_bits
from tests import models
from tests.refused import refused
from tests.training import cases


def by_hand(w, scale, zero, low, high):
    """Σ (ŵ - clip(w))² and its gradient, ŵ a constant."""
    w, scale, zero = (np.asarray(a, np.float64) for a in (w, scale, zero))
    zero = np.round(zero)
    middle = scale * (np.clip(np.round(w / scale) + zero, low, high) - zero)
    ends = scale * (low - zero), scale * (high - zero)
    clipped = np.clip(w, *ends)
    inside = (w >= ends[0]) & (w <= ends[1])
    return ((middle - clipped) ** 2).sum(), 2.0 * (clipped - middle) * inside


@functools.cache
def plans(*, narrow):
    format = qj.integer(narrow=narrow)
    return cases.one_product(models.normal(0, 5, 3), qj.weight_quantizer(bits=8, format=format))


@given(seed=st.integers(0, 999), bits=st.integers(2, 8), narrow=st.booleans())
def test_value_and_gradient_by_an_independent_model(seed, bits, narrow):
    """Scales that clip some weights, one for each channel."""
    w = models.normal(seed, 5, 3)
    plan, qstate, params = plans(narrow=narrow)
    weight = qstate["w"]["weight"]
    scale = jnp.asarray([[0.25, 0.5, 1.0]]) * 2.0 ** (3 - bits)
    qstate = {"w": {"weight": weight._replace(scale=scale, bits=jnp.float32(bits))}}
    params = {"w": w}
    value, gradient = jax.value_and_grad(lambda p: dampening_loss(plan, qstate, p))(params)
    low, high = -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    want, slope = by_hand(w, scale, 0.0, low, high)
    assert float(value) == pytest.approx(want, rel=1e-4, abs=1e-8)
    assert_allclose(gradient["w"], slope, atol=1e-5)


def test_asymmetric_ranges():
    quantizer = qj.weight_quantizer(bits=3, symmetric=False, format=qj.integer(signed=False))
    plan, _, _ = cases.one_product(models.normal(0, 6, 4), quantizer)
    w = models.normal(1, 6, 4)
    qstate = {"w": {"weight": cases.qparams([[0.3, 0.2, 0.1, 0.4]], 2.6, 3.0)}}
    value, gradient = jax.value_and_grad(lambda p: dampening_loss(plan, qstate, p))({"w": w})
    want, slope = by_hand(w, [[0.3, 0.2, 0.1, 0.4]], 2.6, 0, 7)
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert_allclose(gradient["w"], slope, atol=1e-5)


def test_weights_on_their_levels_cost_nothing():
    plan, qstate, params = cases.one_product(models.normal(0, 6, 4))
    level = qj.dequantize_params(qj.freeze(plan, qstate, params))
    assert float(dampening_loss(plan, qstate, level)) == 0.0
    assert float(dampening_loss(plan, qstate, params)) > 0.0


def test_nothing_but_weights_has_a_gradient():
    for estimator in (qj.estimators.LSQ, qj.estimators.QIL):
        quantizer = qj.weight_quantizer(bits=3, estimator=estimator)
        plan, qstate, params = cases.one_product(models.normal(0, 6, 4), quantizer)
        gradient = jax.grad(lambda q, p=plan, w=params: dampening_loss(p, q, w))(qstate)
        assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(gradient)), estimator.name
    case = models.mlp()
    ready = models.ready(case, qj.uniform_policy(weight_bits=3))
    gradient = jax.grad(lambda p: dampening_loss(ready.plan, ready.qstate, p))(case.params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if (leaf != 0.0).any()
    }
    assert moved == {"params/Dense_0/kernel", "params/Dense_1/kernel"}


def test_descent_pulls_weights_to_their_levels():
    """Codes stay as they are, and the distance goes down."""
    plan, qstate, params = cases.one_product(models.normal(0, 6, 4))
    codes = qj.freeze(plan, qstate, params)["w"].codes
    loss = jax.jit(jax.value_and_grad(lambda p: dampening_loss(plan, qstate, p)))
    first, _ = loss(params)
    for _ in range(20):
        params = {"w": params["w"] - 0.1 * loss(params)[1]["w"]}
    assert float(loss(params)[0]) < 1e-3 * float(first)
    assert_array_equal(qj.freeze(plan, qstate, params)["w"].codes, codes)


def test_layers_of_a_scan_sum_up():
    case, plan, qstate = cases.stacked(3)
    (name,) = qstate
    scales = np.asarray(qstate[name]["weight"].scale)
    want = sum(by_hand(w, s, 0.0, -8, 7)[0] for w, s in zip(case.params["w"], scales, strict=True))
    assert float(dampening_loss(plan, qstate, case.params)) == pytest.approx(want, rel=1e-5)
    some = with_bits(plan, qstate, weight_bits=jnp.array([4.0, 0.0, 4.0]))
    want -= by_hand(case.params["w"][1], scales[1], 0.0, -8, 7)[0]
    assert float(dampening_loss(plan, some, case.params)) == pytest.approx(want, rel=1e-5)


def test_zero_bits_cost_nothing_with_finite_gradients():
    plan, qstate, params = cases.one_product(models.normal(0, 6, 4))
    asleep = with_bits(plan, qstate, weight_bits=0)
    value, gradient = jax.value_and_grad(lambda p: dampening_loss(plan, asleep, p))(params)
    assert float(value) == 0.0
    # A table has levels at every width.
    table = cases.one_product(params["w"], qj.weight_quantizer(format=formats.NF4))
    asleep = with_bits(*table[:2], weight_bits=0)
    assert float(dampening_loss(table[0], asleep, params)) == 0.0
    assert_array_equal(gradient["w"], jnp.zeros((6, 4)))


def test_a_transposed_weight_and_a_computed_one():
    """The weight as it enters the product: here the square of the parameter, transposed."""
    case = models.Case(
        lambda p, x: x @ (p["w"] ** 2).T, {"w": models.normal(0, 3, 5)}, models.normal(1, 2, 5)
    )
    ready = models.ready(case, qj.uniform_policy(weight_bits=3, activation_bits=None))
    (operands,) = ready.qstate.values()
    w = np.asarray(case.params["w"])
    want, slope = by_hand(w.T**2, operands["weight"].scale, 0.0, -4, 3)

    def loss(p):
        return dampening_loss(ready.plan, ready.qstate, p)

    value, gradient = jax.value_and_grad(loss)(case.params)
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert_allclose(gradient["w"], slope.T * 2 * w, rtol=1e-4, atol=1e-5)


def test_what_an_estimator_transforms():
    """DoReFa rounds tanh(w) / max: the distance is from there."""
    quantizer = qj.weight_quantizer(
        bits=3,
        format=qj.integer(narrow=True),
        estimator=qj.estimators.DOREFA_WEIGHTS,
        granularity=qj.PerTensor(),
    )
    plan, qstate, params = cases.one_product(models.normal(0, 6, 4), quantizer)
    squashed = np.tanh(np.float64(params["w"]))
    reach = 3 * np.float64(qstate["w"]["weight"].scale)
    x = squashed / np.abs(squashed).max() * reach
    want, _ = by_hand(x, qstate["w"]["weight"].scale, 0.0, -3, 3)
    assert float(dampening_loss(plan, qstate, params)) == pytest.approx(want, rel=1e-4)


def test_live_ranges_and_random_roundings_and_tables():
    """Ranges of the weight at hand; the nearest level, whatever the rounding."""
    w = models.normal(0, 6, 4)
    fixed = cases.one_product(w, qj.weight_quantizer(bits=3))
    want = float(dampening_loss(*fixed[:2], fixed[2]))
    for quantizer in (
        qj.weight_quantizer(bits=3, range=qj.RangeMode.LIVE),
        qj.weight_quantizer(bits=3, rounding=qj.rounding.STOCHASTIC),
        qj.weight_quantizer(bits=3, estimator=qj.estimators.QUANT_NOISE),
    ):
        params = {"w": w}
        case = models.Case(lambda p, x: x @ p["w"], params, jnp.ones((1, 6)))
        plan = models.planned(case, models.policy(quantizer))
        qstate = qj.calibrate(plan, qj.init(plan), params)
        assert float(dampening_loss(plan, qstate, params)) == pytest.approx(want, rel=1e-6)
    plan, qstate, params = cases.one_product(w, qj.weight_quantizer(format=formats.NF4))
    scale = np.float64(qstate["w"]["weight"].scale)
    levels = np.array(formats.NF4.codebook)
    nearest = levels[np.abs(np.float64(w)[..., None] / scale[..., None] - levels).argmin(-1)]
    distance = ((nearest * scale - np.float64(w)) ** 2).sum()
    assert float(dampening_loss(plan, qstate, params)) == pytest.approx(distance, rel=1e-5)


def test_half_precision_is_summed_in_float32():
    plan, qstate, params = cases.one_product(models.normal(0, 6, 4), dtype=jnp.bfloat16)
    loss = dampening_loss(plan, qstate, params)
    assert loss.dtype == jnp.float32
    w = np.asarray(params["w"].astype(jnp.float32))
    want, _ = by_hand(w, qstate["w"]["weight"].scale, 0.0, -8, 7)
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_mistakes_are_refused():
    plan, qstate, params = cases.one_product(np.ones((2, 2)))
    with refused(errors.PlanMismatchError, "not the parameter tree"):
        dampening_loss(plan, qstate, {"v": params["w"]})
    with refused(errors.CalibrationError, "no QParams"):
        dampening_loss(plan, {}, params)


def test_biases_are_no_weights():
    def f(params, x):
        return x @ params["w"] + params["b"][None, :]

    params, x = {"w": models.normal(0, 4, 3), "b": jnp.array([0.3, -0.7, 0.1])}, jnp.ones((2, 4))
    scheme = qj.Scheme(weights=qj.weight_quantizer(bits=4), biases=qj.bias_quantizer(bits=4))
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, x))
    qstate = qj.calibrate(plan, qj.init(plan), params)
    assert "bias" in qstate["w"]
    gradient = jax.grad(lambda p: dampening_loss(plan, qstate, p))(params)
    assert_array_equal(gradient["b"], jnp.zeros(3))
    assert float(jnp.abs(gradient["w"]).max()) > 0.0
