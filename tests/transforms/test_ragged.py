"""Ragged products (mixtures of experts): each group of rows with scales of its own matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpreter import Op, SiteStatus
from quantjax.products import Execution
from tests.models import assert_same_bits, normal

ROWS, DEPTH, OUT, GROUPS = 9, 24, 5, 4
X = normal(0, ROWS, DEPTH)
P = {"w": normal(1, GROUPS, DEPTH, OUT) * jnp.logspace(-1, 1, GROUPS)[:, None, None]}
SIZES = jnp.array([3, 0, 4, 1])  # one row is behind all groups
f = lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes)  # noqa: E731


def experts(x: Any, w: Any, sizes: Any) -> np.ndarray:
    """``x_i · w_g(i)`` in float64, 0 behind all groups."""
    out, start = np.zeros((len(x), w.shape[2])), 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + int(size))
        out[rows] = np.asarray(x, np.float64)[rows] @ np.asarray(w, np.float64)[group]
        start += int(size)
    return out


def dynamic(**options: Any) -> qj.Quantizer:
    return qj.activation_quantizer(bits=8, range=qj.RangeMode.LIVE, **options)


SCHEMES = {
    "w8a8": qj.Scheme(
        weights=qj.weight_quantizer(bits=8), activations=qj.activation_quantizer(bits=8)
    ),
    "tensor": qj.Scheme(
        weights=qj.weight_quantizer(bits=8, granularity=qj.PerTensor()), activations=dynamic()
    ),
    "token": qj.Scheme(
        weights=qj.weight_quantizer(bits=4, granularity=qj.PerGroup(8)),
        activations=dynamic(granularity=qj.PerToken()),
    ),
    "remainder": qj.Scheme(
        weights=qj.weight_quantizer(
            bits=4, granularity=qj.PerGroup(10, remainder=qj.Remainder.SHORTER)
        ),
        activations=dynamic(),
    ),
    "asymmetric": qj.Scheme(
        weights=qj.weight_quantizer(bits=8, symmetric=False), activations=dynamic()
    ),
    "weights": qj.Scheme(weights=qj.weight_quantizer(bits=4)),
}


def ready(scheme: qj.Scheme, f: Any = f, params: Any = P, *inputs: Any) -> Any:
    """Planned, observed, calibrated."""
    inputs = inputs or (X, SIZES)
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, *inputs))
    _, state = qj.observe(f, plan)(qj.init(plan), params, *inputs)
    return plan, state, qj.calibrate(plan, state, params)


def test_the_site():
    (site,) = qj.sites(f, P, X, SIZES)
    assert (site.name, site.op, site.status) == ("w", Op.RAGGED, SiteStatus.REWRITABLE)
    assert (site.operands[1].free, site.operands[1].contracted) == ((0, 2), (1,))
    assert site.multiply_adds == ROWS * DEPTH * OUT
    assert site.contraction_size == DEPTH


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", SCHEMES)
def test_simulation_is_close_to_float_and_execution_equal(name):
    plan, _, qstate = ready(SCHEMES[name])
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, P, X, SIZES)
    frozen = qj.freeze(plan, qstate, P)
    executed = jax.jit(qj.execute(f, plan))(qstate, frozen, X, SIZES)
    assert_same_bits(executed, simulated)
    expected = experts(X, P["w"], SIZES)
    error = np.linalg.norm(simulated - expected) / np.linalg.norm(expected)
    weights = SCHEMES[name].weights
    assert error < (0.02 if weights.bits == 8 else 0.2)
    assert (np.asarray(simulated)[-1] == 0.0).all(), "rows behind all groups are 0"


def test_under_float64_the_sums_stay_integers_of_the_sizes():
    with jax.enable_x64(True):
        plan, _, qstate = ready(SCHEMES["w8a8"])
        simulated = qj.fake_quantize(f, plan)(qstate, P, X, SIZES)
        executed = qj.execute(f, plan)(qstate, qj.freeze(plan, qstate, P), X, SIZES)
    assert_same_bits(executed, simulated)


def test_codes_in_integers_are_those_of_a_numpy_model():
    """Per group of rows: ``Σ (q_x - z)(q_w) · (s_x s_w)``, sums in int64."""
    plan, _, qstate = ready(SCHEMES["w8a8"])
    (entry,) = plan.quantized
    assert entry.form.execution is Execution.INTEGER
    qx, qw = qstate["w"]["activation"], qstate["w"]["weight"]
    assert qw.scale.shape == (GROUPS, 1, OUT)
    zero, x_scale = float(qx.zero_point.item()), np.float32(qx.scale.item())
    x = np.clip(np.rint(np.asarray(X, np.float64) / float(x_scale)) + zero, 0, 255) - zero
    w = np.clip(
        np.rint(np.asarray(P["w"], np.float64) / np.asarray(qw.scale, np.float64)), -128, 127
    )
    sums = experts(x, w, SIZES)
    group = np.repeat(np.arange(GROUPS), np.asarray(SIZES))
    scales = x_scale * np.asarray(qw.scale)[group, 0]
    expected = sums.astype(np.float32)[: len(group)] * scales
    found = jax.jit(qj.fake_quantize(f, plan))(qstate, P, X, SIZES)
    np.testing.assert_array_equal(np.asarray(found)[: len(group)], expected)


def test_long_sums_are_exact_in_chunks():
    depth = 2048
    x, params = normal(2, 6, depth), {"w": normal(3, 2, depth, 3)}
    sizes = jnp.array([2, 4])
    plan, _, qstate = ready(SCHEMES["w8a8"], f, params, x, sizes)
    (entry,) = plan.quantized
    assert entry.sizing.block < depth
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, x, sizes)
    frozen = qj.freeze(plan, qstate, params)
    assert_same_bits(jax.jit(qj.execute(f, plan))(qstate, frozen, x, sizes), simulated)


@pytest.mark.parametrize("name", ["w8a8", "token"])
def test_bypass_is_the_float_product(name):
    plan, state, _ = ready(SCHEMES[name])
    qstate = qj.calibrate(plan, state, P, weight_bits=0, activation_bits=0)
    for run in (lambda f: f, jax.jit):
        assert_same_bits(run(qj.fake_quantize(f, plan))(qstate, P, X, SIZES), run(f)(P, X, SIZES))


def test_gradients_are_those_of_the_rounded_operands():
    """Straight through: of each matrix the rows of its group, of the rows their matrix."""
    plan, _, qstate = ready(SCHEMES["weights"])
    weight = qj.dequantize_params(qj.freeze(plan, qstate, P))
    upstream = normal(4, ROWS, OUT)
    loss = lambda run: lambda p, x: jnp.sum(upstream * run(p, x))  # noqa: E731
    quantized = loss(lambda p, x: qj.fake_quantize(f, plan)(qstate, p, x, SIZES))
    dp, dx = jax.jit(jax.grad(quantized, (0, 1)))(P, X)
    ep, ex = jax.grad(loss(lambda p, x: f(p, x, SIZES)), (0, 1))(weight, X)
    np.testing.assert_allclose(dx, ex, rtol=1e-5, atol=1e-5)
    scale = np.asarray(qstate["w"]["weight"].scale)
    inside = np.asarray(P["w"]) / scale <= 7.5
    np.testing.assert_allclose(dp["w"], np.asarray(ep["w"]) * inside, rtol=1e-5, atol=1e-5)


def test_stacked_layers_of_experts():
    params = {"w": 0.3 * normal(5, 2, GROUPS, DEPTH, DEPTH)}

    def g(p: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(lax.ragged_dot(x, w, sizes)), None), x, p["w"])[0]

    plan, _, qstate = ready(SCHEMES["w8a8"], g, params, X, SIZES)
    assert qstate["w"]["weight"].scale.shape == (2, GROUPS, 1, DEPTH)
    simulated = jax.jit(qj.fake_quantize(g, plan))(qstate, params, X, SIZES)
    executed = jax.jit(qj.execute(g, plan))(qstate, qj.freeze(plan, qstate, params), X, SIZES)
    assert_same_bits(executed, simulated)


def test_other_forms_are_opaque():
    """The gradient of the matrices sums rows group by group: no product of rows with matrices."""
    loss = lambda p, x, sizes: jnp.sum(f(p, x, sizes) ** 2)  # noqa: E731
    rows = [s for s in qj.sites(jax.grad(loss), P, X, SIZES) if s.op is Op.RAGGED]
    assert [row.status for row in rows].count(SiteStatus.OPAQUE) == 1
    assert any("one matrix a group" in row.reason for row in rows)


CALLS = {
    "jit of grad": lambda loss: jax.jit(jax.grad(loss)),
    "grad of jit": lambda loss: jax.grad(jax.jit(loss)),
    "checkpoint": lambda loss: jax.jit(jax.grad(jax.checkpoint(loss))),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["tensor", "token", "alone"])
def test_sizes_may_be_traced_where_gradients_are(name, call):
    """They are an argument of the rules of derivatives, which must not close over a tracer."""
    weights = qj.weight_quantizer(bits=4, granularity=qj.PerGroup(8))
    scheme = SCHEMES[name] if name in SCHEMES else qj.Scheme(weights=weights)
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, P, X, SIZES))
    qstate = qj.calibrate(plan, qj.init(plan), P)
    simulated = qj.fake_quantize(f, plan)
    loss = lambda p, x, sizes: (simulated(qstate, p, x, sizes) ** 2).sum()  # noqa: E731
    want = jax.grad(lambda p: loss(p, X, SIZES))(P)["w"]
    got = CALLS[call](loss)(P, X, SIZES)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
