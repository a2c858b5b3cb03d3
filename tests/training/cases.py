"""What the tests of training share: qstates made by hand, plans of one product, stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantjax as qj
from tests import models


def qparams(scale, zero_point=0.0, bits=4.0, **theta) -> qj.QParams:
    """Of scalars or lists; zero points and entries of theta in the scale's shape."""
    scale = jnp.asarray(scale, jnp.float32)

    def like(x):
        return jnp.broadcast_to(jnp.asarray(x, jnp.float32), scale.shape)

    entries = {name: like(value) for name, value in theta.items()}
    return qj.QParams(scale, like(zero_point), jnp.float32(bits), entries or ())


def qstate(**theta):
    """Two sites, the first with theta if there is any."""
    return {
        "a": {"weight": qparams([[1.0, 2.0]], **theta), "activation": qparams([[0.5]], 3.0)},
        "b": {"weight": qparams([[4.0]])},
    }


def ones_like(tree):
    """A gradient of ones."""
    return jax.tree.map(jnp.ones_like, tree)


def step(optimizer, gradient, tree, state=None, **extra):
    """One update from the start: the moved tree and the state."""
    state = optimizer.init(tree) if state is None else state
    updates, state = optimizer.update(gradient, state, tree, **extra)
    return optax.apply_updates(tree, updates), state


def one_product(w, quantizer=None, activations=None, dtype=jnp.float32):
    """``x @ w`` with a quantized weight: plan, qstate and params."""
    params = {"w": jnp.asarray(w, dtype)}
    x = jnp.ones((1, params["w"].shape[0]), dtype)
    case = models.Case(lambda p, x: x @ p["w"], params, x)
    ready = models.ready(case, models.policy(quantizer or qj.weight_quantizer(bits=4), activations))
    return ready.plan, ready.qstate, params


def stacked(layers: int = 3, quantizer=None, activations=None):
    """Layers in a scan: a plan, its qstate, params."""

    def f(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    w = models.normal(5, layers, 4, 4) * jnp.arange(1.0, layers + 1.0)[:, None, None]
    case = models.Case(f, {"w": w}, models.normal(6, 2, 4))
    quantizer = quantizer or qj.weight_quantizer(bits=4)
    ready = models.ready(case, models.policy(quantizer, activations))
    return case, ready.plan, ready.qstate


def close(actual, expected, rtol=1e-6, atol=0.0):
    """Trees of equal structure with close leaves."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=atol)
