"""Containers of Equinox: its filtered transformations, and those of JAX over modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from quantjax.adapters.equinox import functional
from tests.conformance.containers.case import BATCH, LAYERS, TIMES, WIDTH, Case, Visits
from tests.conformance.containers.raw_cases import SERIES, X

KEY = jax.random.key(0)


def model(method: Callable[..., Any], module: Any, *inputs: Any, **options: Any) -> Case:
    """A method of a module, or of a dict of them; modules are for one example."""
    f, params = functional(module, method=method)
    return Case(f, params, inputs, **options)


def rows(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A layer of each example."""
    return jax.vmap(layer)(x)


def linear(seed: int, out: int = WIDTH) -> eqx.nn.Linear:
    """A layer from the width of all."""
    return eqx.nn.Linear(WIDTH, out, key=jax.random.key(seed))


class Block(eqx.Module):
    """A layer of constant width, of one example."""

    dense: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.dense = eqx.nn.Linear(WIDTH, WIDTH, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x))


class MLP(eqx.Module):
    """Two layers, batch norm between them."""

    one: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    two: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.one = eqx.nn.Linear(WIDTH, 16, key=key)
        self.norm = eqx.nn.BatchNorm(16, "batch", mode="ema")
        self.two = eqx.nn.Linear(16, 4, key=key)

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x, state = self.norm(self.one(x), state)
        return self.two(jax.nn.relu(x)), state


def plain() -> Case:
    """With the statistics of batch norm in Equinox's state."""
    module, state = eqx.nn.make_with_state(MLP)(KEY)

    def method(module: MLP, state: eqx.nn.State, x: jax.Array) -> jax.Array:
        run = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return run(x, state)[0]

    return model(method, eqx.nn.inference_mode(module), state, X)


def jitted() -> Case:
    call = eqx.filter_jit(rows)
    blocks = [Block(jax.random.key(0)), Block(jax.random.key(1))]
    return model(lambda m, x: call(m[1], call(m[0], x)), blocks, X)


def gradient() -> Case:
    """The model is a gradient itself, jitted.

    Not jitted, its eager gradient is differentiated through the ``jit`` that ``jax.numpy`` puts
    around each product, and JAX itself gives other last places once the model is traced.
    """
    energy = eqx.nn.MLP(WIDTH, "scalar", 16, 1, activation=jax.nn.tanh, key=KEY)
    score = eqx.filter_jit(lambda m, x: rows(eqx.filter_grad(lambda x: m(x) ** 2), x))
    return model(score, energy, X)


def vmapped() -> Case:
    """Over examples, which share the weights; over an ensemble, which does not."""
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(WIDTH, 5, key=key))
    module = {"shared": linear(0), "ensemble": make(jax.random.split(KEY, 2))}

    def method(m: Any, x: jax.Array) -> jax.Array:
        hidden = rows(lambda series: jnp.tanh(rows(m["shared"], series)), x)
        each = eqx.filter_vmap(lambda m, x: rows(lambda s: rows(m, s), x), in_axes=(0, None))
        return each(m["ensemble"], hidden)

    return model(method, module, SERIES)


def rematerialized() -> Case:
    """Nothing saved in the first block, its products in the second."""
    policy = jax.checkpoint_policies.dots_saveable
    first, second = eqx.filter_checkpoint(rows), eqx.filter_checkpoint(rows, policy=policy)
    blocks = {"first": Block(jax.random.key(0)), "second": Block(jax.random.key(1))}
    return model(lambda m, x: second(m["second"], first(m["first"], x)), blocks, X)


def stacked(make: Callable[[jax.Array], Any]) -> Any:
    """Modules of all layers in one."""
    return eqx.filter_vmap(make)(jax.random.split(KEY, LAYERS))


