"""Models in bfloat16 from end to end: float32 scales, sums that are exact, bypass bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from tests.models import Case, assert_same_bits, normal


class Net(nn.Module):
    """A table, attention, a convolution and a head, all computed in bfloat16."""

    params: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        options = {"dtype": jnp.bfloat16, "param_dtype": self.params}
        x = nn.Embed(11, 8, **options)(ids)
        x = x + nn.MultiHeadDotProductAttention(2, **options)(x, x)
        x = nn.relu(nn.Conv(8, (3,), **options)(x))
        return nn.Dense(5, **options)(x)


IDS = jnp.arange(12).reshape(2, 6) % 11


def case(params: jnp.dtype) -> Case:
    module = Net(params)
    variables = module.init(jax.random.key(0), IDS)
    moved = [
        (leaf + 0.1 * jnp.abs(normal(i, *leaf.shape)).astype(leaf.dtype)).astype(leaf.dtype)
        for i, leaf in enumerate(jax.tree.leaves(variables))
    ]
    return Case(module.apply, jax.tree.unflatten(jax.tree.structure(variables), moved), IDS)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("params", [jnp.bfloat16, jnp.float32], ids=str)
def test_from_end_to_end(params):
    model = case(params)
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=8),
        activations=qj.activation_quantizer(bits=8),
        outputs=qj.activation_quantizer(bits=8),
        biases=qj.AccumulatorBias(),
    )
    policy = qj.Policy(
        [
            qj.rule(qj.first(), qj.Scheme(weights=qj.weight_quantizer(bits=8))),
            qj.rule(qj.weighted(), scheme),
            qj.rule(qj.everything(), qj.Scheme(activations=qj.activation_quantizer(bits=8))),
        ]
    )
    plan = qj.plan(policy, qj.sites(model.f, model.params, model.x))
    out, state = jax.jit(qj.observe(model.f, plan))(qj.init(plan), model.params, model.x)
    assert out.dtype == jnp.bfloat16
    assert_same_bits(out, jax.jit(model.f)(model.params, model.x))
    qstate = qj.calibrate(plan, state, model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(qstate)} == {jnp.dtype(jnp.float32)}
    simulated = jax.jit(qj.fake_quantize(model.f, plan))(qstate, model.params, model.x)
    assert simulated.dtype == jnp.bfloat16
    wide = [np.asarray(array, np.float32) for array in (simulated, out)]
    assert np.linalg.norm(wide[0] - wide[1]) / np.linalg.norm(wide[1]) < 0.05
    frozen = qj.freeze(plan, qstate, model.params)
    executed = jax.jit(qj.execute(model.f, plan))(qstate, frozen, model.x)
    assert_same_bits(executed, simulated)
    grads = jax.jit(
        jax.grad(
            lambda p: jnp.sum(
                qj.fake_quantize(model.f, plan)(qstate, p, model.x).astype(jnp.float32)
            )
        )
    )(model.params)
    for grad, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(model.params), strict=True):
        assert grad.dtype == leaf.dtype
        assert jnp.isfinite(grad.astype(jnp.float32)).all()


@pytest.mark.parametrize("params", [jnp.bfloat16, jnp.float32], ids=str)
def test_at_width_zero_it_is_the_float_model(params):
    """As it is written: compiled, the float model keeps more digits than it says in some places."""
    model = case(params)
    plan = qj.plan(qj.uniform_policy(), qj.sites(model.f, model.params, model.x))
    _, state = qj.observe(model.f, plan)(qj.init(plan), model.params, model.x)
    qstate = qj.calibrate(plan, state, model.params, weight_bits=0, activation_bits=0)
    quantize, want = qj.fake_quantize(model.f, plan), model.f(model.params, model.x)
    for run in (quantize, jax.jit(quantize)):
        assert_same_bits(run(qstate, model.params, model.x), want)
