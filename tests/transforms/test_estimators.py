"""Estimators through the verbs: calibrated, simulated, frozen, executed, stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import estimators as es
from quantjax import storage

pytestmark = pytest.mark.thinned(13)

RNG = np.random.default_rng(5)
LAYERS, WIDTH = 3, 8
BINARY = (es.APPROX_SIGN, es.SWISH_SIGN, es.ERROR_DECAY, es.MAGNITUDE_AWARE)
FOR_WEIGHTS = tuple(e for e in es.ESTIMATORS if e not in (es.LSQ_PLUS, es.DOREFA_ACTIVATIONS))
FOR_ACTIVATIONS = tuple(e for e in es.ESTIMATORS if e is not es.DOREFA_WEIGHTS)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def flat(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["last"].T


def scanned(params, x):
    def layer(h, w):
        return jax.nn.relu(h @ w) + h, None

    return lax.scan(layer, x, params["layers"])[0] @ params["last"].T


MODELS = {
    "flat": (flat, {"first": normal(WIDTH, 16), "last": normal(5, 16)}),
    "scanned": (scanned, {"layers": normal(LAYERS, WIDTH, WIDTH), "last": normal(5, WIDTH)}),
}
X = jnp.abs(normal(12, WIDTH))
NAMES = pytest.mark.parametrize("name", MODELS)


def _activations(estimator: es.Estimator) -> qj.Quantizer:
    """Asymmetric, or from 0 where the estimator has no zero point."""
    if estimator in BINARY:
        return qj.activation_quantizer(bits=1, symmetric=True, estimator=estimator)
    if es.Need.NO_ZERO_POINT not in estimator.needs:
        return qj.activation_quantizer(bits=4, estimator=estimator)
    format = qj.integer(signed=False)
    return qj.activation_quantizer(bits=4, estimator=estimator, format=format, symmetric=True)


def planned(name: str, weights=es.CLIPPED, activations=es.CLIPPED, **options):
    f, params = MODELS[name]
    binary = weights in BINARY
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=1 if binary else 4, estimator=weights, **options),
        activations=_activations(activations),
    )
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, X))
    state = qj.observe(f, plan)(qj.init(plan), params, X)[1]
    clipping = qj.ranges.percentile(0.9)
    return f, params, plan, qj.calibrate(plan, state, params, activation_rule=clipping)


def whole(qstate):
    """Quant-Noise as it is evaluated: every entry quantized."""

    def of(qparams):
        theta = dict(qparams.theta or {})
        if "rate" in theta:
            theta["rate"] = jnp.ones_like(theta["rate"])
        return qparams._replace(theta=theta or ())

    return jax.tree.map(of, qstate, is_leaf=lambda leaf: isinstance(leaf, qj.QParams))


def key_for(*estimators):
    return jax.random.key(0) if es.QUANT_NOISE in estimators else None


@NAMES
@pytest.mark.parametrize("estimator", FOR_WEIGHTS, ids=lambda e: e.name)
def test_frozen_weights_execute_as_they_were_simulated(name, estimator):
    f, params, plan, qstate = planned(name, weights=estimator)
    qstate, key = whole(qstate), key_for(estimator)
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X, key=key)
    frozen = jax.jit(lambda q, p: qj.freeze(plan, q, p, key=key))(qstate, params)
    executed = jax.jit(qj.execute(f, plan))(qstate, frozen, X)
    assert_array_equal(executed, simulated)
    # The codes carry what was learned in scale and width, and no parameters of the estimator.
    leaves = jax.tree.leaves(frozen, is_leaf=lambda q: isinstance(q, qj.QTensor))
    assert all(isinstance(leaf, qj.QTensor) and leaf.qparams.theta == () for leaf in leaves)
    assert np.abs(np.asarray(simulated)).max() > 0.1


@NAMES
@pytest.mark.parametrize("estimator", FOR_ACTIVATIONS, ids=lambda e: e.name)
def test_activations_execute_as_they_were_simulated(name, estimator):
    f, params, plan, qstate = planned(name, activations=estimator)
    qstate, key = whole(qstate), key_for(estimator)
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X, key=key)
    frozen = qj.freeze(plan, qstate, params)
    assert_array_equal(jax.jit(qj.execute(f, plan))(qstate, frozen, X, key=key), simulated)


@NAMES
def test_everything_that_is_learned_gets_a_gradient(name):
    for weights, activations, learned in [
        (es.LSQ, es.LSQ_PLUS, {"scale"}),
        (es.TQT, es.PACT, {"log2_threshold", "clip"}),
        (es.QIL, es.LSQ_FEATURES, {"center", "distance", "gamma"}),
        (es.DSQ, es.DSQ, {"alpha"}),
        (es.ROUNDED_WIDTH, es.ROUNDED_WIDTH, {"clip", "width"}),
        (es.DIFFERENTIABLE_QUANTIZATION, es.CLIPPED, {"clip", "scale"}),
    ]:
        f, params, plan, qstate = planned(name, weights=weights, activations=activations)
        target = f(params, X)

        def loss(qstate, params, f=f, plan=plan, target=target):
            return jnp.mean((qj.fake_quantize(f, plan)(qstate, params, X) - target) ** 2)

        to_qstate, to_params = jax.jit(jax.grad(loss, (0, 1)))(qstate, params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((to_qstate, to_params)))
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(to_params))
        moved = {
            parameter
            for operands in to_qstate.values()
            for qparams in operands.values()
            for parameter, value in {"scale": qparams.scale, **(qparams.theta or {})}.items()
            if (np.asarray(value) != 0).any()
        }
        assert learned <= moved


@NAMES
def test_zero_points_of_symmetric_quantizers_are_not_moved(name):
    """An optimizer of all QParams would make them fractions, and freezing would refuse them."""
    f, params, plan, qstate = planned(name, weights=es.LSQ, activations=es.LSQ_PLUS)

    def loss(qstate):
        return jnp.sum(qj.fake_quantize(f, plan)(qstate, params, X) ** 2)

    gradient = jax.jit(jax.grad(loss))(qstate)
    assert all((g["weight"].zero_point == 0).all() for g in gradient.values())
    assert any((g["activation"].zero_point != 0).any() for g in gradient.values())
    moved = jax.tree.map(lambda q, g: q - 1e-4 * g, qstate, gradient)
    qj.freeze(plan, moved, params)


def test_descending_lowers_the_loss_of_what_is_learned():
    """The gradients point downhill: each method's parameters alone, the weights held."""
    for weights, activations in [
        (es.LSQ, es.LSQ_FEATURES),
        (es.TQT, es.PACT),
        (es.QIL, es.LSQ_PLUS),
        (es.ROUNDED_WIDTH, es.CLIPPED),
    ]:
        f, params, plan, qstate = planned("flat", weights=weights, activations=activations)
        target = f(params, X)

        @jax.jit
        def loss(qstate, f=f, plan=plan, params=params, target=target):
            return jnp.mean((qj.fake_quantize(f, plan)(qstate, params, X) - target) ** 2)

        first, gradient = loss(qstate), jax.jit(jax.grad(loss))
        best = float(first)
        for _ in range(120):
            to_qstate = gradient(qstate)
            # Signs, because the gradients of the methods are of very different sizes.
            qstate = jax.tree.map(lambda q, g: q - 2e-3 * jnp.sign(g), qstate, to_qstate)
            best = min(best, float(loss(qstate)))
        assert best < 0.93 * float(first), (weights.name, activations.name)


