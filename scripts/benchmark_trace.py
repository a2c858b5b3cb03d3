"""How much longer quantjax takes to trace and to compile than the model alone.

A decoder-like transformer of 48 layers, unrolled and scanned (with rematerialization): tracing and
compiling the plain model, the identity plan, the model with every product handled but unchanged,
observation and simulation. All variants in each round, one after another; medians over rounds,
their ratios to the plain model, and the spread.

    scripts/in_env python scripts/benchmark_trace.py --output FILE.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import quantjax as qj
from experiments import benchmark
from quantjax.interpreter import NOTHING, Outcome, Visit, evaluate, trace

WIDTH, HEADS, LENGTH = 64, 4, 16


class Layer(nn.Module):
    """Attention and a feed-forward pair, normalized beforehand."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(hidden), None


class Transformer(nn.Module):
    """``depth`` layers and a head."""

    depth: int
    scanned: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scanned:
            axes: dict[Any, Any] = {"params": 0}
            keys: dict[Any, bool] = {"params": True}
            stack = nn.scan(nn.remat(Layer), axes, split_rngs=keys, length=self.depth)
            x, _ = stack()(x, None)
        else:
            for _ in range(self.depth):
                x, _ = Layer()(x)
        return nn.Dense(32)(x)


def variants(depth: int, *, scanned: bool) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions of the same model with their arguments, as shapes."""
    model = Transformer(depth, scanned)
    x = jax.ShapeDtypeStruct((2, LENGTH, WIDTH), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    f = lambda params, x: model.apply(params, x)  # noqa: E731
    table = qj.sites(f, params, x)
    identity = qj.plan(qj.Policy([]), table)
    plan = qj.plan(qj.Policy([qj.rule(qj.everything(), quantized())]), table)
    state = jax.eval_shape(lambda: qj.init(plan))
    qstate = jax.eval_shape(lambda s, p: qj.calibrate(plan, s, p), state, params)
    # A new function each time: a transformed function keeps its trace.
    return {
        "plain": (lambda: lambda p, x: f(p, x), (params, x)),
        "identity": (lambda: qj.fake_quantize(f, identity), ({}, params, x)),
        "rewrite": (lambda: rewritten(f), (params, x)),
        "observe": (lambda: qj.observe(f, plan), (state, params, x)),
        "simulate": (lambda: qj.fake_quantize(f, plan), (qstate, params, x)),
    }


def rewritten(f: Callable[..., Any]) -> Callable[..., Any]:
    """The model through the interpreter, every product handed to a handler that binds it."""

    def handler(visit: Visit) -> Outcome:
        return Outcome(visit.product.bind(visit.lhs, visit.rhs))

    def run(params: Any, x: jax.Array) -> Any:
        program = trace(f, params, x)
        names = frozenset(site.name for site in program.sites.values())
        return evaluate(program, handler, names, NOTHING, params, x).result

    return run


def quantized() -> qj.Scheme:
    """W8A8, at attention's products too."""
    return qj.Scheme(weights=qj.weight_quantizer(), activations=qj.activation_quantizer())


def measure(depth: int, rounds: int, *, scanned: bool) -> dict[str, Any]:
    """Seconds to trace and to compile, by variant."""
    made = variants(depth, scanned=scanned)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"trace": [], "compile": []} for name in made
    }
    for number in range(rounds + 1):
        for name, (make, arguments) in made.items():
            jax.clear_caches()
            start = time.perf_counter()
            traced = jax.jit(make()).trace(*arguments)
            middle = time.perf_counter()
            lowered = traced.lower()
            lowered.compile()
            end = time.perf_counter()
            if number:  # the first round warms up
                seconds[name]["trace"].append(middle - start)
                seconds[name]["compile"].append(end - middle)
    result: dict[str, Any] = {}
    for name, kinds in seconds.items():
        result[name] = {}
        for kind, values in kinds.items():
            plain = seconds["plain"][kind]
            ratios = [a / b for a, b in zip(values, plain, strict=True)]
            result[name][kind] = {
                "median_s": statistics.median(values),
                "ratio": statistics.median(values) / statistics.median(plain),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
    return result


def main() -> None:
    """Print a table; write it as JSON where asked to."""
    parser = benchmark.options(__doc__, rounds=5)
    parser.add_argument("--depth", type=int, default=48)
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    report: dict[str, Any] = {
        "depth": options.depth,
        "rounds": options.rounds,
        **benchmark.made_by(),
    }
    for layout in ("unrolled", "scanned"):
        report[layout] = measure(options.depth, options.rounds, scanned=layout == "scanned")
        for name, kinds in report[layout].items():
            shown = "  ".join(
                f"{kind} {v['median_s']:6.3f} s, {v['ratio']:.2f}x "
                f"[{v['ratio_low']:.2f}, {v['ratio_high']:.2f}]"
                for kind, v in kinds.items()
            )
            print(f"{layout:9} {name:9} {shown}")
    benchmark.written(report, options.output)


if __name__ == "__main__":
    main()
