"""Tensors of float64, in a process of their own: JAX has them for all or for none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
import quantjax as qj
from quantjax import formats, ranges, statistics
from quantjax.contract import Trial, counterexamples
from quantjax.arithmetic import Arithmetic
from quantjax.simulation import apply
from quantjax.formats import BUILT_IN, example_theta
from tests.laws.contract_cases import some_widths

done = 0
for format in BUILT_IN[PART::8]:
    theta = example_theta(format)
    trial = Trial(dtype=jnp.float64, theta=theta)
    for bits in some_widths(format):
        broken = counterexamples(format, bits, trial)
        assert not set(broken) & format.laws, (format.name, bits, broken)
    bits = some_widths(format)[-1]
    # Beyond float32's digits: computed in float32, cast back, and bypassed exactly.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)))
    qparams = qj.QParams(jnp.float32(0.25), jnp.float32(0), jnp.float32(bits), theta)
    y = apply(x, qparams, Arithmetic(format))
    narrow = apply(x.astype(jnp.float32), qparams, Arithmetic(format))
    assert y.dtype == jnp.float64 and narrow.dtype == jnp.float32
    assert (np.asarray(y) == np.asarray(narrow, np.float64)).all(), format.name
    same = apply(x, qparams._replace(bits=jnp.float32(0)), Arithmetic(format))
    assert same.dtype == jnp.float64 and (same == x).all(), format.name
    stored = qj.encode(x, qparams, format)
    assert stored.dtype == jnp.float64 and (stored.dequantize() == y).all(), format.name
    assert all(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(stored)), format.name
    done += 1
weights = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)))}
for rule, format in (
    (ranges.K_MEANS, formats.learned_codebook(max_bits=3)),
    (ranges.XNOR, qj.integer(max_bits=1)),
    (ranges.TWN, formats.TERNARY),
    (ranges.TTQ, formats.ternary(learned=True)),
):
    w, bits = weights["w"].astype(jnp.float32), jnp.float32(format.max_bits)
    fitted = rule.fit(w, (1, 8), format, bits)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fitted)), rule.name
for scale in (jnp.full((1, 8), 0.25, jnp.float32), jnp.float32(0.25)):
    qparams = qj.QParams(scale, jnp.zeros_like(scale), jnp.float32(4))
    for arithmetic in (Arithmetic(qj.integer()), Arithmetic(qj.integer(), symmetric=True)):
        total = lambda x, scale: apply(x, qparams._replace(scale=scale), arithmetic).sum()
        by_x, by_scale = jax.grad(total, (0, 1))(weights["w"], scale)
        assert by_x.dtype == jnp.float64 and by_scale.dtype == jnp.float32
seen = statistics.of_tensor(jnp.asarray(np.linspace(-1, 3, 64)), (1,), with_values=True)
for rule in (ranges.MSE, ranges.COSINE, ranges.KL_TENSORRT):
    for signed in (True, False):
        target = ranges.Target(qj.integer(signed=signed), signed, jnp.float32(4))
        found = ranges.derive(rule, seen, target)
        assert found.low.dtype == found.high.dtype == jnp.float32, (rule.name, signed)
        assert found.low < found.high
print("formats:", done)
"""


@pytest.mark.thinned(8)
@pytest.mark.parametrize("part", range(8))
def test_every_format_keeps_its_laws_for_float64(part):
    command = [sys.executable, "-W", "error", "-c", PROGRAM.replace("PART", str(part))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout.split("formats: ")[1]) >= 4
