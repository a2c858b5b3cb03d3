"""Every layer that owns a kernel: exact at bypass, close at eight bits, coarser at four."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from tests.frameworks import equinox_layers, haiku_layers, linen_layers, nnx_layers
from tests.frameworks.layer import Layer, variants
from tests.models import assert_same_bits

pytestmark = pytest.mark.thinned(23)

TABLES = {
    "linen": linen_layers.CLASSES,
    "nnx": nnx_layers.CLASSES,
    "haiku": haiku_layers.CLASSES,
    "equinox": equinox_layers.CLASSES,
}
LAYERS = {
    f"{framework}/{name}": build
    for framework, rows in TABLES.items()
    for name, build in variants(rows).items()
}


class Run(NamedTuple):
    """A layer, its plan of eight bits, what it returns itself, and what it observed."""

    layer: Layer
    plan: qj.Plan
    own: jax.Array
    observed: jax.Array
    state: Any


@pytest.fixture(scope="module", params=LAYERS)
def layer(request) -> Layer:
    return LAYERS[request.param]()


@pytest.fixture(scope="module")
def run(layer) -> Run:
    plan = qj.plan(qj.uniform_policy(), qj.sites(layer.f, layer.params, *layer.inputs))
    observe = jax.jit(qj.observe(layer.f, plan))
    observed, state = observe(qj.init(plan), layer.params, *layer.inputs)
    return Run(layer, plan, jax.jit(layer.f)(layer.params, *layer.inputs), observed, state)


@pytest.fixture(scope="module")
def quantized(run) -> dict[str, jax.Array]:
    """What the layer returns at widths of weights and activations, by one program."""
    fake = jax.jit(qj.fake_quantize(run.layer.f, run.plan))

    def at(weight_bits: int, activation_bits: int) -> jax.Array:
        bits = {"weight_bits": weight_bits}
        if any(not entry.site.op.is_lookup for entry in run.plan.quantized):
            bits["activation_bits"] = activation_bits
        qstate = qj.calibrate(run.plan, run.state, run.layer.params, **bits)
        return fake(qstate, run.layer.params, *run.layer.inputs)

    return {"bypass": at(0, 0), "w8a8": at(8, 8), "w4a8": at(4, 8)}


def error(run: Run, y: jax.Array) -> float:
    """Of the output, relative to it."""
    return float(jnp.linalg.norm(y - run.own) / jnp.linalg.norm(run.own))


def test_observing_and_the_identity_plan_change_no_bit(run):
    assert_same_bits(run.observed, run.own)
    layer = run.layer
    plan = qj.plan(qj.Policy([]), qj.sites(layer.f, layer.params, *layer.inputs))
    identity = jax.jit(qj.fake_quantize(layer.f, plan))({}, layer.params, *layer.inputs)
    assert_same_bits(identity, run.own)


def test_width_zero_changes_no_bit(run, quantized):
    assert_same_bits(quantized["bypass"], run.own)


def test_eight_bits_are_close_and_four_are_coarser(run, quantized):
    fine, coarse = (error(run, quantized[name]) for name in ("w8a8", "w4a8"))
    assert 0 < fine <= 0.02, fine
    assert fine < coarse < 1, (fine, coarse)
    assert jnp.isfinite(quantized["w4a8"]).all()
