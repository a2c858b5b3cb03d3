"""Which leaves are kernels by their names alone, in the trees of four frameworks."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import quantjax as qj
from quantjax.interpreter import leaves_by_path
from quantjax.kernels import kernels_in

MATRIX = jnp.ones((4, 4))


def haiku_convolution() -> Any:
    """Channels first: its bias has an axis for each of the image's."""

    def f(x: jax.Array) -> jax.Array:
        y = hk.Conv2D(4, 3, data_format="NCHW")(x)
        return hk.Linear(2)(y.mean((2, 3)))

    return jax.eval_shape(hk.transform(f).init, jax.random.key(0), jnp.ones((1, 3, 6, 6)))


def haiku_stack() -> Any:
    f = lambda x: hk.experimental.layer_stack(3)(lambda x: hk.Linear(4)(x))(x)  # noqa: E731
    return jax.eval_shape(hk.transform(f).init, jax.random.key(0), jnp.ones((1, 4)))


def nnx_state() -> Any:
    """Three layers in one module, as scans over layers have them; the paths end in ``value``."""

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)

    state = nnx.state(Layer(nnx.Rngs(0)), nnx.Param)
    return jax.tree.map(lambda leaf: jnp.stack(3 * [leaf]), state)


def boxed() -> Any:
    """Of attention, whose biases have a row for each head."""
    box = lambda init, *axes: nn.with_partitioning(init, axes)  # noqa: E731
    attention = nn.MultiHeadDotProductAttention(
        2,
        kernel_init=box(nn.initializers.lecun_normal(), None, None),
        bias_init=box(nn.initializers.zeros_init(), None, None),
        out_kernel_init=box(nn.initializers.lecun_normal(), None, None),
    )
    return attention.init(jax.random.key(0), jnp.ones((1, 3, 4)))


def equinox_stack() -> Any:
    make = lambda key: eqx.nn.GRUCell(4, 4, key=key)  # noqa: E731
    return eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), 3))


TREES = {
    "haiku convolution": (haiku_convolution, {"conv2_d/w", "linear/w"}),
    "haiku stack": (haiku_stack, {"linear/w"}),
    "nnx": (nnx_state, {"dense/kernel/value"}),
    "boxes": (boxed, {f"params/{n}/kernel/value" for n in ("query", "key", "value", "out")}),
    "equinox": (equinox_stack, {"weight_ih", "weight_hh"}),
    "one matrix": (lambda: {"b": MATRIX}, {"b"}),
    "low rank": (lambda: {"w": MATRIX, "a": MATRIX, "b": MATRIX}, {"w", "a", "b"}),
    "attention by hand": (lambda: {"key": MATRIX, "value": MATRIX}, {"key", "value"}),
}


@pytest.mark.parametrize("name", TREES)
def test_kernels_are_told_from_biases_and_norms(name):
    make, want = TREES[name]
    tree = make()
    assert {key.split("__layer_stack_no_per_layer/")[-1] for key in found(tree)} == want


def found(tree: Any) -> list[str]:
    return list(kernels_in(leaves_by_path(tree)))


def test_pruning_and_data_free_quantization_leave_the_others_alone():
    state = nnx_state()
    mask = leaves_by_path(qj.prune_mask(state, 0.5))
    pruned = [path for path, leaf in mask.items() if jnp.ndim(leaf) and not leaf.all()]
    assert pruned == ["dense/kernel/value"]
    weights = qj.weight_quantizer(granularity=qj.PerTensor())
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    quantized = leaves_by_path(qj.quantize_params(state, policy), is_leaf=is_codes)
    assert [path for path, leaf in quantized.items() if is_codes(leaf)] == ["dense/kernel/value"]


def is_codes(leaf: Any) -> bool:
    return isinstance(leaf, qj.QTensor)
