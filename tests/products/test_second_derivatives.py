"""Hessian-vector products: of codes that are scaled once, and of operands in reals.

In the library the tangent of an operand's codes holds its factor already, and only the first rule
knows. The other side of each comparison multiplies ``qj.fake_quant`` of both operands in the
model's own product, and JAX differentiates that twice.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.simulation import apply
from quantjax.tangents import with_tangent
from tests.models import normal
from tests.products.forms import FORMS, hand_made, plan_of

CASES = {
    "plain": ("plain", {}),
    "batched": ("batched", {}),
    "transposed": ("weight_left", {}),
    "strided": ("strided", {}),
    "depthwise": ("depthwise", {}),
    "groups": ("plain", {"weights": qj.weight_quantizer(granularity=qj.PerGroup(7))}),
    "folded": ("plain", {"activations": qj.activation_quantizer(granularity=qj.PerChannel())}),
    "per_tensor": ("plain", {"weights": qj.weight_quantizer(granularity=qj.PerTensor())}),
}


def hessian_vector(loss: Any, arguments: Any, tangents: Any) -> Any:
    """Forward over reverse."""
    gradient = lambda arguments: jax.grad(lambda a: loss(*a))(arguments)  # noqa: E731
    return jax.jit(lambda a, t: jax.jvp(gradient, (a,), (t,))[1])(arguments, tangents)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_products_are_those_of_reals(name):
    form_name, quantizers = CASES[name]
    form = FORMS[form_name]
    case = form.case()
    case = case._replace(x=3.0 * case.x, params={"w": 2.0 * case.params["w"]})
    plan = plan_of(case, **quantizers)
    qstate = hand_made(plan)
    by_key = {operand.key: operand.quantizer for operand in plan.quantized[0].quantized}

    def in_reals(qstate: Any, params: Any, x: jax.Array) -> jax.Array:
        x = apply(x, qstate["w"]["activation"], by_key["activation"].arithmetic)
        w = apply(params["w"], qstate["w"]["weight"], by_key["weight"].arithmetic)
        return case.f({"w": w}, x)

    arguments = (qstate, case.params, case.x)
    leaves, tree = jax.tree.flatten(arguments)
    draws = [0.1 * normal(60 + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    tangents = jax.tree.unflatten(tree, draws)
    for operands in tangents[0].values():  # a symmetric zero point is held
        operands["weight"] = operands["weight"]._replace(
            zero_point=jnp.zeros_like(operands["weight"].zero_point)
        )

    got, want = (
        hessian_vector(lambda *a, f=f: jnp.sum(f(*a) ** 2), arguments, tangents)
        for f in (qj.fake_quantize(case.f, plan), in_reals)
    )
    got[0]["w"]["weight"] = got[0]["w"]["weight"]._replace(zero_point=jnp.zeros(()))
    want[0]["w"]["weight"] = want[0]["w"]["weight"]._replace(zero_point=jnp.zeros(()))
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        floor = 2e-4 * max(float(jnp.abs(right).max()), 1e-3)
        np.testing.assert_allclose(left, right, rtol=2e-3, atol=floor)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want)) > 1.0


def test_a_changed_tangent_leaves_the_value_and_is_differentiated_again():
    """``d/dx`` of ``x`` over ``s`` in the tangent alone is ``1/s``, and its own slope ``-1/s²``."""

    def slope(s: jax.Array) -> jax.Array:
        return jax.grad(lambda x: with_tangent(x, s, operator.truediv))(jnp.float32(3.0))

    assert float(with_tangent(jnp.float32(3.0), jnp.float32(2.0), operator.truediv)) == 3.0
    assert float(slope(jnp.float32(2.0))) == 0.5
    assert float(jax.grad(slope)(jnp.float32(2.0))) == -0.25
    assert not jax.grad(lambda s: with_tangent(jnp.float32(3.0), s, operator.mul))(jnp.float32(2.0))
