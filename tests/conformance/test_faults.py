"""Acceptance: under a trace nothing can raise; outputs are NaN, and ``qj.check`` says why."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax import errors
from quantjax.affine import Fault, QParams
from tests.models import Ready, assert_same_bits, mlp, normal, planned, ready
from tests.refused import refused

CASE = mlp()
FIRST, SECOND = "params/Dense_0/kernel", "params/Dense_1/kernel"


@pytest.fixture(scope="module")
def fixed() -> Ready:
    return ready(CASE, qj.uniform_policy())


@pytest.fixture(scope="module")
def observe(fixed) -> Any:
    return jax.jit(qj.observe(CASE.f, fixed.plan))


@pytest.fixture(scope="module")
def run(fixed) -> Any:
    """Calibrate and run, all of it traced; the qstate comes back to be checked."""

    @jax.jit
    def program(state: Any, bits: jax.Array, params: Any, x: jax.Array) -> Any:
        qstate = qj.calibrate(fixed.plan, state, params, weight_bits=bits, activation_bits=bits)
        return qj.fake_quantize(CASE.f, fixed.plan)(qstate, params, x), qstate

    return program


def reasons(qstate: Any) -> set[tuple[str, str, str]]:
    return {(p.site, p.operand, p.what) for p in qj.check(qstate)}


NEVER = "calibration was never run"
NOT_FINITE = "the range holds NaN or infinity, or nothing was seen of some channel"
OUTSIDE = "the width is outside the format"


def test_good_values_have_no_problem(fixed, run):
    y, qstate = run(fixed.state, 8.0, CASE.params, CASE.x)
    assert qj.check(qstate) == []
    assert np.isfinite(y).all()


def test_calibration_that_was_never_run(fixed, run):
    y, qstate = run(qj.init(fixed.plan), 8.0, CASE.params, CASE.x)
    assert np.isnan(y).all()
    assert reasons(qstate) == {(FIRST, "activation", NEVER), (SECOND, "activation", NEVER)}


@pytest.mark.parametrize("bits", [9.0, -1.0, 3.5, np.nan, np.inf])
def test_a_width_outside_the_format(fixed, run, bits):
    y, qstate = run(fixed.state, bits, CASE.params, CASE.x)
    assert np.isnan(y).all()
    assert len(qj.check(qstate)) == 4
    assert {what for _, _, what in reasons(qstate)} == {OUTSIDE}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_calibration_batch_that_is_not_finite(fixed, observe, run, bad):
    _, state = observe(fixed.state, CASE.params, CASE.x.at[3, 0].set(bad))
    y, qstate = run(state, 8.0, CASE.params, CASE.x)
    assert np.isnan(y).all()
    assert (FIRST, "activation", NOT_FINITE) in reasons(qstate)
    # What was there before is untouched, and stays of use.
    assert_same_bits(run(fixed.state, 8.0, CASE.params, CASE.x)[1], fixed.qstate)


def test_a_mask_that_leaves_nothing_counts_as_no_batch(fixed, observe, run):
    nothing = jnp.zeros(6, bool)
    fresh = qj.init(fixed.plan)
    y, state = observe(fresh, CASE.params, CASE.x, where=nothing)
    assert_same_bits(state, fresh)
    assert_same_bits(y, jax.jit(CASE.f)(CASE.params, CASE.x))
    y, qstate = run(state, 8.0, CASE.params, CASE.x)
    assert np.isnan(y).all()
    assert {what for _, _, what in reasons(qstate)} == {NEVER}
    _, state = observe(fixed.state, CASE.params, 100.0 * CASE.x, where=nothing)
    assert_same_bits(state, fixed.state)


def test_a_masked_nan_does_no_harm_under_jit(fixed, observe):
    keep = jnp.arange(6) != 4
    _, state = observe(qj.init(fixed.plan), CASE.params, CASE.x.at[4].set(jnp.nan), where=keep)
    assert qj.check(qj.calibrate(fixed.plan, state, CASE.params)) == []


def test_a_weight_that_is_not_finite(fixed, run):
    broken = jax.tree.map(lambda leaf: leaf, CASE.params)
    broken["params"]["Dense_1"]["kernel"] = (
        broken["params"]["Dense_1"]["kernel"].at[2, 3].set(jnp.inf)
    )
    y, qstate = run(fixed.state, 8.0, broken, CASE.x)
    assert reasons(qstate) == {(SECOND, "weight", NOT_FINITE)}
    assert np.isnan(np.asarray(y)[:, 3]).all()  # that channel alone
    assert np.isfinite(np.asarray(y)[:, :3]).all()


def test_a_live_range_at_a_width_outside_the_format():
    """Its scale is not in the qstate; the reason is all the same."""
    plan = planned(CASE, qj.uniform_policy(activation_granularity=qj.PerToken()))
    qstate = jax.jit(lambda b: qj.calibrate(plan, {}, CASE.params, activation_bits=b))(11.0)
    assert reasons(qstate) == {(FIRST, "activation", OUTSIDE), (SECOND, "activation", OUTSIDE)}
    run = qj.fake_quantize(CASE.f, plan)
    assert np.isnan(jax.jit(run)(qstate, CASE.params, CASE.x)).all()
    with refused(errors.BitsError, "11.0 bits in the qstate", FIRST, "activation"):
        run(qstate, CASE.params, CASE.x)


@pytest.mark.parametrize("mapper", ["vmap", "map"])
def test_the_lanes_of_a_sweep_are_named(fixed, run, mapper):
    bits = jnp.array([8.0, 9.0, 4.0, 0.0, 2.5])

    def cell(b: jax.Array) -> Any:
        return run(fixed.state, b, CASE.params, CASE.x)

    y, qstates = jax.vmap(cell)(bits) if mapper == "vmap" else lax.map(cell, bits)
    problems = qj.check(qstates)
    assert {p.lanes for p in problems} == {(1, 4)}
    assert len(problems) == 4
    assert "lanes [1, 4]" in str(problems[0])
    assert np.isnan(y).all(axis=(1, 2)).tolist() == [False, True, False, False, True]
    assert np.isfinite(np.asarray(y)[[0, 2, 3]]).all()
    with refused(errors.CalibrationError, FIRST, "jax.vmap or jax.lax.map"):
        qj.fake_quantize(CASE.f, fixed.plan)(qstates, CASE.params, CASE.x)


def test_one_lane_may_hold_several_reasons(fixed):
    """States of several models: one was never observed, one saw NaN, one is well."""
    observed = qj.observe(CASE.f, fixed.plan)
    x = jnp.stack([CASE.x, CASE.x.at[0, 0].set(jnp.nan), CASE.x])
    keep = jnp.stack([jnp.ones(6, bool), jnp.ones(6, bool), jnp.zeros(6, bool)])
    _, states = jax.vmap(lambda x, k: observed(qj.init(fixed.plan), CASE.params, x, where=k))(
        x, keep
    )
    qstates = jax.vmap(lambda s: qj.calibrate(fixed.plan, s, CASE.params))(states)
    lanes = {p.what: p.lanes for p in qj.check(qstates) if p.site == FIRST}
    assert lanes == {NOT_FINITE: (1,), NEVER: (2,)}


@pytest.mark.parametrize("scale", [0.0, -0.5, np.inf])
def test_a_learned_scale_that_left_the_positive_numbers(fixed, scale):
    qparams = fixed.qstate[FIRST]["weight"]
    moved = qparams._replace(scale=qparams.scale.at[0, 2].set(scale))
    (problem,) = qj.check({FIRST: {"weight": moved}})
    assert problem.what == "a scale is not a positive finite number"
    assert "logarithm" in problem.fix
    assert problem.lanes == ()


def test_tracers_cannot_be_checked(fixed):
    with refused(errors.CalibrationError, FIRST, "return the qstate"):
        jax.jit(lambda q: qj.check(q) and None)(fixed.qstate)


def test_problems_of_all_sites_are_listed_in_order():
    fault = jnp.full((1, 1), float(Fault.NOT_FINITE))
    broken = QParams(jnp.full((1, 1), jnp.nan), fault, jnp.float32(8))
    fine = QParams(jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.float32(8))
    qstate = {"b": {"weight": broken, "activation": fine}, "a": {"activation": broken}}
    found = [(p.site, p.operand, p.what) for p in qj.check(qstate)]
    assert found == [("b", "weight", NOT_FINITE), ("a", "activation", NOT_FINITE)]


def test_nan_inputs_of_a_good_qstate_stay_nan(fixed):
    x = normal(9, 6, 8).at[1, 1].set(jnp.nan)
    y = np.asarray(qj.fake_quantize(CASE.f, fixed.plan)(fixed.qstate, CASE.params, x))
    assert np.isnan(y[1]).all()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()
