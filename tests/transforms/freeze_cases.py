"""Weights on all ways to a product, with NumPy's own account of each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import quantjax as qj
from tests.models import Case, linen, normal

Move = Callable[[np.ndarray], np.ndarray]


class Way(NamedTuple):
    """A case, one of its parameters, and where that lies in the product.

    Attributes:
      case: the model.
      path: the parameter, which names its site.
      there: parameter to product, each layer's weight behind the axes of its steps.
      back: the inverse.
      quantizer: of the weights.
      steps: how many leading axes are layers.
      dtype: what the weight is cast to on the way.
    """

    case: Case
    path: str
    there: Move
    back: Move
    quantizer: qj.Quantizer = qj.weight_quantizer(bits=4)
    steps: int = 0
    dtype: Any = jnp.float32

    def leaf(self, tree: Any) -> Any:
        """The parameter in a tree like the case's."""
        for key in self.path.split("/"):
            tree = tree[key]
        return tree


def same(x: np.ndarray) -> np.ndarray:
    return x


def raw(
    f: Any, w: tuple[int, ...], x: tuple[int, ...], there: Move, back: Move, **more: Any
) -> Way:
    """A function of ``{"w": ...}``."""
    return Way(Case(f, {"w": normal(1, *w)}, normal(2, *x)), "w", there, back, **more)


def per_group(size: int) -> qj.Quantizer:
    return qj.weight_quantizer(bits=4, granularity=qj.PerGroup(size))


def scanned(f: Any) -> Any:
    """``f(x, w)`` for each leading entry of ``p["w"]``."""
    return lambda p, x: lax.scan(lambda x, w: (f(x, w), None), x, p["w"])[0]


def nested(p: Any, x: jax.Array) -> jax.Array:
    outer = lambda x, w: (scanned(lambda x, w: jnp.tanh(x @ w.T))({"w": w}, x), None)  # noqa: E731
    return lax.scan(outer, x, p["w"])[0]


class Layer(nn.Module):
    """The body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> Any:
        return jnp.tanh(nn.Dense(6, name="dense")(x)), None


class Stack(nn.Module):
    """Layers whose parameters are stacked along ``axis``."""

    axis: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=3, **options)(name="layers")(x, None)[0]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x)


class HalfDense(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(5, dtype=jnp.bfloat16, name="dense")(x)


def flat_heads(w: np.ndarray) -> np.ndarray:
    return w.reshape(8, 6)


def attention(kernel: str, quantizer: qj.Quantizer) -> Way:
    path = f"params/attention/{kernel}/kernel"
    return Way(linen(Attention(), normal(3, 2, 3, 8)), path, same, same, quantizer)


WAYS: dict[str, Callable[[], Way]] = {
    "dense": lambda: raw(lambda p, x: x @ p["w"], (6, 5), (4, 6), same, same),
    "dense_in_groups": lambda: raw(
        lambda p, x: x @ p["w"], (6, 5), (4, 6), same, same, quantizer=per_group(3)
    ),
    "weight_left": lambda: raw(lambda p, x: p["w"] @ x, (5, 6), (6, 4), same, same),
    "transposed": lambda: raw(
        lambda p, x: x @ p["w"].T, (5, 6), (4, 6), np.transpose, np.transpose
    ),
    "transposed_in_groups": lambda: raw(
        lambda p, x: x @ p["w"].T,
        (5, 6),
        (4, 6),
        np.transpose,
        np.transpose,
        quantizer=per_group(2),
    ),
    "reversed": lambda: raw(
        lambda p, x: x @ jnp.flip(p["w"], 0), (6, 5), (4, 6), np.flipud, np.flipud
    ),
    "heads_flattened": lambda: raw(
        lambda p, x: x @ p["w"].reshape(8, 6),
        (4, 2, 6),
        (3, 8),
        flat_heads,
        lambda w: w.reshape(4, 2, 6),
        quantizer=per_group(4),  # two heads share a scale
    ),
    "heads_cut": lambda: raw(
        lambda p, x: x @ p["w"].reshape(12, 2),
        (4, 3, 2),
        (3, 12),
        lambda w: w.reshape(12, 2),
        lambda w: w.reshape(4, 3, 2),
        quantizer=per_group(2),  # a group begins in one head and ends in the next
    ),
    "channels_of_heads": lambda: raw(
        lambda p, x: x @ p["w"].reshape(6, 8),
        (6, 4, 2),
        (3, 6),
        lambda w: w.reshape(6, 8),
        lambda w: w.reshape(6, 4, 2),
    ),
    "dense_general": lambda: Way(
        linen(nn.DenseGeneral((2, 3), axis=(-2, -1)), normal(4, 3, 4, 2)),
        "params/kernel",
        same,
        same,
    ),
    "query": lambda: attention("query", qj.weight_quantizer(bits=4)),
    "query_in_groups": lambda: attention("query", per_group(2)),
    "attention_out": lambda: attention("out", qj.weight_quantizer(bits=4)),
    "attention_out_in_groups": lambda: attention("out", per_group(2)),
    "conv": lambda: Way(
        linen(nn.Conv(4, (3, 2), strides=(2, 1)), normal(5, 2, 5, 5, 3)),
        "params/kernel",
        same,
        same,
    ),
    "conv_transpose": lambda: Way(
        linen(nn.ConvTranspose(4, (3, 2), transpose_kernel=True), normal(5, 2, 3, 3, 4)),
        "params/kernel",
        lambda w: np.flip(w, (0, 1)).swapaxes(2, 3),
        lambda w: np.flip(w.swapaxes(2, 3), (0, 1)),
    ),
    "half": lambda: Way(
        linen(HalfDense(), normal(6, 3, 6)),
        "params/dense/kernel",
        same,
        same,
        dtype=jnp.bfloat16,
    ),
    "unsigned": lambda: raw(
        lambda p, x: x @ p["w"],
        (6, 5),
        (4, 6),
        same,
        same,
        quantizer=qj.weight_quantizer(format=qj.integer(signed=False), symmetric=False),
    ),
    "narrow_per_tensor": lambda: raw(
        lambda p, x: x @ p["w"],
        (6, 5),
        (4, 6),
        same,
        same,
        quantizer=qj.weight_quantizer(
            bits=3, format=qj.integer(narrow=True), granularity=qj.PerTensor()
        ),
    ),
    "scan": lambda: raw(
        scanned(lambda x, w: jnp.tanh(x @ w)), (3, 6, 6), (2, 6), same, same, steps=1
    ),
    "scan_transposed": lambda: raw(
        scanned(lambda x, w: jnp.tanh(x @ w.T)),
        (3, 6, 6),
        (2, 6),
        lambda w: w.swapaxes(1, 2),
        lambda w: w.swapaxes(1, 2),
        quantizer=per_group(2),
        steps=1,
    ),
    "stack_axis_0": lambda: Way(
        linen(Stack(0), normal(7, 2, 6)), "params/layers/dense/kernel", same, same, steps=1
    ),
    "stack_axis_1": lambda: Way(
        linen(Stack(1), normal(7, 2, 6)),
        "params/layers/dense/kernel",
        lambda w: np.moveaxis(w, 1, 0),
        lambda w: np.moveaxis(w, 0, 1),
        quantizer=per_group(3),
        steps=1,
    ),
    "nested_scans": lambda: raw(
        nested,
        (2, 3, 4, 4),
        (2, 4),
        lambda w: w.swapaxes(2, 3),
        lambda w: w.swapaxes(2, 3),
        steps=2,
    ),
}
