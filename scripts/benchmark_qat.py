"""What a training step costs with fake quantization: static scales, W8A8 and W4A4, over float.

The CNN 32/64/64 with batch 128, ResNet-20 with batch 64 and a transformer of width 128 with four
layers, each with Adam. ResNet-20's float step is also taken with its convolutions fenced from
XLA's producer fusion, which is a float step that CPUs run faster. All variants in each round, one
after another, three times over, of which a round takes each variant's median; ratios of each round
to the float step, their median and the 95 % interval of their mean by Student's t. Compiling:
tracing included, without any cache, eleven times each in turn; medians of the ratios to either
float step.

    scripts/in_env python scripts/benchmark_qat.py --output FILE.json
"""

from __future__ import annotations

import json
import math
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import scipy.stats

import quantjax as qj
from experiments import benchmark
from experiments.steps import CASES, Case, fenced, train_step
from experiments.timing import interleaved

COMPILE_ROUNDS = 11
TURNS = 3


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Ratios of all variants of one model."""
    key = jax.random.key(0)
    x = jax.random.normal(key, case.shape)
    labels = jnp.arange(case.shape[0]) % 10
    variables = dict(jax.jit(case.model.init)(key, x))
    has_stats = "batch_stats" in variables

    def f(variables: Any, x: jax.Array) -> Any:
        if not has_stats:
            return case.model.apply(variables, x), {}
        logits, new = case.model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, {"batch_stats": new["batch_stats"]}

    plan = qj.plan(qj.uniform_policy(weight_bits=8, activation_bits=8), qj.sites(f, variables, x))
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), variables, x)
    derive = jax.jit(
        lambda state, variables, bits: qj.calibrate(
            plan, state, variables, weight_bits=bits, activation_bits=bits
        )
    )
    optimizer = optax.adam(1e-4)
    quantized = train_step(qj.fake_quantize(f, plan), optimizer)
    in_float = train_step(lambda _, variables, x: f(variables, x), optimizer)
    moments = optimizer.init(variables["params"])
    qstates = {f"W{b}A{b}": derive(state, variables, jnp.float32(b)) for b in (8, 4)}
    empty: Any = {}
    arguments = (variables, moments, empty, x, labels)
    steps = {"float": partial(in_float, *arguments)}
    if case.fenced:
        behind = fenced(f)
        fence = train_step(lambda _, variables, x: behind(variables, x), optimizer)
        steps["float, fenced"] = partial(fence, *arguments)
    for name, qstate in qstates.items():
        steps[name] = partial(quantized, variables, moments, qstate, x, labels)
    base = "float, fenced" if case.fenced else "float"
    compiled = _compile_seconds({name: step for name, step in steps.items() if name != "W4A4"})
    times = interleaved(steps, rounds, TURNS)
    report: dict[str, Any] = {
        name: _ratios(seconds, times[base], rounds) for name, seconds in times.items()
    }
    report["base"] = base
    ratios = {
        other: [a / b for a, b in zip(compiled["W8A8"], seconds, strict=True)]
        for other, seconds in compiled.items()
        if other != "W8A8"
    }
    report["compile"] = {
        "seconds": {name: statistics.median(seconds) for name, seconds in compiled.items()},
        "ratio": {other: statistics.median(each) for other, each in ratios.items()},
        "ratios": ratios,
    }
    return report


def _compile_seconds(steps: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of tracing and compiling each step, one after another, in each round."""
    with_cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)

    def seconds(step: Any) -> float:
        jax.clear_caches()
        start = time.perf_counter()
        step.func.lower(*step.args).compile()
        return time.perf_counter() - start

    try:
        rounds = [[seconds(step) for step in steps.values()] for _ in range(COMPILE_ROUNDS)]
        return dict(zip(steps, map(list, zip(*rounds, strict=True)), strict=True))
    finally:
        jax.config.update("jax_enable_compilation_cache", with_cache)


def _ratios(seconds: list[float], base: list[float], rounds: int) -> dict[str, float]:
    each = [a / b for a, b in zip(seconds, base, strict=True)]
    student = float(scipy.stats.t.ppf(0.975, rounds - 1))  # of one round there is no interval
    half = student * statistics.stdev(each) / math.sqrt(rounds) if rounds > 1 else math.nan
    return {
        "ms": 1e3 * statistics.median(seconds),
        "ratio": statistics.median(each),
        "mean_ratio": statistics.mean(each),
        "upper_95": statistics.mean(each) + half,
        "lower_95": statistics.mean(each) - half,
    }


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = benchmark.options(__doc__, rounds=40)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    report: dict[str, Any] = {
        **benchmark.made_by(),
        "rounds": options.rounds,
        "turns": TURNS,
    }
    for name in options.cases:
        report[name] = measured(CASES[name], options.rounds)
        print(name, json.dumps(report[name], indent=1))
    benchmark.written(report, options.output)


if __name__ == "__main__":
    main()
