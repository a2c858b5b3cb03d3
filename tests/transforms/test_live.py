"""Ranges of the tensor as it comes: which rules serve, and what unsigned codes do not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors, ranges
from quantjax.affine import Fault, QParams, clips_negatives, mark_negatives
from tests.refused import refused

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)
PARAMS = {"w": jnp.eye(16, dtype=jnp.float32)}
LIVE = qj.RangeMode.LIVE
UNSIGNED = qj.integer(signed=False)
FITS = [ranges.ADMM, ranges.LEAST_SQUARES, ranges.HQO_SCALE]


def f(params, x):
    return x @ params["w"]


def planned(**scheme):
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(**scheme))])
    return qj.plan(policy, qj.sites(f, PARAMS, X))


def result(x, plan, **bits):
    qstate = qj.calibrate(plan, {}, PARAMS, **bits)
    out = qj.fake_quantize(f, plan)(qstate, PARAMS, x)
    assert_array_equal(jax.jit(qj.fake_quantize(f, plan))(qstate, PARAMS, x), out)
    return np.asarray(out)


QUANTIZERS = {
    **{rule.name: qj.activation_quantizer(range=LIVE, rule=rule) for rule in FITS},
    "symmetric": qj.activation_quantizer(range=LIVE, symmetric=True, format=UNSIGNED),
    "rows": qj.activation_quantizer(
        range=LIVE, symmetric=True, format=UNSIGNED, granularity=qj.PerToken()
    ),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_negative_values_without_codes_are_no_numbers(name):
    """They were 0, half of a normal activation, and nothing said so."""
    plan = planned(activations=QUANTIZERS[name])
    assert np.isnan(result(X, plan)).all()
    for held in (jnp.abs(X), jax.nn.gelu(X), jnp.zeros_like(X)):
        held = held.at[:, 0].set(4.0)  # a tail of each row, in comparison
        found = result(held, plan)
        assert np.abs(found - held).max() < 0.2
    assert_array_equal(result(X, plan, activation_bits=0), X)


def test_rows_without_codes_leave_the_others_alone():
    x = jnp.abs(X).at[3].multiply(-1.0)
    found = result(x, planned(activations=QUANTIZERS["rows"]))
    assert_array_equal(np.isnan(found).all(1), np.arange(len(x)) == 3)
    assert_array_equal(np.isnan(found).any(1), np.arange(len(x)) == 3)


@pytest.mark.parametrize(
    "quantizer",
    [
        qj.activation_quantizer(range=LIVE),
        qj.activation_quantizer(range=LIVE, rule=ranges.HQO_ZERO_POINT),
        qj.activation_quantizer(range=LIVE, symmetric=True, format=qj.integer(), rule=ranges.ADMM),
    ],
    ids=["min_max", "zero_point", "signed"],
)
def test_codes_for_both_signs_hold_both(quantizer):
    assert np.abs(result(X, planned(activations=quantizer)) - X).max() < 0.1


def test_weights_that_a_fit_cannot_hold_are_refused():
    weights = qj.weight_quantizer(symmetric=False, format=UNSIGNED, rule=ranges.ADMM)
    plan = planned(weights=weights)
    assert float(qj.calibrate(plan, {}, PARAMS)["w"]["weight"].scale[0, 0]) > 0.0
    with refused(errors.DataError, "negative values", "signed codes, qj.integer()"):
        qj.calibrate(plan, {}, {"w": -PARAMS["w"]})
    traced = jax.jit(lambda params: qj.calibrate(plan, {}, params))({"w": -PARAMS["w"]})
    assert {problem.what.partition(",")[0] for problem in qj.check(traced)} == {"negative values"}


def test_the_mark_is_for_what_lies_far_below_zero():
    low = jnp.asarray([-1.0, -0.2, 0.0, -1.0, -jnp.inf, jnp.nan, -1.0])
    high = jnp.asarray([1.0, 1.0, 1.0, -0.5, 1.0, 1.0, 0.0])
    far = [True, False, False, True, False, False, True]
    assert_array_equal(clips_negatives(low, high), far)
    ones = jnp.ones(7)
    marked = mark_negatives(QParams(ones, 0.0 * ones, jnp.float32(8)), low, high)
    assert_array_equal(jnp.isnan(marked.scale), far)
    assert_array_equal(marked.zero_point == Fault.NEGATIVE, far)
    for same in (
        QParams(ones, 0.0 * ones, jnp.float32(0)),  # bypass
        QParams(ones, 3.0 * ones, jnp.float32(8)),  # a zero point for them
    ):
        jax.tree.map(assert_array_equal, mark_negatives(same, low, high), same)


@pytest.mark.parametrize("side", ["weights", "activations"])
def test_levels_are_learned_from_the_tensor_as_it_comes(side):
    """A learned codebook has no levels ahead of that."""
    make = {"weights": qj.weight_quantizer, "activations": qj.activation_quantizer}[side]
    codebook = qj.formats.learned_codebook(max_bits=4)
    plan = planned(**{side: make(range=LIVE, rule=ranges.K_MEANS, format=codebook)})
    params = {"w": X[:16]}
    qstate = qj.calibrate(plan, {}, params)
    program = jax.jit(qj.fake_quantize(f, plan))
    eye = jnp.eye(16)
    out = program(qstate, params, eye) if side == "weights" else program(qstate, PARAMS, X)
    levels = (
        [len(np.unique(column)) for column in out.T] if side == "weights" else [len(np.unique(out))]
    )
    assert max(levels) <= 16
    assert 0.0 < np.abs(out - X[: len(out)]).mean() < 0.2
    frozen = qj.freeze(plan, qstate, params if side == "weights" else PARAMS)
    x = eye if side == "weights" else X
    assert_array_equal(jax.jit(qj.execute(f, plan))(qstate, frozen, x), out)


SHARDED = {
    rule.name: qj.activation_quantizer(
        range=LIVE, rule=rule, symmetric=True, format=qj.integer(max_bits=8)
    )
    for rule in (
        *(ranges.MIN_MAX, ranges.percentile(0.99), ranges.MSE, ranges.COSINE, ranges.KL_TENSORRT),
        *(ranges.KL_ONNXRUNTIME, ranges.LEAST_SQUARES, ranges.ADMM, ranges.HQO_SCALE),
    )
} | {
    "asymmetric": qj.activation_quantizer(range=LIVE, rule=ranges.MSE),
    "k_means": qj.activation_quantizer(
        range=LIVE, rule=ranges.K_MEANS, format=qj.formats.learned_codebook(max_bits=4)
    ),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", SHARDED)
def test_inside_shard_map_loops_have_types(name):
    """With ``check_vma``, the default: what varies over devices does so from a loop's start on."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    plan = planned(activations=SHARDED[name])
    qstate = qj.calibrate(plan, {}, PARAMS)
    quantized = qj.fake_quantize(f, plan)
    rows = P("rows")
    sharded = jax.shard_map(quantized, mesh=mesh, in_specs=(P(), P(), rows), out_specs=rows)
    assert_array_equal(jax.jit(sharded)(qstate, PARAMS, X), jax.jit(quantized)(qstate, PARAMS, X))


def test_inside_shard_map_long_sums_are_added_up():
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    x = jnp.asarray(np.random.default_rng(1).integers(0, 256, (4, 70_000)), jnp.float32)
    params = {"w": jnp.ones((70_000, 2), jnp.float32)}
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(), activations=qj.activation_quantizer(range=LIVE)
    )
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, x))
    qstate, quantized, rows = qj.calibrate(plan, {}, params), qj.fake_quantize(f, plan), P("rows")
    sharded = jax.shard_map(quantized, mesh=mesh, in_specs=(P(), P(), rows), out_specs=rows)
    out = jax.jit(sharded)(qstate, params, x)
    assert_array_equal(out, jax.jit(quantized)(qstate, params, x))
