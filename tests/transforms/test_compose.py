"""The quantized model is a function like any other: every transformation of JAX applies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from tests.models import Case, Ready, assert_same_bits, mlp, normal, planned, ready

FIRST, SECOND = "params/Dense_0/kernel", "params/Dense_1/kernel"


@pytest.fixture(scope="module")
def case() -> Case:
    return mlp()


@pytest.fixture(scope="module")
def at_4_bits(case) -> Ready:
    return ready(case, qj.uniform_policy(weight_bits=4, activation_bits=4))


@pytest.fixture(scope="module")
def fake(case, at_4_bits) -> Any:
    return qj.fake_quantize(case.f, at_4_bits.plan)


@pytest.fixture(scope="module")
def jitted(case, at_4_bits, fake) -> jax.Array:
    return jax.jit(fake)(at_4_bits.qstate, case.params, case.x)


def close(got: Any, want: Any) -> None:
    """Equal but for the order in which XLA adds."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)


def test_eager_and_jit_agree(case, at_4_bits, fake, jitted):
    close(fake(at_4_bits.qstate, case.params, case.x), jitted)
    error = np.abs(jitted - case.f(case.params, case.x)).max()
    assert 1e-3 < error < 1.0  # four bits cost something, and not everything


def dequantized(qstate: Any, params: Any, x: jax.Array) -> jax.Array:
    """The same MLP by hand: each operand rounded by ``qj.fake_quant``, then multiplied."""
    variables, statistics = params["params"], params["batch_stats"]["BatchNorm_0"]

    def layer(name: str, x: jax.Array) -> jax.Array:
        site = qstate[f"params/{name}/kernel"]
        x, w = (
            qj.fake_quant(value, q.scale, q.zero_point, bits=q.bits, signed=operand == "weight")
            for operand, value in (("activation", x), ("weight", variables[name]["kernel"]))
            for q in [site[operand]]
        )
        return x @ w + variables[name]["bias"][None]

    norm = variables["BatchNorm_0"]
    x = layer("Dense_0", x) - statistics["mean"][None]
    x = x * lax.rsqrt(statistics["var"] + 1e-5)[None] * norm["scale"][None]
    return layer("Dense_1", jax.nn.relu(x + norm["bias"][None]))


def test_value_and_gradients_are_those_of_dequantize_then_multiply(case, at_4_bits, fake, jitted):
    """Of all arguments: scales and zero points of every layer, parameters, inputs."""
    arguments = at_4_bits.qstate, case.params, case.x
    close(jitted, jax.jit(dequantized)(*arguments))

    def loss(f: Any) -> Any:
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))

    got, want = loss(fake)(*arguments), loss(dequantized)(*arguments)
    for site in (FIRST, SECOND):
        for operand in ("weight", "activation"):
            scale = got[0][site][operand].scale
            assert np.isfinite(scale).all()
            assert np.any(scale != 0)
            np.testing.assert_allclose(scale, want[0][site][operand].scale, rtol=1e-3, atol=1e-3)
            assert float(got[0][site][operand].bits) == 0.0
    close(got[1:], want[1:])


