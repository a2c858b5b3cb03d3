"""What a model takes in integers: the float model, simulated, and executed from frozen weights.

W8A8, static asymmetric activations, weights per channel. Dense layers of 1024 by rows of a batch,
the CNN 32/64/64, ResNet-20 and a decoder of four layers of 256. The three in each round, one after
another; medians over rounds, their ratios to float with the quartiles over rounds, and what the
compiled program holds beside its arguments and its result.

    scripts/in_env python scripts/benchmark_execute.py --output FILE.json
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import quantjax as qj
from experiments import benchmark
from experiments.models.cnn import PooledCNN
from experiments.models.decoder import Decoder, DecoderShape
from experiments.models.resnet import resnet20
from experiments.timing import compared, interleaved

KEY = jax.random.key(0)
MIB = 1 << 20


class Case(NamedTuple):
    """A function, its parameters and an input."""

    f: Callable[..., Any]
    params: Any
    x: jax.Array


def layers(rows: int, *, width: int = 1024, depth: int = 8) -> Case:
    """Dense layers, each with a ReLU."""

    def f(params: Any, x: jax.Array) -> jax.Array:
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    keys = jax.random.split(KEY, depth)
    params = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys]
    return Case(f, params, jax.random.normal(KEY, (rows, width)))


def module(model: nn.Module, x: jax.Array) -> Case:
    """A model of Flax with drawn parameters."""
    params = jax.jit(model.init)(KEY, x)
    return Case(lambda params, x: model.apply(params, x), params, x)


def images(model: nn.Module, *shape: int) -> Case:
    """On normal noise."""
    return module(model, jax.random.normal(KEY, shape))


def decoder() -> Case:
    """Four layers of 256, eight sequences of 64 tokens."""
    shape = DecoderShape(width=256, hidden=688, layers=4)
    return module(Decoder(shape), jax.random.randint(KEY, (8, 64), 0, shape.vocabulary))


CASES: Mapping[str, Callable[[], Case]] = {
    "layers, 1 row": lambda: layers(1),
    "layers, 8 rows": lambda: layers(8),
    "layers, 64 rows": lambda: layers(64),
    "layers, 512 rows": lambda: layers(512),
    "cnn, 32 images": lambda: images(PooledCNN(), 32, 28, 28, 1),
    "resnet20, 32 images": lambda: images(resnet20(), 32, 32, 32, 3),
    "decoder, 8 x 64 tokens": decoder,
}


def measured(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Times and temporaries; raises where integers and simulation differ."""
    f, params, x = case
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), params, x)
    qstate = jax.jit(lambda s, p: qj.calibrate(plan, s, p))(state, params)
    frozen = qj.freeze(plan, qstate, params)
    programs = {
        "float": (f, (params, x)),
        "simulated": (qj.fake_quantize(f, plan), (qstate, params, x)),
        "executed": (qj.execute(f, plan), (qstate, frozen, x)),
    }
    compiled = {
        name: (jax.jit(run).lower(*given).compile(), given)
        for name, (run, given) in programs.items()
    }
    same, other = (compiled[name][0](*compiled[name][1]) for name in ("simulated", "executed"))
    if not jnp.allclose(same, other, rtol=1e-5, atol=1e-5):
        raise SystemExit("executed otherwise than simulated")
    calls = {
        name: lambda run=run, given=given: run(*given) for name, (run, given) in compiled.items()
    }
    report = compared(interleaved(calls, rounds), "float")
    for name, (run, _) in compiled.items():
        held: Any = run.memory_analysis()
        report[name]["temporaries_mib"] = held.temp_size_in_bytes / MIB
    return report


def main() -> None:
    """Print a table; write it as JSON where asked to."""
    parser = benchmark.options(__doc__, rounds=25)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    report: dict[str, Any] = {
        **benchmark.made_by(),
        "rounds": options.rounds,
    }
    for name in options.cases:
        report[name] = measured(CASES[name](), options.rounds)
        print(name)
        for variant, values in report[name].items():
            shown = "  ".join(f"{key} {value:.2f}" for key, value in values.items())
            print(f"  {variant:10} {shown}", flush=True)
    benchmark.written(report, options.output)


if __name__ == "__main__":
    main()
