"""What estimators ask of a quantizer, and what became of mistakes that were silent once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax import estimators as es
from quantjax.arithmetic import Arithmetic
from quantjax.estimators import Need
from quantjax.formats import POWER_OF_TWO, integer
from quantjax.simulation import apply
from tests.refused import refused

pytestmark = pytest.mark.thinned(3)

LIVE = qj.RangeMode.LIVE
RNG = np.random.default_rng(0)
UNSIGNED = {"format": integer(signed=False), "symmetric": True}


@pytest.mark.parametrize(
    "estimator", [e for e in es.ESTIMATORS if Need.FIXED_RANGE in e.needs], ids=lambda e: e.name
)
def test_ranges_that_parameters_start_from_are_fixed(estimator):
    with refused(errors.EstimatorError, "a range that calibration fixes"):
        qj.weight_quantizer(estimator=estimator, range=LIVE)


def test_lsq_learns_no_scale_that_each_tensor_brings():
    """It had a scale of 1 there, whose gradient was 0."""
    for estimator in (es.LSQ, es.LSQ_FEATURES, es.LSQ_PLUS):
        assert Need.FIXED_RANGE in estimator.needs


@pytest.mark.parametrize(
    "estimator", [e for e in es.ESTIMATORS if Need.NO_ZERO_POINT in e.needs], ids=lambda e: e.name
)
def test_what_has_no_zero_point_is_symmetric(estimator):
    with refused(errors.EstimatorError, "its zero point is 0"):
        qj.activation_quantizer(estimator=estimator)


@pytest.mark.parametrize("estimator", [es.TQT, es.DSQ, es.ROUNDED_WIDTH], ids=lambda e: e.name)
def test_integers_are_asked_for(estimator):
    for format in (qj.formats.E4M3FN, qj.formats.NF4, qj.formats.midrise()):
        with refused(errors.EstimatorError, "integer codes"):
            qj.weight_quantizer(estimator=estimator, format=format)


def test_surrogates_of_the_sign_are_for_one_bit():
    for estimator in (es.APPROX_SIGN, es.SWISH_SIGN, es.ERROR_DECAY, es.MAGNITUDE_AWARE):
        with refused(errors.EstimatorError, "one bit"):
            qj.weight_quantizer(estimator=estimator, bits=4)
        assert qj.weight_quantizer(estimator=estimator, bits=1).bits == 1


def test_other_needs():
    with refused(errors.EstimatorError, "any real numbers"):
        qj.activation_quantizer(
            estimator=es.PACT,
            format=integer(signed=False, scale_rule=POWER_OF_TWO),
            symmetric=True,
        )
    with refused(errors.EstimatorError, "more than one bit"):
        qj.weight_quantizer(estimator=es.DIFFERENTIABLE_QUANTIZATION, bits=1)


def test_the_estimator_is_in_what_a_plan_prints():
    assert str(qj.weight_quantizer(estimator=es.LSQ, bits=4)) == "int4/channel/lsq"
    assert str(qj.weight_quantizer(bits=4)) == "int4/channel"


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0, 8.0])
def test_thresholds_of_tqt_are_exact_at_powers_of_two(bits):
    """``log2`` of a power of two is not, and its ceiling would double the scale."""
    scales = jnp.ldexp(jnp.ones(19), jnp.arange(-14, 5))

    def there_and_back(scale):
        qparams = qj.QParams(scale, jnp.float32(0), jnp.float32(bits))
        started = es.TQT.started(qparams, integer())
        return Arithmetic(integer(), estimator=es.TQT).resolved(started, ()).scale

    for run in (jax.vmap(there_and_back), jax.jit(jax.vmap(there_and_back))):
        assert_array_equal(run(scales), scales)
    # What lies between goes up to the next one.
    assert_array_equal(jax.vmap(there_and_back)(scales * 1.01), 2 * scales)


def test_thresholds_out_of_all_bounds_stay_numbers():
    def scale(threshold):
        theta = {"log2_threshold": jnp.float32(threshold)}
        qparams = qj.QParams(*map(jnp.float32, (1.0, 0.0, 4.0)), theta)
        return float(Arithmetic(integer(), estimator=es.TQT).resolved(qparams, ()).scale)

    assert scale(-300.0) == 2.0**-126
    assert scale(300.0) == 2.0**127
    assert np.isnan(scale(np.nan))


@pytest.mark.parametrize("estimator", [es.PACT, es.ROUNDED_WIDTH, es.QIL], ids=lambda e: e.name)
def test_faults_of_a_scale_are_kept(estimator):
    fault = float(qj.Fault.BITS_OUTSIDE_FORMAT)
    qparams = qj.QParams(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(4.0))
    started = estimator.started(qparams, integer())
    broken = started._replace(scale=jnp.float32(jnp.nan), zero_point=jnp.float32(fault))
    resolved = Arithmetic(integer(), estimator=estimator).resolved(broken, ())
    assert np.isnan(resolved.scale)
    assert float(resolved.zero_point) == fault
    assert np.isnan(apply(jnp.ones(3), broken, Arithmetic(integer(), estimator=estimator))).all()


def test_learned_widths_find_back_into_their_container():
    format = integer(max_bits=8)

    def size(width):
        theta = {"clip": jnp.float32(1.0), "width": width}
        qparams = qj.QParams(*map(jnp.float32, (0.1, 0.0, 8.0)), theta)
        return es.learned_bits(qparams, format, es.ROUNDED_WIDTH)

    for width in (9.3, 8.0, 0.2):
        assert float(size(jnp.float32(width))) == np.clip(round(width), 1, 8)
        assert float(jax.grad(size)(jnp.float32(width))) == 1.0


def test_a_clip_beyond_the_container_is_its_last_code():
    theta = {"clip": jnp.float32(300.0)}
    qparams = qj.QParams(*map(jnp.float32, (1.0, 0.0, 8.0)), theta)
    arithmetic = Arithmetic(integer(), estimator=es.DIFFERENTIABLE_QUANTIZATION)
    x = jnp.array([100.2, 250.0])
    assert apply(x, qparams, arithmetic).tolist() == [100.0, 127.0]
    to_x = jax.grad(lambda x: apply(x, qparams, arithmetic).sum())(x)
    assert to_x.tolist() == [1.0, 0.0]


def model(weights: qj.Quantizer, activations: qj.Quantizer | None = None):
    f = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": jnp.asarray(RNG.normal(size=(6, 4)).astype(np.float32))}
    x = jnp.asarray(RNG.normal(size=(32, 6)).astype(np.float32))
    scheme = qj.Scheme(weights=weights, activations=activations)
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, x))
    state = qj.observe(f, plan)(qj.init(plan), params, x)[1]
    return f, params, x, plan, state


def test_negative_activations_are_refused_where_codes_start_at_zero():
    for estimator in (es.PACT, es.CLIPPED):
        quantizer = qj.activation_quantizer(estimator=estimator, **UNSIGNED)
        _, params, _, plan, state = model(qj.weight_quantizer(), quantizer)
        with refused(errors.DataError, "negative values"):
            qj.calibrate(plan, state, params)


def test_negative_activations_are_marked_under_a_trace():
    """In each layer of a stack its own; at width 0 nothing is clipped."""

    signs = jnp.asarray([1.0, -1.0, 1.0])[:, None, None]
    params = {"w": signs * jnp.ones((3, 6, 6))}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)

    def layers(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), jnp.abs(x), params["w"])[0]

    scheme = qj.Scheme(activations=qj.activation_quantizer(**UNSIGNED))
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(layers, params, x))
    state = qj.observe(layers, plan)(qj.init(plan), params, x)[1]
    calibrate = jax.jit(lambda state, bits: qj.calibrate(plan, state, params, activation_bits=bits))
    marked = calibrate(state, 8.0)
    (problem,) = qj.check(marked)
    assert problem.what.startswith("negative values")
    assert np.isnan(marked["w"]["activation"].scale).ravel().tolist() == [False, False, True]
    assert qj.check(calibrate(state, 0.0)) == []


def test_a_tail_below_zero_is_not():
    """As GELU and Swish have it."""
    f = lambda p, x: jax.nn.gelu(x) @ p["w"]  # noqa: E731
    params = {"w": jnp.ones((6, 2))}
    x = jnp.asarray(RNG.normal(size=(64, 6)).astype(np.float32))
    scheme = qj.presets.lsq()
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, x))
    state = qj.observe(f, plan)(qj.init(plan), params, x)[1]
    assert qj.check(qj.calibrate(plan, state, params)) == []


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("estimator", [es.QIL, es.DOREFA_WEIGHTS], ids=lambda e: e.name)
@pytest.mark.parametrize("narrow", [True, False])
def test_transformed_weights_keep_their_size(bits, estimator, narrow):
    """The range that was calibrated is the range of what comes out, at every width."""
    quantizer = qj.weight_quantizer(
        bits=bits,
        estimator=estimator,
        format=integer(narrow=narrow),
        granularity=qj.PerTensor(),
    )
    f, params, _, plan, state = model(quantizer)
    qstate = qj.calibrate(plan, state, params)
    for wanted in (bits, 8):
        now = qj.training.with_bits(plan, qstate, weight_bits=wanted)
        y = qj.fake_quantize(f, plan)(now, params, jnp.eye(6))
        largest = float(jnp.abs(params["w"]).max())
        # In two's complement the upper end is one step short of the range.
        steps = 2 ** (wanted - 1) - (1 if narrow else 0)
        reached = max(float(y.max()), -float(y.min()))
        assert largest * (1 - 1.001 / steps) <= reached <= largest * 1.001


def test_data_free_codes_are_those_of_the_estimator():
    for estimator in (es.TQT, es.QIL, es.ROUNDED_WIDTH, es.DOREFA_WEIGHTS):
        quantizer = qj.weight_quantizer(bits=4, estimator=estimator, granularity=qj.PerTensor())
        _, params, _, plan, state = model(quantizer)
        frozen = qj.freeze(plan, qj.calibrate(plan, state, params), params)
        policy = qj.Policy([qj.rule(qj.everything(), qj.Scheme(weights=quantizer))])
        alone = qj.quantize_params(params, policy)
        assert_array_equal(alone["w"].codes, frozen["w"].codes)
        assert_array_equal(alone["w"].dequantize(), frozen["w"].dequantize())


def tied(weights: qj.Quantizer, others: qj.Quantizer):
    f = lambda p, x: (x @ p["w"]) @ p["w"].T  # noqa: E731
    params = {"w": jnp.asarray(RNG.normal(size=(6, 4)).astype(np.float32))}
    x = jnp.ones((2, 6))
    rules = [
        qj.rule(qj.path("w"), qj.Scheme(weights=weights)),
        qj.rule(qj.path("w#1"), qj.Scheme(weights=others)),
    ]
    plan = qj.plan(qj.Policy(rules), qj.sites(f, params, x))
    return params, plan, qj.calibrate(plan, {}, params)


def test_a_tied_weight_has_one_transform():
    tensor = {"granularity": qj.PerTensor(), "bits": 4}
    qil, plain = (qj.weight_quantizer(estimator=e, **tensor) for e in (es.QIL, es.CLIPPED))
    params, plan, qstate = tied(qil, qil)
    qj.freeze(plan, qstate, params)
    moved = qstate["w#1"]["weight"]
    theta = {**moved.theta, "center": moved.theta["center"] * 0.7}
    other = {**qstate, "w#1": {"weight": moved._replace(theta=theta)}}
    with refused(errors.FreezeError, "two sets of parameters"):
        qj.freeze(plan, other, params)
    params, plan, qstate = tied(qj.weight_quantizer(estimator=es.DOREFA_WEIGHTS, **tensor), plain)
    with refused(errors.FreezeError, "two estimators"):
        qj.freeze(plan, qstate, params)


def test_what_is_executed_draws_nothing_for_training():
    noisy = qj.weight_quantizer(bits=4, estimator=es.QUANT_NOISE)
    f, params, x, plan, state = model(noisy, qj.activation_quantizer(estimator=es.QUANT_NOISE))
    qstate = qj.calibrate(plan, state, params)
    frozen = qj.freeze(plan, qstate, params)  # no key
    whole = qj.training.with_parameter(qstate, "rate", 1.0)
    want = jax.jit(qj.fake_quantize(f, plan))(whole, params, x, key=jax.random.key(0))
    for weights in (frozen, params):
        assert_array_equal(jax.jit(qj.execute(f, plan))(qstate, weights, x), want)


def test_a_minifloat_with_exponent_bits_can_learn_its_scale():
    quantizer = qj.weight_quantizer(format=qj.formats.E4M3FN, estimator=es.LSQ)
    f, params, x, plan, state = model(quantizer)
    width = qj.FloatBits(jnp.float32(2), jnp.float32(1))
    entry = qj.calibrate(plan, state, params, weight_bits=width)["w"]["weight"]
    # A range that none reaches: at its bounds LSQ differs from the clipped estimator.
    qstate = {"w": {"weight": entry._replace(scale=np.float32(1.5) * entry.scale)}}

    def loss(qstate):
        return jnp.sum(qj.fake_quantize(f, plan)(qstate, params, x) ** 2)

    to_scale = jax.jit(jax.grad(loss))(qstate)["w"]["weight"].scale
    assert np.isfinite(to_scale).all()
    # LSQ's factor has the highest level of e2m1, which is 4 where NaN takes the last code.
    plain = qj.weight_quantizer(format=qj.formats.E4M3FN)
    f, _, _, other, _ = model(plain)
    reference = jax.grad(lambda q: jnp.sum(qj.fake_quantize(f, other)(q, params, x) ** 2))(qstate)[
        "w"
    ]["weight"].scale
    assert_allclose(to_scale, reference / np.sqrt(6 * 4.0), rtol=1e-4)


def test_check_names_a_learned_parameter_that_is_gone():
    quantizer = qj.activation_quantizer(estimator=es.PACT, **UNSIGNED)
    f = lambda p, x: jax.nn.relu(x) @ p["w"]  # noqa: E731
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    scheme = qj.Scheme(weights=qj.weight_quantizer(), activations=quantizer)
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, x))
    state = qj.observe(f, plan)(qj.init(plan), params, x)[1]
    qstate = qj.calibrate(plan, state, params)
    assert qj.check(qstate) == []
    for bad in (jnp.nan, -1.0, 0.0):
        broken = qj.training.with_parameter(qstate, "clip", bad)
        (problem,) = qj.check(broken)
        assert "parameter of the estimator" in problem.what
        assert problem.operand == "activation"


def test_a_learned_clip_counts_as_clipped():
    quantizer = qj.activation_quantizer(estimator=es.PACT, **UNSIGNED)
    f = lambda p, x: jax.nn.relu(x) @ p["w"]  # noqa: E731
    params = {"w": jnp.ones((6, 2))}
    x = jnp.asarray(RNG.normal(size=(64, 6)).astype(np.float32))
    scheme = qj.Scheme(weights=qj.weight_quantizer(), activations=quantizer)
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, x))
    state = qj.observe(f, plan)(qj.init(plan), params, x)[1]
    qstate = qj.training.with_parameter(qj.calibrate(plan, state, params), "clip", 0.5)
    report = qj.compare(f, plan)(qstate, params, x)
    share = float((np.asarray(x) > 0.5).mean())
    assert_allclose(report["w"].operands["activation"].saturation, share, rtol=1e-5)


@pytest.mark.parametrize("estimator", es.ESTIMATORS, ids=lambda e: e.name)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_nan_stays_nan_and_alone(estimator, signed):
    bits = 1 if Need.ONE_BIT in estimator.needs else 4
    quantizer = qj.Quantizer(
        format=integer(signed=signed),
        bits=bits,
        symmetric=True,
        granularity=qj.PerTensor(),
        estimator=estimator,
    )
    w = jnp.asarray(np.abs(RNG.normal(size=(8, 4))) if not signed else RNG.normal(size=(8, 4)))
    w = w.astype(jnp.float32)
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=quantizer))])
    plan = qj.plan(policy, qj.sites(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((1, 8))))
    qparams = qj.calibrate(plan, {}, {"w": w})["w"]["weight"]
    found = apply(w.at[0, 0].set(jnp.nan), qparams, quantizer.arithmetic, jax.random.key(0))
    expected = jnp.zeros((8, 4), bool).at[0, 0].set(True)
    assert_array_equal(jnp.isnan(found), expected)


def test_intervals_need_more_than_a_sign():
    with refused(errors.EstimatorError, "more than one bit"):
        qj.presets.qil(weight_bits=1)
