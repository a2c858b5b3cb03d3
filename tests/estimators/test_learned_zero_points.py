"""LSQ+: a zero point that training moves out of the codes is used where they end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.estimators import CLIPPED, LSQ_PLUS
from tests.models import Case, assert_same_bits, normal
from tests.refused import refused

pytestmark = pytest.mark.thinned(2)

CODES = {
    "unsigned": (qj.integer(max_bits=4, signed=False), 0.0, 15.0),
    "signed": (qj.integer(max_bits=4), -8.0, 7.0),
}
X = normal(0, 6, 8)


@functools.cache
def both(codes: str):
    """The values and the gradient of the zero point, of what is given."""
    format, _, _ = CODES[codes]

    def run(x, zero):
        y = qj.fake_quant(x, 0.25, zero, bits=4, format=format, estimator=LSQ_PLUS)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("far", [0.6, 3.3, 1000.0, 1e9])
@pytest.mark.parametrize("codes", CODES)
def test_beyond_the_codes_it_is_at_their_end_and_its_gradient_passes(codes, far):
    _, low, high = CODES[codes]
    for end, outside in ((low, low - far), (high, high + far)):
        (_, want), want_gradients = both(codes)(X, end)
        (_, found), gradients = both(codes)(X, outside)
        assert_same_bits(found, want)
        for got, at_the_end in zip(gradients, want_gradients, strict=True):
            assert_same_bits(got, at_the_end)
        assert float(gradients[1]) != 0.0


@pytest.mark.parametrize("codes", CODES)
def test_among_the_codes_nothing_is_new(codes):
    _, low, high = CODES[codes]
    for zero in np.linspace(low, high, 7):
        (_, found), _ = both(codes)(X, zero)
        levels = np.clip(np.rint(np.asarray(X) / 0.25) + np.rint(zero), low, high)
        np.testing.assert_array_equal(found, (levels - np.rint(zero)) * np.float32(0.25))


def relu_layer() -> Case:
    params = {"a": normal(1, 8, 8), "b": jnp.abs(normal(2, 8, 3))}
    return Case(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, X)


def stacked() -> Case:
    def f(params, x):
        return jax.lax.scan(lambda c, w: (jax.nn.relu(c @ w), None), x, params["b"])[0]

    return Case(f, {"b": 0.5 * normal(3, 2, 8, 8)}, X)


def prepared(case: Case, estimator):
    """A plan for ``b`` with learned zero points of activations and of weights, calibrated."""
    activations = qj.activation_quantizer(bits=4, estimator=estimator)
    weights = qj.weight_quantizer(bits=4, symmetric=False, estimator=estimator)
    scheme = qj.Scheme(weights=weights, activations=activations)
    plan = qj.plan(
        qj.Policy([qj.rule(qj.path("b"), scheme)]), qj.sites(case.f, case.params, case.x)
    )
    _, state = jax.jit(qj.observe(case.f, plan))(qj.init(plan), case.params, case.x)
    return plan, qj.calibrate(plan, state, case.params)


def moved(qstate, by: float):
    return {
        name: {k: q._replace(zero_point=q.zero_point + by) for k, q in operands.items()}
        for name, operands in qstate.items()
    }


@pytest.mark.parametrize("by", [-400.0, 400.0])
@pytest.mark.parametrize("case", [relu_layer, stacked])
def test_what_training_moved_is_executed_as_it_is_simulated(case, by):
    case = case()
    plan, qstate = prepared(case, LSQ_PLUS)
    assert "int8" in str(plan)
    out = moved(qstate, by)
    simulated = jax.jit(qj.fake_quantize(case.f, plan))(out, case.params, case.x)
    assert np.isfinite(simulated).all()
    frozen = qj.freeze(plan, out, case.params)
    assert_same_bits(jax.jit(qj.execute(case.f, plan))(out, frozen, case.x), simulated)
    assert_same_bits(qj.execute(case.f, plan)(out, frozen, case.x), simulated)


def test_where_nothing_keeps_it_execution_says_what_does():
    case = relu_layer()
    plan, qstate = prepared(case, CLIPPED)
    out = moved(qstate, 0.0)
    activation = out["b"]["activation"]
    out["b"]["activation"] = activation._replace(zero_point=activation.zero_point - 400.0)
    frozen = qj.freeze(plan, out, case.params)
    with refused(errors.FreezeError, "a zero point outside 0..255", "LSQ_PLUS"):
        qj.execute(case.f, plan)(out, frozen, case.x)


@pytest.mark.parametrize("zero", [0.0, 0.4, 9.0])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_symmetric_quantizer_has_none_in_simulation_and_execution(narrow, zero):
    """Narrow unsigned codes begin at 1: zero is no code of theirs, and needs none."""
    case = relu_layer()
    activations = qj.activation_quantizer(
        bits=4,
        symmetric=True,
        format=qj.integer(signed=False, narrow=narrow),
        estimator=LSQ_PLUS,
    )
    scheme = qj.Scheme(weights=qj.weight_quantizer(), activations=activations)
    plan = qj.plan(
        qj.Policy([qj.rule(qj.path("b"), scheme)]), qj.sites(case.f, case.params, case.x)
    )
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    qstate = qj.calibrate(plan, state, case.params)
    assert qj.check(qstate, plan) == []
    frozen = qj.freeze(plan, qstate, case.params)
    qstate["b"]["activation"] = qstate["b"]["activation"]._replace(
        zero_point=jnp.full((1, 1), zero)
    )
    simulated = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    assert_same_bits(jax.jit(qj.execute(case.f, plan))(qstate, frozen, case.x), simulated)
    assert np.isnan(simulated).all() == (zero != 0.0)