def scanned(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``run(module, x)`` of each layer in turn."""

    def method(module: Any, x: jax.Array) -> jax.Array:
        arrays, rest = eqx.partition(module, eqx.is_array)
        step = lambda x, layer: (run(eqx.combine(layer, rest), x), None)  # noqa: E731
        return lax.scan(step, x, arrays)[0]

    return method


def hidden_states(cell: Any, x: jax.Array) -> jax.Array:
    """All hidden states of a recurrent network, time axis second."""
    is_lstm = isinstance(cell, eqx.nn.LSTMCell)

    def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        state = jax.vmap(cell)(x, state)
        return state, state[0] if is_lstm else state

    start = jnp.zeros((x.shape[0], WIDTH))
    _, states = lax.scan(step, (start, start) if is_lstm else start, x.swapaxes(0, 1))
    return states.swapaxes(0, 1)


def recurrent(cell: Any) -> Case:
    """A recurrent network and a head."""

    def method(m: Any, x: jax.Array) -> jax.Array:
        return rows(lambda series: rows(m["head"], series), hidden_states(m["cell"], x))

    visits = {"*": Visits((), 2 * TIMES), "head/weight": Visits()}
    return model(method, {"cell": cell, "head": linear(1, 5)}, SERIES, visits=visits)


def branches() -> Case:
    """The second calibration batch takes the other branch."""

    def method(m: Any, x: jax.Array) -> jax.Array:
        one = lambda x: jnp.tanh(rows(m["one"], x))  # noqa: E731
        two = lambda x: jnp.sin(rows(m["two"], x))  # noqa: E731
        return lax.cond(jnp.sum(x) > 0.0, one, two, x)

    modules = {"one": linear(0), "two": linear(1)}
    return model(method, modules, X, visits={"*": Visits((), 1)})


def loop() -> Case:
    """As many turns as the first input says."""

    def method(m: Any, count: jax.Array, x: jax.Array) -> jax.Array:
        body = lambda carry: (carry[0] + 1, rows(m, carry[1]))  # noqa: E731
        return lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), x))[1]

    visits = {"*": Visits((), 2 * TIMES)}
    return model(method, Block(KEY), jnp.int32(TIMES), X, visits=visits, reverse=False)


@eqx.filter_custom_jvp
def with_own_jvp(layer: eqx.nn.Linear, x: jax.Array) -> jax.Array:
    """A layer with its derivative by hand."""
    return rows(layer, x)


@with_own_jvp.def_jvp
def _(primals: Any, tangents: Any) -> Any:
    (layer, x), (d_layer, dx) = primals, tangents
    moved = dx @ layer.weight.T
    if d_layer.weight is not None:
        moved += x @ d_layer.weight.T + d_layer.bias[None]
    return rows(layer, x), moved


@eqx.filter_custom_vjp
def by_hand(layer_and_x: tuple[eqx.nn.Linear, jax.Array]) -> jax.Array:
    """A layer with its gradient by hand; Equinox differentiates by the first argument."""
    return rows(*layer_and_x)


@by_hand.def_fwd
def _(perturbed: Any, layer_and_x: tuple[eqx.nn.Linear, jax.Array]) -> Any:
    return rows(*layer_and_x), None


@by_hand.def_bwd
def _(residuals: Any, g: jax.Array, perturbed: Any, layer_and_x: Any) -> Any:
    layer, x = layer_and_x
    moved = eqx.tree_at(lambda m: (m.weight, m.bias), layer, (g.T @ x, g.sum(0)))
    return moved, g @ layer.weight


def with_own_vjp(layer: eqx.nn.Linear, x: jax.Array) -> jax.Array:
    """The same, of two arguments."""
    return by_hand((layer, x))


def own(layer: Callable[..., jax.Array], **options: Any) -> Case:
    """A layer with a derivative by hand, and a plain one."""

    def method(m: Any, x: jax.Array) -> jax.Array:
        return rows(m["head"], jnp.tanh(layer(m["own"], x)))

    return model(method, {"own": linear(0), "head": linear(1, 5)}, X, **options)


def tied() -> Case:
    """One layer twice, and an embedding that is the head too."""
    pair = (eqx.nn.Embedding(7, WIDTH, key=KEY), linear(1, 7))
    shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def method(m: Any, tokens: jax.Array, x: jax.Array) -> jax.Array:
        embed, head = m["shared"]()
        x = rows(embed, tokens) + x
        return rows(head, rows(m["one"], jnp.tanh(rows(m["one"], x))))

    tokens = jnp.arange(BATCH, dtype=jnp.int32)
    return model(method, {"shared": shared, "one": linear(2)}, tokens, X)


CASES: dict[str, Callable[[], Case]] = {
    "plain": plain,
    "jit": jitted,
    "grad": lambda: gradient()._replace(last_places=True),
    "vmap": vmapped,
    "remat": rematerialized,
    "layers": lambda: model(scanned(rows), stacked(Block), X, visits={"*": Visits((LAYERS,))}),
    "time": lambda: recurrent(eqx.nn.LSTMCell(WIDTH, WIDTH, key=KEY))._replace(last_places=True),
    "time_gru": lambda: recurrent(eqx.nn.GRUCell(WIDTH, WIDTH, key=KEY)),
    "nested": lambda: model(
        scanned(hidden_states),
        stacked(lambda key: eqx.nn.LSTMCell(WIDTH, WIDTH, key=key)),
        SERIES,
        visits={"*": Visits((LAYERS,), 2 * TIMES)},
    )._replace(last_places=True),
    "cond": branches,
    "while": loop,
    "custom_jvp": lambda: own(with_own_jvp, inlined=True),
    "custom_vjp": lambda: own(with_own_vjp, opaque=1),
    "tied": tied,
}
