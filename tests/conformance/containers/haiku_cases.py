"""Containers of Haiku: its versions of JAX's transformations, and lifted ones of JAX itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from quantjax.adapters.haiku import functional
from tests.conformance.containers.case import BATCH, LAYERS, TIMES, WIDTH, Case, Visits
from tests.conformance.containers.raw_cases import SERIES, X, with_own_jvp, with_own_vjp


def model(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Case:
    """A function of Haiku modules; of its results only the output is kept."""
    transformed = hk.transform_with_state(forward)
    f, params, state = functional(transformed, jax.random.key(0), *inputs)

    def apply(params: Any, state: Any, *inputs: Any) -> Any:
        return f(params, state, None, *inputs)[0]

    return Case(apply, params, (state, *inputs), **options)


def jitted_model(forward: Callable[..., Any], *inputs: Any) -> Case:
    """The same, jitted.

    Not jitted, eager gradients pass the ``jit`` that ``jax.numpy`` puts around each product, and
    JAX itself gives other last places once such a model is traced; bypass gives others even so.
    """
    case = model(forward, *inputs)
    return case._replace(f=jax.jit(case.f))


def block(x: jax.Array, name: str) -> jax.Array:
    """A layer of constant width."""
    return jnp.tanh(hk.Linear(WIDTH, name=name)(x))


def mlp(x: jax.Array) -> jax.Array:
    """Two layers, batch norm between them."""
    x = hk.Linear(16, name="one")(x)
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
    x = norm(x, is_training=hk.running_init())
    return hk.Linear(4, name="two")(jax.nn.relu(x))


def lifted(init: Callable[..., Any], name: str, *inputs: Any) -> Any:
    """Parameters of an inner pure function, among those of the model."""
    key = hk.next_rng_key() if hk.running_init() else None
    return hk.lift(init, name=name)(key, *inputs)


def jitted(x: jax.Array) -> jax.Array:
    """Two blocks, each a pure function of its own that is jitted."""
    inner = hk.transform(lambda x: block(x, "dense"))
    for name in ("one", "two"):
        x = jax.jit(inner.apply)(lifted(inner.init, name, x), None, x)
    return x


def score(x: jax.Array) -> jax.Array:
    """The model is a gradient itself."""
    one, two = hk.Linear(16, name="one"), hk.Linear(4, name="two")
    if hk.running_init():
        return two(one(x))
    return hk.grad(lambda x: jnp.sum(two(jax.nn.relu(one(x))) ** 2))(x)


def vmapped(x: jax.Array) -> jax.Array:
    """Over examples, which share the weights; over an ensemble, which does not."""
    shared = hk.Linear(WIDTH, name="shared")
    x = hk.vmap(lambda x: jnp.tanh(shared(x)), split_rng=False)(x)
    inner = hk.transform(lambda x: hk.Linear(5, name="dense")(x))

    def init(key: jax.Array, x: jax.Array) -> Any:
        return jax.vmap(inner.init, (0, None))(jax.random.split(key, 2), x)

    params = lifted(init, "ensemble", x)
    return jax.vmap(lambda p, x: inner.apply(p, None, x), (0, None))(params, x)


def rematerialized(x: jax.Array) -> jax.Array:
    """Nothing saved in the first block, its products in the second."""
    policy = jax.checkpoint_policies.dots_saveable
    x = hk.remat(lambda x: block(x, "first"))(x)
    return hk.remat(lambda x: block(x, "second"), policy=policy)(x)


def layers(x: jax.Array) -> jax.Array:
    """A stack in a scan."""
    return hk.layer_stack(LAYERS)(lambda x: block(x, "dense"))(x)


def unrolled(core: hk.RNNCore, x: jax.Array) -> jax.Array:
    """All outputs of a recurrent network."""
    start = core.initial_state(x.shape[0])
    return hk.dynamic_unroll(core, x, start, time_major=False)[0]


def recurrent(make: Callable[[], hk.RNNCore]) -> Case:
    """A recurrent network and a head."""

    def forward(x: jax.Array) -> jax.Array:
        return hk.Linear(5, name="head")(unrolled(make(), x))

    return model(forward, SERIES, visits={"*": Visits((), 2 * TIMES), "head/w": Visits()})


def nested(x: jax.Array) -> jax.Array:
    """Layers of recurrent networks."""
    return hk.layer_stack(LAYERS)(lambda x: unrolled(hk.LSTM(WIDTH, name="lstm"), x))(x)


def scanned(x: jax.Array) -> jax.Array:
    """One layer as often as there are steps."""
    dense = hk.Linear(WIDTH, name="one")
    return hk.scan(lambda x, _: (jnp.tanh(dense(x)), None), x, None, length=TIMES)[0]


def branches(x: jax.Array) -> jax.Array:
    """The second calibration batch takes the other branch."""
    one, two = hk.Linear(WIDTH, name="one"), hk.Linear(WIDTH, name="two")
    if hk.running_init():
        return one(two(x))
    return hk.cond(jnp.sum(x) > 0.0, lambda x: jnp.tanh(one(x)), lambda x: jnp.sin(two(x)), x)


def loop(count: jax.Array, x: jax.Array) -> jax.Array:
    """As many turns as the first input says."""
    dense = hk.Linear(WIDTH, name="one")
    if hk.running_init():
        return dense(x)
    return hk.while_loop(
        lambda carry: carry[0] < count,
        lambda carry: (carry[0] + 1, jnp.tanh(dense(carry[1]))),
        (jnp.int32(0), x),
    )[1]


def own(product: Callable[..., jax.Array], **options: Any) -> Case:
    """A product with a derivative by hand, and a plain one."""

    def forward(x: jax.Array) -> jax.Array:
        w = hk.get_parameter("own", (WIDTH, WIDTH), init=hk.initializers.RandomNormal())
        return hk.Linear(5, name="head")(jnp.tanh(product(w, x)))

    return model(forward, X, **options)


def tied(tokens: jax.Array, x: jax.Array) -> jax.Array:
    """One layer twice, and an embedding that is the head too."""
    embed = hk.Embed(7, WIDTH, w_init=hk.initializers.RandomUniform(-1.0), name="embed")
    dense = hk.Linear(WIDTH, name="one")
    x = embed(tokens) + x
    return dense(jnp.tanh(dense(x))) @ embed.embeddings.T


LAYERED = {"*": Visits((LAYERS,))}
TOKENS = jnp.arange(BATCH, dtype=jnp.int32)

CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: jitted_model(mlp, X),
    "jit": lambda: model(jitted, X),
    "grad": lambda: jitted_model(score, X),
    "vmap": lambda: model(vmapped, X),
    "remat": lambda: model(rematerialized, X),
    "layers": lambda: model(layers, X, visits=LAYERED),
    "time": lambda: recurrent(lambda: hk.VanillaRNN(WIDTH, name="rnn")),
    "time_gru": lambda: recurrent(lambda: hk.GRU(WIDTH, name="gru")),
    "lstm": lambda: recurrent(lambda: hk.LSTM(WIDTH, name="lstm")),
    "nested": lambda: model(nested, SERIES, visits={"*": Visits((LAYERS,), 2 * TIMES)}),
    "scan": lambda: model(scanned, X, visits={"*": Visits((), 2 * TIMES)}),
    "cond": lambda: model(branches, X, visits={"*": Visits((), 1)}),
    "while": lambda: model(
        loop, jnp.int32(TIMES), X, visits={"*": Visits((), 2 * TIMES)}, reverse=False
    ),
    "custom_jvp": lambda: own(with_own_jvp, inlined=True),
    "custom_vjp": lambda: own(with_own_vjp, opaque=1),
    "tied": lambda: model(tied, TOKENS, X),
}
