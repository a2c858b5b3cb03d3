"""Quantized lookups: rows with their scales, simulated, frozen and executed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.estimators import DOREFA_WEIGHTS, LSQ
from quantjax.formats import MXFP4, NF4, midrise
from quantjax.products import Execution
from tests.models import assert_same_bits, normal

pytestmark = pytest.mark.thinned(2)

IDS = jnp.array([[1, 6, 1], [0, 3, 5]])
TABLE = {"table": normal(0, 7, 8) * jnp.logspace(-1.5, 1.5, 7)[:, None]}
f = lambda p, i: jnp.take(p["table"], i, axis=0)  # noqa: E731


def planned(quantizer: qj.Quantizer, f: Any = f, params: Any = TABLE, ids: Any = IDS) -> Any:
    """A plan of the weights alone, and its qstate."""
    scheme = qj.Scheme(weights=quantizer)
    plan = qj.plan(qj.Policy([qj.rule(qj.everything(), scheme)]), qj.sites(f, params, ids))
    return plan, qj.calibrate(plan, {}, params)


def codes_model(table: Any, bits: int, axis: int = 1) -> np.ndarray:
    """Symmetric full-range codes of each row, in float64."""
    w = np.asarray(table, np.float64)
    scale = (np.abs(w).max(axis, keepdims=True) / 2.0 ** (bits - 1)).astype(np.float32)
    codes = np.clip(np.rint(w / scale.astype(np.float64)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes.astype(np.float32) * scale).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_are_those_of_the_quantized_table(bits):
    """An independent model quantizes all of the table; scales go with their rows."""
    plan, qstate = planned(qj.weight_quantizer(bits=bits))
    assert qstate["table"]["weight"].scale.shape == (7, 1)
    expected = codes_model(TABLE["table"], bits)[np.asarray(IDS)]
    for run in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(run(qj.fake_quantize(f, plan))(qstate, TABLE, IDS), expected)
        qparams = qj.freeze(plan, qstate, TABLE)
        np.testing.assert_array_equal(run(qj.execute(f, plan))(qstate, qparams, IDS), expected)
        np.testing.assert_array_equal(run(qj.execute(f, plan))(qstate, TABLE, IDS), expected)


QUANTIZERS = {
    "tensor": qj.weight_quantizer(bits=4, granularity=qj.PerTensor()),
    "group": qj.weight_quantizer(bits=4, granularity=qj.PerGroup(4)),
    "asymmetric": qj.weight_quantizer(bits=4, symmetric=False),
    "live": qj.weight_quantizer(bits=4, range=qj.RangeMode.LIVE),
    "nf4": qj.weight_quantizer(format=NF4),
    "mxfp4": qj.weight_quantizer(format=MXFP4, granularity=qj.PerGroup(4)),
    "lsq": qj.weight_quantizer(bits=4, estimator=LSQ, granularity=qj.PerTensor()),
    "dorefa": qj.weight_quantizer(
        bits=3, estimator=DOREFA_WEIGHTS, format=midrise(), granularity=qj.PerTensor()
    ),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_lookup_is_a_lookup_in_the_quantized_table(name):
    """And so is what is executed, code for code."""
    plan, qstate = planned(QUANTIZERS[name])
    rows = jax.jit(qj.fake_quantize(f, plan))(qstate, TABLE, IDS)
    frozen = qj.freeze(plan, qstate, TABLE)
    if name != "live":
        expected = qj.dequantize_params(frozen)["table"][IDS]
        np.testing.assert_array_equal(rows, expected)
    # Signs of zero are not kept by codes.
    np.testing.assert_array_equal(jax.jit(qj.execute(f, plan))(qstate, frozen, IDS), rows)
    error = jnp.linalg.norm(rows - f(TABLE, IDS)) / jnp.linalg.norm(f(TABLE, IDS))
    assert float(error) > 0
    assert float(error) < 0.5 or name == "dorefa", "which squashes what it is given"


def test_the_plan_says_rows_of_codes():
    plan, _ = planned(qj.weight_quantizer(bits=4))
    (entry,) = plan.quantized
    assert (entry.form.execution, entry.sizing) == (Execution.ROWS, None)
    assert "rows of codes" in str(plan)


def test_bypass_is_the_float_lookup_with_its_gradient():
    plan, _ = planned(qj.weight_quantizer(bits=4))
    qstate = qj.calibrate(plan, {}, TABLE, weight_bits=0)
    loss = lambda f, *a: jnp.sum(jnp.sin(f(*a)))  # noqa: E731
    simulated = qj.fake_quantize(f, plan)
    for run in (lambda f: f, jax.jit):
        assert_same_bits(run(simulated)(qstate, TABLE, IDS), run(f)(TABLE, IDS))
        grad = run(jax.grad(lambda p: loss(simulated, qstate, p, IDS)))(TABLE)
        assert_same_bits(grad, run(jax.grad(lambda p: loss(f, p, IDS)))(TABLE))


def test_gradients_go_straight_through_to_the_rows_that_were_taken():
    plan, qstate = planned(qj.weight_quantizer(bits=4, granularity=qj.PerTensor()))
    upstream = normal(3, 2, 3, 8)
    run = lambda p: jnp.sum(upstream * qj.fake_quantize(f, plan)(qstate, p, IDS))  # noqa: E731
    grad = np.asarray(jax.grad(run)(TABLE)["table"])
    expected = np.zeros((7, 8))
    np.add.at(expected, np.asarray(IDS), np.asarray(upstream))
    scale = float(qstate["table"]["weight"].scale.reshape(()))
    inside = np.asarray(TABLE["table"]) / scale <= 7.5  # the largest value has no level of its own
    np.testing.assert_allclose(grad, expected * inside, rtol=1e-6)


def test_gradients_of_the_scales_come_from_their_rows_alone():
    plan, qstate = planned(qj.weight_quantizer(bits=4))

    def loss(scale: jax.Array) -> jax.Array:
        weight = qstate["table"]["weight"]._replace(scale=scale)
        return jnp.sum(qj.fake_quantize(f, plan)({"table": {"weight": weight}}, TABLE, IDS))

    grad = np.asarray(jax.grad(loss)(qstate["table"]["weight"].scale)).ravel()
    assert np.all(grad[[2, 4]] == 0.0), "rows that nobody took"
    assert np.all(grad[[0, 1, 3, 5, 6]] != 0.0)


def test_widths_are_traced():
    """A sweep over widths is one program, each cell as that width alone."""
    plan, _ = planned(qj.weight_quantizer(bits=8))

    def cell(bits: jax.Array) -> jax.Array:
        return qj.fake_quantize(f, plan)(
            qj.calibrate(plan, {}, TABLE, weight_bits=bits), TABLE, IDS
        )

    widths = jnp.array([2.0, 4.0, 8.0])
    grid = jax.jit(lambda widths: lax.map(cell, widths))(widths)
    for width, found in zip((2, 4, 8), grid, strict=True):
        np.testing.assert_array_equal(found, codes_model(TABLE["table"], width)[np.asarray(IDS)])
    np.testing.assert_array_equal(jax.vmap(cell)(widths), grid)


OUTSIDE = jnp.array([[1, 7, -1], [0, -8, 99]])
MODES = {
    "take": lambda p, i: jnp.take(p["table"], i, axis=0),
    "clip": lambda p, i: jnp.take(p["table"], i, axis=0, mode="clip"),
    "wrap": lambda p, i: jnp.take(p["table"], i, axis=0, mode="wrap"),
    "zero": lambda p, i: p["table"].at[i].get(mode="fill", fill_value=0.0),
    "index": lambda p, i: p["table"][i],
    "slice": lambda p, i: lax.dynamic_slice_in_dim(p["table"], i[1, 2], 2),
    "batched": lambda p, i: jax.vmap(lambda i: lax.dynamic_slice_in_dim(p["table"], i, 2))(i[0]),
}


@pytest.mark.parametrize("name", MODES)
def test_indices_out_of_bounds_do_what_the_model_does(name):
    """NaN, the nearest row or what the model fills in: as in the quantized table."""
    g = MODES[name]
    plan, qstate = planned(qj.weight_quantizer(bits=4, symmetric=False), g, ids=OUTSIDE)
    frozen = qj.freeze(plan, qstate, TABLE)
    expected = np.asarray(g(qj.dequantize_params(frozen), OUTSIDE))
    for found in (
        jax.jit(qj.fake_quantize(g, plan))(qstate, TABLE, OUTSIDE),
        jax.jit(qj.execute(g, plan))(qstate, frozen, OUTSIDE),
    ):
        np.testing.assert_array_equal(found, expected)


def test_columns_and_ensembles():
    tables = {"table": normal(5, 3, 7, 8)}
    ensemble = lambda p, i: jax.vmap(lambda t: t[i])(p["table"])  # noqa: E731
    columns = lambda p, i: jnp.take(p["table"], i, axis=2)  # noqa: E731
    for g in (ensemble, columns):
        plan, qstate = planned(qj.weight_quantizer(bits=4), g, tables)
        frozen = qj.freeze(plan, qstate, tables)
        expected = g(qj.dequantize_params(frozen), IDS)
        assert_same_bits(jax.jit(qj.fake_quantize(g, plan))(qstate, tables, IDS), expected)
        assert_same_bits(jax.jit(qj.execute(g, plan))(qstate, frozen, IDS), expected)


def test_stacked_tables_and_one_that_all_steps_share():
    tables = {"stack": normal(6, 3, 7, 8), "shared": normal(7, 7, 8)}

    def g(p: Any, i: jax.Array) -> jax.Array:
        step = lambda total, t: (total + t[i] * p["shared"][i], None)  # noqa: E731
        return lax.scan(step, jnp.zeros((2, 3, 8)), p["stack"])[0]

    plan, qstate = planned(qj.weight_quantizer(bits=4), g, tables)
    assert qstate["stack"]["weight"].scale.shape == (3, 7, 1)
    frozen = qj.freeze(plan, qstate, tables)
    expected = jax.jit(g)(qj.dequantize_params(frozen), IDS)
    np.testing.assert_allclose(
        jax.jit(qj.fake_quantize(g, plan))(qstate, tables, IDS), expected, rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.jit(qj.execute(g, plan))(qstate, frozen, IDS), expected, rtol=1e-6
    )


def tied(p: Any, i: jax.Array) -> jax.Array:
    """A lookup and logits by one table."""
    return jnp.tanh(p["table"][i]) @ p["table"].T


def test_a_tied_table_is_frozen_once_and_serves_both():
    policy = qj.uniform_policy(weight_bits=4)
    plan = qj.plan(policy, qj.sites(tied, TABLE, IDS))
    _, state = qj.observe(tied, plan)(qj.init(plan), TABLE, IDS)
    qstate = qj.calibrate(plan, state, TABLE)
    scales = [qstate[name]["weight"].scale for name in ("table", "table#1")]
    np.testing.assert_array_equal(scales[0], scales[1].T)
    frozen = qj.freeze(plan, qstate, TABLE)
    executed = jax.jit(qj.execute(tied, plan))(qstate, frozen, IDS)
    assert_same_bits(executed, jax.jit(qj.fake_quantize(tied, plan))(qstate, TABLE, IDS))


def test_uses_of_a_tied_table_that_disagree_are_refused():
    eight = qj.rule(qj.path("table"), qj.Scheme(weights=qj.weight_quantizer(bits=8)))
    four = qj.rule(qj.path("table#1"), qj.Scheme(weights=qj.weight_quantizer(bits=4)))
    plan = qj.plan(qj.Policy([eight, four]), qj.sites(tied, TABLE, IDS))
    qstate = qj.calibrate(plan, {}, TABLE)
    assert jnp.isfinite(qj.fake_quantize(tied, plan)(qstate, TABLE, IDS)).all()
    with pytest.raises(qj.errors.FreezeError, match="has the width 8 in one use, 4 in another"):
        qj.freeze(plan, qstate, TABLE)
    one = qj.plan(qj.Policy([four]), qj.sites(tied, TABLE, IDS))
    with pytest.raises(qj.errors.FreezeError, match="used in float as well"):
        qj.freeze(one, qj.calibrate(one, {}, TABLE), TABLE)


def test_bfloat16_rows():
    params = {"table": TABLE["table"].astype(jnp.bfloat16)}
    plan, qstate = planned(qj.weight_quantizer(bits=8), params=params)
    rows = jax.jit(qj.fake_quantize(f, plan))(qstate, params, IDS)
    assert rows.dtype == jnp.bfloat16
    frozen = qj.freeze(plan, qstate, params)
    assert_same_bits(jax.jit(qj.execute(f, plan))(qstate, frozen, IDS), rows)
    expected = codes_model(params["table"].astype(jnp.float32), 8)[np.asarray(IDS)]
    np.testing.assert_array_equal(rows, expected.astype(rows.dtype))


def test_compare_reports_a_lookup():
    plan, qstate = planned(qj.weight_quantizer(bits=4))
    report = qj.compare(f, plan)(qstate, TABLE, IDS)["table"]
    quantized = codes_model(TABLE["table"], 4)[np.asarray(IDS)]
    rows = np.asarray(TABLE["table"])[np.asarray(IDS)]
    expected = 10 * np.log10((rows**2).sum() / ((rows - quantized) ** 2).sum())
    np.testing.assert_allclose(report.sqnr, expected, rtol=1e-4)
    assert set(report.operands) == {"weight"}


def test_random_rounding_takes_a_key():
    quantizer = qj.weight_quantizer(bits=4, rounding=qj.rounding.STOCHASTIC)
    plan, qstate = planned(quantizer)
    with pytest.raises(qj.errors.KeyMissingError):
        qj.fake_quantize(f, plan)(qstate, TABLE, IDS)
    draws = [qj.fake_quantize(f, plan)(qstate, TABLE, IDS, key=jax.random.key(n)) for n in (0, 1)]
    assert not (draws[0] == draws[1]).all()
    scale = jnp.take(qstate["table"]["weight"].scale, IDS, axis=0)
    assert float(jnp.max(jnp.abs(draws[0] - f(TABLE, IDS)) / scale)) <= 1.0001
