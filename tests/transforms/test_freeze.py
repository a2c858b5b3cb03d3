"""``qj.freeze``: the codes of the simulation, in each parameter's own layout."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.transforms import encoding
from tests.models import Case, assert_same_bits, normal, planned, policy
from tests.oracles.integers import Integers, codes, reals, spread
from tests.refused import refused
from tests.transforms.freeze_cases import WAYS, Way, raw, same, scanned

pytestmark = pytest.mark.thinned(5)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, qj.QTensor)


class Frozen:
    """A case, planned for its weights alone, calibrated and frozen."""

    def __init__(self, way: Way, weight_bits: Any = None) -> None:
        self.way = way
        self.plan = planned(way.case, policy(way.quantizer))
        self.qstate = qj.calibrate(self.plan, {}, way.case.params, weight_bits=weight_bits)
        self.params = qj.freeze(self.plan, self.qstate, way.case.params)

    def layers(self) -> Any:
        """``(float weight in the product, its QParams)`` by layer, in NumPy."""
        weight = self.way.there(np.asarray(self.way.leaf(self.way.case.params)))
        weight = np.asarray(jnp.asarray(weight).astype(self.way.dtype).astype(jnp.float32))
        qparams = self.qstate[self.way.path]["weight"]
        for index in np.ndindex(weight.shape[: self.way.steps]):
            yield index, weight[index], jax.tree.map(lambda a, i=index: np.asarray(a)[i], qparams)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes, and the floats that they stand for, at the parameter."""
        shape = self.way.there(np.asarray(self.way.leaf(self.way.case.params))).shape
        found, floats = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        format = self.way.quantizer.format
        for index, weight, (scale, zero, bits, _) in self.layers():
            narrow = getattr(format, "narrow", False)
            family = Integers(int(bits), format.signed, narrow)
            found[index] = codes(weight, scale, zero, family)
            floats[index] = reals(found[index], scale, zero)
        return self.way.back(found), self.way.back(floats)


@functools.cache
def frozen_by(name: str) -> Frozen:
    """At the quantizer's own width."""
    return Frozen(WAYS[name]())


@pytest.fixture(params=WAYS)
def frozen(request) -> Frozen:
    return frozen_by(request.param)


