"""Cells of a grid spread over devices by ``shard_map``; ``on_a_mesh`` runs it with eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import quantjax as qj

GENERATOR = np.random.default_rng(7)
X = jnp.asarray(GENERATOR.normal(size=(4, 6)), jnp.float32)
PARAMS = {
    name: jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)
    for name, shape in (("a", (6, 5)), ("bias", (5,)), ("b", (5, 3)))
}
SWEPT = (("weight_bits",), ("activation_bits",), ("weight_bits", "activation_bits"))


def f(params, x):
    """Biases and a ReLU: each has an operand that varies over devices, and one that does not."""
    return jax.nn.relu(x @ params["a"] + params["bias"]) @ params["b"]


def cells_are_those_of_one_device() -> None:
    """Outputs and gradients, the parameters being the same on all devices."""
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, PARAMS, X))
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), PARAMS, X)
    widths = jnp.arange(1.0, 9.0)

    def cell(width, params, x, swept):
        bits = dict.fromkeys(swept, width)

        def loss(params):
            qstate = qj.calibrate(plan, state, params, **bits)
            return jnp.sum(qj.fake_quantize(f, plan)(qstate, params, x) ** 2)

        return jax.value_and_grad(loss)(params)

    mesh = jax.make_mesh((8,), ("cells",), axis_types=(AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": (P("cells"), P(), P()), "out_specs": P("cells")}
    for swept in SWEPT:

        def every(widths, params, x, swept=swept):
            # What is differentiated varies, or its gradient is summed over all cells.
            if jax.typeof(widths).mat.varying:
                params = jax.tree.map(lambda w: jax.lax.pcast(w, "cells", to="varying"), params)
            return jax.lax.map(lambda width: cell(width, params, x, swept), widths)

        want = jax.jit(every)(widths, PARAMS, X)
        got = jax.jit(jax.shard_map(every, **specs))(widths, PARAMS, X)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, got, want)

        def outputs(widths, params, x, swept=swept):
            def one(width):
                bits = dict.fromkeys(swept, width)
                qstate = qj.calibrate(plan, state, params, **bits)
                return qj.fake_quantize(f, plan)(qstate, params, x)

            return jax.lax.map(one, widths)

        spread = jax.jit(jax.shard_map(outputs, **specs))(widths, PARAMS, X)
        close(spread, jax.jit(outputs)(widths, PARAMS, X))
