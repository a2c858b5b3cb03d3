"""What would be wrong without a word is refused: other axes, unused widths, truncating dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.interpreter import trace
from tests.models import dense, normal, planned, policy, ready


def test_a_product_with_swapped_operands_is_not_the_planned_one():
    case = dense(rows=4, features=16, out=8)
    prepared = ready(case, qj.uniform_policy())

    def swapped(params, x):
        return jax.lax.dot_general(params["w"], x, (((0,), (1,)), ((), ()))).T

    with pytest.raises(errors.PlanMismatchError, match=r"site w \(dot_general\)"):
        qj.fake_quantize(swapped, prepared.plan)(prepared.qstate, case.params, case.x)


def test_an_activation_of_another_rank_names_the_site():
    case = dense()
    prepared = ready(case, qj.uniform_policy())
    with pytest.raises(errors.PlanMismatchError, match=r"activation 1x4x6"):
        qj.fake_quantize(case.f, prepared.plan)(prepared.qstate, case.params, case.x[None])


def test_integer_inputs_of_a_model_planned_on_floats_say_that_they_are():
    case = dense()
    prepared = ready(case, qj.uniform_policy())
    quantized, x = qj.fake_quantize(case.f, prepared.plan), case.x.astype(jnp.int32)
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(errors.PlanMismatchError, match="cast the int32 operand to a float"),
    ):
        quantized(prepared.qstate, case.params, x)


@pytest.mark.parametrize("bits", [2, {"w": 2}])
def test_widths_of_what_is_not_quantized_are_refused(bits):
    case = dense()
    prepared = ready(case, policy(None, qj.activation_quantizer()))
    with pytest.raises(errors.PolicyError, match="no weight is quantized"):
        qj.calibrate(prepared.plan, prepared.state, case.params, weight_bits=bits)


def test_unsigned_weights_about_zero_are_refused():
    unsigned = qj.integer(signed=False)
    with pytest.raises(errors.QuantizerError, match="negative weight"):
        qj.weight_quantizer(format=unsigned)
    assert not qj.weight_quantizer(format=unsigned, symmetric=False).symmetric


def test_integers_are_refused_rather_than_truncated():
    whole = jnp.array([1, 2, 3])
    with pytest.raises(errors.DataError, match="int32"):
        qj.fake_quant(whole, 0.7, bits=4)
    p = qj.QParams(jnp.float32(0.7), jnp.float32(0), jnp.float32(4))
    with pytest.raises(errors.DataError, match="int32"):
        qj.encode(whole, p, qj.integer())


def test_two_leaves_of_one_path_are_refused():
    params = {"a": {"b": normal(0, 4, 4)}, "a/b": normal(1, 4, 4)}
    with pytest.raises(errors.SiteError, match="path a/b"):
        qj.sites(lambda p, x: x @ p["a/b"], params, normal(2, 3, 4))


def test_a_barrier_keeps_operands_apart():
    params = {"a": normal(0, 4, 8), "b": normal(1, 8, 2)}

    def f(params, x):
        a, b, x = jax.lax.optimization_barrier((params["a"], params["b"], x))
        return (x @ a) @ b

    assert [site.name for site in qj.sites(f, params, normal(2, 3, 4))] == ["a", "b"]


def test_a_long_derivation_is_followed_once():
    """Each step uses the one before three times: without sharing, 3^40 steps."""

    def f(params, x):
        w = params["w"]
        for _ in range(40):
            w = w + 0.1 * w * jnp.tanh(w)
        return x @ w

    params = {"w": 0.1 * normal(0, 4, 4)}
    program = trace(f, params, normal(1, 2, 4))
    assert [origin.derivable for origin in program.weights.values()] == [True]
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, normal(1, 2, 4)))
    (operands,) = qj.calibrate(plan, qj.init(plan), params).values()
    assert np.all(np.isfinite(operands["weight"].scale))


def test_a_plan_still_fits_another_batch():
    case = dense()
    plan = planned(case, qj.uniform_policy())
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, normal(5, 9, 6))
    assert set(state) == {"w"}
