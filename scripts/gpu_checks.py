"""Whether quantjax keeps its promises on the accelerator in use, and how fast integers are there.

Bypass: width 0 of a dense network, a CNN and a transformer against the float model, entry by entry,
with the float model compiled a second time as the control. Integers: W8A8 executed against
simulated. Ties: codes of ``scale (k + 1/2)`` against NumPy, 2 to 8 bits. Quotients: divisions
against NumPy's. Lengths: int8 dots of short sums against int64. Cells: widths and seeds in one
program against each cell alone. Codes: of noise, against the CPU of this process. Speed: matrix
products in float32, tf32, bfloat16 and int8, ten calls a round, all variants in each round, one
after another; medians, and ratios to bfloat16. The file is written anew after each check.

    scripts/in_env python scripts/gpu_checks.py --output FILE.json
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from experiments.models.cnn import PooledCNN
from experiments.steps import Transformer
from experiments.timing import interleaved
from quantjax.formats import divide_by_scale
from quantjax.integers import lowering
from quantjax.interpreter import Op

W8A8 = qj.uniform_policy(weight_bits=8, activation_bits=8)
WIDTHS, SEEDS, REPEATS = np.arange(2.0, 9, dtype=np.float32), 3, 10


class Model(NamedTuple):
    """``f(params, x)`` with arguments for it."""

    f: Callable[..., Any]
    params: Any
    x: jax.Array


def model(name: str, *, small: bool, seed: int = 0) -> Model:
    """One of the three, with drawn parameters; all of them draw the same input."""
    dense = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(512), nn.gelu, nn.Dense(10)])
    module, shape = {
        "mlp": (dense, (8 if small else 256, 784)),
        "cnn": (PooledCNN(), (4 if small else 128, 28, 28, 1)),
        "transformer": (Transformer(1 if small else 4), (2 if small else 16, 128, 128)),
    }[name]
    x = jax.random.normal(jax.random.key(100), shape)
    return Model(module.apply, jax.jit(module.init)(jax.random.key(seed), x), x)


def observed(case: Model) -> tuple[qj.Plan, Any]:
    """A W8A8 plan and the statistics of one batch."""
    plan = qj.plan(W8A8, qj.sites(case.f, case.params, case.x))
    return plan, jax.jit(qj.observe(case.f, plan))(qj.init(plan), case.params, case.x)[1]


def ready(case: Model) -> tuple[qj.Plan, Any, Any]:
    """A W8A8 plan, its scales and the frozen weights."""
    plan, state = observed(case)
    qstate = jax.jit(lambda state, params: qj.calibrate(plan, state, params))(state, case.params)
    return plan, qstate, qj.freeze(plan, qstate, case.params)


def differing(got: Any, want: Any) -> dict[str, dict[str, float]]:
    """Entries, those whose bits differ, and the largest difference, by the leaf's own name."""
    found: dict[str, dict[str, float]] = collections.defaultdict(collections.Counter)  # type: ignore[arg-type]
    leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, one), other in leaves:
        kind = getattr(path[-1], "key", "value") if path else "value"
        a, b = (np.ascontiguousarray(side) for side in (one, other))
        each = found[str(kind)]
        each["entries"] += a.size
        bits = (np.frombuffer(side.tobytes(), f"u{side.itemsize}") for side in (a, b))
        each["differing"] += int(np.not_equal(*bits).sum())
        gap = np.abs(a.astype(np.float64) - b).max(initial=0)
        each["relative"] = max(each["relative"], gap / max(np.abs(b).max(initial=0), 1e-30))
    return {kind: dict(each) for kind, each in found.items()}


def passes(found: dict[str, dict[str, float]]) -> bool:
    """Whether no entry differs."""
    return not any(each["differing"] for each in found.values())


def bypass(name: str, *, small: bool) -> dict[str, Any]:
    """Value and gradients at width 0 against those of the float model, both under ``jit``."""
    case = model(name, small=small)
    plan = qj.plan(W8A8, qj.sites(case.f, case.params, case.x))
    qstate = qj.calibrate(plan, qj.init(plan), case.params, weight_bits=0, activation_bits=0)

    def both(f: Callable[..., Any]) -> Any:
        def run(qstate: Any, params: Any, x: jax.Array) -> Any:
            value, pull = jax.vjp(lambda params, x: f(qstate, params, x), params, x)
            dparams, dx = pull(jnp.cos(jnp.arange(value.size, dtype=x.dtype)).reshape(value.shape))
            return {"output": value, "input": dx, "params": dparams}

        return jax.jit(run)(qstate, case.params, case.x)

    want, again = (both(lambda _, params, x: case.f(params, x)) for _ in range(2))
    found = differing(both(qj.fake_quantize(case.f, plan)), want)
    return {"passes": passes(found), "bypass": found, "control": differing(again, want)}