def test_learned_widths_are_executed():
    f, params, plan, qstate = planned("flat", weights=es.ROUNDED_WIDTH)

    def narrower(qparams):
        theta = {**qparams.theta, "width": jnp.full_like(qparams.theta["width"], 2.6)}
        return qparams._replace(theta=theta)

    qstate = {
        name: {**operands, "rhs" if "rhs" in operands else "weight": narrower(operands["weight"])}
        for name, operands in qstate.items()
    }
    frozen = qj.freeze(plan, qstate, params)
    tensor = frozen["first"]
    assert (np.asarray(tensor.qparams.bits) == 3).all()
    assert np.abs(np.asarray(tensor.codes)).max() == 3
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X)
    assert_array_equal(jax.jit(qj.execute(f, plan))(qstate, frozen, X), simulated)


@NAMES
def test_ranges_of_the_tensor_at_hand_keep_what_is_set_by_hand(name):
    """SAWB and IR-Net: the scale is live, and theta is the schedule's."""
    live = qj.RangeMode.LIVE
    f, params, plan, qstate = planned(name, weights=es.ERROR_DECAY, range=live, rule=qj.ranges.XNOR)

    def at(sharpness):
        def of(qparams):
            theta = {k: jnp.full_like(v, sharpness) for k, v in (qparams.theta or {}).items()}
            return qparams._replace(theta=theta or ())

        return jax.tree.map(of, qstate, is_leaf=lambda leaf: isinstance(leaf, qj.QParams))

    def value(params, qstate):
        return qj.fake_quantize(f, plan)(qstate, params, X).sum()

    both = jax.jit(jax.value_and_grad(value))
    (soft, to_soft), (sharp, to_sharp) = both(params, at(0.1)), both(params, at(8.0))
    assert soft == sharp
    leaf = "last"
    assert not np.allclose(to_soft[leaf], to_sharp[leaf])
    # A sharp bump reaches fewer weights.
    assert (np.abs(to_sharp[leaf]) < 1e-6).sum() > (np.abs(to_soft[leaf]) < 1e-6).sum()


