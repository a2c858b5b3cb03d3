"""Networks and a training step that benchmarks of quantization-aware training compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.models.cnn import PooledCNN
from experiments.models.resnet import resnet20
from quantjax.interpreter import Carried, Outcome, ProgramCache, Visit, evaluate


class Layer(nn.Module):
    """Attention and a two-layer network, normalized before each."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, tokens, width)`` to the same."""
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        q, k, v = (
            nn.DenseGeneral((self.heads, width // self.heads), name=name)(y) for name in "qkv"
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // self.heads)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="out")(mixed)
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(y)


class Transformer(nn.Module):
    """Four layers of width 128 over embedded tokens; the mean goes to the classes."""

    layers: int = 4
    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of ``(batch, tokens, width)``."""
        for _ in range(self.layers):
            x = Layer()(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


class Case(NamedTuple):
    """A model and the shape of a batch."""

    model: nn.Module
    shape: tuple[int, ...]
    fenced: bool = False


CASES = {
    "cnn": Case(PooledCNN(), (128, 28, 28, 1)),
    "transformer": Case(Transformer(), (16, 128, 128)),
    "resnet20": Case(resnet20(), (64, 32, 32, 3), fenced=True),
}


def fenced(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, with both operands of each product behind an optimization barrier."""
    programs = ProgramCache(f)

    def run(variables: Any, x: jax.Array) -> Any:
        program = programs(variables, x)

        def handler(visit: Visit) -> Outcome:
            lhs, rhs = (jax.lax.optimization_barrier(side) for side in (visit.lhs, visit.rhs))
            return Outcome(visit.product.bind(lhs, rhs))

        names = frozenset(site.name for site in program.sites.values())
        return evaluate(program, handler, names, Carried({}, {}), variables, x).result

    return run


def train_step(apply: Callable[..., Any], optimizer: optax.GradientTransformation) -> Any:
    """``(variables, moments, qstate, x, labels) -> (variables, moments)``; scales are static."""

    def step(variables: Any, moments: Any, qstate: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            logits, stats = apply(qstate, {**variables, "params": params}, x)
            cost = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return cost, stats

        gradient, stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, moments = optimizer.update(gradient, moments, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, "params": params, **stats}, moments

    return jax.jit(step)
