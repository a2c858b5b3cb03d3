"""Containers of Flax NNX: its transformations of functions of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from quantjax.adapters.nnx import functional
from tests.conformance.containers.case import BATCH, LAYERS, TIMES, WIDTH, Case, Visits
from tests.conformance.containers.raw_cases import SERIES, X, with_own_jvp, with_own_vjp


def model(module: nnx.Module, *inputs: Any, **options: Any) -> Case:
    """A module as ``f(params, state, *inputs)``; of its results only the output is kept."""
    f, params, state = functional(module)
    return Case(lambda *arguments: f(*arguments)[0], params, (state, *inputs), **options)


class Block(nnx.Module):
    """A layer of constant width."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x))


class MLP(nnx.Module):
    """Two layers, batch norm between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one = nnx.Linear(WIDTH, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.two = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.two(nnx.relu(self.norm(self.one(x))))


class Jitted(nnx.Module):
    """Blocks called through ``nnx.jit``."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        call = nnx.jit(lambda block, x: block(x))
        for block in self.blocks:
            x = call(block, x)
        return x


class Score(nnx.Module):
    """The model is a gradient itself."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.energy = MLP(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=1)(self.energy, x)


class Vmapped(nnx.Module):
    """Over examples, which share the weights; over an ensemble, which does not."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.shared = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, 5, rngs=rngs))
        self.ensemble = nnx.split_rngs(splits=2)(make)(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nnx.vmap(lambda m, x: jnp.tanh(m(x)), in_axes=(None, 0))(self.shared, x)
        return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(self.ensemble, hidden)


class Rematerialized(nnx.Module):
    """Nothing saved in the first block, its products in the second."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = Block(rngs), Block(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        policy = jax.checkpoint_policies.dots_saveable
        x = nnx.remat(lambda m, x: m(x))(self.first, x)
        return nnx.remat(lambda m, x: m(x), policy=policy)(self.second, x)


class Layers(nnx.Module):
    """A stack in a scan."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> None:
        self.stack = nnx.split_rngs(splits=LAYERS)(nnx.vmap(make))(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        run = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.stack)


class Recurrent(nnx.Module):
    """A recurrent network and a head."""

    def __init__(self, cell: nnx.RNNCellBase, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(cell, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x))


def recurrent(cell: type[nnx.RNNCellBase]) -> Case:
    rngs = nnx.Rngs(0)
    visits = {"*": Visits((), 2 * TIMES), "head/kernel": Visits()}
    return model(Recurrent(cell(WIDTH, WIDTH, rngs=rngs), rngs), SERIES, visits=visits)


def rnn(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, WIDTH, rngs=rngs), rngs=rngs)


class Branches(nnx.Module):
    """The second calibration batch takes the other branch."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one, self.two = Block(rngs), Block(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.cond(
            jnp.sum(x) > 0.0, lambda m, x: m.one(x), lambda m, x: jnp.sin(m.two(x)), self, x
        )


class Loop(nnx.Module):
    """As many turns as the first input says."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one = Block(rngs)

    def __call__(self, count: jax.Array, x: jax.Array) -> jax.Array:
        return nnx.while_loop(
            lambda carry: carry[1] < count,
            lambda carry: (carry[0], carry[1] + 1, carry[0](carry[2])),
            (self.one, jnp.int32(0), x),
        )[2]


class Own(nnx.Module):
    """A product with a derivative by hand, and a plain one."""

    def __init__(self, product: Callable[..., jax.Array], rngs: nnx.Rngs) -> None:
        self.product = product
        self.own = nnx.Param(rngs.normal((WIDTH, WIDTH)))
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.product(self.own[...], x)))


class Tied(nnx.Module):
    """One layer twice, and an embedding that is the head too."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, WIDTH, rngs=rngs)
        self.one = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.again = self.one

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        x = self.embed(tokens) + x
        return self.embed.attend(self.again(jnp.tanh(self.one(x))))


LAYERED = {"*": Visits((LAYERS,))}
TOKENS = jnp.arange(BATCH, dtype=jnp.int32)

CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: model(MLP(nnx.Rngs(0)), X),
    "jit": lambda: model(Jitted(nnx.Rngs(0)), X),
    "grad": lambda: model(Score(nnx.Rngs(0)), X),
    "vmap": lambda: model(Vmapped(nnx.Rngs(0)), SERIES),
    "remat": lambda: model(Rematerialized(nnx.Rngs(0)), X),
    "layers": lambda: model(Layers(Block, nnx.Rngs(0)), X, visits=LAYERED),
    "time": lambda: recurrent(nnx.LSTMCell),
    "time_optimized": lambda: recurrent(nnx.OptimizedLSTMCell),
    "time_gru": lambda: recurrent(nnx.GRUCell),
    "nested": lambda: model(
        Layers(rnn, nnx.Rngs(0)), SERIES, visits={"*": Visits((LAYERS,), 2 * TIMES)}
    ),
    "cond": lambda: model(Branches(nnx.Rngs(0)), X, visits={"*": Visits((), 1)}),
    "while": lambda: model(
        Loop(nnx.Rngs(0)),
        jnp.int32(TIMES),
        X,
        visits={"*": Visits((), 2 * TIMES)},
        reverse=False,
    ),
    "custom_jvp": lambda: model(Own(with_own_jvp, nnx.Rngs(0)), X, inlined=True),
    "custom_vjp": lambda: model(Own(with_own_vjp, nnx.Rngs(0)), X, opaque=1),
    "tied": lambda: model(Tied(nnx.Rngs(0)), TOKENS, X),
}
