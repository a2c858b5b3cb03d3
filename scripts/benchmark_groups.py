"""What weights with a scale for each group cost in training: gradient steps, against the float one.

One layer of 512 inputs, 512 outputs and 512 rows, the gradient of its weight and of its input; the
float step, one by hand (the weight rounded straight through in groups, then one product), and what
``fake_quantize`` makes of it by granularity and format. All variants in each round, one after
another; medians over rounds, their ratios to float with the quartiles over rounds, and the time of
compiling.

    scripts/in_env python scripts/benchmark_groups.py --output FILE.json
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import quantjax as qj
from experiments import benchmark
from experiments.timing import compared, interleaved

SIZE = 512
HAND = 16
"""Entries in a group of the step by hand."""

TOKENS = qj.activation_quantizer(granularity=qj.PerToken(), range=qj.RangeMode.LIVE)
SCHEMES: Mapping[str, qj.Scheme] = {
    "int4 per channel": qj.Scheme(weights=qj.weight_quantizer(bits=4)),
    "int4 in groups of 16": qj.Scheme(
        weights=qj.weight_quantizer(bits=4, granularity=qj.PerGroup(16))
    ),
    "int4 in groups of 128": qj.Scheme(
        weights=qj.weight_quantizer(bits=4, granularity=qj.PerGroup(128))
    ),
    "NF4 in groups of 64": qj.Scheme(
        weights=qj.weight_quantizer(format=qj.formats.NF4, granularity=qj.PerGroup(64))
    ),
    "NVFP4": qj.Scheme(
        weights=qj.weight_quantizer(format=qj.formats.NVFP4, granularity=qj.PerGroup(16))
    ),
    "W8A8, tokens": qj.Scheme(weights=qj.weight_quantizer(), activations=TOKENS),
    "W4A8 in groups of 32, tokens": qj.Scheme(
        weights=qj.weight_quantizer(bits=4, granularity=qj.PerGroup(32)), activations=TOKENS
    ),
}


def layer(params: Any, x: jax.Array) -> jax.Array:
    """One dense layer."""
    return jnp.tanh(x @ params["w"])


def by_hand(params: Any, x: jax.Array) -> jax.Array:
    """The layer with its weight in 4 bits, groups of :data:`HAND` rows, straight through."""
    groups = params["w"].reshape(SIZE // HAND, HAND, SIZE)
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(groups), axis=1, keepdims=True) / 7.0)
    steps = groups / scale
    rounded = steps + jax.lax.stop_gradient(jnp.round(steps) - steps)
    return layer({"w": (jnp.clip(rounded, -8.0, 7.0) * scale).reshape(SIZE, SIZE)}, x)


def step(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Gradients of a weight and an input."""
    return jax.grad(lambda params, x, *rest: jnp.var(f(params, x, *rest)), (0, 1))


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """All variants, interleaved; and what each took to trace and compile."""
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (SIZE, SIZE)) / SIZE**0.5}
    x = jax.random.normal(jax.random.fold_in(key, 1), (SIZE, SIZE))
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "float": (step(layer), (params, x)),
        "by hand, groups of 16": (step(by_hand), (params, x)),
    }
    for name, scheme in SCHEMES.items():
        plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(layer, params, x))
        qstate = qj.calibrate(plan, qj.init(plan), params)
        simulated = qj.fake_quantize(layer, plan)
        quantized = functools.partial(_with_state, simulated)
        programs[name] = (step(quantized), (params, x, qstate))
    calls, compiling = {}, {}
    for name, (run, given) in programs.items():
        start = time.perf_counter()
        compiled = jax.jit(run).lower(*given).compile()
        compiling[name] = time.perf_counter() - start
        calls[name] = functools.partial(compiled, *given)
    report = compared(interleaved(calls, rounds), "float")
    for name, seconds in compiling.items():
        report[name]["compile_s"] = seconds
    return report


def _with_state(simulated: Any, params: Any, x: jax.Array, qstate: Any) -> jax.Array:
    out: jax.Array = simulated(qstate, params, x)
    return out


def main() -> None:
    """Print a table; write it as JSON where asked to."""
    options = benchmark.options(__doc__, rounds=25).parse_args()
    report = measured(options.rounds)
    for name, values in report.items():
        shown = "  ".join(f"{key} {value:.2f}" for key, value in values.items())
        print(f"{name:30} {shown}")
    benchmark.written({**benchmark.made_by(), "rounds": options.rounds, **report}, options.output)


if __name__ == "__main__":
    main()
