"""Acceptance: what is simulated is what integers compute, code for code, at every site.

Every model in every mode: outputs, codes of both operands and int32 sums of ``qj.execute`` equal
those of ``qj.fake_quantize`` and of an int64 model in NumPy.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import quantjax as qj
from quantjax.affine import QParams
from quantjax.integers import lowering
from quantjax.interpreter import Op
from quantjax.products import Execution
from quantjax.site_plan import OperandPlan, SitePlan
from tests.integers.test_by_group import group_by_group
from tests.integers.visiting import product_dtypes
from tests.models import Case, Ready, assert_same_bits, ready
from tests.products.terms import factors, product
from tests.transforms.coded import (
    Model,
    Recorded,
    as_int64,
    at,
    blocks_of,
    frozen_and_floats,
    live_qparams_of,
    modelled,
    recording_execution,
    recording_simulation,
    small,
    steps_of,
    terms_of,
)
from tests.transforms.integer_zoo import GROUP, MODELS, MODES

pytestmark = pytest.mark.thinned(31)

INTEGERS = (Execution.INTEGER, Execution.GROUPED)


class Cell(NamedTuple):
    """A model in a mode, and everything that it is run as."""

    name: str
    case: Case
    ready: Ready
    qparams: Any
    executed: Any
    simulated: Any
    execution: Recorded
    simulation: Recorded


@pytest.fixture(scope="module", params=MODELS)
def case(request) -> Any:
    return request.param, MODELS[request.param]()


@pytest.fixture(scope="module", params=MODES)
def cell(request, case) -> Cell:
    name, case = case
    done = ready(case, MODES[request.param])
    plan, qstate = done.plan, done.qstate
    qparams = qj.freeze(plan, qstate, case.params)
    return Cell(
        f"{name}/{request.param}",
        case,
        done,
        qparams,
        jax.jit(qj.execute(case.f, plan))(qstate, qparams, case.x),
        jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x),
        recording_execution(case, plan)(qstate, qparams, case.x),
        recording_simulation(case, plan)(qstate, case.params, case.x),
    )


def test_the_output_is_that_of_the_simulation(cell):
    if cell.name == "transformer/groups_weight_only":
        # Floats of a normalization enter sums of floats: XLA orders them by what it fuses.
        np.testing.assert_allclose(cell.executed, cell.simulated, rtol=1e-5, atol=1e-5)
        return
    assert_same_bits(cell.executed, cell.simulated)
    assert not np.array_equal(cell.executed, jax.jit(cell.case.f)(cell.case.params, cell.case.x))


def test_every_site_is_executed_in_the_form_of_its_mode(cell):
    forms = {entry.form.execution for entry in cell.ready.plan.quantized}
    assert len(cell.ready.plan.quantized) > 1
    if "weight_only" in cell.name:
        assert forms == {Execution.CODES}
    elif "groups" in cell.name:
        assert Execution.GROUPED in forms <= set(INTEGERS)
    else:
        assert forms == {Execution.INTEGER}


def test_frozen_weights_are_held_once(cell):
    """No kernel stays in float but those that the table says are computed."""
    quantized, floats = frozen_and_floats(cell.qparams)
    kernels = [leaf for leaf in floats if leaf.ndim > 1 and leaf.shape[-2] > 4]
    assert bool(kernels) == ("optimized_lstm" in cell.name)
    assert quantized
    assert {leaf.codes.dtype.itemsize for leaf in quantized} == {1}


def qparams_of(cell: Cell, entry: SitePlan, operand: OperandPlan, index: Any) -> QParams:
    """What a visit's operand is quantized by: the qstate's; of a live range, the formula's.

    A jitted program may compute a normalization once for the range and once more for the codes,
    which differ in the last place. So a live scale is near the formula's, and taken as it is.
    """
    name, side = entry.site.name, operand.operand.side
    given = at(cell.ready.qstate[name][operand.key], index if entry.site.steps else ())
    if operand.quantizer.range is not qj.RangeMode.LIVE:
        return given
    want = live_qparams_of(
        operand, at(cell.simulation.records[name]["raw"][side], index), given.bits
    )
    found = at(cell.execution.records[name]["operands"][side], index)
    np.testing.assert_allclose(found.scale, want.scale, rtol=1e-6)
    np.testing.assert_array_equal(found.zero_point, want.zero_point)
    return want._replace(scale=found.scale)


def model_of(cell: Cell, entry: SitePlan, operand: OperandPlan, index: Any) -> Model:
    """One operand in NumPy, from the floats that the simulation has."""
    raw = at(cell.simulation.records[entry.site.name]["raw"][operand.operand.side], index)
    return modelled(operand, raw, qparams_of(cell, entry, operand, index))


def test_codes_are_those_of_the_model_and_of_the_simulation(cell):
    seen = 0
    for entry in cell.ready.plan.quantized:
        name = entry.site.name
        ours, theirs = cell.execution.records[name], cell.simulation.records[name]
        for index in steps_of(entry, ours):
            one, other = at(ours, index), at(theirs, index)
            for operand in entry.quantized:
                side = operand.operand.side
                if not operand.is_weight:  # those of a frozen weight are not the model's own
                    assert_same_bits(one["raw"][side], other["raw"][side])
                qparams = qparams_of(cell, entry, operand, index)
                want = model_of(cell, entry, operand, index)
                found, simulated = one["operands"][side], other["sides"][side]
                np.testing.assert_array_equal(as_int64(found.codes), want.codes, err_msg=name)
                np.testing.assert_array_equal(found.zero_point, np.rint(qparams.zero_point))
                assert_same_bits(found.scale, np.asarray(qparams.scale))
                assert_same_bits(simulated.factor, np.asarray(qparams.scale))
                values = as_int64(simulated.values)
                np.testing.assert_array_equal(values, want.operand.centered, err_msg=name)
                seen += len(np.unique(want.codes)) > 3
    assert seen


def test_sums_are_those_of_the_model_and_of_the_simulation(cell):
    """And so is what a site returns: the sum times both scales, once; group by group in order."""
    checked = 0
    for entry in cell.ready.plan.quantized:
        name, execution = entry.site.name, entry.form.execution
        if execution not in INTEGERS:
            continue
        equation, records = cell.execution.products[name], cell.execution.records[name]
        terms = terms_of(equation)
        for index in steps_of(entry, records):
            one, other = (at(r.records[name], index) for r in (cell.execution, cell.simulation))
            sides = sorted(entry.operands, key=lambda operand: operand.operand.side)
            left, right = (model_of(cell, entry, side, index).operand for side in sides)
            if execution is Execution.GROUPED:
                want = group_by_group(terms, blocks_of(equation, GROUP), left, right)
            else:
                sums = product(terms, left.centered, right.centered)
                assert one["sums"].dtype == np.int32
                np.testing.assert_array_equal(one["sums"], sums, err_msg=name)
                assert small(sums).all()
                np.testing.assert_array_equal(other["sums"], sums, err_msg=name)
                want = sums.astype(np.float32) * factors(terms, left.scale, right.scale)
            assert_same_bits(one["out"], want)
            assert_same_bits(other["out"], want)
            checked += 1
    assert bool(checked) != ("weight_only" in cell.name)


def test_the_program_multiplies_int8_into_int32(cell, monkeypatch):
    """At every site that the plan says is integer, and floats are multiplied at no such site."""
    monkeypatch.setitem(lowering.TABLE, jax.default_backend(), lowering.DEFAULT)
    plan, case = cell.ready.plan, cell.case
    executed = qj.execute(case.f, plan)
    jaxpr = jax.make_jaxpr(executed)(cell.ready.qstate, cell.qparams, case.x).jaxpr
    want: collections.Counter[Any] = collections.Counter()
    for entry in plan.sites:
        if entry.form is None or entry.form.execution not in INTEGERS:
            want[entry.site.op.value, "float32", "float32", "float32"] += 1
            continue
        # A convolution whose kernel has a zero point needs the sums over its windows as well.
        window = entry.site.op is Op.CONV and "unsigned_weights" in cell.name
        want[entry.site.op.value, "int8", "int8", "int32"] += 2 if window else 1
    assert collections.Counter(product_dtypes(jaxpr)) == want
