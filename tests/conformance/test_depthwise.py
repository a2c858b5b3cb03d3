"""Depthwise convolutions whose channels have ranges over three decades.

A scale for all channels of an activation loses the small ones whole (in peers the worst channel's
error is 100 %). With a scale a channel it is that of channels quantized each on its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from tests.models import normal

CHANNELS = 16
RANGES = jnp.logspace(0, 3, CHANNELS)
X = normal(0, 4, 10, 10, CHANNELS) * RANGES[None, None, None]
KERNEL = normal(1, 3, 3, 1, CHANNELS) * RANGES[None, None, None, ::-1]


def f(params: Any, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        params["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=CHANNELS,
    )


def errors(activations: qj.Quantizer) -> tuple[Any, np.ndarray, Any]:
    """Relative error of each channel of the output; and what was quantized."""
    scheme = qj.Scheme(weights=qj.weight_quantizer(bits=8), activations=activations)
    params = {"kernel": KERNEL}
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, X))
    out, state = jax.jit(qj.observe(f, plan))(qj.init(plan), params, X)
    qstate = qj.calibrate(plan, state, params)
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X)
    executed = jax.jit(qj.execute(f, plan))(qstate, qj.freeze(plan, qstate, params), X)
    np.testing.assert_allclose(
        executed, simulated, rtol=1e-5, atol=1e-5 * float(jnp.abs(out).max())
    )
    norm = lambda y: np.sqrt(np.sum(np.asarray(y, np.float64) ** 2, axis=(0, 1, 2)))  # noqa: E731
    return plan, norm(simulated - out) / norm(out), (simulated, out)


def fake(x: np.ndarray, bits: int, *, symmetric: bool) -> np.ndarray:
    """8-bit min-max quantization of one channel, in NumPy."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    if symmetric:
        scale = max(-low, high) / 2 ** (bits - 1)
        return np.clip(np.rint(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def convolved(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """One channel, padded with zeros, in float64."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    shifts = [(i, j) for i in range(3) for j in range(3)]
    return sum(padded[:, i : i + 10, j : j + 10] * w[i, j] for i, j in shifts)


def test_the_worst_channel_is_as_good_as_channels_quantized_alone():
    plan, found, _ = errors(qj.activation_quantizer(bits=8, granularity=qj.PerChannel()))
    x, w = np.asarray(X, np.float64), np.asarray(KERNEL, np.float64)
    alone = []
    for c in range(CHANNELS):
        quantized = fake(x[..., c], 8, symmetric=False), fake(w[:, :, 0, c], 8, symmetric=True)
        exact = convolved(x[..., c], w[:, :, 0, c])
        alone.append(np.linalg.norm(convolved(*quantized) - exact) / np.linalg.norm(exact))
    assert plan.quantized[0].quantized[0].scale_shape == (1, 1, 1, CHANNELS)
    np.testing.assert_allclose(found, alone, rtol=0.02)
    assert max(found) < 0.02


def test_one_scale_for_all_channels_loses_the_small_ones():
    """What peers do, and what a tensor-wise policy does here too: the reason for the other."""
    _, found, _ = errors(qj.activation_quantizer(bits=8))
    assert max(found) > 0.5


@pytest.mark.parametrize("live", [False, True])
def test_dynamic_ranges_by_channel(live):
    mode = qj.RangeMode.LIVE if live else qj.RangeMode.FIXED
    quantizer = qj.activation_quantizer(bits=8, granularity=qj.PerChannel(), range=mode)
    _, found, _ = errors(quantizer)
    assert max(found) < 0.02


def test_a_net_of_depthwise_and_pointwise_layers_keeps_its_channels():
    """A pointwise layer mixes channels of all sizes; ahead of it they are quantized each."""
    params = {"kernel": KERNEL, "mix": normal(2, CHANNELS, CHANNELS)}
    g = lambda p, x: jax.nn.relu(f(p, x)) @ p["mix"]  # noqa: E731
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=8),
        activations=qj.activation_quantizer(bits=8, granularity=qj.PerChannel()),
    )
    policy = qj.Policy([qj.rule(qj.op(qj.Op.CONV), scheme), *qj.presets.w8a8().rules])
    plan = qj.plan(policy, qj.sites(g, params, X))
    out, state = jax.jit(qj.observe(g, plan))(qj.init(plan), params, X)
    qstate = qj.calibrate(plan, state, params)
    found = jax.jit(qj.fake_quantize(g, plan))(qstate, params, X)
    assert float(jnp.linalg.norm(found - out) / jnp.linalg.norm(out)) < 0.02
