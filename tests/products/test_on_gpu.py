"""What a GPU is given: codes in bfloat16, gradients at the model's own precision. It runs anywhere,
and so tests the programs, not the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.affine import QParams
from quantjax.formats import E4M3FN
from tests.integers.visiting import equations
from tests.models import assert_same_bits, normal, planned
from tests.products.forms import FORMS, expected, hand_made, plan_of

pytestmark = pytest.mark.usefixtures("own_programs")

PRODUCTS = ("dot_general", "conv_general_dilated")
LONG = 3000


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def operand_dtypes(f: Any, *arguments: Any) -> set[str]:
    """Of the products in the program of ``f``."""
    found = equations(jax.make_jaxpr(f)(*arguments).jaxpr)
    return {str(e.invars[0].aval.dtype) for e in found if e.primitive.name in PRODUCTS}


@pytest.mark.parametrize("name", ["plain", "batched", "conv_2d_same", "depthwise", "mixed_layout"])
def test_sums_of_eight_bits_are_exact_in_bfloat16(name):
    form = FORMS[name]
    case = form.case()
    plan = plan_of(case)
    qstate = hand_made(plan, 1)
    fake = qj.fake_quantize(case.f, plan)
    assert "bfloat16" in operand_dtypes(fake, qstate, case.params, case.x)
    got = jax.jit(fake)(qstate, case.params, case.x)
    assert_same_bits(got, expected(form, case, qstate["w"]))


def dense(width: int) -> Any:
    case = FORMS["plain"].case()
    return case._replace(params={"w": normal(3, width, 5)}, x=normal(4, 3, width))


def calibrated(case: Any, policy: qj.Policy, **bits: Any) -> tuple[qj.Plan, Any]:
    plan = planned(case, policy)
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    return plan, qj.calibrate(plan, state, case.params, **bits)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("bits", [(8, 8), (0, 8), (8, 0), (0, 0)])
def test_values_and_gradients_are_those_of_float32(bits, monkeypatch):
    """Sums too long for float32 among them; at a width of 0 on one side nothing is rounded."""
    case = dense(LONG)
    plan, qstate = calibrated(
        case, qj.uniform_policy(), weight_bits=bits[0], activation_bits=bits[1]
    )

    def run(params: Any, x: jax.Array) -> Any:
        return qj.fake_quantize(case.f, plan)(qstate, params, x)

    def both(params: Any, x: jax.Array) -> Any:
        value, pull = jax.vjp(run, params, x)
        return value, pull(jnp.cos(value))

    got = jax.jit(both)(case.params, case.x)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    want = jax.jit(lambda *a: both(*a))(case.params, case.x)
    if all(bits):
        assert_same_bits(got[0], want[0])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_second_derivatives_do_not_pass_through_bfloat16(monkeypatch):
    case = dense(7)
    plan, qstate = calibrated(case, qj.uniform_policy(), weight_bits=8, activation_bits=8)

    def of_scale(x: jax.Array) -> jax.Array:
        site = {
            key: QParams(q.scale * jnp.mean(x**2), q.zero_point, q.bits)
            for key, q in qstate["w"].items()
        }
        return jnp.sum(qj.fake_quantize(case.f, plan)({"w": site}, case.params, x) ** 2)

    def second(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(of_scale)(x))))(x)

    got = jax.jit(second)(case.x)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    want = jax.jit(lambda x: second(x))(case.x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    "quantizer",
    [
        qj.weight_quantizer(format=qj.integer(max_bits=12), bits=12),
        qj.weight_quantizer(format=E4M3FN),
    ],
    ids=["twelve_bits", "floats"],
)
def test_what_bfloat16_cannot_hold_stays_in_float32(quantizer):
    case = dense(7)
    scheme = qj.Scheme(weights=quantizer, activations=qj.activation_quantizer())
    plan, qstate = calibrated(case, qj.Policy([qj.rule(qj.weighted(), scheme)]))
    fake = qj.fake_quantize(case.f, plan)
    assert operand_dtypes(fake, qstate, case.params, case.x) == {"float32"}


def test_entries_that_pass_unquantized_are_not_rounded(monkeypatch):
    """Quant-Noise leaves ``x/s`` among the codes, which bfloat16 would cut to 8 bits."""
    case = dense(32)
    weights = qj.weight_quantizer(estimator=qj.estimators.QUANT_NOISE)
    scheme = qj.Scheme(weights=weights, activations=qj.activation_quantizer())
    plan, qstate = calibrated(case, qj.Policy([qj.rule(qj.weighted(), scheme)]))
    key = jax.random.key(1)
    run = lambda: qj.fake_quantize(case.f, plan)(qstate, case.params, case.x, key=key)  # noqa: E731
    got = run()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    np.testing.assert_allclose(got, run(), rtol=1e-6)


@pytest.mark.parametrize("zero", [0.0, 200.0, -301.0])
def test_a_zero_point_that_left_the_range_stays_in_float32(zero, monkeypatch):
    """As one that is learned may: centered codes are beyond 256 then."""
    case = dense(32)
    plan, qstate = calibrated(case, qj.uniform_policy(), weight_bits=8, activation_bits=8)
    site = qstate["w"]
    moved = site["activation"]._replace(zero_point=jnp.full_like(site["activation"].scale, zero))
    qstate = {"w": {**site, "activation": moved}}
    fake = qj.fake_quantize(case.f, plan)
    got = jax.jit(fake)(qstate, case.params, case.x)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    want = jax.jit(lambda *a: fake(*a))(qstate, case.params, case.x)
    assert_same_bits(got, want)
