"""Widths that the container does not hold: refused where they are known, NaN where they are not.

The simulation would use codes that the frozen integers do not have.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, formats
from quantjax.affine import Fault
from quantjax.training import with_bits
from tests.models import assert_same_bits, dense, normal, planned
from tests.refused import refused

CASE = dense()
FORMATS = {"integer": qj.integer(), "minifloat": formats.E4M3FN, "powers": formats.inq(max_bits=8)}
NONE = [-1.0, -1e-7, 0.3, 8.5, 9.0, 17.0, np.nan, np.inf]


def quantized(format):
    quantizer = qj.weight_quantizer(format=format)
    plan = planned(
        CASE,
        qj.Policy(
            [
                qj.rule(
                    qj.weighted(),
                    qj.Scheme(weights=quantizer, activations=qj.activation_quantizer()),
                )
            ]
        ),
    )
    _, state = qj.observe(CASE.f, plan)(qj.init(plan), CASE.params, CASE.x)
    return plan, qj.calibrate(plan, state, CASE.params)


def replaced(qstate, key, **fields):
    q = qstate["w"][key]
    fields = {name: jnp.full_like(getattr(q, name), value) for name, value in fields.items()}
    return {"w": {**qstate["w"], key: q._replace(**fields)}}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("bits", NONE)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_known_widths_are_refused_by_every_verb(name, bits):
    plan, qstate = quantized(FORMATS[name])
    other = replaced(qstate, "weight", bits=bits)
    for run in (
        lambda: qj.fake_quantize(CASE.f, plan)(other, CASE.params, CASE.x),
        lambda: (
            jax.jit(qj.fake_quantize(CASE.f, plan)).lower(qstate, CASE.params, CASE.x)
            and jax.jit(lambda p: qj.fake_quantize(CASE.f, plan)(other, p, CASE.x))(CASE.params)
        ),
        lambda: qj.freeze(plan, other, CASE.params),
        lambda: qj.execute(CASE.f, plan)(other, CASE.params, CASE.x),
        lambda: qj.compare(CASE.f, plan)(other, CASE.params, CASE.x),
    ):
        with refused(errors.BitsError, "in the qstate", "site w", "weight", "container of 8"):
            run()


@pytest.mark.parametrize("rule", [qj.ranges.MIN_MAX, qj.ranges.SAWB, qj.ranges.KL_TENSORRT])
def test_a_width_that_arithmetic_left_beside_a_whole_number_is_that_one(rule):
    """``jnp.linspace(1, 16, 16)`` has 7.0000005, and rules take the whole part of a width."""
    plan, qstate = quantized(qj.integer())
    _, state = qj.observe(CASE.f, plan)(qj.init(plan), CASE.params, CASE.x)
    at = lambda bits: qj.calibrate(  # noqa: E731
        plan, state, CASE.params, weight_bits=bits, activation_bits=bits, rule=rule
    )
    want, traced = at(7), jax.jit(at)
    beside = [np.float32(6.9999995), jnp.float32(7.0000005), 6.9999999, {"w": 7.0000001}]
    for width in beside:
        assert_same_bits(at(width), want)
        assert_same_bits(traced(width), traced(7.0))
    moved = with_bits(plan, qstate, weight_bits=beside[0])
    assert_same_bits(moved, with_bits(plan, qstate, weight_bits=7))
    minifloat, _ = quantized(formats.E4M3FN)
    parts = [qj.FloatBits(e, m) for e, m in ((4.0000005, 2.9999998), (4, 3))]
    found = [qj.calibrate(minifloat, state, CASE.params, weight_bits=bits) for bits in parts]
    assert_same_bits(*found)
    for width in (6.99, 7.5, [7.0, 7.0], 5e-4, -5e-4):  # those next to 0 are no bypass
        with refused(errors.BitsError, "site w"):
            at(width)
    for width in (6.99, 5e-4, -5e-4):
        assert np.isnan(traced(width)["w"]["weight"].scale).all()
    for width in (jax.ShapeDtypeStruct((), jnp.float32), [jax.ShapeDtypeStruct((), jnp.float32)]):
        with refused(errors.ArgumentError, "a width is a ShapeDtypeStruct"):
            at(width)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("key", ["weight", "activation"])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_traced_widths_are_nan_lane_by_lane(name, key):
    plan, qstate = quantized(FORMATS[name])

    def simulated(bits):
        other = replaced(qstate, key, bits=bits)
        return qj.fake_quantize(CASE.f, plan)(other, CASE.params, CASE.x)

    def executed(bits):
        other = replaced(qstate, key, bits=bits)
        frozen = qj.freeze(plan, other, CASE.params)
        return qj.execute(CASE.f, plan)(other, frozen, CASE.x), frozen["w"].dequantize()

    widths = jnp.float32([8.0, *NONE])
    y, (z, w) = jax.jit(jax.vmap(simulated))(widths), jax.jit(jax.vmap(executed))(widths)
    for found in (y, z) if key == "activation" else (y, z, w):
        assert np.isfinite(found[0]).all()
        assert np.isnan(found[1:]).all()
    np.testing.assert_array_equal(y[0], z[0])


@pytest.mark.parametrize("bits", [0.5, 1.5, 2.5, 3.5, 4.5, 3.4999998, 8.495, 8.4999])
@pytest.mark.parametrize("key", ["weight", "activation"])
def test_between_two_widths_simulation_and_execution_take_the_same(key, bits):
    """The mean of a qstate of 2 bits and one of 3 has 2.5."""
    plan, qstate = quantized(qj.integer())
    other = replaced(qstate, key, bits=bits)
    whole = replaced(qstate, key, bits=np.floor(np.float32(bits) + np.float32(127.5)) - 127)
    frozen = qj.freeze(plan, other, CASE.params)
    want = qj.fake_quantize(CASE.f, plan)(whole, CASE.params, CASE.x)
    for y in (
        qj.fake_quantize(CASE.f, plan)(other, CASE.params, CASE.x),
        jax.jit(qj.fake_quantize(CASE.f, plan))(other, CASE.params, CASE.x),
        qj.execute(CASE.f, plan)(other, frozen, CASE.x),
        qj.execute(CASE.f, plan)(whole, frozen, CASE.x),
    ):
        np.testing.assert_array_equal(y, want)


def test_some_widths_of_a_list_may_be_traced():
    def f(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    params = {"w": normal(5, 3, 6, 6)}
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, normal(6, 2, 6)))
    at = lambda bits: qj.calibrate(plan, {}, params, weight_bits=[2, bits, 4])  # noqa: E731
    assert_same_bits(jax.jit(at)(jnp.float32(3.0)), jax.jit(lambda: at(3))())


def test_layers_have_widths_of_their_own():
    def f(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, params["w"])

    params, x = {"w": normal(0, 3, 4, 4)}, normal(1, 2, 4)
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, x))
    qstate = qj.calibrate(plan, {}, params)

    def entered(bits):
        w = qstate["w"]["weight"]._replace(bits=bits)
        return qj.fake_quantize(f, plan)({"w": {"weight": w}}, params, x)[1]

    third = jax.jit(entered)(jnp.float32([8.0, 9.0, 4.0]))
    assert np.isfinite(third[:2]).all()
    assert np.isnan(third[2]).all()


def test_a_scale_of_other_groups_is_refused():
    plan, qstate = quantized(qj.integer())
    for bad in (
        replaced(qstate, "weight")["w"]["weight"]._replace(scale=jnp.ones((1, 3))),
        qstate["w"]["weight"]._replace(scale=jnp.ones((1, 3)), zero_point=jnp.zeros((1, 3))),
        qstate["w"]["weight"]._replace(zero_point=jnp.zeros((1, 2))),
    ):
        with refused(errors.CalibrationError, "does not fit", "(1, 5)", "qj.calibrate"):
            other = {"w": {**qstate["w"], "weight": bad}}
            qj.fake_quantize(CASE.f, plan)(other, CASE.params, CASE.x)
    one = qstate["w"]["weight"]._replace(scale=jnp.ones((1, 1)), zero_point=jnp.zeros((1, 1)))
    for_all = {"w": {**qstate["w"], "weight": one}}
    assert qj.fake_quantize(CASE.f, plan)(for_all, CASE.params, CASE.x).shape == (4, 5)


@pytest.mark.parametrize("zero_point", [0.0, 1.0, 2.0, 5.0, 117.0])
def test_a_scale_that_became_nan_is_told_from_a_fault(zero_point):
    _, qstate = quantized(qj.integer())
    other = replaced(qstate, "activation", scale=np.nan, zero_point=zero_point)
    (problem,) = qj.check(other)
    assert "not a positive finite number" in problem.what
    assert problem.operand == "activation"


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault])
def test_no_fault_is_a_zero_point(fault):
    assert float(fault) == np.float32(fault) > 2 * 2**16


def test_check_names_what_is_wrong_with_zero_points_and_widths():
    plan, qstate = quantized(qj.integer())
    (problem,) = qj.check(replaced(qstate, "activation", zero_point=np.nan))
    assert "zero point is NaN or infinite" in problem.what
    moved = replaced(qstate, "weight", zero_point=5.0)
    assert qj.check(moved) == []  # some quantizer may have it
    (problem,) = qj.check(moved, plan)
    assert "symmetric" in problem.what
    for bits in (-1.0, np.nan, np.inf):
        (problem,) = qj.check(replaced(qstate, "weight", bits=bits))
        assert "outside the format" in problem.what
    wide = replaced(qstate, "weight", bits=9.0)
    assert qj.check(wide) == []  # some format may hold it
    (problem,) = qj.check(wide, plan)
    assert "outside the format" in problem.what
    assert qj.check(qstate, plan) == []


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_with_a_plan_lanes_are_held_against_the_format(name):
    plan, qstate = quantized(FORMATS[name])
    lanes = jax.vmap(lambda bits: replaced(qstate, "weight", bits=bits))(jnp.float32([8, 9, 0]))
    (problem,) = qj.check(lanes, plan)
    assert problem.lanes == (1,)
