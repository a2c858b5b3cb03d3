"""How much memory ``qj.freeze`` needs beyond its input and its output; Linux only.

Parameters of a stack of dense layers, one far larger than the rest, scanned layers and a reshaped
kernel among them. The peak of the process (VmHWM, reset beforehand) less what it held before and
less the frozen leaves, as a multiple of the largest float leaf. Each case in a process of its own.

    scripts/in_env python scripts/benchmark_freeze.py --output FILE.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import quantjax as qj
from experiments import benchmark

MIB = 1 << 20


def dense(params: Any, x: jax.Array) -> jax.Array:
    """Four dense layers, the first of 256 MiB."""
    for name in ("a", "b", "c", "d"):
        x = jnp.tanh(x @ params[name])
    return x


def scanned(params: Any, x: jax.Array) -> jax.Array:
    """Sixteen layers in one leaf of 256 MiB."""
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]


def reshaped(params: Any, x: jax.Array) -> jax.Array:
    """A kernel of heads, as attention has it, and a transposed one."""
    kernel = params["heads"]
    x = jnp.tanh(x @ kernel.reshape(kernel.shape[0], -1))
    return x @ params["table"].T


CASES: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], int]] = {
    "dense": (
        dense,
        {"a": (4096, 16384), "b": (16384, 512), "c": (512, 512), "d": (512, 64)},
        4096,
    ),
    "scanned": (scanned, {"layers": (16, 2048, 2048)}, 2048),
    "reshaped": (reshaped, {"heads": (4096, 64, 128), "table": (4096, 8192)}, 4096),
}
GRANULARITIES = {"channel": qj.PerChannel(), "group64": qj.PerGroup(64)}


def resident(field: str) -> int:
    """A field of the process's memory status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in the process's status")


def measure(case: str, granularity: str) -> dict[str, float]:
    """Figures of one case, in this process."""
    f, shapes, width = CASES[case]
    params = {name: jnp.ones(shape) * 0.5 for name, shape in shapes.items()}
    weights = qj.weight_quantizer(bits=4, granularity=GRANULARITIES[granularity])
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    plan = qj.plan(policy, qj.sites(f, params, jax.ShapeDtypeStruct((1, width), jnp.float32)))
    qstate = jax.block_until_ready(qj.calibrate(plan, {}, params))
    # Compile and allocate what stays, with a small model of the same kind of leaves.
    small = {"w": jnp.ones((256, 256))}
    tiny = qj.plan(policy, qj.sites(lambda p, x: x @ p["w"], small, jnp.ones((1, 256))))
    jax.block_until_ready(qj.freeze(tiny, qj.calibrate(tiny, {}, small), small))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    frozen = jax.block_until_ready(qj.freeze(plan, qstate, params))
    peak = resident("VmHWM")
    output = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    largest = max(leaf.nbytes for leaf in params.values())
    return {
        "input_mib": sum(leaf.nbytes for leaf in params.values()) / MIB,
        "output_mib": output / MIB,
        "largest_leaf_mib": largest / MIB,
        "extra_mib": (peak - before - output) / MIB,
        "extra_leaves": (peak - before - output) / largest,
    }


def main() -> None:
    """Print a table; write it as JSON where asked to."""
    parser = benchmark.options(__doc__)
    parser.add_argument("--case", nargs=2, metavar=("CASE", "GRANULARITY"))
    options = parser.parse_args()
    if options.case and not (options.case[0] in CASES and options.case[1] in GRANULARITIES):
        parser.error(f"cases: {', '.join(CASES)}; granularities: {', '.join(GRANULARITIES)}")
    if options.case:
        print(json.dumps(measure(*options.case)))
        return
    report: dict[str, Any] = {
        **benchmark.made_by(),
        "cases": {},
    }
    for case in CASES:
        for granularity in GRANULARITIES:
            command = [sys.executable, __file__, "--case", case, granularity]
            done = subprocess.run(command, capture_output=True, check=True, text=True)
            figures = json.loads(done.stdout)
            report["cases"][f"{case}/{granularity}"] = figures
            shown = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
            print(f"{case:9} {granularity:8} {shown}")
    benchmark.written(report, options.output)


if __name__ == "__main__":
    main()
