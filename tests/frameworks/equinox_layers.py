"""Layers of Equinox that own a kernel; each is for one example, and mapped over several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from quantjax.adapters.equinox import functional
from tests.frameworks.layer import (
    CONV,
    DOT_LEFT,
    LOOKUP,
    NO_WEIGHT,
    Build,
    Layer,
    Row,
    named,
)
from tests.frameworks.linen_layers import IMAGES, KEY, ROWS, SERIES, TOKENS, VOLUMES, Sites
from tests.models import normal, shuffled

nn = eqx.nn


def equinox(
    make: Callable[[], Any],
    sites: Sites,
    *inputs: Any,
    pick: Callable[[Any], Any] = lambda y: y,
) -> Build:
    """A module, mapped over first axes of the inputs; ``pick`` takes an array of its result."""

    def build() -> Layer:
        f, params = functional(make(), method=lambda m, *inputs: pick(jax.vmap(m)(*inputs)))
        return Layer(f, shuffled(params), inputs, sites)

    return build


def conv(make: Callable[..., Any], *arguments: Any, x: jax.Array = IMAGES, **options: Any) -> Build:
    """Channels first, as Equinox has them."""
    x = jnp.moveaxis(x, -1, 1)
    return equinox(lambda: make(*arguments, key=KEY, **options), named(CONV, "weight"), x)


BIASES = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
CELL = named(DOT_LEFT, "weight_ih weight_hh")
STATE = normal(7, 6, 6)
CLASSES: dict[str, Row] = {
    "Linear": {"plain": equinox(lambda: nn.Linear(8, 5, key=KEY), named(DOT_LEFT, "weight"), ROWS)},
    "Conv": {
        "1d": conv(nn.Conv1d, 8, 5, 3, x=SERIES),
        "2d": conv(nn.Conv2d, 4, 5, 3, stride=2),
        "dilated": conv(nn.Conv2d, 4, 5, 3, dilation=2),
        "grouped": conv(nn.Conv2d, 4, 6, 3, groups=2),
        "depthwise": conv(nn.Conv2d, 4, 8, 3, groups=4),
        "3d": conv(nn.Conv3d, 3, 3, 2, x=VOLUMES),
    },
    "ConvTranspose": {
        "1d": conv(nn.ConvTranspose1d, 8, 5, 3, stride=2, x=SERIES),
        "2d": conv(nn.ConvTranspose2d, 4, 5, 3),
        "3d": conv(nn.ConvTranspose3d, 3, 3, 2, x=VOLUMES),
    },
    "Embedding": {
        # Of one token, Equinox takes a slice at (token, 0); mapped, a gather by both indices.
        "lookup": equinox(lambda: nn.Embedding(7, 8, key=KEY), named(LOOKUP, "weight"), TOKENS)
    },
    "LSTMCell": {
        "step": equinox(
            lambda: nn.LSTMCell(8, 6, key=KEY),
            CELL,
            ROWS,
            (STATE, 0.5 * STATE),
            pick=lambda y: y[0],
        )
    },
    "GRUCell": {"step": equinox(lambda: nn.GRUCell(8, 6, key=KEY), CELL, ROWS, STATE)},
    "MultiheadAttention": {
        "self": equinox(
            lambda: nn.MultiheadAttention(2, 8, **BIASES, key=KEY),
            (
                *named(DOT_LEFT, "query key value", "{}_proj/weight"),
                NO_WEIGHT,
                NO_WEIGHT,
                *named(DOT_LEFT, "output_proj/weight"),
            ),
            SERIES,
            SERIES,
            SERIES,
        )
    },
}
