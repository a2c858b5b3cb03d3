"""Biases of products with a weight for each entry of a batch: experts, ensembles, mapped layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from tests.models import Case, Ready, assert_same_bits, normal, ready

X = normal(1, 2, 16, 5)


def experts(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("ebi,eio->ebo", x, p["w"]) + p["b"][:, None]


def members(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda w, b: x[0] @ w + b[None])(p["w"], p["b"])


P = {"w": normal(2, 2, 5, 7), "b": normal(3, 2, 7)}
LINEN = {
    "mapped layer": nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2
    )(7),
    "batch_dims": nn.DenseGeneral(7, batch_dims=(0,)),
    "einsum": nn.Einsum((2, 5, 7), "ebi,eio->ebo"),
}


def case(name: str) -> Case:
    if name in ("experts", "members"):
        return Case({"experts": experts, "members": members}[name], P, X)
    model = LINEN[name]
    params = model.init(jax.random.key(0), X)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert shapes == {(2, 5, 7), (2, 7)}
    params = jax.tree.map(lambda a: normal(4, *a.shape) if a.ndim == 2 else a, params)
    return Case(lambda v, x: model.apply(v, x), params, X)


NAMES = ["experts", "members", *LINEN]


def planned(example: Case, **options: Any) -> Ready:
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=4), activations=qj.activation_quantizer(), **options
    )
    return ready(example, qj.Policy([qj.rule(qj.weighted(), scheme)]))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_rounded_behind_them_and_integers_do_the_same(name):
    f, params, x = example = case(name)
    done = planned(example, outputs=qj.activation_quantizer(bits=3), biases=qj.AccumulatorBias())
    simulated = jax.jit(qj.fake_quantize(f, done.plan))(done.qstate, params, x)
    frozen = qj.freeze(done.plan, done.qstate, params)
    executed = jax.jit(qj.execute(f, done.plan))(done.qstate, frozen, x)
    assert_same_bits(executed, simulated)
    (entry,) = done.plan.quantized
    output = done.qstate[entry.site.name]["output"]
    codes = np.asarray(simulated) / np.asarray(output.scale).reshape(())
    np.testing.assert_allclose(codes, codes.round(), atol=1e-4)
    assert len(np.unique(codes.round())) <= 8


@pytest.mark.parametrize("name", NAMES)
def test_they_are_multiples_of_the_scale_of_their_own_sums(name):
    """A code for each expert and channel, whose scales differ."""
    f, params, x = example = case(name)
    done = planned(example, biases=qj.AccumulatorBias())
    (entry,) = done.plan.quantized
    operands = done.qstate[entry.site.name]
    run = qj.fake_quantize(f, done.plan)
    without = jax.tree.map(lambda a: jnp.zeros_like(a) if a.ndim == 2 else a, params)
    got = run(done.qstate, params, x) - run(done.qstate, without, x)
    sums = np.asarray(operands["activation"].scale).reshape(()) * np.float64(
        operands["weight"].scale.reshape(2, 1, 7)
    )
    (bias,) = (np.float64(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    want = np.round(bias[:, None] / sums) * sums
    assert np.abs(want - bias[:, None]).max() > 1e-4  # rounding is seen
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), atol=1e-5)
