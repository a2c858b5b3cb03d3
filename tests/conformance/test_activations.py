"""Width 0 changes no bit of a jitted model whatever stands between its products.

Between two products no fence holds the quantized result; XLA fuses its scale with what reads it.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from tests.conformance.test_identity import assert_close
from tests.models import assert_same_bits, normal

pytestmark = pytest.mark.thinned(41)

ACTIVATIONS = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "gelu": nn.gelu,
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
    "tanh": jnp.tanh,
    "square": jnp.square,
}


class Dense(nn.Module):
    """Three layers; odd widths leave remainders of vectors."""

    name_of_activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.name_of_activation]
        return nn.Dense(3)(act(nn.Dense(17)(act(nn.Dense(33)(x)))))


class Convolutional(nn.Module):
    """Two convolutions with a pool of maxima, and a head."""

    name_of_activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.name_of_activation]
        x = nn.max_pool(act(nn.Conv(5, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(act(nn.Conv(7, (3, 3))(x)).reshape(x.shape[0], -1))


class Gated(nn.Module):
    """The product of two branches."""

    name_of_activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.name_of_activation]
        return nn.Dense(3)(act(nn.Dense(21)(x)) * nn.Dense(21)(x))


ROUNDED = {("gelu", Convolutional)}
"""Whose gradients differ in the last place on CPUs with 8 floats a vector (AVX2), not with 16."""

SHAPES = {Dense: (9, 13), Convolutional: (3, 9, 9, 2), Gated: (6, 11)}


@pytest.mark.parametrize("model", SHAPES, ids=lambda model: model.__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_width_zero_changes_no_bit(model, activation):
    module, x = model(activation), normal(1, *SHAPES[model])
    params = module.init(jax.random.key(0), x)
    f = lambda params, x: module.apply(params, x)  # noqa: E731
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    assert len(plan.quantized) == 3
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), params, x)
    qstate = qj.calibrate(plan, state, params, weight_bits=0, activation_bits=0)

    def derived(f):
        return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(f(params, x))), (0, 1))

    fake = qj.fake_quantize(f, plan)
    run = jax.jit(lambda q, *a: (fake(q, *a), derived(lambda *b: fake(q, *b))(*a)))
    got = run(qstate, params, x)
    want = jax.jit(lambda *a: (f(*a), derived(f)(*a)))(params, x)
    assert_close(got, want)
    assert_same_bits(got[0], want[0])
    if (activation, model) not in ROUNDED:
        assert_same_bits(got[1], want[1])
    eight = qj.calibrate(plan, state, params, weight_bits=8, activation_bits=8)
    assert not jnp.array_equal(run(eight, params, x)[0], want[0])
