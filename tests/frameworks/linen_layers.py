"""Every class of ``flax.linen``: its builders, or why it owns no kernel."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.frameworks.layer import CONV, DOT, LOOKUP, NO_WEIGHT, OPAQUE, Build, Layer, Row, named
from tests.models import normal, shuffled

KEY = jax.random.key(0)
ROWS = normal(1, 6, 8)
SERIES = normal(2, 3, 5, 8)
IMAGES = normal(3, 2, 6, 6, 4)
VOLUMES = normal(4, 2, 4, 4, 4, 3)
OTHERS = normal(5, 3, 4, 8)
TOKENS = jnp.arange(6, dtype=jnp.int32)

Sites = tuple[str, ...]
DENSE = named(DOT, "params/kernel")


def linen(
    make: Callable[[], nn.Module],
    sites: Sites,
    *inputs: Any,
    method: Callable[..., Any] | None = None,
    pick: Callable[[Any], Any] = lambda y: y,
    **options: Any,
) -> Build:
    """A module in evaluation mode; ``pick`` takes the array of what it returns."""

    def build() -> Layer:
        module = make()
        with quiet():
            variables = shuffled(module.init(KEY, *inputs, method=method, **options))

        def f(variables: Any, *inputs: Any) -> Any:
            with quiet():
                return pick(module.apply(variables, *inputs, method=method, **options))

        return Layer(f, variables, inputs, sites)

    return build


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """``nn.SelfAttention`` says in each call that it goes; until then it is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SelfAttention will be deprecated", DeprecationWarning)
        yield


def dense(make: Callable[[], nn.Module], x: jax.Array = ROWS) -> Build:
    return linen(make, DENSE, x)


def conv(*arguments: Any, x: jax.Array = IMAGES, **options: Any) -> Build:
    sites = named(CONV, "params/kernel")
    return linen(functools.partial(nn.Conv, *arguments, **options), sites, x)


def local(*arguments: Any, x: jax.Array, **options: Any) -> Build:
    """Patches are a convolution with a constant kernel; the layer's own is in a dot."""
    sites = (CONV, *DENSE)
    return linen(functools.partial(nn.ConvLocal, *arguments, **options), sites, x)


def attention(kind: type[nn.Module], *inputs: jax.Array, **options: Any) -> Build:
    """Three projections, scores, the sum that they weigh, and a projection."""
    sites = (*gates("query key value"), NO_WEIGHT, NO_WEIGHT, *gates("out"))
    return linen(lambda: kind(num_heads=2, **options), sites, *inputs)


def cell(make: Callable[[], Any], sites: Sites, x: jax.Array = ROWS) -> Build:
    """One step of a recurrent cell from a state that is not zero; its output."""

    def build() -> Layer:
        start = make().initialize_carry(KEY, x.shape)
        carry = jax.tree.map(lambda leaf: normal(7, *leaf.shape), start)
        return linen(make, sites, carry, x, pick=lambda y: y[1])()

    return build


def gates(text: str, kind: str = DOT) -> Sites:
    """Kernels of these submodules."""
    return named(kind, text, "params/{}/kernel")


def simple() -> nn.Module:
    return nn.RNN(nn.SimpleCell(6))


GATES = "hf hg hi", "if ig ii"
CONCATENATED = tuple(
    f"f({','.join(f'params/{gate}/kernel' for gate in text.split())},...): {DOT}" for text in GATES
)
WEIGHT_NORM = "f({0},{0}/scale)".format("params/layer_instance/kernel")
SPECTRAL_NORM = "f(batch_stats/layer_instance/kernel/u,params/layer_instance/kernel)"
ITERATION = (NO_WEIGHT + OPAQUE,) * 4  # the largest singular value: of parameters alone
FP8 = "a product for dot_general=; owns scales of its own quantization, and no kernel"
NORM = "scales and shifts element by element"
BASE = "a base or a container; owns what is put into it"

