"""Parameters that are set by hand reach every operand that has them, and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.training import error_decay, with_parameter
from tests import models
from tests.refused import refused
from tests.training import cases


def test_every_entry_is_set_and_nothing_else():
    qstate = cases.qstate(sharpness=0.1, rate=0.5)
    before = jax.tree.map(jnp.copy, qstate)
    after = with_parameter(qstate, "sharpness", 4.0)
    models.assert_same_bits(qstate, before)  # the given one is as it was
    weight = after["a"]["weight"]
    assert_array_equal(weight.theta["sharpness"], [[4.0, 4.0]])
    back = with_parameter(after, "sharpness", 0.1)
    models.assert_same_bits(back, qstate)
    assert jax.tree.structure(after) == jax.tree.structure(qstate)
    assert weight.theta["sharpness"].dtype == jnp.float32


def test_several_operands():
    qstate = {name: {"weight": cases.qparams([[1.0]], rate=0.5)} for name in "abc"}
    qstate["d"] = {"weight": cases.qparams([[1.0]])}
    qstate["e"] = {"weight": cases.qparams([[1.0]], clip=2.0)}
    after = with_parameter(qstate, "rate", 1.0)
    assert [float(after[name]["weight"].theta["rate"][0, 0]) for name in "abc"] == [1.0] * 3
    assert after["d"]["weight"].theta == ()
    models.assert_same_bits(after["e"], qstate["e"])


def test_values_for_each_group():
    qstate = cases.qstate(clip=1.0)
    after = with_parameter(qstate, "clip", np.float32([[2.0, 3.0]]))
    assert_array_equal(after["a"]["weight"].theta["clip"], [[2.0, 3.0]])


def test_values_may_be_traced_and_differentiated():
    qstate = cases.qstate(clip=1.0)
    values = jnp.array([1.0, 2.0])
    found = jax.jit(jax.vmap(lambda v: with_parameter(qstate, "clip", v)["a"]["weight"]))(values)
    assert_array_equal(found.theta["clip"][:, 0, 1], values)

    def total(v):
        return with_parameter(qstate, "clip", v)["a"]["weight"].theta["clip"].sum()

    assert float(jax.grad(total)(3.0)) == 2.0


def test_a_schedule_in_a_training_step():
    """Gradients of a model follow the sharpness of the step, in one compiled program."""
    quantizer = qj.weight_quantizer(bits=1, estimator=qj.estimators.ERROR_DECAY)
    case = models.dense()
    ready = models.ready(case, models.policy(quantizer))
    quantized, sharpness = qj.fake_quantize(case.f, ready.plan), error_decay(10)

    @jax.jit
    def gradient(step):
        qstate = with_parameter(ready.qstate, "sharpness", sharpness(step))
        return jax.grad(lambda p: jnp.sum(quantized(qstate, p, case.x)))(case.params)["w"]

    def by_hand(t):
        """Σ_batch x · k t (1 - tanh²(t w/s)), in float64."""
        w, x = (np.asarray(a, np.float64) for a in (case.params["w"], case.x))
        u = w / np.asarray(ready.qstate["w"]["weight"].scale, np.float64)
        slope = max(1.0 / t, 1.0) * t * (1.0 - np.tanh(t * u) ** 2)
        return x.sum(0)[:, None] * slope

    for step, t in ((0, 0.1), (5, 1.0), (10, 10.0)):
        np.testing.assert_allclose(gradient(step), by_hand(t), rtol=2e-3, atol=1e-4)


def test_stacked_layers():
    quantizer = qj.weight_quantizer(bits=1, estimator=qj.estimators.ERROR_DECAY)
    _, _, qstate = cases.stacked(3, quantizer)
    (operands,) = qstate.values()
    shape = operands["weight"].theta["sharpness"].shape
    assert shape[0] == 3
    after = with_parameter(qstate, "sharpness", 2.0)
    (operands,) = after.values()
    assert_array_equal(operands["weight"].theta["sharpness"], jnp.full(shape, 2.0))


@pytest.mark.parametrize("name", ["rate", "scale", ""])
def test_names_that_are_nowhere_are_refused(name):
    with refused(errors.TrainingError, f"no operand has a parameter {name}", "there are clip"):
        with_parameter(cases.qstate(clip=1.0), name, 1.0)


def test_shapes_that_do_not_fit_are_refused():
    with refused(errors.TrainingError, "a value of shape (3,)", "site a, weight"):
        with_parameter(cases.qstate(clip=1.0), "clip", jnp.ones(3))
