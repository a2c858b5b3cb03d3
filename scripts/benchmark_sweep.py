"""What a grid of widths costs, as a multiple of the float forward pass; run with `scripts/in_env`.

Compares, for 49 cells (weight bits 2-8 x activation bits 2-8) of a CNN and an MLP: the float
forward pass alone, the grid as one program under `lax.map` and under `vmap`, and each cell with
static widths, compiled on its own. Run times are medians of interleaved rounds with their
quartiles; compile times are single. Inputs are random: only time is measured here.

    scripts/in_env python scripts/benchmark_sweep.py --output FILE.json
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from experiments import benchmark
from experiments.timing import quartiles
from quantjax.sweep import Execution, compile_cells

BUDGET = 4 << 30
WIDTHS = np.arange(2, 9, dtype=np.float32)


class CNN(nn.Module):
    """The CNN 32/64/64 of the peers' comparison."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels in (32, 64, 64):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class MLP(nn.Module):
    """Three dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (256, 256):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


def compiled_in(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds that it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def measure(name: str, model: nn.Module, x: jax.Array, rounds: int) -> dict[str, Any]:
    """All figures of one model."""
    params = model.init(jax.random.key(0), x[:1])

    def f(params: Any, x: jax.Array) -> jax.Array:
        return model.apply(params, x)  # type: ignore[return-value]

    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    _, state = qj.observe(f, plan)(qj.init(plan), params, x[:64])
    quantized = qj.fake_quantize(f, plan)

    def cell(values: Any, state: Any, params: Any, x: jax.Array) -> jax.Array:
        qstate = qj.calibrate(
            plan, state, params, weight_bits=values["w"], activation_bits=values["a"]
        )
        return jnp.argmax(quantized(qstate, params, x), axis=-1)

    mesh = np.meshgrid(WIDTHS, WIDTHS, indexing="ij")
    values = {"w": mesh[0].ravel(), "a": mesh[1].ravel()}
    shared = (state, params, x)
    programs: dict[str, Any] = {}
    compile_seconds: dict[str, float] = {}
    for execution, cells_per_call in ((Execution.MAP, 49), (Execution.VMAP, 7)):
        start = time.perf_counter()
        programs[execution.value] = compile_cells(
            cell,
            values,
            *shared,
            memory_budget_bytes=BUDGET,
            execution=execution,
            cells_per_call=cells_per_call,
        )
        compile_seconds[execution.value] = time.perf_counter() - start
    plain = jax.jit(lambda params, x: jnp.argmax(f(params, x), axis=-1))
    float_program, compile_seconds["float"] = compiled_in(lambda: plain.lower(params, x).compile())

    def static(bits: float) -> Any:
        one = jax.jit(lambda state, params, x: cell({"w": bits, "a": bits}, state, params, x))
        return compiled_in(lambda: one.lower(*shared).compile())

    statics = [static(bits) for bits in (2.0, 4.0, 6.0, 8.0)]
    compile_seconds["static, one cell"] = statistics.median(seconds for _, seconds in statics)
    candidates: dict[str, tuple[Callable[[], Any], int]] = {
        "float": (lambda: jax.block_until_ready(float_program(params, x)), 1),
        "static, one cell": (lambda: jax.block_until_ready(statics[3][0](*shared)), 1),
        "map": (lambda: programs["map"].run(values, *shared), 49),
        "vmap": (lambda: programs["vmap"].run(values, *shared), 49),
    }
    times: dict[str, list[float]] = {key: [] for key in candidates}
    for index in range(rounds + 1):
        for key, (run, cells) in candidates.items():
            _, seconds = compiled_in(run)
            if index:
                times[key].append(seconds / cells)
    base = statistics.median(times["float"])
    rows: dict[str, dict[str, Any]] = {}
    for key, samples in times.items():
        low, median, high = quartiles(samples)
        total = 49 * median + compile_seconds[key] * (49 if "static" in key else 1)
        rows[key] = {
            "ms_per_cell": round(1e3 * median, 2),
            "quartiles_ms": [round(1e3 * low, 2), round(1e3 * high, 2)],
            "over_float": round(median / base, 3),
            "compile_s": round(compile_seconds[key], 2),
            "grid_total_s": round(total, 2),
        }
    print(f"\n{name}, input {'x'.join(map(str, x.shape))}, {rounds} rounds")
    print(
        f"{'':18s}{'ms/cell':>9s}{'quartiles':>18s}{'x float':>9s}{'compile s':>11s}{'grid s':>8s}"
    )
    for key, row in rows.items():
        span = "-".join(f"{q:.2f}" for q in row["quartiles_ms"])
        print(
            f"{key:18s}{row['ms_per_cell']:9.2f}{span:>18s}{row['over_float']:9.2f}"
            f"{row['compile_s']:11.2f}{row['grid_total_s']:8.1f}"
        )
    return rows


def main() -> None:
    """Measure and write."""
    parser = benchmark.options(__doc__, rounds=7)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    key = jax.random.key(1)
    images = jax.random.normal(key, (options.images, 28, 28, 1))
    vectors = jax.random.normal(key, (options.images, 256))
    figures = {
        **benchmark.made_by(),
        "cores": os.cpu_count(),
        "rounds": options.rounds,
        "cnn_32_64_64": measure("CNN 32/64/64", CNN(), images, options.rounds),
        "mlp_256_256": measure("MLP 256/256", MLP(), vectors, options.rounds),
    }
    benchmark.written(figures, options.output)


if __name__ == "__main__":
    main()
