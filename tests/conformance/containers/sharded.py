"""Run with eight simulated devices: a sharded batch gives what one device gives.

A program of its own, because a process has its devices for life; ``test_devices`` starts it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import quantjax as qj
from quantjax.adapters.nnx import functional
from tests.conformance.containers import nnx_cases, raw_cases
from tests.conformance.containers.case import Case
from tests.models import CNN, MLP, assert_same_bits, normal, shuffled

DEVICES, ROWS = 8, 16


def linen(module: nn.Module, x: jax.Array) -> Case:
    return Case(module.apply, shuffled(module.init(jax.random.key(0), x)), (x,))


def of_nnx() -> Case:
    f, params, state = functional(nnx_cases.MLP(nnx.Rngs(0)))
    inputs = (state, normal(2, ROWS, 6))
    return Case(lambda *arguments: f(*arguments)[0], shuffled(params), inputs)


def of_layers() -> Case:
    return raw_cases.layers()._replace(inputs=(normal(3, ROWS, 6),))


CASES: dict[str, Callable[[], Case]] = {
    "linen_mlp": lambda: linen(MLP(), normal(0, ROWS, 8)),
    "linen_cnn": lambda: linen(CNN(), normal(1, ROWS, 8, 8, 3)),
    "nnx": of_nnx,
    "raw_scan": of_layers,
}


def check(case: Case) -> None:
    """All that has to hold for one model."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    *state, x = case.inputs
    single = (case.params, *state, x)
    sharded = (*jax.device_put((case.params, *state), whole), jax.device_put(x, rows))
    assert len(sharded[-1].sharding.device_set) == DEVICES
    assert sharded[-1].addressable_shards[0].data.shape[0] == ROWS // DEVICES

    want = jax.jit(case.f)(*sharded)
    assert len(want.sharding.device_set) == DEVICES
    identity = case.planned(qj.Policy([]))
    same(jax.jit(lambda *a: qj.fake_quantize(case.f, identity)({}, *a))(*sharded), want)

    plan = case.planned(qj.uniform_policy(weight_bits=8, activation_bits=8))
    assert len(plan.quantized) == len(plan.sites)
    bypass = qj.calibrate(plan, qj.init(plan), case.params, weight_bits=0, activation_bits=0)
    quantized = jax.jit(qj.fake_quantize(case.f, plan))
    same(quantized(jax.device_put(bypass, whole), *sharded), want)

    observe = jax.jit(qj.observe(case.f, plan))
    y, state_1 = observe(qj.init(plan), *single)
    y_8, state_8 = observe(jax.device_put(qj.init(plan), whole), *sharded)
    same(y_8, want)
    first, *_ = plan.quantized  # of its layers the first one: what came in is the batch itself
    of_batch = [
        jax.tree.map(
            lambda a: np.asarray(a)[(0,) * len(first.site.steps)],
            {key: s._replace(moments=()) for key, s in state[first.site.name].items()},
        )
        for state in (state_8, state_1)
    ]
    assert_same_bits(*of_batch)
    close(*(sums_and_ends(state) for state in (state_8, state_1)), 1e-5)

    qstate = qj.calibrate(plan, state_1, case.params)
    got = quantized(jax.device_put(qstate, whole), *sharded)
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    one = quantized(qstate, *single)
    close(got, one, 1e-5)
    scale = float(jnp.abs(want).max())
    assert 1e-4 < float(np.abs(np.asarray(got) - np.asarray(want)).max()) / scale < 0.05
    coarse = qj.calibrate(plan, state_1, case.params, weight_bits=3)
    assert (
        float(np.abs(np.asarray(quantized(coarse, *single)) - np.asarray(y)).max()) > 0.05 * scale
    )


def sums_and_ends(state: Any) -> Any:
    """Statistics with the totals of their histograms: a last place can decide on a bin."""

    def of(seen: qj.Statistics) -> Any:
        return seen._replace(distribution=seen.distribution.counts.low.sum(-1))

    return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, qj.Statistics))


def same(got: jax.Array, want: jax.Array) -> None:
    """The same bits on the same devices."""
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    assert_same_bits(np.asarray(got), np.asarray(want))


def close(got: Any, want: Any, tolerance: float) -> None:
    """Equal but for the last places of sums."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.abs(np.asarray(b)).max()), 1e-6)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    assert jax.device_count() == DEVICES, jax.devices()
    for name in parser.parse_args().cases:
        check(CASES[name]())
        print(f"{name} holds")


if __name__ == "__main__":
    main()
