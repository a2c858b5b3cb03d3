"""A sum that is moved ahead of its bias is quantized as any other: in the product's layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import quantjax as qj
from tests.models import Case, Ready, assert_same_bits, normal, ready

P = {"w": normal(1, 6, 5), "b": normal(2, 5), "k": normal(3, 3, 2, 4), "c": normal(4, 4)}
X = normal(5, 4, 6)
SERIES = normal(6, 4, 7, 2)


def rows(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"][None])


def mapped(p: Any, x: jax.Array) -> jax.Array:
    """As a layer of Equinox: the product of one example, its bias as it lies."""
    return jnp.tanh(jax.vmap(lambda x: x @ p["w"] + p["b"])(x))


def columns(p: Any, x: jax.Array) -> jax.Array:
    """The weight first; under ``vmap`` the sum is transposed ahead of the bias."""
    return jnp.tanh(jax.vmap(lambda x: p["w"].T @ x + p["b"])(x))


def turned(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh((x @ p["w"]).T + p["b"][:, None]).T


def cut(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh((x @ p["w"]).reshape(2, 2, 5) + p["b"][None, None]).reshape(4, 5)


def in_a_scan(p: Any, x: jax.Array) -> jax.Array:
    step = lambda _, row: (None, jnp.tanh(row @ p["w"] + p["b"]))  # noqa: E731
    return lax.scan(step, None, x)[1]


def convolved(p: Any, x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return jnp.tanh(y + p["c"][None, None])


def convolved_alone(p: Any, x: jax.Array) -> jax.Array:
    """One example at a time, channels first, as Equinox convolves."""

    def one(x: jax.Array) -> jax.Array:
        kernel = jnp.transpose(p["k"], (2, 1, 0))
        y = lax.conv_general_dilated(x.T[None], kernel, (1,), "SAME")
        return (jnp.squeeze(y, 0) + p["c"][:, None]).T

    return jnp.tanh(jax.vmap(one)(x))


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], jax.Array]] = {
    "mapped": (rows, mapped, X),
    "columns": (rows, columns, X),
    "turned": (rows, turned, X),
    "cut": (rows, cut, X),
    "scan": (rows, in_a_scan, X),
    "convolution": (convolved, convolved_alone, SERIES),
}
BIASES = {
    "sums": qj.AccumulatorBias(),
    "own scale": qj.bias_quantizer(bits=8),
    "none": None,
}


def planned(f: Callable[..., Any], x: jax.Array, biases: Any) -> Ready:
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=4),
        activations=qj.activation_quantizer(bits=6),
        outputs=qj.activation_quantizer(bits=3),
        biases=biases,
    )
    return ready(Case(f, P, x), qj.Policy([qj.rule(qj.everything(), scheme)]))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("biases", BIASES.values(), ids=list(BIASES))
@pytest.mark.parametrize("name", PAIRS)
def test_it_is_quantized_as_the_same_layer_without_moves(name, biases):
    plain, moved, x = PAIRS[name]
    results, qstates = [], []
    for f in (plain, moved):
        done = planned(f, x, biases)
        frozen = qj.freeze(done.plan, done.qstate, P)
        simulated = jax.jit(qj.fake_quantize(f, done.plan))(done.qstate, P, x)
        executed = jax.jit(qj.execute(f, done.plan))(done.qstate, frozen, x)
        np.testing.assert_allclose(executed, simulated, rtol=1e-6, atol=1e-6)
        results.append(simulated)
        (site,) = done.plan.quantized
        qstates.append(done.qstate[site.site.name]["output"])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6, atol=1e-6)
    scales = [float(qparams.scale.reshape(())) for qparams in qstates]
    np.testing.assert_allclose(*scales, rtol=1e-6)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", PAIRS)
def test_outputs_are_rounded_behind_the_bias(name):
    """They lie on the output's own grid, which a bias added later would leave."""
    _, moved, x = PAIRS[name]
    linear = lambda p, x: jnp.arctanh(moved(p, x))  # noqa: E731
    done = planned(moved, x, None)
    (site,) = done.plan.quantized
    scale = done.qstate[site.site.name]["output"].scale
    steps = qj.fake_quantize(linear, done.plan)(done.qstate, P, x) / scale.reshape(())
    np.testing.assert_allclose(steps, jnp.round(steps), atol=2e-3)
    assert len(np.unique(np.round(np.asarray(steps)))) <= 8


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", PAIRS)
def test_bypass_is_the_model_and_gradients_flow(name):
    _, moved, x = PAIRS[name]
    done = planned(moved, x, qj.AccumulatorBias())
    widths = dict.fromkeys(("weight_bits", "activation_bits", "output_bits"), 0)
    floats = qj.calibrate(done.plan, done.state, P, **widths)
    simulated = qj.fake_quantize(moved, done.plan)
    assert_same_bits(jax.jit(simulated)(floats, P, x), jax.jit(moved)(P, x))
    loss = lambda f, *args: (f(*args) ** 2).sum()  # noqa: E731
    got = jax.jit(jax.grad(lambda p: loss(simulated, floats, p, x)))(P)
    want = jax.jit(jax.grad(lambda p: loss(moved, p, x)))(P)
    for name_ in P:
        np.testing.assert_allclose(got[name_], want[name_], rtol=1e-5, atol=1e-6)
    quantized = jax.grad(lambda p: loss(simulated, done.qstate, p, x))(P)
    assert sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(quantized)) > 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", [name for name in PAIRS if name != "scan"])
def test_meshes_with_explicit_axes_change_nothing(name):
    """The sum is handled where axes are automatic, and moved there; scans are along no axis."""
    _, moved, x = PAIRS[name]
    done = planned(moved, x, qj.AccumulatorBias())
    want = jax.jit(qj.fake_quantize(moved, done.plan))(done.qstate, P, x)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        given = jax.device_put((done.qstate, P), NamedSharding(mesh, PartitionSpec()))
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
        got = jax.jit(qj.fake_quantize(moved, done.plan))(*given, sharded)
    assert_same_bits(np.asarray(got), np.asarray(want))
