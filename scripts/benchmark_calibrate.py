"""What calibration costs: observing over the model alone, and all rules and widths over one.

Observing: the digits network, the CNN 32/64/64 and ResNet-20, a batch at a time, the plain forward
pass, statistics tensor by tensor without histograms, and with them. Deriving: ranges of all
activations by every rule at 2 to 8 bits, from the statistics of one calibration, over calibrating
and deriving one rule at one width. All variants in each round, one after another; medians over
rounds, their ratios, and the spread of the ratio over rounds.

    scripts/in_env python scripts/benchmark_calibrate.py --output FILE.json
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import quantjax as qj
from experiments import benchmark
from experiments.digits.model import DigitsCNN
from experiments.models.cnn import PooledCNN
from experiments.models.resnet import resnet20
from experiments.timing import compared, interleaved
from quantjax import ranges
from quantjax.calibration import RULES as NAMED_RULES

RULES: Mapping[str, ranges.RangeRule] = {rule.name: rule for rule in NAMED_RULES.values()}
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class Case(NamedTuple):
    """A model, the shape of an image, images a batch and batches of a calibration."""

    model: nn.Module
    shape: tuple[int, ...]
    batch: int
    batches: int


CASES = {
    "digits": Case(DigitsCNN(), (8, 8, 1), 128, 7),
    "cnn": Case(PooledCNN(), (28, 28, 1), 128, 8),
    "resnet20": Case(resnet20(), (32, 32, 3), 128, 8),
}


class Prepared(NamedTuple):
    """What both comparisons start from."""

    f: Callable[..., Any]
    plan: qj.Plan
    params: Any
    batches: list[jax.Array]


def prepared(case: Case) -> Prepared:
    """A model with drawn parameters, W8A8, and batches of normal noise."""
    key = jax.random.key(0)
    shape = (case.batch, *case.shape)
    batches = [jax.random.normal(jax.random.fold_in(key, i), shape) for i in range(case.batches)]
    params = jax.jit(case.model.init)(key, batches[0])
    f = lambda params, x: case.model.apply(params, x)  # noqa: E731
    plan = qj.plan(
        qj.uniform_policy(weight_bits=8, activation_bits=8), qj.sites(f, params, batches[0])
    )
    return Prepared(f, plan, params, batches)


def observing(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """One batch: forward, and with statistics; the state is given back and forth as in a loop."""
    f, plan, params, (x, *_) = prepared(case)
    plain, observe = jax.jit(f), jax.jit(qj.observe(f, plan), donate_argnums=0)
    states = {"tensor-wise": qj.init(plan, histogram_bins=None), "histograms": qj.init(plan)}

    def observed(name: str) -> Callable[[], Any]:
        def run() -> Any:
            y, states[name] = observe(states[name], params, x)
            return y, states[name]

        return run

    variants: dict[str, Callable[[], Any]] = {"plain": lambda: plain(params, x)}
    variants |= {name: observed(name) for name in states}
    return compared(interleaved(variants, rounds), "plain")


def deriving(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Calibration of all batches and one rule at one width, and the same with all of both."""
    f, plan, params, batches = prepared(case)
    observe = jax.jit(qj.observe(f, plan), donate_argnums=0)
    widths = jnp.asarray(WIDTHS, jnp.float32)

    def collected() -> Any:
        state = qj.init(plan)
        for x in batches:
            _, state = observe(state, params, x)
        return state

    def by(rule: ranges.RangeRule | ranges.IndexedRule) -> Callable[..., Any]:
        def derive(state: Any, params: Any, bits: jax.Array) -> Any:
            return qj.calibrate(plan, state, params, activation_bits=bits, activation_rule=rule)

        return derive

    stack = ranges.stack(list(RULES.values()))

    def every(state: Any, params: Any, widths: jax.Array) -> Any:
        """All cells of rules and widths: one program, in which the rule is an index of a lane."""
        rules, bits = jnp.meshgrid(jnp.arange(len(RULES)), widths, indexing="ij")

        def cell(index: jax.Array, bits: jax.Array) -> Any:
            return by(stack[index])(state, params, bits)

        return jax.vmap(cell)(rules.ravel(), bits.ravel())

    one, grid = jax.jit(by(ranges.MIN_MAX)), jax.jit(every)
    start = time.perf_counter()
    state = jax.block_until_ready(collected())
    observed = time.perf_counter() - start
    first = {"observe": observed}
    for name, run in (
        ("one", lambda: one(state, params, widths[-1])),
        ("all", lambda: grid(state, params, widths)),
    ):
        start = time.perf_counter()
        jax.block_until_ready(run())
        first[name] = time.perf_counter() - start
    times = interleaved(
        {
            "one rule, one width": lambda: one(collected(), params, widths[-1]),
            "all rules, 2 to 8 bits": lambda: grid(collected(), params, widths),
        },
        rounds,
    )
    report = compared(times, "one rule, one width")
    report["first call, with compiling"] = {
        "one_ms": 1e3 * (first["observe"] + first["one"]),
        "all_ms": 1e3 * (first["observe"] + first["all"]),
        "ratio": (first["observe"] + first["all"]) / (first["observe"] + first["one"]),
    }
    state = collected()
    each = {name: jax.jit(jax.vmap(by(rule), (None, None, 0))) for name, rule in RULES.items()}
    alone = interleaved(
        {name: functools.partial(run, state, params, widths) for name, run in each.items()}, 3
    )
    for name, seconds in alone.items():
        report[f"rule {name}, 2 to 8 bits"] = {"ms": 1e3 * statistics.median(seconds)}
    return report


def main() -> None:
    """Print tables; write them as JSON where asked to."""
    parser = benchmark.options(__doc__, rounds=15)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    report: dict[str, Any] = {
        **benchmark.made_by(),
        "rounds": options.rounds,
    }
    for name in options.cases:
        for what, measure in (("observing", observing), ("deriving", deriving)):
            figures = measure(CASES[name], options.rounds)
            report[f"{name}, {what}"] = figures
            print(f"{name}, {what}, {CASES[name].batch} images a batch")
            for variant, values in figures.items():
                shown = "  ".join(f"{key} {value:.2f}" for key, value in values.items())
                print(f"  {variant:32} {shown}")
    benchmark.written(report, options.output)


if __name__ == "__main__":
    main()
