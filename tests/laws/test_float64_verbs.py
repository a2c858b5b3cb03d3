"""The verbs under ``jax_enable_x64``: the float32 arrays that they make without it, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", sys.argv[1] == "float64")
jax.config.update("jax_numpy_dtype_promotion", "strict")
import quantjax as qj
from quantjax import training
from quantjax.calibration import RULES
from experiments.models.kv_cache import quantized_cache

draw = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
params = {"a": jnp.asarray(draw(0, 8, 16)), "b": jnp.asarray(draw(1, 2, 16, 16))}
x = jnp.asarray(draw(2, 32, 8))

def f(params, x):
    x = jax.nn.relu(x @ params["a"])
    return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["b"])[0]

found = {}
plan = qj.plan(qj.uniform_policy(weight_bits=4, activation_bits=8), qj.sites(f, params, x))
y, state = jax.jit(qj.observe(f, plan))(qj.init(plan), params, x)
found["observed"] = y, state
rules = qj.ranges.stack([r for r in RULES.values() if r.name not in ("cosine", "l_p(2.4)")])
derive = lambda index: qj.calibrate(plan, state, params, activation_rule=rules[index])
found["rules"] = jax.jit(lambda: jax.lax.map(derive, jnp.arange(len(rules), dtype=jnp.int32)))()
qstate = jax.jit(lambda: qj.calibrate(plan, state, params, weight_rule=qj.ranges.MSE))()
frozen = qj.freeze(plan, qstate, params)
found["frozen"] = frozen
found["executed"] = jax.jit(qj.execute(f, plan))(qstate, frozen, x)
total = lambda q: qj.fake_quantize(f, plan)(q, params, x).sum()
found["gradient"] = jax.jit(jax.grad(total))(qstate)
found["compared"] = jax.jit(qj.compare(f, plan))(qstate, params, x)
found["widths"] = training.with_bits(plan, qstate, weight_bits=jnp.float32(3))
codec = quantized_cache()
store = codec.write(codec.empty((1, 6, 2, 4)), jnp.asarray(draw(3, 1, 2, 2, 4)), jnp.int32(1))
found["cache"] = codec.read(store)
for name, tree in found.items():
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32, (name, path, leaf.dtype)
        print(name, jax.tree_util.keystr(path), np.asarray(leaf).tobytes().hex())
"""


def printed(mode: str) -> list[str]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, mode]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout.splitlines()


@pytest.fixture(scope="module")
def both():
    return printed("float32"), printed("float64")


def test_float64_mode_changes_no_number(both):
    narrow, wide = both
    assert len(narrow) == len(wide) > 80
    different = [a.split()[:2] for a, b in zip(narrow, wide, strict=True) if a != b]
    assert different == []
