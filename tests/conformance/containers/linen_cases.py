"""Containers of Flax linen: its lifted transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.conformance.containers.case import BATCH, LAYERS, TIMES, WIDTH, Case, Visits
from tests.conformance.containers.raw_cases import SERIES, X, with_own_jvp
from tests.models import MLP

KERNEL = "params/{}/kernel"


def model(module: nn.Module, *inputs: Any, **options: Any) -> Case:
    """A module in evaluation mode; variables are its params."""
    return Case(module.apply, module.init(jax.random.key(0), *inputs), inputs, **options)


class Block(nn.Module):
    """A layer of constant width, usable as the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, *_: Any) -> Any:
        x = jnp.tanh(nn.Dense(WIDTH)(x))
        return (x, None) if _ else x


class Then(nn.Module):
    """A body, then a head."""

    body: nn.Module

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        return nn.Dense(5, name="head")(self.body(*inputs))


def gradient() -> Case:
    module = MLP()
    energy = lambda x, v: jnp.sum(module.apply(v, x) ** 2)  # noqa: E731
    variables = module.init(jax.random.key(0), X)
    return Case(lambda v, x: jax.grad(energy)(x, v), variables, (X,))


class Vmapped(nn.Module):
    """Over examples, which share the weights; over an ensemble, which does not."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        each = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
        ensemble = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return ensemble(5, name="ensemble")(jnp.tanh(each(WIDTH, name="shared")(x)))


class Rematerialized(nn.Module):
    """Nothing saved in the first block, its products in the second."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.remat(Block)(name="first")(x)
        policy = jax.checkpoint_policies.dots_saveable
        return nn.remat(Block, policy=policy)(name="second")(x)


class Layers(nn.Module):
    """A stack in a scan."""

    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack = nn.scan(
            self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return stack(name="stack")(x, None)[0]


class Recurrent(nn.Module):
    """A layer of an LSTM, usable as the body of a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, *_: Any) -> Any:
        x = nn.RNN(nn.OptimizedLSTMCell(WIDTH), name="rnn")(x)
        return (x, None) if _ else x


def recurrent(cell: nn.RNNCellBase, *, visits: Visits | None = None) -> Case:
    """A recurrent network and a head."""
    everywhere = {"*": visits or Visits((), 2 * TIMES), KERNEL.format("head"): Visits()}
    return model(Then(nn.RNN(cell)), SERIES, visits=everywhere)


class RematScan(nn.Module):
    """Two by two layers, each level rematerialized."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat_scan(Block, lengths=(2, 2))(name="stack")(x)


class Branches(nn.Module):
    """The second calibration batch takes the other branch."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one, two = nn.Dense(WIDTH, name="one"), nn.Dense(WIDTH, name="two")
        if self.is_initializing():
            return one(two(x))
        return nn.cond(
            jnp.sum(x) > 0.0,
            lambda _, x: jnp.tanh(one(x)),
            lambda _, x: jnp.sin(two(x)),
            self,
            x,
        )


class Loop(nn.Module):
    """As many turns as the first input says."""

    @nn.compact
    def __call__(self, count: jax.Array, x: jax.Array) -> jax.Array:
        dense = nn.Dense(WIDTH, name="one")
        if self.is_initializing():
            return dense(x)
        return nn.while_loop(
            lambda _, carry: carry[0] < count,
            lambda _, carry: (carry[0] + 1, jnp.tanh(dense(carry[1]))),
            self,
            (jnp.int32(0), x),
        )[1]


class OwnJvp(nn.Module):
    """A product with its derivative by hand."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(1.0), (WIDTH, WIDTH))
        return jnp.tanh(with_own_jvp(kernel, x))


class OwnVjp(nn.Module):
    """A layer with its gradient by hand."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def forward(module: nn.Module, x: jax.Array) -> Any:
            return nn.vjp(lambda module, x: module(x), module, x)

        def backward(pull: Callable[..., Any], g: jax.Array) -> Any:
            return pull(g)

        dense = nn.Dense(WIDTH)
        return jnp.tanh(nn.custom_vjp(lambda m, x: m(x), forward, backward)(dense, x))


class Tied(nn.Module):
    """One layer twice, and an embedding that is the head too."""

    @nn.compact
    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        embed = nn.Embed(7, WIDTH, name="embed")
        dense = nn.Dense(WIDTH, name="one")
        x = embed(tokens) + x
        return embed.attend(dense(jnp.tanh(dense(x))))


LAYERED = {"*": Visits((LAYERS,))}
TOKENS = jnp.arange(BATCH, dtype=jnp.int32)

CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: model(MLP(), X),
    "jit": lambda: model(nn.Sequential([nn.jit(Block)(), nn.jit(nn.Dense)(5)]), X),
    "grad": gradient,
    "vmap": lambda: model(Vmapped(), SERIES),
    "remat": lambda: model(Rematerialized(), X),
    "layers": lambda: model(Layers(), X, visits=LAYERED),
    "time": lambda: recurrent(nn.LSTMCell(WIDTH)),
    "time_optimized": lambda: recurrent(nn.OptimizedLSTMCell(WIDTH)),
    "time_gru": lambda: recurrent(nn.GRUCell(WIDTH)),
    "nested": lambda: model(Layers(Recurrent), SERIES, visits={"*": Visits((LAYERS,), 2 * TIMES)}),
    "remat_scan": lambda: model(RematScan(), X, visits={"*": Visits((2, 2))}),
    "cond": lambda: model(Branches(), X, visits={"*": Visits((), 1)}),
    "while": lambda: model(
        Loop(), jnp.int32(TIMES), X, visits={"*": Visits((), 2 * TIMES)}, reverse=False
    ),
    "custom_jvp": lambda: model(Then(OwnJvp()), X, inlined=True),
    "custom_vjp": lambda: model(Then(OwnVjp()), X, opaque=1),
    "tied": lambda: model(Tied(), TOKENS, X),
}
