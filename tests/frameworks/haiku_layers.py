"""Layers of Haiku that own a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax

from quantjax.adapters.haiku import functional
from tests.frameworks.layer import CONV, DOT, LOOKUP, NO_WEIGHT, Build, Layer, Row, named
from tests.frameworks.linen_layers import IMAGES, KEY, ROWS, SERIES, TOKENS, VOLUMES, Sites
from tests.models import normal, shuffled


def haiku(forward: Callable[..., Any], sites: Sites, *inputs: Any) -> Build:
    """A function of Haiku modules that keep no state."""

    def build() -> Layer:
        f, params, state = functional(hk.transform(forward), KEY, *inputs)
        apply = lambda params, *inputs: f(params, state, None, *inputs)[0]  # noqa: E731
        return Layer(apply, shuffled(params), inputs, sites)

    return build


def conv(make: Callable[[], Any], x: jax.Array = IMAGES) -> Build:
    return haiku(lambda x: make()(x), named(CONV, "layer/w"), x)


def cell(make: Callable[[], hk.RNNCore], sites: Sites, x: jax.Array = ROWS) -> Build:
    """One step of a recurrent core from a state that is not zero; its output."""

    def build() -> Layer:
        start = hk.transform(lambda: make().initial_state(x.shape[0])).apply({}, None)
        carry = jax.tree.map(lambda leaf: normal(7, *leaf.shape), start)
        return haiku(lambda x, carry: make()(x, carry)[0], sites, x, carry)()

    return build


GRU = named(DOT, "layer/w_i f(layer/w_h) f(layer/w_h)#1")
CLASSES: dict[str, Row] = {
    "Linear": {
        "plain": haiku(lambda x: hk.Linear(5, name="layer")(x), named(DOT, "layer/w"), ROWS)
    },
    "Conv": {
        "1d": conv(lambda: hk.Conv1D(5, 3, name="layer"), SERIES),
        "2d": conv(lambda: hk.Conv2D(5, 3, stride=2, name="layer")),
        "dilated": conv(lambda: hk.Conv2D(5, 3, rate=2, name="layer")),
        "grouped": conv(lambda: hk.Conv2D(6, 3, feature_group_count=2, name="layer")),
        "channels_first": conv(lambda: hk.Conv2D(5, 3, data_format="NCHW", name="layer")),
        "3d": conv(lambda: hk.Conv3D(3, 2, name="layer"), VOLUMES),
    },
    "DepthwiseConv": {
        "1d": conv(lambda: hk.DepthwiseConv1D(2, 3, name="layer"), SERIES),
        "2d": conv(lambda: hk.DepthwiseConv2D(2, 3, name="layer")),
        "3d": conv(lambda: hk.DepthwiseConv3D(1, 2, name="layer"), VOLUMES),
    },
    "SeparableDepthwiseConv2D": {
        "2d": haiku(
            lambda x: hk.SeparableDepthwiseConv2D(2, 3, name="layer")(x),
            named(CONV, "depthwise_conv2_d depthwise_conv2_d_1", "layer/~/{}/w"),
            IMAGES,
        )
    },
    "ConvTranspose": {
        "1d": conv(lambda: hk.Conv1DTranspose(5, 3, stride=2, name="layer"), SERIES),
        "2d": conv(lambda: hk.Conv2DTranspose(5, 3, name="layer")),
        "3d": conv(lambda: hk.Conv3DTranspose(3, 2, name="layer"), VOLUMES),
    },
    "Embed": {
        "lookup": haiku(
            lambda x: hk.Embed(7, 8, name="layer")(x), named(LOOKUP, "layer/embeddings"), TOKENS
        ),
        "one_hot": haiku(
            lambda x: hk.Embed(7, 8, lookup_style="ONE_HOT", name="layer")(x),
            named(DOT, "layer/embeddings"),
            TOKENS,
        ),
    },
    "LSTM": {"step": cell(lambda: hk.LSTM(6, name="layer"), named(DOT, "layer/linear/w"))},
    "GRU": {"step": cell(lambda: hk.GRU(6, name="layer"), GRU)},
    "VanillaRNN": {
        "step": cell(
            lambda: hk.VanillaRNN(6, name="layer"), named(DOT, "layer/linear/w layer/linear_1/w")
        )
    },
    "ConvLSTM": {
        "2d": cell(
            lambda: hk.Conv2DLSTM((6, 6), 3, 3, name="layer"),
            named(CONV, "input_to_hidden hidden_to_hidden", "layer/{}/w"),
            IMAGES,
        )
    },
    "MultiHeadAttention": {
        "self": haiku(
            lambda x: hk.MultiHeadAttention(
                2, 4, w_init=hk.initializers.VarianceScaling(), name="layer"
            )(x, x, x),
            (
                *named(DOT, "query key value", "layer/{}/w"),
                NO_WEIGHT,
                NO_WEIGHT,
                *named(DOT, "layer/linear/w"),
            ),
            SERIES,
        )
    },
}
