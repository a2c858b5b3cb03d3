"""Containers written by hand, in functions of ``(params, x)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.conformance.containers.case import BATCH, LAYERS, TIMES, WIDTH, Case, Visits, batch

Layer = dict[str, jax.Array]


def layer(*stack: int, out: int = WIDTH) -> Layer:
    """A weight and a bias, of as many layers as the leading axes say."""
    return {"w": 0.5 * batch(*stack, WIDTH, out), "b": 0.1 * batch(*stack, out)}


def affine(p: Layer, x: jax.Array) -> jax.Array:
    """``x W + b``."""
    return dot(x, p["w"]) + p["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x @ w`` without the ``jit`` that ``jax.numpy`` puts around it, as Flax has it."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def mlp(p: dict[str, Layer], x: jax.Array) -> jax.Array:
    """Two layers."""
    return affine(p["two"], lax.tanh(affine(p["one"], x)))


def two() -> dict[str, Layer]:
    """Parameters of :func:`mlp`."""
    return {"one": layer(), "two": layer(out=5)}


X = batch(BATCH, WIDTH)
SERIES = batch(BATCH, TIMES, WIDTH)


def plain() -> Case:
    return Case(mlp, two(), (X,))


def jitted() -> Case:
    inner = jax.jit(affine)
    return Case(lambda p, x: inner(p["two"], jnp.tanh(inner(p["one"], x))), two(), (X,))


def gradient() -> Case:
    """The model is a gradient itself, as that of an energy is a score."""
    energy = lambda x, p: jnp.sum(mlp(p, x) ** 2)  # noqa: E731
    return Case(lambda p, x: jax.grad(energy)(x, p), two(), (X,))


def vmapped() -> Case:
    """Over examples, which share the weights; over an ensemble, which does not."""

    def f(p: Any, x: jax.Array) -> jax.Array:
        hidden = jax.vmap(lambda series: jnp.tanh(affine(p["shared"], series)))(x)
        return jax.vmap(affine, (0, None))(p["ensemble"], hidden)

    return Case(f, {"shared": layer(), "ensemble": layer(2)}, (SERIES,))


def rematerialized() -> Case:
    """Nothing saved in the first block, its products in the second."""
    policy = jax.checkpoint_policies.dots_saveable
    first = jax.checkpoint(mlp)
    second = jax.checkpoint(mlp, policy=policy)
    block = {"one": layer(), "two": layer()}
    return Case(
        lambda p, x: second(p["b"], jnp.tanh(first(p["a"], x))), {"a": block, "b": block}, (X,)
    )


def layers() -> Case:
    def f(p: Any, x: jax.Array) -> jax.Array:
        x, _ = lax.scan(lambda x, p: (jnp.tanh(affine(p, x)), None), x, p["stack"])
        return affine(p["head"], x)

    visits = {"stack/w": Visits((LAYERS,))}
    return Case(f, {"stack": layer(LAYERS), "head": layer()}, (X,), visits)


def lstm(p: Any, series: jax.Array) -> jax.Array:
    """All hidden states of an LSTM, time axis second."""

    def step(carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        h, c = carry
        gates = affine(p["input"], x) + dot(h, p["hidden"])
        i, g, o, forget = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(forget) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((2, series.shape[0], p["hidden"].shape[0]))
    _, states = lax.scan(step, (start[0], start[1]), series.swapaxes(0, 1))
    return states.swapaxes(0, 1)


def lstm_params(*stack: int) -> Any:
    """Parameters of :func:`lstm`."""
    return {
        "input": layer(*stack, out=4 * WIDTH),
        "hidden": 0.3 * batch(*stack, WIDTH, 4 * WIDTH),
    }


def time() -> Case:
    def f(p: Any, x: jax.Array) -> jax.Array:
        return affine(p["head"], lstm(p["lstm"], x))

    visits = {name: Visits((), 2 * TIMES) for name in ("lstm/input/w", "lstm/hidden")}
    return Case(f, {"lstm": lstm_params(), "head": layer()}, (SERIES,), visits)


def nested() -> Case:
    def f(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, p: (lstm(p, x), None), x, p)[0]

    return Case(f, lstm_params(LAYERS), (SERIES,), {"*": Visits((LAYERS,), 2 * TIMES)})


def branches() -> Case:
    """The second calibration batch takes the other branch."""

    def f(p: Any, x: jax.Array) -> jax.Array:
        x = lax.cond(
            jnp.sum(x) > 0.0,
            lambda p, x: jnp.tanh(affine(p["one"], x)),
            lambda p, x: jnp.sin(affine(p["two"], x)),
            p,
            x,
        )
        return affine(p["head"], x)

    params = {"one": layer(), "two": layer(), "head": layer()}
    return Case(f, params, (X,), {"one/w": Visits((), 1), "two/w": Visits((), 1)})


def loop() -> Case:
    def f(p: Any, count: jax.Array, x: jax.Array) -> jax.Array:
        def body(carry: Any) -> Any:
            return carry[0] + 1, jnp.tanh(affine(p["one"], carry[1]))

        return lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), x))[1]

    inputs = (jnp.int32(TIMES), X)
    return Case(f, {"one": layer()}, inputs, {"one/w": Visits((), 2 * TIMES)}, reverse=False)


@jax.custom_jvp
def with_own_jvp(w: jax.Array, x: jax.Array) -> jax.Array:
    """``x W`` with its derivative by hand."""
    return x @ w


@with_own_jvp.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (w, x), (dw, dx) = primals, tangents
    return x @ w, dx @ w + x @ dw


@jax.custom_vjp
def with_own_vjp(w: jax.Array, x: jax.Array) -> jax.Array:
    """``x W`` with its gradient by hand."""
    return x @ w


with_own_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


def own(product: Callable[..., jax.Array], **options: Any) -> Case:
    """One layer with a product that has a derivative of its own, and a plain one."""

    def f(p: Any, x: jax.Array) -> jax.Array:
        return affine(p["head"], jnp.tanh(product(p["own"], x)))

    return Case(f, {"own": batch(WIDTH, WIDTH), "head": layer()}, (X,), **options)


def tied() -> Case:
    """The same weight twice, and once transposed, as the head of a language model has it."""

    def f(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(affine(p["one"], jnp.tanh(affine(p["one"], x))))
        return x @ p["one"]["w"].T

    return Case(f, {"one": layer()}, (X,))


CASES = {
    "plain": plain,
    "jit": jitted,
    "grad": lambda: gradient()._replace(last_places=True),
    "vmap": vmapped,
    "remat": rematerialized,
    "layers": layers,
    "time": time,
    "nested": nested,
    "cond": branches,
    "while": loop,
    "custom_jvp": lambda: own(with_own_jvp, inlined=True),
    "custom_vjp": lambda: own(with_own_vjp, opaque=1),
    "tied": tied,
}