def integers(name: str, *, small: bool) -> dict[str, Any]:
    """Outputs of ``qj.execute`` against those of ``qj.fake_quantize``, and what was compiled."""
    case = model(name, small=small)
    plan, qstate, frozen = ready(case)
    simulated = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    program = jax.jit(qj.execute(case.f, plan)).lower(qstate, frozen, case.x).compile()
    found = differing(program(qstate, frozen, case.x), simulated)
    text = program.as_text() or ""
    marks = ("s32[", "s8[", "__cublas$lt$matmul", "__cublas$gemm", "__cudnn$conv", "__triton")
    return {"passes": passes(found), "outputs": found, "hlo": {m: text.count(m) for m in marks}}


def ties(*, small: bool) -> dict[str, Any]:
    """Codes halfway between two, with scales of 12 significant bits so that each tie is exact."""
    rows = 200 if small else 4000
    draw = np.random.default_rng(0)
    scale = np.ldexp(draw.integers(2049, 4096, (rows, 1)), draw.integers(-24, 0, (rows, 1)))
    x = scale * (np.arange(-160, 160) + 0.5)
    assert np.array_equal(x, x.astype(np.float32))

    def codes(bits: jax.Array, x: jax.Array, scale: jax.Array) -> jax.Array:
        qparams = qj.QParams(scale, jnp.zeros_like(scale), bits)
        return qj.encode(x, qparams, qj.integer()).codes

    by_row = jax.vmap(lambda bits, x, s: codes(bits, x[None], s[None])[0], (None, 0, 0))
    runs = {"jit": jax.jit(codes), "vmap": jax.jit(by_row)}
    wrong: dict[str, int] = dict.fromkeys(runs, 0)
    for bits in WIDTHS:
        want = np.clip(np.rint(x / scale), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
        for way, run in runs.items():
            got = run(jnp.float32(bits), jnp.float32(x), jnp.float32(scale))
            wrong[way] += int((np.asarray(got) != want).sum())
    return {"passes": not any(wrong.values()), "codes": x.size * len(WIDTHS), "wrong": wrong}


def quotients(*, small: bool) -> dict[str, Any]:
    """Quotients by a plain division and by the library's, against IEEE's, entry by entry."""
    number = 1 << (12 if small else 20)
    draw = np.random.default_rng(1)
    exponents = draw.integers(-40, 40, (2, number))
    x, d = np.ldexp(draw.uniform(1.0, 2.0, (2, number)), exponents).astype(np.float32)
    want = (x / d).view(np.int32)
    wrong = {
        name: int((np.asarray(jax.jit(divide)(x, d)).view(np.int32) != want).sum())
        for name, divide in (("plain", jnp.divide), ("divide_by_scale", divide_by_scale))
    }
    return {"passes": not wrong["divide_by_scale"], "quotients": number, "wrong": wrong}


def lengths(*, small: bool) -> dict[str, Any]:
    """int8 dots of short sums, as XLA has them and as ``execute`` asks for them: wrong lengths."""
    numbers = (((1,), (0,)), ((), ()))
    forms = {"xla": lowering.DEFAULT[Op.DOT], "execute": lowering.lowering(Op.DOT)}
    wrong: dict[str, list[int]] = {name: [] for name in forms}
    draw = np.random.default_rng(2)
    for length in (1, 9) if small else (*range(1, 34), 63, 64, 65, 147):
        x, w = (draw.integers(-128, 128, s).astype(np.int8) for s in ((64, length), (length, 48)))
        want = x.astype(np.int64) @ w.astype(np.int64)
        for name, form in forms.items():
            got = jax.jit(partial(form, dimension_numbers=numbers))(x, w)
            if np.any(np.asarray(got) != want):
                wrong[name].append(length)
    return {"passes": not wrong["execute"], "wrong": wrong}


def cells(name: str, *, small: bool) -> dict[str, Any]:
    """Logits of all widths and seeds by ``vmap`` and by ``lax.map``, against each cell alone."""
    cases = [model(name, small=small, seed=seed) for seed in range(SEEDS)]
    (plan, first), *others = (observed(case) for case in cases)
    params, states = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        for trees in ([case.params for case in cases], [first, *(state for _, state in others)])
    )
    f, x = cases[0].f, cases[0].x

    def cell(which: tuple[jax.Array, jax.Array], params: Any, states: Any, x: jax.Array) -> Any:
        bits, seed = which
        params, state = jax.tree.map(lambda leaf: leaf[seed], (params, states))
        qstate = qj.calibrate(plan, state, params, weight_bits=bits, activation_bits=bits)
        return qj.fake_quantize(f, plan)(qstate, params, x)

    given = params, states, x
    which = jnp.repeat(jnp.asarray(WIDTHS), SEEDS), jnp.tile(jnp.arange(SEEDS), len(WIDTHS))
    alone = jax.jit(cell)
    want = jnp.stack([alone(one, *given) for one in zip(*which, strict=True)])
    vmapped = jax.jit(jax.vmap(cell, (0, None, None, None)))(which, *given)
    mapped = jax.jit(lambda which, *a: jax.lax.map(lambda w: cell(w, *a), which))(which, *given)
    found = {"vmap": differing(vmapped, want), "map": differing(mapped, want)}
    return {"passes": all(map(passes, found.values())), "cells": len(want), **found}