SCALES = {
    "dense": (1, 5),
    "dense_in_groups": (2, 5),
    "weight_left": (5, 1),
    "transposed": (5, 1),
    "transposed_in_groups": (5, 3),
    "heads_flattened": (2, 1, 6),
    "heads_cut": (4, 3, 2),  # no coarser blocks hold the groups apart
    "channels_of_heads": (1, 4, 2),
    "query": (1, 4, 2),
    "attention_out": (1, 1, 8),
    "attention_out_in_groups": (4, 1, 8),
    "conv": (1, 1, 1, 4),
    "narrow_per_tensor": (1, 1),
    "scan": (3, 1, 6),
    "scan_transposed": (3, 6, 3),
    "stack_axis_1": (2, 3, 6),
    "nested_scans": (2, 3, 4, 1),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_is_stored_once_for_all_that_share_it(name):
    leaf = frozen_by(name).way.leaf(frozen_by(name).params)
    assert leaf.qparams.scale.shape == SCALES[name]
    # Symmetric codes have one zero point for all, of each layer if the first axes are layers.
    steps = leaf.qparams.bits.shape
    ones = (*steps, *(1,) * (leaf.ndim - len(steps)))
    assert leaf.qparams.zero_point.shape == (SCALES[name] if name == "stack_axis_1" else ones)
    assert not leaf.qparams.zero_point.any()


def test_the_tree_keeps_its_structure(frozen):
    params = frozen.way.case.params
    structure = jax.tree.structure(frozen.params, is_leaf=is_quantized)
    assert structure == jax.tree.structure(params)
    pairs = zip(
        jax.tree.leaves(frozen.params, is_leaf=is_quantized), jax.tree.leaves(params), strict=True
    )
    changed = 0
    for leaf, original in pairs:
        assert (leaf.shape, leaf.dtype) == (original.shape, original.dtype)
        changed += is_quantized(leaf)
        if not is_quantized(leaf):
            assert_same_bits(leaf, original)
    assert changed == len(frozen.plan.quantized)


def test_codes_are_those_of_the_model_where_the_parameter_has_them(frozen):
    leaf = frozen.way.leaf(frozen.params)
    found, floats = frozen.expected()
    assert leaf.codes.dtype == leaf.format.storage_dtype
    np.testing.assert_array_equal(leaf.codes, found)
    assert len(np.unique(found)) > 4
    assert_same_bits(leaf.dequantize(), np.asarray(floats))


def test_scales_are_those_of_the_qstate(frozen):
    """Spread over the parameter."""
    leaf = frozen.way.leaf(frozen.params)
    shape = frozen.way.there(np.zeros(leaf.shape)).shape
    want = np.zeros(shape, np.float32)
    for index, weight, qparams in frozen.layers():
        want[index] = spread(qparams.scale, weight.shape)
    stored = np.asarray(leaf.qparams.scale)
    assert_same_bits(np.array(spread(stored, leaf.shape)), frozen.way.back(want))


def test_the_model_of_the_floats_is_near_the_simulation(frozen):
    case = frozen.way.case
    floats = jax.jit(lambda p, x: case.f(qj.dequantize_params(p), x))(frozen.params, case.x)
    simulated = jax.jit(qj.fake_quantize(case.f, frozen.plan))(frozen.qstate, case.params, case.x)
    tolerance = 2e-2 if frozen.way.dtype == jnp.bfloat16 else 1e-5
    floats, simulated = (np.asarray(y, np.float32) for y in (floats, simulated))
    np.testing.assert_allclose(floats, simulated, rtol=tolerance, atol=tolerance)
    own = np.asarray(jax.jit(case.f)(case.params, case.x), np.float32)
    assert np.abs(floats - own).max() > 5 * np.abs(floats - simulated).max()


def test_jitted_it_gives_the_same(frozen):
    def run(qstate: Any, params: Any) -> Any:
        return qj.freeze(frozen.plan, qstate, params)

    assert_same_bits(jax.jit(run)(frozen.qstate, frozen.way.case.params), frozen.params)


def test_executed_it_gives_what_the_simulation_gives(frozen):
    case = frozen.way.case
    simulated = jax.jit(qj.fake_quantize(case.f, frozen.plan))(frozen.qstate, case.params, case.x)
    executed = jax.jit(qj.execute(case.f, frozen.plan))(frozen.qstate, frozen.params, case.x)
    if frozen.way.dtype == jnp.float32:
        np.testing.assert_allclose(executed, simulated, rtol=1e-6, atol=1e-6)
    else:
        assert_same_bits(executed, simulated)


@pytest.mark.parametrize("name", ["scan", "stack_axis_1", "nested_scans"])
def test_each_layer_has_its_own_width(name):
    way = WAYS[name]()
    lengths = Frozen(way).qstate[way.path]["weight"].bits.shape
    widths = jnp.asarray(np.arange(2, 2 + np.prod(lengths)).reshape(lengths), jnp.float32)
    frozen = Frozen(way, {way.path: widths})
    found, floats = frozen.expected()
    leaf = way.leaf(frozen.params)
    np.testing.assert_array_equal(leaf.codes, found)
    assert_same_bits(leaf.dequantize(), np.asarray(floats))
    for index in np.ndindex(lengths):
        bits = int(widths[index])
        assert way.there(np.asarray(leaf.codes))[index].min() == -(2 ** (bits - 1))
    simulated = jax.jit(qj.fake_quantize(way.case.f, frozen.plan))
    executed = jax.jit(qj.execute(way.case.f, frozen.plan))
    case = way.case
    np.testing.assert_allclose(
        executed(frozen.qstate, frozen.params, case.x),
        simulated(frozen.qstate, case.params, case.x),
        rtol=1e-6,
        atol=1e-6,
    )


def test_other_trees_than_dictionaries():
    f = lambda p, x: x @ p[0] @ p[1]["b"]  # noqa: E731
    case = Case(f, (normal(1, 4, 3), {"b": normal(2, 3, 2), "c": None}), normal(3, 2, 4))
    plan = planned(case, policy(qj.weight_quantizer()))
    first, rest = qj.freeze(plan, qj.calibrate(plan, {}, case.params), case.params)
    assert is_quantized(first)
    assert is_quantized(rest["b"])
    assert rest["c"] is None


def test_width_zero_has_no_codes():
    way = WAYS["dense"]()
    plan = planned(way.case, policy(way.quantizer))
    qstate = qj.calibrate(plan, {}, way.case.params, weight_bits=0)
    with refused(errors.FreezeError, "0 bits", "site w", "weight 6x5"):
        qj.freeze(plan, qstate, way.case.params)


def test_a_single_layer_at_width_zero_is_enough():
    way = raw(scanned(lambda x, w: jnp.tanh(x @ w)), (3, 6, 6), (2, 6), same, same, steps=1)
    plan = planned(way.case, policy(way.quantizer))
    widths = {"w": jnp.array([4.0, 0.0, 4.0])}
    qstate = qj.calibrate(plan, {}, way.case.params, weight_bits=widths)
    with refused(errors.FreezeError, "0 bits"):
        qj.freeze(plan, qstate, way.case.params)


@pytest.mark.parametrize("scale", [-1.0, 0.0, jnp.inf, jnp.nan])
def test_a_scale_that_is_none_has_no_codes(scale):
    """A learned scale that has crossed zero, for instance; under a trace it is NaN."""
    way = WAYS["dense"]()
    plan = planned(way.case, policy(way.quantizer))
    qstate = qj.calibrate(plan, {}, way.case.params)
    broken = qstate["w"]["weight"]._replace(scale=qstate["w"]["weight"].scale.at[0, 1].set(scale))
    with refused(errors.FreezeError, "no positive finite number", "site w"):
        qj.freeze(plan, {"w": {"weight": broken}}, way.case.params)
    frozen = jax.jit(functools.partial(qj.freeze, plan))(
        {"w": {"weight": broken}}, way.case.params
    )["w"]
    assert np.isnan(frozen.qparams.scale[0, 1])
    assert np.isfinite(np.delete(frozen.qparams.scale, 1)).all()
    out = jax.jit(qj.fake_quantize(way.case.f, plan))({"w": {"weight": broken}}, *way.case[1:])
    assert np.isnan(out).any(axis=0).tolist() == [False, True, False, False, False]


def test_nan_has_no_code():
    way = WAYS["dense"]()
    plan = planned(way.case, policy(way.quantizer))
    qstate = qj.calibrate(plan, {}, way.case.params)
    params = {"w": way.case.params["w"].at[3, 2].set(jnp.nan)}
    with refused(errors.DataError, "NaN", "site w"):
        qj.freeze(plan, qstate, params)


def test_other_parameters_than_planned():
    way = WAYS["dense"]()
    plan = planned(way.case, policy(way.quantizer))
    qstate = qj.calibrate(plan, {}, way.case.params)
    with refused(errors.PlanMismatchError, "it has 5x5"):
        qj.freeze(plan, qstate, {"w": jnp.ones((5, 5))})
    with refused(errors.CalibrationError, "no QParams"):
        qj.freeze(plan, {}, way.case.params)


def test_a_stack_of_no_layers_is_refused():
    def f(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    params, x = {"w": jnp.zeros((0, 4, 4))}, jnp.ones((2, 4))
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, x))
    with refused(errors.FreezeError, "without entries", "(0, 4, 4)"):
        qj.freeze(plan, qj.calibrate(plan, {}, params), params)


SHORTER = qj.PerGroup(100, remainder=qj.Remainder.SHORTER)


@pytest.mark.parametrize(
    "granularity",
    [qj.PerTensor(), qj.PerChannel(), qj.PerGroup(64), SHORTER],
    ids=lambda it: it.name,
)
def test_a_large_parameter_is_encoded_by_parts_as_it_is_as_a_whole(granularity):
    w = normal(0, 512, 160)
    assert w.size > encoding.SMALL
    weights = qj.weight_quantizer(bits=4, granularity=granularity)
    case = Case(lambda p, x: x @ p["w"], {"w": w}, normal(1, 3, 512))
    plan = planned(case, policy(weights))
    qstate = qj.calibrate(plan, {}, case.params)
    found = qj.freeze(plan, qstate, case.params)["w"]
    want = qj.encode(w, qstate["w"]["weight"], weights.format)
    assert_same_bits(found.dequantize(), want.dequantize())
