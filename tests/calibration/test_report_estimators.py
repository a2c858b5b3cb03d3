"""What an estimator changes in the value is in the report: it says what simulation does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import estimators, ranges
from quantjax.calibration import calibration_report

W = jax.random.normal(jax.random.key(0), (64, 16))
RULES = (ranges.MSE, ranges.MIN_MAX, ranges.percentile(0.9))
CHANGING = {
    "dorefa": estimators.DOREFA_WEIGHTS,
    "tqt": estimators.TQT,
    "pact": estimators.PACT,
    "qil": estimators.QIL,
    "rounded_width": estimators.ROUNDED_WIDTH,
    "uhlich": estimators.DIFFERENTIABLE_QUANTIZATION,
    "lsq": estimators.LSQ,
    "quant_noise": estimators.QUANT_NOISE,
}


def f(params, x):
    return x @ params["w"]


@functools.cache
def planned(name, granularity):
    weights = qj.weight_quantizer(bits=3, estimator=CHANGING[name], granularity=granularity)
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    return qj.plan(policy, qj.sites(f, {"w": W}, jnp.eye(64)))


def sqnr(plan, rule) -> float:
    """In float64, of the weight that the simulated model multiplies."""
    qstate = qj.calibrate(plan, {}, {"w": W}, weight_rule=rule)
    key = jax.random.key(0)
    theta = qstate["w"]["weight"].theta
    if "rate" in (theta or {}):  # all entries, as the report has it
        theta = {**theta, "rate": jnp.ones_like(theta["rate"])}
        qstate = {"w": {"weight": qstate["w"]["weight"]._replace(theta=theta)}}
    used = qj.fake_quantize(f, plan)(qstate, {"w": W}, jnp.eye(64), key=key)
    x, q = np.asarray(W, np.float64), np.asarray(used, np.float64)
    return 10 * np.log10((x**2).sum() / ((q - x) ** 2).sum())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("granularity", [qj.PerTensor(), qj.PerChannel()], ids=str)
@pytest.mark.parametrize("name", sorted(CHANGING))
def test_figures_are_those_of_the_weight_that_is_multiplied(name, granularity):
    plan = planned(name, granularity)
    report = calibration_report(plan, {}, {"w": W}, rules=RULES)["w", "weight"]
    figures = {rule.name: sqnr(plan, rule) for rule in RULES}
    for rule in RULES:
        np.testing.assert_allclose(report[rule.name].sqnr, figures[rule.name], atol=1e-3)
    assert report.best.rule == max(figures, key=figures.__getitem__)


def test_the_outermost_levels_are_those_in_use():
    """TQT's scale is a power of two, not the rule's."""
    plan = planned("tqt", qj.PerTensor())
    qstate = qj.calibrate(plan, {}, {"w": W}, weight_rule=ranges.MSE)
    used = qj.fake_quantize(f, plan)(qstate, {"w": W}, jnp.eye(64))
    found = calibration_report(plan, {}, {"w": W}, rules=RULES)["w", "weight"]["mse"]
    assert found.clip_high.ravel()[0] == used.max()
    assert found.clip_low.ravel()[0] <= used.min()
