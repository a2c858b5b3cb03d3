"""Sixteen QAT runs (four widths, four seeds) as one program, against sixteen runs of their own.

A dense and a convolutional network on the digits. *Separate*: each run is traced and compiled with
its width as a constant, as toolkits with static widths have it. *One program*: the width is an
array; ``vmap`` trains all lanes at once, ``loop`` calls one compiled step for each lane in turn.
Compiling is included everywhere, without the persistent cache. Each lane is compared with its own
run. Under ``lax.map`` XLA's gradients of convolutions are many times slower on a CPU, so that it is
no variant.

    scripts/in_env python scripts/benchmark_variants.py --output FILE.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import quantjax as qj
from experiments import benchmark
from experiments.digits.data import load
from experiments.models.cnn import SmallCNN

WIDTHS, SEEDS, BATCH = (8, 6, 4, 2), (0, 1, 2, 3), 64


class MLP(nn.Module):
    """Two hidden layers of 128."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


MODELS = {"dense": MLP(), "convolutional": SmallCNN(channels=(16, 32), strides=(2, 2))}


class Lane(NamedTuple):
    """What one run carries."""

    variables: Any
    qstate: Any
    moments: Any


class Setup(NamedTuple):
    """What all runs of a model share."""

    start: Callable[[jax.Array, Any], Lane]
    step: Callable[[Lane, jax.Array], Lane]


def setup(model: nn.Module) -> Setup:
    """LSQ at every product, weights and scales by Adam; inference-mode batch norm."""
    data = load()
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    f = lambda variables, x: model.apply(variables, x)  # noqa: E731
    shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    policy = qj.Policy([qj.rule(qj.weighted(), qj.presets.lsq(weight_bits=8, activation_bits=8))])
    plan = qj.plan(policy, qj.sites(f, shapes, images[:1]))
    quantized, optimizer = qj.fake_quantize(f, plan), optax.adam(1e-3)

    def start(seed: jax.Array, bits: Any) -> Lane:
        variables = model.init(jax.random.key(seed), images[:1])
        _, state = qj.observe(f, plan)(qj.init(plan), variables, images[:256])
        qstate = qj.calibrate(plan, state, variables, weight_bits=bits, activation_bits=bits)
        return Lane(variables, qstate, optimizer.init((variables["params"], qstate)))

    def step(lane: Lane, key: jax.Array) -> Lane:
        index = jax.random.randint(key, (BATCH,), 0, len(labels))

        def loss(trained: Any) -> jax.Array:
            params, qstate = trained
            logits = quantized(qstate, {**lane.variables, "params": params}, images[index])
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index])
            return jnp.mean(each)

        trained = lane.variables["params"], lane.qstate
        updates, moments = optimizer.update(jax.grad(loss)(trained), lane.moments, trained)
        params, qstate = optax.apply_updates(trained, updates)
        return Lane({**lane.variables, "params": params}, qstate, moments)

    return Setup(start, step)


def keys_of(seed: Any, steps: int) -> jax.Array:
    """The batches of a run."""
    return jax.random.split(jax.random.fold_in(jax.random.key(17), seed), steps)


def separate(model: nn.Module, steps: int) -> list[Lane]:
    """Sixteen programs, the width of each a constant in it."""
    lanes = []
    for bits in WIDTHS:
        for seed in SEEDS:
            shared = setup(model)  # new function objects, so that nothing is taken over
            begin = jax.jit(lambda seed, s=shared, b=bits: s.start(seed, float(b)))
            step = jax.jit(lambda lane, key, s=shared: s.step(lane, key))
            lane = begin(seed)
            for key in keys_of(seed, steps):
                lane = step(lane, key)
            lanes.append(jax.block_until_ready(lane))
    return lanes


def in_a_loop(model: nn.Module, steps: int) -> list[Lane]:
    """One compiled step, called for each lane in turn."""
    shared = setup(model)
    begin, step = jax.jit(shared.start), jax.jit(shared.step)
    lanes = []
    for bits in WIDTHS:
        for seed in SEEDS:
            lane = begin(seed, jnp.float32(bits))
            for key in keys_of(seed, steps):
                lane = step(lane, key)
            lanes.append(jax.block_until_ready(lane))
    return lanes


def under_vmap(model: nn.Module, steps: int) -> list[Lane]:
    """One compiled step of all lanes together."""
    shared = setup(model)
    bits = jnp.repeat(jnp.asarray(WIDTHS, jnp.float32), len(SEEDS))
    seeds = jnp.tile(jnp.asarray(SEEDS), len(WIDTHS))
    lanes = jax.jit(jax.vmap(shared.start))(seeds, bits)
    step = jax.jit(jax.vmap(shared.step))
    every = jax.vmap(lambda seed: keys_of(seed, steps))(seeds)
    for i in range(steps):
        lanes = step(lanes, every[:, i])
    jax.block_until_ready(lanes)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], lanes) for i in range(len(seeds))]


VARIANTS = {"separate": separate, "loop": in_a_loop, "vmap": under_vmap}


def largest_difference(lanes: list[Lane], others: list[Lane]) -> float:
    """Of any parameter, over its tensor's largest."""
    found = 0.0
    for a, b in zip(lanes, others, strict=True):
        for x, y in zip(
            jax.tree.leaves(a.variables["params"]),
            jax.tree.leaves(b.variables["params"]),
            strict=True,
        ):
            found = max(found, float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-12)))
    return found


def measured(model: nn.Module, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of each variant, compiling included, and how far lanes are from their own run."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    results: dict[str, list[Lane]] = {}
    for _ in range(rounds):
        for name, run in VARIANTS.items():
            jax.clear_caches()
            start = time.perf_counter()
            results[name] = run(model, steps)
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["separate"])
    return {
        name: {
            "seconds": statistics.median(seconds),
            "of_separate": statistics.median(seconds) / base,
            "seconds_each_round": seconds,
            "largest_difference_from_own_run": largest_difference(
                results[name], results["separate"]
            ),
        }
        for name, seconds in times.items()
    }


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = benchmark.options(__doc__, rounds=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    report: dict[str, Any] = {
        **benchmark.made_by(),
        "steps": options.steps,
        "rounds": options.rounds,
        "lanes": len(WIDTHS) * len(SEEDS),
    }
    for name in options.models:
        report[name] = measured(MODELS[name], options.steps, options.rounds)
        print(name, json.dumps(report[name], indent=1))
    benchmark.written(report, options.output)


if __name__ == "__main__":
    main()