def test_sawb_follows_the_weights():
    options = {"range": qj.RangeMode.LIVE, "rule": qj.ranges.SAWB, "granularity": qj.PerTensor()}
    f, params, plan, qstate = planned("flat", weights=es.SAWB, **options)
    run = jax.jit(qj.fake_quantize(f, plan))
    doubled = {**params, "last": 2 * params["last"]}
    assert_allclose(run(qstate, doubled, X), 2 * run(qstate, params, X), rtol=1e-5)


@NAMES
def test_bypass_is_the_float_model_whatever_the_estimator(name):
    for weights, activations in [(es.QIL, es.PACT), (es.DOREFA_WEIGHTS, es.TQT), (es.EWGS, es.DSQ)]:
        f, params, plan, qstate = planned(name, weights=weights, activations=activations)
        off = {
            site: {
                key: qparams._replace(bits=jnp.zeros_like(qparams.bits))
                for key, qparams in operands.items()
            }
            for site, operands in qstate.items()
        }

        def loss(params, g):
            return jnp.sum(g(params, X) ** 2)

        quantized = lambda params, x, f=f, plan=plan, q=off: qj.fake_quantize(f, plan)(q, params, x)  # noqa: E731
        got = jax.jit(jax.value_and_grad(lambda p, g=quantized: loss(p, g)))(params)
        want = jax.jit(jax.value_and_grad(lambda p, g=f: loss(p, g)))(params)
        jax.tree.map(assert_array_equal, got, want)


def test_what_is_learned_goes_to_disk(tmp_path):
    f, params, plan, qstate = planned("scanned", weights=es.QIL, activations=es.PACT)
    storage.save_quantization(tmp_path / "plan.json", plan=plan, qstate=qstate)
    saved = storage.load_quantization(tmp_path / "plan.json")
    again = storage.plan_from(saved, qj.sites(f, params, X))
    assert again == plan
    assert jax.tree.structure(saved.qstate) == jax.tree.structure(qstate)
    for a, b in zip(jax.tree.leaves(saved.qstate), jax.tree.leaves(qstate), strict=True):
        assert_array_equal(a, b)


def test_missing_parameters_are_named_with_their_edit():
    f, params, plan, qstate = planned("flat", activations=es.PACT)
    bare = {
        site: {key: qparams._replace(theta=()) for key, qparams in operands.items()}
        for site, operands in qstate.items()
    }
    with pytest.raises(qj.errors.EstimatorError, match="clip"):
        qj.fake_quantize(f, plan)(bare, params, X)


def test_compare_and_the_calibration_report_take_estimators():
    f, params, plan, qstate = planned("flat", weights=es.TQT, activations=es.PACT)
    report = jax.jit(qj.compare(f, plan))(qstate, params, X)
    assert all(0 < site.sqnr < 60 for site in report.sites.values())
