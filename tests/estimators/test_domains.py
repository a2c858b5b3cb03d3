"""Parameters of estimators that mean nothing: NaN where computed, a problem for ``qj.check``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, estimators
from quantjax.affine import QParams
from tests.models import dense, policy, ready

NAN, INF = float("nan"), float("inf")
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
KEY = jax.random.key(0)
CASE = dense()

# Estimator, bits, name of the parameter, good values, bad ones.
DOMAINS = {
    "rate": (estimators.QUANT_NOISE, 4, [0.0, 0.5, 1.0], [NAN, -0.2, 1.5]),
    "alpha": (estimators.DSQ, 4, [0.02, 0.5], [NAN, 0.0, 1.0, 1.5]),
    "log2_threshold": (estimators.TQT, 4, [-3.0, 2.0], [NAN, INF, -INF]),
    "center": (estimators.QIL, 4, [0.5], [NAN, INF]),
    "distance": (estimators.QIL, 4, [0.5], [NAN, 0.0, -1.0, INF]),
    "gamma": (estimators.QIL, 4, [1.0, 0.3], [NAN, 0.0, -1.0]),
    "beta": (estimators.SWISH_SIGN, 1, [5.0], [NAN, 0.0, -5.0]),
    "sharpness": (estimators.ERROR_DECAY, 1, [0.1, 10.0], [NAN, 0.0, -1.0]),
}


def applied(name, value):
    estimator, bits, *_ = DOMAINS[name]
    format = qj.integer()
    qparams = QParams(jnp.float32(0.25), jnp.float32(0.0), jnp.float32(bits))
    theta = {**estimator.started(qparams, format).theta, name: value}
    return qj.fake_quant(
        X, 0.25, bits=bits, format=format, theta=theta, estimator=estimator, key=KEY
    )


@pytest.mark.parametrize("name", DOMAINS)
def test_outside_its_domain_all_is_nan(name):
    *_, good, bad = DOMAINS[name]
    found = jax.jit(jax.vmap(lambda v: applied(name, v)))(jnp.asarray([*good, *bad], jnp.float32))
    is_nan = np.isnan(found).reshape(len(found), -1)
    assert not is_nan[: len(good)].any()
    assert is_nan[len(good) :].all(axis=1).all()


@pytest.mark.parametrize("name", DOMAINS)
def test_at_bypass_nothing_is_changed(name):
    """A parameter says nothing where there is no quantizer."""
    estimator, _, _, bad = DOMAINS[name]
    qparams = QParams(jnp.float32(0.25), jnp.float32(0.0), jnp.float32(4.0))
    theta = {**estimator.started(qparams, qj.integer()).theta, name: jnp.float32(bad[0])}
    y = qj.fake_quant(X, 0.25, bits=0, theta=theta, estimator=estimator, key=KEY)
    np.testing.assert_array_equal(y, X)


@pytest.mark.parametrize("name", DOMAINS)
def test_check_says_so(name):
    estimator, bits, good, bad = DOMAINS[name]
    weights = qj.weight_quantizer(bits=bits, estimator=estimator, granularity=qj.PerTensor())
    plan, _, qstate = ready(CASE, policy(weights))
    assert not qj.check(qstate, plan)
    for value in good:
        assert not qj.check(qj.training.with_parameter(qstate, name, value), plan)
    for value in bad:
        (problem,) = qj.check(qj.training.with_parameter(qstate, name, value), plan)
        assert "a parameter of the estimator" in problem.what


@pytest.mark.parametrize("name", DOMAINS)
def test_freezing_refuses_what_simulation_makes_nan(name):
    estimator, bits, good, bad = DOMAINS[name]
    weights = qj.weight_quantizer(bits=bits, estimator=estimator, granularity=qj.PerTensor())
    plan, _, qstate = ready(CASE, policy(weights))
    for value in good:
        qj.freeze(plan, qj.training.with_parameter(qstate, name, value), CASE.params)
    for value in bad:
        broken = qj.training.with_parameter(qstate, name, value)
        y = qj.fake_quantize(CASE.f, plan)(broken, CASE.params, CASE.x, key=KEY)
        assert np.isnan(y).all()
        with pytest.raises(errors.FreezeError, match="scale"):
            qj.freeze(plan, broken, CASE.params)