def test_a_step_along_the_scales_lowers_the_loss(case, at_4_bits, fake):
    """Learned step sizes: the gradient points the right way on the rounded function itself."""
    target = case.f(case.params, case.x)

    def loss(log_scales: Any, bits: jax.Array) -> jax.Array:
        qstate = jax.tree.map(lambda q: q, at_4_bits.qstate)
        for site in qstate:
            weight = qstate[site]["weight"]
            scale = jnp.exp(log_scales[site])
            qstate[site]["weight"] = weight._replace(scale=scale, bits=bits)
        return jnp.mean((fake(qstate, case.params, case.x) - target) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    scales = {s: jnp.log(2.0 * q["weight"].scale) for s, q in at_4_bits.qstate.items()}
    losses = []
    for _ in range(40):
        value, gradient = step(scales, jnp.float32(4))
        losses.append(float(value))
        scales = jax.tree.map(lambda s, g: s - 0.04 * jnp.sign(g), scales, gradient)
    assert min(losses) < 0.7 * losses[0]


@pytest.mark.parametrize("wrap", [jax.vmap, lambda f: lambda *a: lax.map(lambda z: f(*z), a)])
def test_several_models_at_once(case, at_4_bits, fake, wrap):
    """Parameters and their QParams batched together; each lane is that model alone."""
    models = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.5 * leaf, leaf + 0.1]), case.params)
    plan, state = at_4_bits.plan, at_4_bits.state

    def one(params: Any) -> Any:
        qstate = qj.calibrate(plan, state, params)
        return qstate, fake(qstate, params, case.x)

    qstates, outputs = jax.jit(wrap(one))(models)
    alone = jax.jit(one)
    for lane in range(3):
        qstate, output = alone(jax.tree.map(lambda leaf, i=lane: leaf[i], models))
        assert_same_bits(jax.tree.map(lambda leaf, i=lane: leaf[i], qstates), qstate)
        close(outputs[lane], output)
    assert qj.check(qstates) == []


def test_one_sample_at_a_time_under_vmap(case, at_4_bits, fake, jitted):
    """Ranges are fixed, so the batch does not matter."""
    single = jax.vmap(lambda row: fake(at_4_bits.qstate, case.params, row[None])[0])
    close(jax.jit(single)(case.x), jitted)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpointing_the_quantized_model(case, at_4_bits, fake, policy):
    def loss(f: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(f(*a) ** 2), (0, 1, 2)))

    arguments = at_4_bits.qstate, case.params, case.x
    close(loss(jax.checkpoint(fake, policy=policy))(*arguments), loss(fake)(*arguments))


def test_training_steps_in_a_scan(case, at_4_bits, fake):
    """Quantization-aware training: gradients inside a scan, parameters carried, loss falls."""
    target = jnp.tanh(normal(8, 6, 4))

    def step(params: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            qstate = qj.calibrate(at_4_bits.plan, at_4_bits.state, params)
            return jnp.mean((fake(qstate, params, x) - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), value

    batches = jnp.broadcast_to(case.x, (40, *case.x.shape))
    trained, losses = jax.jit(lambda p, b: lax.scan(step, p, b))(case.params, batches)
    assert float(losses[-1]) < 0.5 * float(losses[0])
    assert jax.tree.structure(trained) == jax.tree.structure(case.params)


def test_hessian_vector_products_exist(case, at_4_bits, fake):
    """Forward over reverse, which needs a rule for both modes."""

    def loss(params: Any) -> jax.Array:
        return jnp.sum(fake(at_4_bits.qstate, params, case.x) ** 2)

    tangent = jax.tree.map(jnp.ones_like, case.params)
    _, product = jax.jit(lambda p, t: jax.jvp(jax.grad(loss), (p,), (t,)))(case.params, tangent)
    leaves = jax.tree.leaves(product)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.any(leaf != 0) for leaf in leaves)


def test_the_gradient_of_a_model_is_a_model_with_more_products():
    """A plan of ``jax.grad(f)`` sees the backward products; they are weightless or named anew."""
    model = mlp()

    def loss_gradient(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda p: jnp.sum(model.f(p, x) ** 2))(params)

    forward = qj.sites(model.f, model.params, model.x)
    backward = qj.sites(loss_gradient, model.params, model.x)
    assert len(backward) > len(forward)
    assert {site.name for site in forward} <= {site.name for site in backward}
    everywhere = planned(Case(loss_gradient, model.params, model.x), qj.uniform_policy())
    bypass = qj.calibrate(
        everywhere, qj.init(everywhere), model.params, weight_bits=0, activation_bits=0
    )
    got = jax.jit(qj.fake_quantize(loss_gradient, everywhere))(bypass, model.params, model.x)
    close(got, jax.jit(loss_gradient)(model.params, model.x))