CLASSES: dict[str, Row] = {
    "Dense": {"plain": dense(lambda: nn.Dense(5))},
    "DenseGeneral": {
        "axes": dense(lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)), SERIES),
        "batch": dense(lambda: nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), SERIES),
    },
    "Einsum": {"plain": dense(lambda: nn.Einsum((8, 2, 5), "bi,iho->bho"))},
    "Conv": {
        "1d": conv(5, (3,), x=SERIES),
        "causal": conv(5, (3,), padding="CAUSAL", x=SERIES),
        "2d": conv(5, (3, 3)),
        "circular": conv(5, (3, 3), padding="CIRCULAR"),
        "strided": conv(5, (3, 3), strides=2, padding="VALID"),
        "dilated": conv(5, (3, 3), kernel_dilation=2),
        "input_dilated": conv(5, (3, 3), input_dilation=2, padding=1),
        "grouped": conv(6, (3, 3), feature_group_count=2),
        "depthwise": conv(8, (3, 3), feature_group_count=4),
        "3d": conv(3, (2, 2, 2), x=VOLUMES),
    },
    "ConvLocal": {
        "1d": local(5, (3,), x=SERIES),
        "2d": local(3, (3, 3), strides=2, x=IMAGES),
    },
    "ConvTranspose": {
        "strided": linen(
            lambda: nn.ConvTranspose(5, (3, 3), strides=(2, 2)),
            named(CONV, "params/kernel"),
            IMAGES,
        ),
        "transposed": linen(
            lambda: nn.ConvTranspose(4, (3, 3), transpose_kernel=True),
            named(CONV, "params/kernel"),
            IMAGES,
        ),
    },
    "Embed": {
        "lookup": linen(lambda: nn.Embed(7, 8), named(LOOKUP, "params/embedding"), TOKENS),
        "attend": linen(
            lambda: nn.Embed(7, 8),
            named(DOT, "params/embedding"),
            ROWS,
            method=nn.Embed.attend,
        ),
    },
    "MultiHeadDotProductAttention": {
        "cross": attention(nn.MultiHeadDotProductAttention, SERIES, OTHERS)
    },
    "MultiHeadAttention": {"self": attention(nn.MultiHeadAttention, SERIES, qkv_features=4)},
    "SelfAttention": {"self": attention(nn.SelfAttention, SERIES)},
    "LSTMCell": {"step": cell(lambda: nn.LSTMCell(6), gates("ii hi if hf ig hg io ho"))},
    "OptimizedLSTMCell": {
        "step": cell(lambda: nn.OptimizedLSTMCell(6), CONCATENATED),
    },
    "GRUCell": {"step": cell(lambda: nn.GRUCell(6), gates("ir hr iz hz in hn"))},
    "MGUCell": {"step": cell(lambda: nn.MGUCell(6), gates("if hf hn in"))},
    "SimpleCell": {"step": cell(lambda: nn.SimpleCell(6), gates("i h"))},
    "ConvLSTMCell": {
        "step": cell(lambda: nn.ConvLSTMCell(3, (3, 3)), gates("ih hh", CONV), IMAGES)
    },
    "RNN": {
        "gru": linen(
            lambda: nn.RNN(nn.GRUCell(6)),
            gates("cell/ir cell/hr cell/iz cell/hz cell/in cell/hn"),
            SERIES,
        )
    },
    "Bidirectional": {
        "simple": linen(
            lambda: nn.Bidirectional(simple(), simple()),
            gates("forward_rnn/cell/i forward_rnn/cell/h backward_rnn/cell/i backward_rnn/cell/h"),
            SERIES,
        )
    },
    "WeightNorm": {
        "dense": linen(lambda: nn.WeightNorm(nn.Dense(5)), named(DOT, WEIGHT_NORM), ROWS)
    },
    "SpectralNorm": {
        "dense": linen(
            lambda: nn.SpectralNorm(nn.Dense(5)),
            (*ITERATION, *named(DOT, SPECTRAL_NORM)),
            ROWS,
            update_stats=False,
        )
    },
    "Dropout": "zeroes entries",
    "PReLU": "one slope for all entries",
    **dict.fromkeys(("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"), NORM),
    **dict.fromkeys(("Module", "Sequential", "RNNCellBase"), BASE),
    **dict.fromkeys(
        (
            "Fp8DirectDotGeneralOp",
            "Fp8DotGeneral",
            "Fp8DotGeneralOp",
            "Fp8Einsum",
            "NANOOFp8DotGeneralOp",
        ),
        FP8,
    ),
}
