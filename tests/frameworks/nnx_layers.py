"""Every class of ``flax.nnx``: its builders, or why it owns no kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from quantjax.adapters.nnx import functional
from tests.frameworks.layer import CONV, DOT, LOOKUP, NO_WEIGHT, Build, Layer, Row, named
from tests.frameworks.linen_layers import (
    BASE,
    IMAGES,
    ITERATION,
    NORM,
    OTHERS,
    ROWS,
    SERIES,
    TOKENS,
    VOLUMES,
    Sites,
)
from tests.models import normal, shuffled

Make = Callable[[nnx.Rngs], nnx.Module]
CELL = "cell/dense_{}/kernel"


def module(
    make: Make,
    sites: Sites,
    *inputs: Any,
    method: Callable[..., Any] | None = None,
    wrt: Any = nnx.Param,
) -> Build:
    """A module in evaluation mode, its state an input."""

    def build() -> Layer:
        made = make(nnx.Rngs(0))
        made.eval()
        f, params, state = functional(made, method=method, wrt=wrt)
        return Layer(lambda *a: f(*a)[0], shuffled(params), (state, *inputs), sites)

    return build


def dense(make: Make, x: jax.Array = ROWS) -> Build:
    return module(make, named(DOT, "kernel"), x)


def conv(*arguments: Any, x: jax.Array = IMAGES, **options: Any) -> Build:
    make = functools.partial(nnx.Conv, *arguments, **options)
    return module(lambda rngs: make(rngs=rngs), named(CONV, "kernel"), x)


def attention(*inputs: jax.Array, **options: Any) -> Build:
    """Three projections, scores, the sum that they weigh, and a projection."""
    sites = (*kernels("query key value"), NO_WEIGHT, NO_WEIGHT, *kernels("out"))
    make = functools.partial(nnx.MultiHeadAttention, 2, 8, decode=False, **options)
    return module(lambda rngs: make(rngs=rngs), sites, *inputs)


def cell(kind: type[nnx.RNNCellBase], sites: Sites) -> Build:
    """One step of a recurrent cell from a state that is not zero; its output."""

    def build() -> Layer:
        start = kind(8, 6, rngs=nnx.Rngs(0)).initialize_carry(ROWS.shape, nnx.Rngs(1))
        carry = jax.tree.map(lambda leaf: normal(7, *leaf.shape), start)
        step = lambda m, carry, x: m(carry, x)[1]  # noqa: E731
        return module(lambda rngs: kind(8, 6, rngs=rngs), sites, carry, ROWS, method=step)()

    return build


def simple(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.RNN(nnx.SimpleCell(8, 6, rngs=rngs), rngs=rngs)


def kernels(text: str, pattern: str = "{}/kernel") -> Sites:
    """Kernels of these submodules."""
    return named(DOT, text, pattern)


CLASSES: dict[str, Row] = {
    "Linear": {"plain": dense(lambda rngs: nnx.Linear(8, 5, rngs=rngs))},
    "LinearGeneral": {
        "axes": dense(
            lambda rngs: nnx.LinearGeneral((5, 8), (2, 3), axis=(-2, -1), rngs=rngs), SERIES
        ),
        "batch": dense(lambda rngs: nnx.LinearGeneral(8, 5, batch_axis={0: 3}, rngs=rngs), SERIES),
    },
    "Einsum": {"plain": dense(lambda rngs: nnx.Einsum("bi,iho->bho", (8, 2, 5), rngs=rngs))},
    "Conv": {
        "1d": conv(8, 5, (3,), x=SERIES),
        "2d": conv(4, 5, (3, 3)),
        "strided": conv(4, 5, (3, 3), strides=2, padding="VALID"),
        "dilated": conv(4, 5, (3, 3), kernel_dilation=2),
        "grouped": conv(4, 6, (3, 3), feature_group_count=2),
        "depthwise": conv(4, 8, (3, 3), feature_group_count=4),
        "3d": conv(3, 3, (2, 2, 2), x=VOLUMES),
    },
    "ConvTranspose": {
        "strided": module(
            lambda rngs: nnx.ConvTranspose(4, 5, (3, 3), strides=(2, 2), rngs=rngs),
            named(CONV, "kernel"),
            IMAGES,
        )
    },
    "Embed": {
        "lookup": module(
            lambda rngs: nnx.Embed(7, 8, rngs=rngs), named(LOOKUP, "embedding"), TOKENS
        ),
        "attend": module(
            lambda rngs: nnx.Embed(7, 8, rngs=rngs),
            named(DOT, "embedding"),
            ROWS,
            method=nnx.Embed.attend,
        ),
    },
    "MultiHeadAttention": {"self": attention(SERIES), "cross": attention(SERIES, OTHERS)},
    "LSTMCell": {"step": cell(nnx.LSTMCell, kernels("ii hi if_ hf ig hg io ho"))},
    "OptimizedLSTMCell": {"step": cell(nnx.OptimizedLSTMCell, kernels("dense_i dense_h"))},
    "GRUCell": {"step": cell(nnx.GRUCell, kernels("dense_i dense_h"))},
    "SimpleCell": {"step": cell(nnx.SimpleCell, kernels("dense_i dense_h"))},
    "RNN": {"simple": module(simple, kernels("i h", CELL), SERIES)},
    "Bidirectional": {
        "simple": module(
            lambda rngs: nnx.Bidirectional(simple(rngs), simple(rngs), rngs=rngs),
            (
                *kernels("i h", f"forward_rnn/{CELL}"),
                *kernels("i h", f"backward_rnn/{CELL}"),
            ),
            SERIES,
        )
    },
    "LoRA": {
        "factors": module(
            lambda rngs: nnx.LoRA(8, 2, 5, rngs=rngs), named(DOT, "lora_a lora_b"), ROWS
        ),
        "around": module(
            lambda rngs: nnx.LoRA(8, 2, 5, base_module=nnx.Linear(8, 5, rngs=rngs), rngs=rngs),
            named(DOT, "lora_a lora_b base_module/kernel"),
            ROWS,
        ),
    },
    "LoRALinear": {
        "plain": module(
            lambda rngs: nnx.LoRALinear(8, 5, lora_rank=2, rngs=rngs),
            named(DOT, "kernel lora/lora_a lora/lora_b"),
            ROWS,
        )
    },
    "WeightNorm": {
        "linear": module(
            lambda rngs: nnx.WeightNorm(nnx.Linear(8, 5, rngs=rngs), rngs=rngs),
            named(DOT, "f(layer_instance/kernel,scales/('kernel',))"),
            ROWS,
            # In Flax 0.12.8 the scales are bare arrays, which no type of variable selects.
            wrt=nnx.Any(nnx.Param, nnx.PathContains("scales")),
        )
    },
    "SpectralNorm": {
        "linear": module(
            lambda rngs: nnx.SpectralNorm(nnx.Linear(8, 5, rngs=rngs), rngs=rngs),
            (*ITERATION, f"f(batch_stats/('kernel', 'u'),layer_instance/kernel): {DOT}"),
            ROWS,
            # As an input, the vector of its iteration would make of the normed kernel a value that
            # depends on inputs, which is no weight.
            wrt=nnx.Any(nnx.Param, nnx.BatchStat),
        )
    },
    "Dropout": "zeroes entries",
    "PReLU": "one slope for all entries",
    "RoPE": "turns pairs of entries by angles of their position",
    **dict.fromkeys(("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"), NORM),
    **dict.fromkeys(("Dict", "List", "Module", "Sequential", "RNNCellBase"), BASE),
}
