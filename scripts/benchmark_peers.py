"""Much the same work in quantjax and in Qwix: a sweep over 49 pairs of widths, a training step.

Sweep: the digits network, trained once in float; weights by channel and activations by tensor with
static scales from the same 256 images, 2 to 8 bits each, accuracy on the held-out half. quantjax
runs all cells as one program, in simulation; Qwix has a model of each cell, traced and compiled by
itself. Its `QtProvider` multiplies integers, int8 into int32; products of two int4 operands, or of
one, do not compile on this backend, and what a cell raises instead of an accuracy is counted by its
class. It collects statistics eagerly, since they leak tracers under `jax.jit` (0.1.8). Seconds
include compiling, without the persistent cache.

Step: the networks of `experiments/steps.py`, W8A8 with static scales, forward and backward in float
where the toolkit leaves it so; interleaved rounds, ratios to the float step, of ResNet-20 also to
the one whose convolutions are fenced from XLA's producer fusion, as quantization fences them. Both
quantize products with weights alone.

Qwix is no dependency; install it beside (`pip install --no-deps qwix`), then

    scripts/in_env python scripts/benchmark_peers.py --output FILE.json
"""

from __future__ import annotations

import collections
import importlib
import importlib.metadata
import importlib.util
import json
import time
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantjax as qj
from experiments import benchmark
from experiments.digits.data import Digits, load
from experiments.digits.model import DigitsCNN
from experiments.digits.train import Training, train
from experiments.steps import CASES, Case, fenced, train_step
from experiments.timing import compared, interleaved

WIDTHS = tuple(range(2, 9))
CALIBRATION = 256


def _peer() -> Any:
    """Qwix, which is no dependency."""
    return importlib.import_module("qwix")


def _accuracy(logits: jax.Array, data: Digits) -> float:
    return float(np.mean(np.argmax(np.asarray(logits), -1) == data.test_labels))


def _by_qwix(
    model: nn.Module, variables: Any, empty: Any, data: Digits, widths: tuple[int, int]
) -> float:
    """One cell: a model with these widths, its statistics, its logits; ``empty`` to begin with."""
    qwix = _peer()
    provider = qwix.QtProvider([_rule(*widths)])
    quantized = qwix.quantize_model(model, provider)
    seen, images = jnp.asarray(data.train_images[:CALIBRATION]), jnp.asarray(data.test_images)
    _, found = quantized.apply({**variables, "quant_stats": empty}, seen, mutable=["quant_stats"])
    return _accuracy(jax.jit(quantized.apply)({**variables, **found}, images), data)


def _rule(weight_bits: int, activation_bits: int) -> Any:
    return _peer().QtRule(
        op_names=("dot_general", "conv_general_dilated"),
        weight_qtype=f"int{weight_bits}",
        act_qtype=f"int{activation_bits}",
        act_static_scale=True,
    )


def _by_quantjax(model: nn.Module, variables: Any, data: Digits) -> np.ndarray:
    """All cells: ``(weight widths, activation widths)`` accuracies."""

    def f(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x)

    seen, images = jnp.asarray(data.train_images[:CALIBRATION]), jnp.asarray(data.test_images)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, variables, seen))
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), variables, seen)
    labels = jnp.asarray(data.test_labels)

    def cell(widths: tuple[jax.Array, jax.Array]) -> jax.Array:
        weight_bits, activation_bits = widths
        qstate = qj.calibrate(
            plan, state, variables, weight_bits=weight_bits, activation_bits=activation_bits
        )
        logits = qj.fake_quantize(f, plan)(qstate, variables, images)
        return jnp.mean(jnp.argmax(logits, -1) == labels)

    grid = jnp.meshgrid(jnp.float32(WIDTHS), jnp.float32(WIDTHS), indexing="ij")
    found = jax.jit(partial(jax.lax.map, cell))((grid[0].ravel(), grid[1].ravel()))
    return np.asarray(found).reshape(len(WIDTHS), len(WIDTHS))


