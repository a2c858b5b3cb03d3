"""What ``fake_quant`` costs by format, as a multiple of a plain copy; and what codes weigh.

Speed: a 4096 x 4096 float32 matrix, forward, and forward with the gradient of x and of the scale,
each format and a copy (``x + 1``, read once and written once) one after another in every round;
medians, ratios, and their spread over rounds. Size: a tree of kernels in symmetric int4 with scales
for groups of 64 and 128, vectors left in float, against its float32 bytes, on device and on disk.

    scripts/in_env python scripts/benchmark_formats.py --output FILE.json
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import quantjax as qj
from experiments import benchmark
from quantjax import storage
from quantjax.affine import QParams
from quantjax.arithmetic import Arithmetic
from quantjax.formats import BUILT_IN, Format, Theta, example_theta
from quantjax.rounding import CEIL, HALF_AWAY, HALF_EVEN, STOCHASTIC, Rounding
from quantjax.simulation import apply

Call = Callable[[], Any]


def quantizing(format: Format, rounding: Rounding) -> Callable[..., jax.Array]:
    """``(x, scale, bits, key, theta) -> y``; the width is an argument, as in a sweep."""

    def run(
        x: jax.Array, scale: jax.Array, bits: jax.Array, key: jax.Array, theta: Theta
    ) -> jax.Array:
        qparams = QParams(scale, jnp.zeros_like(scale), bits, theta)
        return apply(x, qparams, Arithmetic(format, rounding), key)

    return run


def calls(size: int) -> Mapping[str, tuple[Call, Call]]:
    """Forward, and forward with backward, by name; ``copy`` and its own gradient among them."""
    x = jax.random.normal(jax.random.key(0), (size, size))
    scale = jnp.full((1, size), 0.05)
    key = jax.random.key(1)

    def both(f: Callable[..., jax.Array], *others: Any) -> tuple[Call, Call]:
        forward = jax.jit(f)

        @jax.jit
        def backward(x: jax.Array, scale: jax.Array) -> Any:
            y, pull = jax.vjp(lambda x, scale: f(x, scale, *others), x, scale)
            return y, *pull(x)

        return lambda: forward(x, scale, *others), lambda: backward(x, scale)

    made = {"copy": both(lambda x, scale: x + 1.0)}
    for format in BUILT_IN:
        bits = jnp.float32(format.max_bits)
        quantize = quantizing(format, HALF_EVEN)
        made[format.label(format.max_bits)] = both(quantize, bits, key, example_theta(format))
    eight = jnp.float32(8)
    for rounding in (HALF_AWAY, CEIL, STOCHASTIC):
        made[f"int8 {rounding.name}"] = both(quantizing(qj.integer(), rounding), eight, key, ())
    return made


def speed(size: int, rounds: int) -> dict[str, Any]:
    """Medians and ratios to the copy, by format."""
    made = calls(size)
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in made}
    for number in range(rounds + 1):
        for name, pair in made.items():
            for kind, call in enumerate(pair):
                start = time.perf_counter()
                jax.block_until_ready(call())
                if number:  # the first round compiles
                    seconds[name][kind].append(time.perf_counter() - start)
    report: dict[str, Any] = {}
    copy = seconds["copy"][0]
    for name, kinds in seconds.items():
        report[name] = {}
        for way, values in zip(("forward", "with_backward"), kinds, strict=True):
            ratios = sorted(a / b for a, b in zip(values, copy, strict=True))
            report[name][way] = {
                "median_s": statistics.median(values),
                "ratio": statistics.median(values) / statistics.median(copy),
                "ratio_low": ratios[0],
                "ratio_high": ratios[-1],
            }
    return report


def sizes(width: int, group: int) -> dict[str, float]:
    """Bytes of a frozen tree against its floats, on device and on disk."""
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        f"layer_{i}": {
            "kernel": jax.random.normal(key, (width, width)),
            "bias": jnp.zeros(width),
            "scale": jnp.ones(width),
        }
        for i, key in enumerate(keys)
    }

    def f(params: Any, x: jax.Array) -> jax.Array:
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"]) * layer["scale"]
        return x

    weights = qj.weight_quantizer(bits=4, granularity=qj.PerGroup(group))
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    plan = qj.plan(policy, qj.sites(f, params, jax.ShapeDtypeStruct((1, width), jnp.float32)))
    frozen = qj.pack_params(qj.freeze(plan, qj.calibrate(plan, {}, params), params))
    floats = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    kernels = sum(layer["kernel"].nbytes for layer in params.values())
    device = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    with tempfile.TemporaryDirectory() as folder:
        storage.save_params(Path(folder) / "frozen", frozen)
        disk = sum(p.stat().st_size for p in (Path(folder) / "frozen").rglob("*") if p.is_file())
    return {
        "quantized_share": kernels / floats,
        "device_ratio": device / floats,
        "disk_ratio": disk / floats,
    }


def main() -> None:
    """Print two tables; write them as JSON where asked to."""
    parser = benchmark.options(__doc__, rounds=9)
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "size": options.size,
        "rounds": options.rounds,
        **benchmark.made_by(),
        "speed": speed(options.size, options.rounds),
        "storage": {f"group{group}": sizes(1024, group) for group in (64, 128)},
    }
    for name, kinds in report["speed"].items():
        shown = "  ".join(
            f"{kind} {v['median_s'] * 1e3:7.1f} ms {v['ratio']:5.2f}x "
            f"[{v['ratio_low']:.2f}, {v['ratio_high']:.2f}]"
            for kind, v in kinds.items()
        )
        print(f"{name:24} {shown}")
    for name, figures in report["storage"].items():
        print(name, "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    benchmark.written(report, options.output)


if __name__ == "__main__":
    main()
