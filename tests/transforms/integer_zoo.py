"""Models and schemes of the acceptance tests of ``qj.freeze`` and ``qj.execute``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import quantjax as qj
from tests.models import Case, linen, mlp, normal, policy

LAYERS, TIMES = 4, 3


class Convolutions(nn.Module):
    """Strided, dilated, grouped, padded by hand, transposed; a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2), name="strided")(x))
        x = jnp.tanh(nn.Conv(8, (2, 2), kernel_dilation=(2, 2), name="dilated")(x))
        x = x + nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.relu(nn.Conv(4, (3, 2), padding=((2, 0), (-1, 2)), name="padded")(x))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), padding="SAME", name="transposed")(x)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class Block(nn.Module):
    """A transformer layer, usable as the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> Any:
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        x = x + attention(nn.LayerNorm(name="before")(x))
        h = nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm(name="between")(x)))
        return x + nn.Dense(8, name="down")(h), None


class Transformer(nn.Module):
    """Four layers in a scan, each of them rematerialized."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return nn.Dense(4, name="head")(stack(name="layers")(x, None)[0])


class Recurrent(nn.Module):
    """A recurrent layer and a head."""

    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name="head")(nn.RNN(self.cell(8), name="rnn")(x))


MODELS: Mapping[str, Callable[[], Case]] = {
    "mlp": mlp,
    "cnn": lambda: linen(Convolutions(), normal(1, 2, 6, 6, 4)),
    "transformer": lambda: linen(Transformer(), normal(2, 2, 4, 8)),
    "lstm": lambda: linen(Recurrent(nn.LSTMCell), normal(3, 2, TIMES, 8)),
    "optimized_lstm": lambda: linen(Recurrent(nn.OptimizedLSTMCell), normal(4, 2, TIMES, 8)),
}

GROUP = 2
UNSIGNED = qj.weight_quantizer(format=qj.integer(signed=False), symmetric=False)
IN_GROUPS = qj.weight_quantizer(bits=4, granularity=qj.PerGroup(GROUP))
LIVE = qj.activation_quantizer(range=qj.RangeMode.LIVE)
PER_TOKEN = qj.activation_quantizer(granularity=qj.PerToken(), range=qj.RangeMode.LIVE)
STATIC = qj.activation_quantizer()

MODES: Mapping[str, qj.Policy] = {
    "static_asymmetric": policy(qj.weight_quantizer(), STATIC),
    "static_symmetric": policy(qj.weight_quantizer(), qj.activation_quantizer(symmetric=True)),
    "unsigned_weights": policy(UNSIGNED, STATIC),
    "live": policy(qj.weight_quantizer(), LIVE),
    "live_per_token": policy(qj.weight_quantizer(), PER_TOKEN),
    "weight_only_int4": policy(qj.weight_quantizer(bits=4)),
    "groups_static": policy(IN_GROUPS, STATIC),
    "groups_per_token": policy(IN_GROUPS, PER_TOKEN),
    "groups_weight_only": policy(IN_GROUPS),
    "w4a8": policy(qj.weight_quantizer(bits=4), STATIC),
}


def raw_stack(seed: int = 5) -> Case:
    """Layers in a scan written by hand."""
    f = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    return Case(f, {"w": normal(seed, LAYERS, 6, 6)}, normal(seed + 1, 3, 6))