def codes_of_noise(*, small: bool) -> dict[str, Any]:
    """``qj.fake_quant`` here and on the CPU, with scales of columns, 2 to 8 bits."""
    size = 256 if small else 2048
    x, scale = jax.random.normal(jax.random.key(0), (size, size)), jnp.linspace(0.005, 0.5, size)
    run = jax.jit(lambda x, scale, bits: qj.fake_quant(x, scale, bits=bits))
    total: collections.Counter[str] = collections.Counter()
    for bits in WIDTHS:
        arguments = x, scale[None], jnp.float32(bits)
        there = run(*jax.device_put(arguments, jax.devices("cpu")[0]))
        total.update(differing(run(*arguments), there)["value"])
    return {"passes": not total["differing"], **total}


def speed(size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds, tera-operations a second and the ratio to bfloat16, of square products."""
    w, x = jax.random.normal(jax.random.key(0), (2, size, size))
    f = lambda params, x: x @ params["w"]  # noqa: E731
    case = Model(f, {"w": w}, x)
    plan, qstate, frozen = ready(case)
    w8, x8 = ((a * 40).astype(jnp.int8) for a in (w, x))
    contract = jax.jit(
        lambda x, w, side: jax.lax.dot_general(
            x, w, (((1,), (side,)), ((), ())), preferred_element_type=jnp.int32
        ),
        static_argnums=2,
    )
    exact = jax.jit(lambda x, w: jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST))
    half, (w16, x16) = jax.jit(jnp.matmul), (w.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    execute, simulate = jax.jit(qj.execute(f, plan)), jax.jit(qj.fake_quantize(f, plan))
    calls: dict[str, Callable[[], Any]] = {
        "float32, highest precision": lambda: exact(x, w),
        "float32, default precision": lambda: half(x, w),
        "bfloat16": lambda: half(x16, w16),
        "int8 dot alone": lambda: contract(x8, w8, 0),
        "int8 dot alone, weight transposed": lambda: contract(x8, w8, 1),
        "W8A8 executed": lambda: execute(qstate, frozen, x),
        "W8A8 simulated": lambda: simulate(qstate, case.params, x),
    }
    times = interleaved({name: partial(repeated, run) for name, run in calls.items()}, rounds)
    medians = {name: statistics.median(seconds) / REPEATS for name, seconds in times.items()}
    return {
        name: {
            "ms": 1e3 * median,
            "tera_per_s": 2e-12 * size**3 / median,
            "ratio": median / medians["bfloat16"],
        }
        for name, median in medians.items()
    }


def repeated(run: Callable[[], Any]) -> Any:
    """The last of ten results; a device starts the next while Python waits for none."""
    return [run() for _ in range(REPEATS)][-1]


def checks(*, small: bool, rounds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by name, in the order in which they run."""
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "ties": partial(ties, small=small),
        "quotients": partial(quotients, small=small),
        "codes": partial(codes_of_noise, small=small),
        "lengths": partial(lengths, small=small),
    }
    for check, names in (
        (integers, ("mlp", "cnn", "transformer")),
        (bypass, ("mlp", "cnn", "transformer")),
        (cells, ("mlp", "cnn")),
    ):
        made |= {f"{check.__name__} {name}": partial(check, name, small=small) for name in names}
    sizes = (256,) if small else (4096, 8192)
    return made | {f"speed {size}": partial(speed, size, rounds) for size in sizes}


def main() -> None:
    """Run and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checks", nargs="+", help="only those whose names start so")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="shapes for a CPU")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    for name, check in checks(small=options.small, rounds=options.rounds).items():
        if options.checks and not name.startswith(tuple(options.checks)):
            continue
        start = time.perf_counter()
        try:
            report[name] = check()
        except jax.errors.JaxRuntimeError as error:  # what XLA cannot compile here
            report[name] = {"passes": False, "error": str(error)[:2000]}
        report[name]["seconds"] = round(time.perf_counter() - start, 1)
        print(name, json.dumps(report[name], indent=1), flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
