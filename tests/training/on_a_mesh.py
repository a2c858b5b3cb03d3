"""Run with eight simulated devices: what training keeps of weights that lie in parts on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantjax as qj
from tests.devices import run_all
from tests.transforms.on_a_mesh import MODELS, POLICIES, X, agree, mesh, observed, split

WIDTHS = {"W3": 3.0, "W2": 2.0}


def planned(name: str, bits: float):
    f, params, specs = MODELS[name]
    params = jax.tree.map(lambda w: w + 0.3 * jnp.cos(jnp.arange(w.size).reshape(w.shape)), params)
    plan = qj.plan(POLICIES["W8A8"], qj.sites(f, params, X))
    state = observed(f, plan, params, X)[1]
    qstate = qj.calibrate(plan, state, params, weight_bits=bits)
    return plan, qstate, params, split(params, *specs)


def dampening(name: str, bits: float) -> None:
    plan, qstate, params, spread = planned(name, bits)
    loss = functools.partial(qj.training.dampening_loss, plan, qstate)
    run = jax.value_and_grad(loss)
    want = jax.jit(run)(params)
    assert want[0] > 0.0
    np.testing.assert_allclose(loss(spread), want[0], rtol=1e-5)
    with jax.set_mesh(mesh()):
        found = jax.jit(run)(spread)
    for got in (found, jax.jit(run)(spread)):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        for path, leaf in spread.items():
            np.testing.assert_allclose(got[1][path], want[1][path], atol=1e-6)
            assert got[1][path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def oscillations(name: str, bits: float) -> None:
    """Weights that a gradient pushes to and fro are held, in a loop whose carry is on the mesh."""
    plan, qstate, params, spread = planned(name, bits)
    tx = optax.chain(
        optax.sgd(1.0), qj.training.freeze_oscillations(plan, 0.4, momentum=jnp.float32(0.3))
    )

    def trained(params):
        def step(carry, sign):
            params, state = carry
            updates = jax.tree.map(lambda w: sign * jnp.full_like(w, 0.8), params)
            updates, state = tx.update(updates, state, params, qstate=qstate)
            return (optax.apply_updates(params, updates), state), state[1].step

        signs = jnp.array([1.0, -1.0] * 3)
        return jax.lax.scan(step, (params, tx.init(params)), signs)[0]

    want, (_, follows) = jax.jit(trained)(params)
    assert 0.0 < qj.training.frozen_share(follows) < 1.0
    with jax.set_mesh(mesh()):
        got, (_, followed) = jax.jit(trained)(spread)
    agree((got, followed), (want, follows))
    for path, leaf in spread.items():
        assert got[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        level = followed.weights[path].level
        assert level.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


CASES = {
    f"{case.__name__} of {name}, {label}": functools.partial(case, name, bits)
    for case in (dampening, oscillations)
    for name, (label, bits) in zip(
        ("columns, then rows", "gathered", "layers"), [*WIDTHS.items(), ("W3", 3.0)], strict=True
    )
}


if __name__ == "__main__":
    run_all(CASES)
