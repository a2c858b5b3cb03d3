"""Widths that an optimizer moved a little are what they were; moved further, they are reported."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import errors, training
from quantjax.transforms.whole import whole_widths
from tests.models import mlp, planned
from tests.refused import refused

pytestmark = pytest.mark.thinned(2)

FORMATS = {
    "integer": (qj.uniform_policy(weight_bits=4, activation_bits=8), None),
    "minifloat": (
        qj.Policy(
            [
                qj.rule(
                    qj.weighted(), qj.Scheme(weights=qj.weight_quantizer(format=qj.formats.E4M3FN))
                )
            ]
        ),
        qj.FloatBits(4, 3),
    ),
}


@pytest.fixture(params=sorted(FORMATS))
def case(request):
    policy, width = FORMATS[request.param]
    model = mlp()
    plan = planned(model, policy)
    _, state = qj.observe(model.f, plan)(qj.init(plan), model.params, model.x)
    qstate = qj.calibrate(
        plan, state, model.params, **({} if width is None else {"weight_bits": width})
    )
    return model, plan, qstate


def moved(qstate, by):
    """Every width, and every exponent width, times a little less than 1."""
    return {
        site: {
            key: q._replace(
                bits=q.bits * (1.0 - by),
                theta={name: array * (1.0 - by) for name, array in q.theta.items()}
                if isinstance(q.theta, dict)
                else q.theta,
            )
            for key, q in operands.items()
        }
        for site, operands in qstate.items()
    }


@pytest.mark.parametrize("by", [2.0**-23, 1e-3])
def test_widths_that_moved_a_little_are_whole_in_every_verb(case, by):
    model, plan, qstate = case
    other = moved(qstate, by)
    for one, two in (
        (qj.fake_quantize(model.f, plan)(q, model.params, model.x) for q in (qstate, other)),
        (qj.freeze(plan, q, model.params) for q in (qstate, other)),
        (
            qj.execute(model.f, plan)(q, qj.freeze(plan, q, model.params), model.x)
            for q in (qstate, other)
        ),
        (
            qj.execute(model.f, plan)(q, qj.freeze(plan, qstate, model.params), model.x)
            for q in (qstate, other)
        ),
        (qj.compare(model.f, plan)(q, model.params, model.x) for q in (qstate, other)),
        (training.weight_bits_total(plan, q) for q in (qstate, other)),
    ):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_array_equal(a, b)
    assert qj.check(other) == []


def test_what_moved_further_is_reported_by_lane():
    _, _, qstate = mlp_case()
    far = jax.vmap(lambda by: moved(qstate, by))(jnp.float32([0.0, 0.02, 0.0]))
    problems = qj.check(far)
    assert {p.lanes for p in problems} == {(1,)}
    assert all("moved off the whole number" in p.what for p in problems)
    assert all("by_part" in p.fix for p in problems)


def test_moved_exponent_widths_are_reported_too():
    theta = {"exponent_bits": jnp.float32(3.5)}
    q = qj.QParams(jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.float32(8.0), theta)
    (problem,) = qj.check({"w": {"weight": q}})
    assert "moved off the whole number" in problem.what
    assert qj.check({"w": {"weight": q._replace(theta={"exponent_bits": jnp.float32(4.0)})}}) == []


@pytest.mark.parametrize(
    ("bits", "whole"),
    [(0.0, 0.0), (0.3, 0.3), (-1e-7, -1e-7), (0.5, 1.0), (1.0, 1.0), (2.4, 2.0), (2.5, 3.0)],
)
def test_only_zero_bits_are_bypass(bits, whole):
    """What lies between bypass and a bit is no width."""
    q = qj.QParams(jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.float32(bits))
    assert float(whole_widths({"w": {"weight": q}})["w"]["weight"].bits) == np.float32(whole)


def test_what_no_plan_has_is_left_alone():
    model, plan, qstate = mlp_case()
    more = {**qstate, "other": None, "another": {"weight": None}}
    want = qj.fake_quantize(model.f, plan)(qstate, model.params, model.x)
    got = qj.fake_quantize(model.f, plan)(more, model.params, model.x)
    np.testing.assert_array_equal(got, want)


def mlp_case():
    model = mlp()
    plan = planned(model, qj.uniform_policy(weight_bits=4, activation_bits=8))
    _, state = qj.observe(model.f, plan)(qj.init(plan), model.params, model.x)
    return model, plan, qj.calibrate(plan, state, model.params)


def test_weight_decay_over_the_whole_tree_keeps_the_codes():
    model, plan, qstate = mlp_case()
    optimizer = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(1e-2))
    variables = (model.params, qstate)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, variables), optimizer.init(variables), variables
    )
    params, decayed = optax.apply_updates(variables, updates)
    assert float(decayed["params/Dense_0/kernel"]["weight"].bits) < 4.0
    first = qj.freeze(plan, qstate, model.params)["params"]["Dense_0"]["kernel"]
    second = qj.freeze(plan, decayed, params)["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(first.codes, second.codes)


def test_an_average_of_two_equal_trees_is_that_tree():
    model, plan, qstate = mlp_case()
    three = training.with_bits(plan, qstate, weight_bits=3.0)
    average = optax.incremental_update(three, three, 0.1)
    run = qj.fake_quantize(model.f, plan)
    got, want = (run(q, model.params, model.x) for q in (average, three))
    np.testing.assert_allclose(got, want, rtol=1e-6)  # scales moved in the last place


def test_entries_of_theta_that_are_no_widths_stay():
    theta = {"exponent_bits": jnp.float32(3.9999), "alpha": jnp.float32(0.3)}
    q = qj.QParams(jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.float32(7.9999), theta)
    got = whole_widths({"w": {"weight": q}})["w"]["weight"]
    assert (float(got.bits), float(got.theta["exponent_bits"])) == (8.0, 4.0)
    np.testing.assert_array_equal(got.theta["alpha"], theta["alpha"])
    assert np.isnan(
        float(
            whole_widths({"w": {"weight": q._replace(bits=jnp.float32(jnp.nan))}})["w"][
                "weight"
            ].bits
        )
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
def test_integers_take_the_nearest_width_themselves(signed, narrow):
    """In simulation, whose program would have an operation more for each operand."""
    format = qj.integer(signed=signed, narrow=narrow)
    scaled = jnp.linspace(-300.0, 300.0, 4001)
    rounding = qj.rounding.HALF_EVEN
    for width in range(1, 9):
        for off in (-1e-3, -1e-6, 1e-6, 1e-3, 0.2, -0.2):
            for zero in (None, jnp.float32(3.0)):
                got, want = (
                    format.snap(scaled, zero, jnp.float32(bits), rounding)
                    for bits in (width + off, width)
                )
                np.testing.assert_array_equal(got.level, want.level)
            bounds = (format.level_range(jnp.float32(bits)) for bits in (width + off, width))
            np.testing.assert_array_equal(*map(np.array, bounds))


@pytest.mark.parametrize("field", ["scale", "zero_point", "bits"])
def test_what_a_cast_of_the_whole_tree_made_is_refused(field):
    """Mixed precision casts ``(params, qstate)``: execution failed in JAX, and check was silent."""
    case = mlp()
    plan = planned(case, FORMATS["integer"][0])
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    qstate = qj.calibrate(plan, state, case.params)
    (name, *_) = qstate
    weight = qstate[name]["weight"]
    cast = weight._replace(**{field: getattr(weight, field).astype(jnp.bfloat16)})
    other = {**qstate, name: {**qstate[name], "weight": cast}}
    for verb in (
        lambda: qj.fake_quantize(case.f, plan)(other, case.params, case.x),
        lambda: qj.freeze(plan, other, case.params),
        lambda: training.with_bits(plan, other, weight_bits=2),
    ):
        said = field.replace("_", " ")
        with refused(errors.CalibrationError, "another dtype", f"{name} ", f"{said}, bfloat16"):
            verb()
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), qstate)  # JAX makes float32 of it
    assert qj.check(wide, plan) == []
    assert np.isfinite(qj.fake_quantize(case.f, plan)(wide, case.params, case.x)).all()
    (problem,) = qj.check(other, plan)
    assert (problem.site, problem.operand) == (name, "weight")
    assert "float32" in problem.what
    assert qj.check(qstate, plan) == []
