"""Called eagerly, what belongs together is one program: each takes tens of ms to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from tests.compilations import counted_compilations
from tests.models import cnn, ready

pytestmark = pytest.mark.usefixtures("own_programs")
CASE = cnn()
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
LABELS = jnp.arange(6, dtype=jnp.int32) % 5
SITES = len(qj.sites(CASE.f, CASE.params, CASE.x))
FOUR = qj.weight_quantizer(bits=4, format=qj.integer(max_bits=4), granularity=qj.PerTensor())
PACKED = qj.Policy([qj.rule(qj.everything(), qj.Scheme(weights=FOUR))])
QPARAMS = qj.QParams(jnp.float32(0.1), jnp.float32(0.0), jnp.float32(4.0))

SINGLE = {
    "fake_quant": (lambda: qj.fake_quant(X, 0.1, bits=4), 3),
    "encode": (lambda: qj.encode(X, QPARAMS, qj.integer(max_bits=4)).stored, 4),
    "quantize_params": (lambda: jax.tree.leaves(qj.quantize_params({"w": X}, PACKED)), 10),
    "kd_loss": (lambda: qj.kd_loss(X, 2.0 * X, LABELS, where=LABELS > 1), 5),
    "prune_mask": (lambda: qj.prune_mask({"w": X}, 0.5), 6),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_first_call_compiles_few_programs(name):
    call, most = SINGLE[name]
    jax.clear_caches()
    with counted_compilations() as events:
        jax.block_until_ready(call())
    assert 0 < len(events) <= most


@pytest.mark.parametrize(("verb", "each"), [("fake_quantize", 16), ("compare", 24), ("freeze", 6)])
def test_a_site_compiles_few_programs(verb, each):
    """Sites that are alike share theirs, so that this is a bound for any model."""
    plan, _, qstate = ready(CASE, qj.uniform_policy(weight_bits=4, activation_bits=8))
    jax.clear_caches()
    calls = {
        "fake_quantize": lambda: qj.fake_quantize(CASE.f, plan)(qstate, CASE.params, CASE.x),
        "compare": lambda: qj.compare(CASE.f, plan)(qstate, CASE.params, CASE.x),
        "freeze": lambda: qj.freeze(plan, qstate, CASE.params),
    }
    CASE.f(CASE.params, CASE.x)  # what the model itself compiles
    with counted_compilations() as events:
        jax.block_until_ready(jax.tree.leaves(calls[verb]()))
    assert 0 < len(events) <= each * SITES
