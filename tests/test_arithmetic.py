"""A symmetric quantizer computes its codes without a zero point, and has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax.affine import QParams
from quantjax.arithmetic import Arithmetic
from quantjax.simulation import apply, codes_or_values
from tests.models import assert_same_bits, normal
from tests.products.forms import hand_made

FORMATS = {
    "signed": qj.integer(),
    "narrow": qj.integer(narrow=True),
    "unsigned": qj.integer(signed=False),
}


def qparams(bits: float, zero_point: float = 0.0) -> QParams:
    scale = jnp.float32([[0.25, 0.031]])
    return QParams(scale, jnp.full((1, 2), zero_point), jnp.float32(bits), ())


@pytest.mark.parametrize("bits", [0.0, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_gradients_are_those_with_a_zero_point_of_0(name, bits):
    x = jnp.concatenate([2.0 * normal(0, 160, 2), jnp.float32([[-0.0, 0.0], [1e-30, -1e-30]])])
    found = []
    for symmetric in (False, True):
        arithmetic = Arithmetic(FORMATS[name], symmetric=symmetric)
        at_width = lambda x, a=arithmetic: apply(x, qparams(bits), a)  # noqa: E731
        y, pull = jax.vjp(at_width, x)
        codes, _ = codes_or_values(x, qparams(bits), arithmetic)
        found.append((y, pull(jnp.ones_like(x))[0], codes))
    assert_same_bits(*found)


def test_a_zero_point_that_a_symmetric_quantizer_was_given_is_never_silent():
    x, symmetric = normal(1, 8, 2), Arithmetic(qj.integer(), symmetric=True)
    assert np.isnan(jax.jit(lambda q: apply(x, q, symmetric))(qparams(8.0, 3.0))).all()
    assert np.isfinite(apply(x, qparams(8.0), symmetric)).all()
    assert np.isfinite(apply(x, qparams(8.0, 3.0), Arithmetic(qj.integer()))).all()
    assert_array_equal(apply(x, qparams(0.0, 3.0), symmetric), x)  # bypass


def test_nor_is_it_in_a_product():
    f = lambda w, x: x @ w  # noqa: E731
    w, x = normal(2, 5, 3), normal(3, 4, 5)
    plan = qj.plan(qj.uniform_policy(weight_bits=8, activation_bits=8), qj.sites(f, w, x))
    run = jax.jit(qj.fake_quantize(f, plan))
    state = hand_made(plan)
    assert np.isfinite(run(state, w, x)).all()
    is_qparams = lambda node: isinstance(node, QParams)  # noqa: E731
    moved = jax.tree.map(
        lambda node: node._replace(zero_point=node.zero_point + 1.0), state, is_leaf=is_qparams
    )
    assert np.isnan(run(moved, w, x)).all()
