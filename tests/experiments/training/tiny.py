"""A dense net of two layers on random data; its state has all that a quantized training has."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from experiments.training import Feed, Task, TrainerConfig, TrainResult, feed, train, trainer

ROWS, FEATURES, HIDDEN, CLASSES = 40, 6, 8, 3
BATCH = 8  # five steps an epoch
CONFIG = TrainerConfig(steps=13, batch=BATCH, log_every=4, evaluate_every=5, checkpoint_every=3)


class State(NamedTuple):
    """Parameters, momentum, a running mean, QParams, a key and a count; a NamedTuple itself."""

    params: dict[str, jax.Array]
    momentum: dict[str, jax.Array]
    running_mean: jax.Array
    qstate: dict[str, Any]
    key: jax.Array
    count: jax.Array


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(ROWS, FEATURES)).astype(np.float32)
    return inputs, generator.integers(0, CLASSES, ROWS).astype(np.int32)


def init(key: jax.Array) -> State:
    first, second, own = jax.random.split(key, 3)
    params = {
        "first": jax.random.normal(first, (FEATURES, HIDDEN)) * 0.5,
        "second": jax.random.normal(second, (HIDDEN, CLASSES)) * 0.5,
    }
    qparams = qj.QParams(jnp.full((1, HIDDEN), 0.05), jnp.zeros((1, HIDDEN)), jnp.float32(4), {})
    return State(
        params,
        jax.tree.map(jnp.zeros_like, params),
        jnp.zeros(FEATURES),
        {"first": {"weight": qparams}},
        own,
        jnp.int32(0),
    )


def logits(params: dict[str, jax.Array], qstate: dict[str, Any], inputs: jax.Array) -> jax.Array:
    q = qstate["first"]["weight"]
    weight = qj.fake_quant(params["first"], q.scale, q.zero_point, bits=q.bits)
    return jax.nn.relu(inputs @ weight) @ params["second"]


def loss(params: Any, qstate: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    scores = jax.nn.log_softmax(logits(params, qstate, inputs))
    return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))


def step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Momentum, with noise on the inputs from the step's key and from the state's own."""
    inputs, labels = batch
    own, noise = jax.random.split(state.key)
    inputs = inputs + 0.1 * jax.random.normal(key, inputs.shape)
    inputs = inputs + 0.1 * jax.random.normal(noise, inputs.shape)
    value, gradient = jax.value_and_grad(loss)(state.params, state.qstate, inputs, labels)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.momentum, gradient)
    params = jax.tree.map(lambda w, m: w - 0.1 * m, state.params, momentum)
    mean = 0.9 * state.running_mean + 0.1 * jnp.mean(inputs, axis=0)
    new = State(params, momentum, mean, state.qstate, own, state.count + 1)
    return new, {"loss": value, "first_label": labels[0].astype(jnp.float32)}


def evaluate(state: State) -> dict[str, jax.Array]:
    inputs, labels = data(1)
    return {"loss": loss(state.params, state.qstate, jnp.asarray(inputs), jnp.asarray(labels))}


TASK = Task(init, step, evaluate, identity={"learning_rate": 0.1, "layers": [HIDDEN, CLASSES]})


def run(folder: Any = None, *, seed: int = 0, task: Task = TASK, **changes: Any) -> TrainResult:
    """Train the tiny task; ``sinks`` and fields of the configuration by name."""
    sinks = changes.pop("sinks", ())
    config = dataclasses.replace(CONFIG, **changes)
    return train(task, data(), config, seed, folder, sinks=sinks)


def stop_before(
    monkeypatch: Any, done: int, error: type[BaseException] = KeyboardInterrupt
) -> None:
    """From now on a training fails once ``done`` steps have been done."""

    def stopping(*args: Any, **kwargs: Any) -> Feed:
        real = feed(*args, **kwargs)

        def at(step: int) -> Any:
            if step == done:
                raise error("stopped on purpose")
            return real.at(step)

        return real._replace(at=at)

    monkeypatch.setattr(trainer, "feed", stopping)


def go_on(monkeypatch: Any) -> None:
    """Undo :func:`stop_before`."""
    monkeypatch.setattr(trainer, "feed", feed)


def same(first: Any, second: Any) -> bool:
    """Whether two trees have the same structure, dtypes and bits."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(_same_leaf(one, other) for one, other in pairs)


def _same_leaf(one: Any, other: Any) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()
