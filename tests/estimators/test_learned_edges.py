"""Learned parameters that are none, values that are none, and entries that are not quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors, estimators
from quantjax.training import with_parameter
from tests.models import Case, assert_same_bits, normal, ready
from tests.refused import refused

LAYER = Case(lambda p, x: x @ p["w"], {"w": normal(0, 6, 4)}, normal(1, 5, 6))


def calibrated(weights, case=LAYER, activations=None):
    scheme = qj.Scheme(weights=weights, activations=activations)
    plan, _, qstate = ready(case, qj.Policy([qj.rule(qj.weighted(), scheme)]))
    return plan, qstate


DIFFERENTIABLE = qj.presets.differentiable_quantization().weights


@pytest.mark.parametrize("clip", [1.0, 1e-3, 1e-9])
def test_a_small_clip_leaves_no_sign_behind(clip):
    """``d · round(clip(x, ±q_max) / d)``: 0 once the clip is below half a step, and no ±d."""
    plan, qstate = calibrated(DIFFERENTIABLE)
    qstate = with_parameter(qstate, "clip", clip)
    scale = np.float64(qstate["w"]["weight"].scale)
    w = np.float64(LAYER.params["w"])
    want = scale * np.round(np.clip(w, -clip, clip) / scale)
    identity = jnp.eye(6)
    got = qj.fake_quantize(LAYER.f, plan)(qstate, LAYER.params, identity)
    assert_allclose(got, want, rtol=1e-6)
    frozen = qj.freeze(plan, qstate, LAYER.params)
    assert_same_bits(jax.jit(qj.execute(LAYER.f, plan))(qstate, frozen, identity), got)


@pytest.mark.parametrize("clip", [0.0, -0.01, -1.0, np.nan])
def test_a_clip_that_is_none_is_nan_and_refused(clip):
    """It was one signed bit: every weight became +d, or NaN in one program and 0 in the other."""
    plan, qstate = calibrated(DIFFERENTIABLE)
    qstate = with_parameter(qstate, "clip", clip)
    assert np.isnan(qj.fake_quantize(LAYER.f, plan)(qstate, LAYER.params, LAYER.x)).all()
    with refused(errors.FreezeError, "no positive finite number", "site w"):
        qj.freeze(plan, qstate, LAYER.params)
    frozen = jax.jit(lambda q: qj.freeze(plan, q, LAYER.params))(qstate)
    assert np.isnan(jax.jit(qj.execute(LAYER.f, plan))(qstate, frozen, LAYER.x)).all()


@pytest.mark.parametrize("name", ["center", "distance"])
def test_an_interval_that_is_none_is_nan(name):
    theta = {"center": jnp.float32(0.5), "distance": jnp.float32(0.5), "gamma": jnp.float32(1.0)}
    options = {"bits": 3, "format": qj.integer(narrow=True), "estimator": estimators.QIL}
    x = jnp.array([-1.0, 0.3, 1.0])
    assert np.isfinite(qj.fake_quant(x, 0.25, theta=theta, **options)).all()
    theta[name] = jnp.float32(jnp.nan)
    assert np.isnan(qj.fake_quant(x, 0.25, theta=theta, **options)).all()


@pytest.mark.parametrize(
    ("estimator", "bits"),
    [
        (estimators.DOREFA_ACTIVATIONS, 3),
        (estimators.CLIPPED, 3),
        (estimators.DSQ, 3),
        (estimators.MAGNITUDE_AWARE, 1),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_gradients_of_what_is_nan_are_not_zero(estimator, bits):
    theta = {"alpha": jnp.float32(0.2)} if estimator is estimators.DSQ else ()
    total = lambda x: qj.fake_quant(x, 0.5, bits=bits, estimator=estimator, theta=theta).sum()  # noqa: E731
    gradient = jax.grad(total)(jnp.array([jnp.nan, 0.3, -100.0]))
    assert gradient[0] != 0.0
    assert gradient[1] > 0.0
    assert gradient[2] == 0.0


@pytest.mark.parametrize(("bits", "signed"), [(1, True), (4, True), (1, False), (4, False)])
def test_scales_of_tqt_are_the_formula(bits, signed):
    """``2^ceil(log2 t) / 2^(b-1)``, ``2^b`` for unsigned codes: at one bit too."""
    threshold = 1.5
    x = jnp.array([0.26, 3.9])
    got = qj.fake_quant(
        x,
        1.0,
        bits=bits,
        format=qj.integer(signed=signed),
        estimator=estimators.TQT,
        theta={"log2_threshold": jnp.log2(jnp.float32(threshold))},
    )
    scale = 2.0 / 2.0 ** (bits - signed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    want = scale * np.clip(np.round(np.float64(x) / scale), low, high)
    if signed and bits == 1:
        want = scale * np.where(np.float64(x) >= 0.0, 1.0, -1.0)
    assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_entries_that_pass_are_whole_in_long_sums_too(rate):
    """A sum beyond 2^24 was taken in int32, which cut the fractions of what is not quantized."""
    size = 40_000
    params, x = {"w": normal(0, size, 4)}, jax.random.uniform(jax.random.key(1), (8, size))
    case = Case(LAYER.f, params, x)
    weights = qj.weight_quantizer(bits=8, estimator=estimators.QUANT_NOISE)
    plan, qstate = calibrated(weights, case, qj.activation_quantizer(bits=2))
    run = jax.jit(qj.fake_quantize(case.f, plan))
    noisy, key = with_parameter(qstate, "rate", rate), jax.random.key(2)
    activation = qstate["w"]["activation"]
    seen = qj.fake_quant(x, activation.scale, activation.zero_point, bits=2, signed=False)
    got = run(noisy, params, x, key=key)
    if rate == 0.0:
        want = np.float64(seen) @ np.float64(params["w"])
        assert np.abs(got - want).max() < 3e-6 * np.abs(want).max()
    whole = with_parameter(qstate, "rate", 1.0)
    frozen = qj.freeze(plan, qstate, params)
    assert_same_bits(
        run(whole, params, x, key=key), jax.jit(qj.execute(case.f, plan))(qstate, frozen, x)
    )


def test_lsq_takes_its_bounds_on_the_position_and_not_on_the_code():
    """Equations 3 and 5 by hand: half a step beyond a bound counts as the bound, and so does it."""
    x = jnp.array([-2.4, -2.0, -1.9, 0.3, 0.9, 1.0, 1.2, 1.6])
    one = jnp.float32(1.0)
    y = lambda x, s: qj.fake_quant(x, s, bits=2, estimator=estimators.LSQ)  # noqa: E731
    to_x = jax.grad(lambda x: y(x, one).sum())(x)
    assert to_x.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    to_scale = jax.jacfwd(lambda s: y(x, s))(one) * np.sqrt(x.size)  # Q_P is 1
    assert_allclose(to_scale, [-2, -2, -0.1, -0.3, 0.1, 1, 1, 1], rtol=1e-5, atol=1e-6)
    clipped = jax.grad(lambda x: qj.fake_quant(x, one, bits=2, estimator=estimators.CLIPPED).sum())(
        x
    )
    assert clipped.tolist() == [1, 1, 1, 1, 1, 1, 1, 0]


def test_lsq_lets_a_nan_through_and_does_not_hide_it():
    x, one = jnp.array([jnp.nan, 0.2]), jnp.float32(1.0)
    y = lambda x, s: qj.fake_quant(x, s, bits=2, estimator=estimators.LSQ).sum()  # noqa: E731
    to_x, to_scale = jax.grad(y, (0, 1))(x, one)
    assert to_x.tolist() == [1, 1]
    assert jnp.isnan(to_scale)


@pytest.mark.parametrize("bits", [7, 8])
def test_a_clip_that_starts_at_the_container_has_its_own_gradient(bits):
    """Outside of the range: the sign, and for the scale what rounding adds to ``clip / d``."""
    learned, format = estimators.DIFFERENTIABLE_QUANTIZATION, qj.integer(max_bits=8)
    start = qj.QParams(jnp.float32(0.01), jnp.float32(0.0), jnp.float32(bits))
    theta = learned.started(start, format).theta

    def total(scale, theta):
        x = jnp.array([5.0, -5.0, 5.0])
        y = qj.fake_quant(x, scale, bits=bits, format=format, theta=theta, estimator=learned)
        return jnp.sum(y)

    of_scale, of_theta = jax.grad(total, (0, 1))(start.scale, theta)
    assert abs(float(of_scale)) < 1e-3
    assert float(of_theta["clip"]) == 1.0
