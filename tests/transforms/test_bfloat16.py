"""bfloat16 models have the same numbers in every program: cast, summed or gated ahead of a product.

XLA leaves out a cast to bfloat16 that is cast back, where it fuses both: from some size on, in one
program and not in the next.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.lean import widened
from tests.models import assert_same_bits

HALF = jnp.bfloat16
GENERATOR = np.random.default_rng(31)


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape), HALF)


PARAMS = {"a": drawn(32, 32) / 4, "w": drawn(32, 10) / 4}
WIDE = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PARAMS)
IMAGES, ROWS = drawn(256, 4, 32), drawn(256, 32)
MANY = drawn(8192, 32)  # as many as XLA fuses otherwise on a CPU than it does few


def averaged(params, x):
    return x.mean(1) @ params["w"]


def hidden_and_averaged(params, x):
    return jax.nn.relu(x @ params["a"]).mean(1) @ params["w"]


def cast_on_the_way(params, x):
    """Parameters in float32, as Flax holds them under ``dtype=jnp.bfloat16``."""
    half = jax.tree.map(lambda leaf: leaf.astype(HALF), params)
    return hidden_and_averaged(half, x)


def averaged_in_float32(params, x):
    h = jax.nn.gelu((x @ params["a"]).astype(jnp.float32))
    return h.mean(1).astype(HALF) @ params["w"]


def summed(params, x):
    return jax.nn.relu(x @ params["a"]).sum(1) @ params["w"]


def residual(params, x):
    return (x + jax.nn.silu(x @ params["a"])) @ params["w"]


def gated(params, x):
    h = x @ params["a"]
    return (jax.nn.relu(h) * jax.nn.sigmoid(h)) @ params["w"]


def normed(x):
    away = x - x.mean(-1, keepdims=True)
    return away * jax.lax.rsqrt((away * away).mean(-1, keepdims=True) + 1e-3)


def read_twice(params, x):
    """A sum that a product reads, and what is computed of the product's result."""
    y = x + x @ params["a"]
    return (y + jax.nn.softmax(y @ params["a"], -1)) @ params["w"]


def normed_behind(params, x):
    """A residual whose norm stands behind the product, as in Swin v2 and Gemma 2."""
    y = x + jax.nn.gelu(x @ params["a"])
    return (y + normed(y @ params["a"])) @ params["w"]


def normed_ahead(params, x):
    y = x + jax.nn.gelu(normed(x) @ params["a"])
    return y + normed(y) @ params["a"]


def in_layers(params, x):
    """The same inside a scan, and inside a function that is jitted."""

    def layer(h, _):
        return jax.jit(normed_ahead)(params, h), None

    return jax.lax.scan(layer, x, None, length=2)[0] @ params["w"]


MODELS = {
    "averaged": (averaged, PARAMS, IMAGES),
    "hidden, averaged": (hidden_and_averaged, PARAMS, IMAGES),
    "cast on the way": (cast_on_the_way, WIDE, IMAGES),
    "averaged in float32": (averaged_in_float32, PARAMS, IMAGES),
    "summed": (summed, PARAMS, IMAGES),
    "residual": (residual, PARAMS, ROWS),
    "gated": (gated, PARAMS, ROWS),
    "read twice": (read_twice, PARAMS, MANY),
    "normed behind": (normed_behind, PARAMS, MANY),
    "normed ahead": (normed_ahead, PARAMS, MANY),
    "in layers": (in_layers, PARAMS, MANY),
}
POLICIES = {
    "W8A8": qj.uniform_policy(),
    "W4A4": qj.uniform_policy(weight_bits=4, activation_bits=4),
    "live": qj.presets.w8a8_dynamic(),
    "weights": qj.uniform_policy(activation_bits=None),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_executed_is_simulated_jitted_or_not(name, policy):
    f, params, x = MODELS[name]
    plan = qj.plan(POLICIES[policy], qj.sites(f, params, x))
    state = jax.jit(qj.observe(f, plan))(qj.init(plan), params, x)[1]
    qstate = qj.calibrate(plan, state, params)
    frozen = jax.jit(lambda q, p: qj.freeze(plan, q, p))(qstate, params)
    assert_same_bits(frozen, qj.freeze(plan, qstate, params))
    simulate, execute = qj.fake_quantize(f, plan), qj.execute(f, plan)
    simulated = jax.jit(simulate)(qstate, params, x)
    executed = jax.jit(execute)(qstate, frozen, x)
    assert_same_bits(executed, simulated)

    def around(params):
        y = simulate(qstate, params, x)
        return y.astype(jnp.float32).sum(), y

    assert_same_bits(jax.jit(jax.value_and_grad(around, has_aux=True))(params)[0][1], simulated)
    if policy != "weights":  # of which a product is in float, and its sums in any order
        assert_same_bits(simulated, simulate(qstate, params, x))


def test_wide_numbers_are_those_that_there_are():
    x = jnp.asarray([1.0, 1.001, 3e38, 1e-38, jnp.inf, jnp.nan, -0.0])
    for dtype in (HALF, jnp.float16, jnp.float32):
        narrow = x.astype(dtype)
        assert_same_bits(widened(narrow), narrow.astype(jnp.float32))

    @jax.jit
    def mean(x):
        return widened(x.mean(1)), x.mean(1)

    for found in mean(IMAGES):
        assert_same_bits(found.astype(HALF).astype(jnp.float32), found.astype(jnp.float32))


def test_gradients_pass_through():
    plan = qj.plan(qj.uniform_policy(), qj.sites(averaged, PARAMS, IMAGES))
    state = qj.observe(averaged, plan)(qj.init(plan), PARAMS, IMAGES)[1]
    qstate = qj.calibrate(plan, state, PARAMS)
    run = qj.fake_quantize(averaged, plan)
    gradient = jax.grad(lambda params, x: run(qstate, params, x).astype(jnp.float32).sum(), (0, 1))
    got, want = jax.jit(gradient)(PARAMS, IMAGES), gradient(PARAMS, IMAGES)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == HALF
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=0.02, atol=1e-6)
    assert jnp.abs(got[0]["w"]).max() > 1.0
