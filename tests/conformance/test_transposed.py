"""Products next to a transposition, which XLA makes part of them: bypass still changes no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from tests.conformance.test_identity import assert_close
from tests.models import assert_same_bits, normal

# Small ones, whose sums XLA's kernels add up in another order when a side is transposed.
SHAPES = [(6, 18, 8), (6, 7, 8), (5, 3, 17)]
FORMS = {
    "weight": lambda p, x: x @ p["in"].T,
    "result": lambda p, x: (p["in"] @ x.T).T,
    "mapped": lambda p, x: jax.vmap(lambda row: p["in"] @ row)(x),
    "behind a sum": lambda p, x: jnp.tanh((p["in"] @ x.T).T + 0.5) @ p["out"],
    "between products": lambda p, x: jnp.tanh(x @ p["in"].T) @ p["out"],
}


@pytest.fixture(params=FORMS)
def f(request):
    return FORMS[request.param]


TWO = (FORMS["behind a sum"], FORMS["between products"])


def parameters(f, out, into):
    """A matrix from ``into`` to ``out`` channels, and one back where ``f`` has two products."""
    found = {"in": normal(1, out, into), "out": normal(3, out, into)}
    return {name: found[name] for name in ("in", "out") if name == "in" or f in TWO}


def calibrated(f, params, x, bits):
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    _, state = qj.observe(f, plan)(qj.init(plan), params, x)
    return plan, qj.calibrate(plan, state, params, weight_bits=bits, activation_bits=bits)


@pytest.mark.thinned(7)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_width_zero_changes_no_bit(f, shape, compiled):
    batch, out, into = shape
    params, x = parameters(f, out, into), normal(2, batch, into)
    plan, qstate = calibrated(f, params, x, 0)
    fake = qj.fake_quantize(f, plan)
    own, quantized = (jax.jit(f), jax.jit(fake)) if compiled else (f, fake)
    assert_same_bits(quantized(qstate, params, x), own(params, x))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("bits", [8, 4])
def test_simulation_equals_execution(f, bits):
    params, x = parameters(f, 18, 8), normal(2, 6, 8)
    plan, qstate = calibrated(f, params, x, bits)
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, x)
    frozen = qj.freeze(plan, qstate, params)
    assert_same_bits(jax.jit(qj.execute(f, plan))(qstate, frozen, x), simulated)
    own = f(params, x)
    error = np.linalg.norm(simulated - own) / np.linalg.norm(own)
    assert 0 < error < {8: 0.02, 4: 0.3}[bits]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_gradients_pass_the_transpositions(f, compiled):
    params, x = parameters(f, 18, 8), normal(2, 6, 8)
    plan, qstate = calibrated(f, params, x, 0)
    fake = qj.fake_quantize(f, plan)

    def gradients(f):
        found = jax.grad(lambda params, x: jnp.sum(jnp.sin(f(params, x))), (0, 1))
        return (jax.jit(found) if compiled else found)(params, x)

    got = gradients(lambda params, x: fake(qstate, params, x))
    want = gradients(f)
    (assert_same_bits if compiled else assert_close)(got, want)
