"""Models in bfloat16 and float16: their own dtype comes out, arithmetic is float32 in between."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.products import Exactness
from tests.models import Case, assert_same_bits, normal, planned, ready, shuffled
from tests.products.forms import CONVS, DOTS, expected, hand_made, plan_of

HALVES = [jnp.bfloat16, jnp.float16]


def cast(case: Case, dtype: Any) -> Case:
    return Case(case.f, jax.tree.map(lambda p: p.astype(dtype), case.params), case.x.astype(dtype))


class HalfModel(nn.Module):
    """Parameters in float32, computation in bfloat16, as linen does with ``dtype=``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x))
        return nn.Dense(3, dtype=jnp.bfloat16)(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def half_model() -> Case:
    x = normal(4, 3, 6, 6, 2)
    return Case(HalfModel().apply, shuffled(HalfModel().init(jax.random.key(0), x)), x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["plain", "weight_left", "batched", "strided", "depthwise"])
def test_the_output_is_the_float32_result_cast_once(name, dtype):
    """Operands are rounded to half precision first, so the oracle gets those."""
    form = (DOTS | CONVS)[name]
    half = cast(form.case(), dtype)
    plan = plan_of(half)
    qstate = hand_made(plan)
    fake = qj.fake_quantize(half.f, plan)
    got = jax.jit(fake)(qstate, half.params, half.x)
    assert got.dtype == dtype
    want = expected(form, cast(half, jnp.float32), qstate["w"])
    assert_same_bits(got, jnp.asarray(want).astype(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("granularity", [None, qj.PerGroup(7)], ids=str)
def test_width_zero_is_the_models_own_product(dtype, granularity):
    """Not the float32 product rounded: where a model accumulates in half precision, so does it."""
    case = cast(DOTS["plain"].case(), dtype)
    plan = plan_of(case, qj.weight_quantizer(granularity=granularity))
    qstate = qj.calibrate(plan, qj.init(plan), case.params, weight_bits=0, activation_bits=0)

    def run(qstate: Any, params: Any, x: jax.Array) -> Any:
        fake = qj.fake_quantize(case.f, plan)
        return jax.value_and_grad(lambda p, x: fake(qstate, p, x).sum(), (0, 1))(params, x)

    want = jax.jit(jax.value_and_grad(lambda p, x: case.f(p, x).sum(), (0, 1)))
    assert_same_bits(jax.jit(run)(qstate, case.params, case.x), want(case.params, case.x))


def test_a_bfloat16_model_runs_and_keeps_its_dtypes(half_model):
    plan, _, qstate = ready(half_model, qj.uniform_policy())
    # The name is that of the float32 parameter behind the cast.
    assert [entry.site.name for entry in plan.quantized] == [
        "params/Conv_0/kernel",
        "params/Dense_0/kernel",
    ]
    assert {o.operand.dtype for entry in plan.quantized for o in entry.operands} == {"bfloat16"}
    arrays = jax.tree.leaves(qstate)
    assert {a.dtype for a in arrays} == {np.dtype(np.float32)}

    got = jax.jit(qj.fake_quantize(half_model.f, plan))(qstate, half_model.params, half_model.x)
    truth = jax.jit(half_model.f)(half_model.params, half_model.x)
    assert got.dtype == truth.dtype == jnp.bfloat16
    error = np.abs(np.float32(got) - np.float32(truth)).max()
    assert error < 0.05 * np.abs(np.float32(truth)).max()

    def loss(params: Any) -> jax.Array:
        return qj.fake_quantize(half_model.f, plan)(qstate, params, half_model.x).sum()

    gradients = jax.jit(jax.grad(loss))(half_model.params)
    for leaf, own in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(half_model.params), strict=True
    ):
        assert leaf.dtype == own.dtype
        assert np.isfinite(np.float32(leaf)).all()


def test_a_bfloat16_model_at_width_zero_changes_no_bit(half_model):
    plan = planned(half_model, qj.uniform_policy())

    def run(bits: jax.Array, params: Any, x: jax.Array) -> Any:
        qstate = qj.calibrate(plan, qj.init(plan), params, weight_bits=bits, activation_bits=bits)
        return qj.fake_quantize(half_model.f, plan)(qstate, params, x)

    want = jax.jit(half_model.f)(half_model.params, half_model.x)
    assert_same_bits(jax.jit(run)(jnp.float32(0), half_model.params, half_model.x), want)
    observe = qj.observe(half_model.f, plan)
    y, _ = jax.jit(observe)(qj.init(plan), half_model.params, half_model.x)
    assert_same_bits(y, want)


def test_weights_of_a_bfloat16_model_are_calibrated_as_they_enter_the_product(half_model):
    """The scale covers the rounded weight, which is what the product sees."""
    plan, _, qstate = ready(half_model, qj.uniform_policy())
    kernel = half_model.params["params"]["Dense_0"]["kernel"]
    rounded = np.float32(kernel.astype(jnp.bfloat16))
    scale = np.abs(rounded).max(axis=0, keepdims=True) / np.float32(128)
    np.testing.assert_array_equal(qstate["params/Dense_0/kernel"]["weight"].scale, scale)
    assert not np.array_equal(np.abs(np.asarray(kernel)).max(axis=0), scale.ravel() * 128)
    assert plan.quantized[1].sizing.exactness is Exactness.EXACT


def test_an_output_dtype_of_its_own_is_kept():
    """``preferred_element_type``: bfloat16 operands, float32 result."""

    def f(params: Any, x: jax.Array) -> jax.Array:
        return jnp.matmul(x, params["w"], preferred_element_type=jnp.float32)

    case = cast(DOTS["plain"].case(), jnp.bfloat16)._replace(f=f)
    plan, _, qstate = ready(case, qj.uniform_policy())
    got = jax.jit(qj.fake_quantize(f, plan))(qstate, case.params, case.x)
    assert got.dtype == jnp.float32
    want = expected(DOTS["plain"], cast(case, jnp.float32), qstate["w"])
    assert_same_bits(got, want)


def test_float64_models_keep_their_dtype_and_their_bits_at_width_zero():
    with jax.enable_x64(True):
        case = cast(DOTS["plain"].case(), jnp.float64)
        plan = planned(case, qj.uniform_policy())
        _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
        fake = qj.fake_quantize(case.f, plan)
        own = case.f(case.params, case.x)
        bypass = qj.calibrate(plan, state, case.params, weight_bits=0, activation_bits=0)
        assert_same_bits(fake(bypass, case.params, case.x), own)
        eight = fake(qj.calibrate(plan, state, case.params), case.params, case.x)
        assert eight.dtype == own.dtype == jnp.float64
        assert 0 < float(jnp.abs(eight - own).max()) < 0.05 * float(jnp.abs(own).max())