def swept() -> dict[str, Any]:
    """Seconds and accuracies of the grid by either toolkit."""
    data, model = load(), DigitsCNN()
    variables = train(model, data, Training(), 0, lambda epoch: None)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.clear_caches()
    start = time.perf_counter()
    ours = _by_quantjax(model, variables, data)
    seconds = time.perf_counter() - start
    failed: collections.Counter[str] = collections.Counter()
    theirs: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    qwix = _peer()
    widest = qwix.quantize_model(model, qwix.QtProvider([_rule(8, 8)]))
    images = jnp.asarray(data.train_images[:CALIBRATION])
    empty = widest.init(jax.random.key(0), images)["quant_stats"]
    ahead = time.perf_counter() - start
    for w in WIDTHS:
        for a in WIDTHS:
            start = time.perf_counter()
            try:
                accuracy = _by_qwix(model, variables, empty, data, (w, a))
            except Exception as error:  # noqa: BLE001 - counted, and shown
                failed[type(error).__name__] += 1
                continue
            theirs[f"W{w}A{a}"] = {"accuracy": accuracy, "seconds": time.perf_counter() - start}
    each = [entry["seconds"] for entry in theirs.values()]
    logits = jax.jit(model.apply)(variables, jnp.asarray(data.test_images))
    return {
        "float accuracy": _accuracy(logits, data),
        "quantjax": {
            "cells": ours.size,
            "seconds": seconds,
            "seconds a cell": seconds / ours.size,
            "accuracy": {
                f"W{w}A{a}": float(ours[i, j])
                for i, w in enumerate(WIDTHS)
                for j, a in enumerate(WIDTHS)
            },
        },
        "qwix": {
            "cells": len(theirs),
            "raised": dict(failed),
            "seconds": ahead + sum(each),
            "seconds a cell": (ahead + sum(each)) / len(each) if each else None,
            "accuracy": {name: entry["accuracy"] for name, entry in theirs.items()},
        },
    }


def stepped(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """The float step, and W8A8 by either toolkit."""
    key = jax.random.key(0)
    x = jax.random.normal(key, case.shape)
    labels = jnp.arange(case.shape[0]) % 10
    variables = dict(jax.jit(case.model.init)(key, x))
    has_stats = "batch_stats" in variables

    def of(model: nn.Module) -> Any:
        def f(variables: Any, x: jax.Array) -> Any:
            if not has_stats:
                return model.apply(variables, x), {}
            logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return logits, {"batch_stats": new["batch_stats"]}

        return f

    f = of(case.model)
    plan = qj.plan(qj.uniform_policy(weight_bits=8, activation_bits=8), qj.sites(f, variables, x))
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), variables, x)
    qstate = jax.jit(partial(qj.calibrate, plan))(state, variables)
    qwix = _peer()
    peer = qwix.quantize_model(case.model, qwix.QtProvider([_rule(8, 8)]))
    empty = peer.init(key, x)["quant_stats"]
    _, found = peer.apply({**variables, "quant_stats": empty}, x, mutable=["quant_stats"])
    theirs = of(peer)

    def by_qwix(stats: Any, variables: Any, x: jax.Array) -> Any:
        return theirs({**variables, **stats}, x)

    optimizer = optax.adam(1e-4)
    moments = optimizer.init(variables["params"])
    run = {
        "float": (train_step(lambda _, variables, x: f(variables, x), optimizer), {}),
        "quantjax": (train_step(qj.fake_quantize(f, plan), optimizer), qstate),
        "qwix": (train_step(by_qwix, optimizer), found),
    }
    if case.fenced:
        behind = fenced(f)
        fence = train_step(lambda _, variables, x: behind(variables, x), optimizer)
        run["float, fenced"] = (fence, {})
    variants = {
        name: partial(step, variables, moments, static, x, labels)
        for name, (step, static) in run.items()
    }
    return compared(interleaved(variants, rounds, turns=3), "float")


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = benchmark.options(__doc__, rounds=20)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    if importlib.util.find_spec("qwix") is None:
        parser.error("Qwix is not installed: pip install --no-deps qwix")
    report: dict[str, Any] = {
        **benchmark.made_by(),
        "qwix": importlib.metadata.version("qwix"),
        "rounds": options.rounds,
        "sweep": swept(),
    }
    print(json.dumps(report, indent=1))
    for name in options.cases:
        report[f"step, {name}"] = stepped(CASES[name], options.rounds)
        print(name, json.dumps(report[f"step, {name}"], indent=1))
    benchmark.written(report, options.output)


if __name__ == "__main__":
    main()
