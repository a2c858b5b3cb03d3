"""Blocks of rows x columns: a scale shared along the sum and along an axis of the output.

The products themselves against int64, and the way from the plan to integer execution.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.granularity import Granularity, OperandAxes, PerBlock, PerGroup, Remainder
from quantjax.products import Execution
from tests.models import Case, assert_same_bits, normal, planned
from tests.products.forms import Form, conv, dot
from tests.products.test_remainders import Axes, Operand, axes_of, by_blocks, check, pairs_for

pytestmark = pytest.mark.thinned(7)

SHORTER = Remainder.SHORTER

# Form, rows and columns; REFUSE where they divide, SHORTER where they do not.
FORMS = {
    "plain": (dot("mk,kn->mn", (3, 12), (12, 6)), 4, 3),
    "plain_remainder": (dot("mk,kn->mn", (3, 14), (14, 7)), 4, 3),
    "transposed": (
        dot("mk,kn->mn", (3, 14), (14, 7), lambda p, x: x @ p["w"].T)._replace(transposed=True),
        5,
        2,
    ),
    "weight_left": (dot("km,nk->nm", (14, 3), (5, 14), lambda p, x: p["w"] @ x), 4, 2),
    "batched": (dot("bmk,bkn->bmn", (2, 3, 11), (2, 11, 5)), 4, 3),
    "columns_along_the_batch": (dot("bmk,knb->bmn", (5, 3, 11), (11, 4, 5)), 4, 3),
    "heads": (dot("btd,dhk->bthk", (2, 3, 7), (7, 2, 5)), 3, 2),
    "two_sums": (dot("mij,ijn->mn", (3, 3, 7), (3, 7, 5)), 4, 2),
    "conv_same": (conv((1, 4, 4, 7), (3, 3, 7, 5), padding="SAME"), 4, 3),
    "conv_of_groups": (conv((1, 4, 4, 10), (3, 3, 5, 6), padding="SAME", groups=2), 3, 4),
    "depthwise": (conv((1, 4, 4, 4), (3, 3, 1, 8), groups=4, padding="SAME"), 4, 3),
    "conv_channels_first": (
        conv((1, 7, 4, 4), (5, 7, 3, 3), layouts=("NCHW", "OIHW", "NCHW")),
        3,
        2,
    ),
}


def roles(operand: Any) -> OperandAxes:
    return OperandAxes(operand.free, operand.contracted, operand.window)


def scales_of(form: Form, granularity: Granularity) -> tuple[int, ...]:
    return granularity.scale_shape(form.w, roles(axes_of(form).w), is_weight=True)


@pytest.mark.parametrize("name", FORMS)
def test_weights_in_blocks(name):
    """Simulation and integers, with zero points of blocks, per tensor and per row on the left."""
    form, rows, columns = FORMS[name]
    weight = axes_of(form).w
    scales = scales_of(form, PerBlock(rows, columns, remainder=SHORTER))
    n, groups = (shape[weight.contracted[-1]] for shape in (form.w, scales))
    assert 1 < scales[weight.free[-1]] < form.w[weight.free[-1]]
    check(form, -(-n // groups), pairs_for(form, scales))


@pytest.mark.parametrize("name", ["plain_remainder", "batched", "conv_same", "weight_left"])
def test_blocks_as_long_as_the_sum(name):
    """No scale varies along the sum: one sum, scaled by groups of columns."""
    form, _, columns = FORMS[name]
    scales = scales_of(form, PerBlock(10**6, columns, remainder=SHORTER))
    assert scales[axes_of(form).w.contracted[-1]] == 1
    check(form, 10**6, pairs_for(form, scales))


def test_blocks_of_the_activation():
    """Blocks of rows of the batch on the left, blocks of the weight on the right."""
    form, _, _ = FORMS["plain_remainder"]
    x = Operand(1, form.x, (2, 2), asymmetric=True)
    w = Operand(2, form.w, (2, 3), asymmetric=True)
    check(form, 7, [(x, w)])


def test_columns_in_another_order_would_give_other_results():
    """So the tests above can fail."""
    form, _, _ = FORMS["plain"]
    x = Operand(1, form.x, (1, 1), asymmetric=False)
    w = Operand(2, form.w, (3, 2), asymmetric=False)
    blocks = by_blocks(form, 4, x, w)
    w.scale = w.scale[:, ::-1]
    assert (blocks != by_blocks(form, 4, x, w)).any()


def test_which_axes_are_named():
    form, _, _ = FORMS["heads"]
    named = PerBlock(3, 2, axes=(0, 1), remainder=SHORTER)
    assert scales_of(form, named) == (3, 1, 5)
    assert scales_of(form, PerBlock(3, 2, remainder=SHORTER)) == (3, 2, 3)
    check(form, 3, pairs_for(form, (3, 1, 5)))


# From the plan to integers.

GRANULARITIES = {
    "group": PerGroup(4, remainder=SHORTER),
    "block": PerBlock(4, 2, remainder=SHORTER),
    "block_named": PerBlock(4, 3, axes=(-2, -1), remainder=SHORTER),
}
CASES = {
    "dense": Case(lambda p, x: x @ p["w"], {"w": normal(1, 14, 5)}, normal(2, 3, 14)),
    "transposed": Case(lambda p, x: x @ p["w"].T, {"w": normal(1, 5, 14)}, normal(2, 3, 14)),
    "heads": Case(
        lambda p, x: x @ p["w"].reshape(14, 5), {"w": normal(3, 2, 7, 5)}, normal(4, 3, 14)
    ),
    "scanned": Case(
        lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0],
        {"w": normal(5, 2, 7, 7)},
        normal(6, 3, 7),
    ),
    "flipped": Case(lambda p, x: x @ p["w"][::-1], {"w": normal(7, 14, 5)}, normal(8, 3, 14)),
    "conv": Case(
        conv((1, 4, 4, 7), (3, 3, 7, 5)).f, {"w": normal(9, 3, 3, 7, 5)}, normal(10, 1, 4, 4, 7)
    ),
}


def policy_for(granularity: Granularity, *, symmetric: bool = True) -> qj.Policy:
    weights = qj.weight_quantizer(granularity=granularity, symmetric=symmetric)
    scheme = qj.Scheme(weights=weights, activations=qj.activation_quantizer())
    return qj.Policy([qj.rule(qj.weighted(), scheme)])


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("dense", "group"),
        ("dense", "block_named"),
        ("transposed", "block"),
        ("heads", "group"),
        ("heads", "block"),
        ("scanned", "block"),
        ("flipped", "group"),
        ("flipped", "block"),
        ("conv", "block"),
        ("conv", "block_named"),
    ],
)
def test_execution_is_what_was_simulated(name, granularity):
    """A scale goes from the product to the parameter and back, through reshapes that cut groups."""
    case = CASES[name]
    plan = planned(case, policy_for(GRANULARITIES[granularity]))
    # With named axes each tap of a window has scales of its own, which no integer sum can have.
    by_tap = (name, granularity) == ("conv", "block_named")
    form = Execution.SIMULATED if by_tap else Execution.GROUPED
    assert {entry.form.execution for entry in plan.quantized} == {form}
    _, state = jax.jit(qj.observe(case.f, plan))(qj.init(plan), case.params, case.x)
    qstate = qj.calibrate(plan, state, case.params)
    simulated = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    qparams = qj.freeze(plan, qstate, case.params)
    assert_same_bits(jax.jit(qj.execute(case.f, plan))(qstate, qparams, case.x), simulated)
    weights = qj.dequantize_params(qparams)["w"]
    assert 0 < float(jnp.abs(weights - case.params["w"]).max()) < 0.05


def test_ranges_are_those_of_each_block():
    """Calibration sees every block alone, the shorter ones too."""
    case = CASES["dense"]
    plan = planned(case, policy_for(PerBlock(4, 2, remainder=SHORTER)))
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    scale = qj.calibrate(plan, state, case.params)[plan.quantized[0].site.name]["weight"].scale
    w = np.abs(np.asarray(case.params["w"]))
    want = [
        [w[row : row + 4, column : column + 2].max() / 128 for column in (0, 2, 4)]
        for row in (0, 4, 8, 12)
    ]
    np.testing.assert_array_equal(scale, np.float32(want))


def test_weights_without_a_model():
    params = {"w": normal(1, 14, 5)}
    qparams = qj.quantize_params(params, policy_for(GRANULARITIES["block_named"]))
    assert qparams["w"].qparams.scale.shape == (4, 2)
    error = jnp.abs(qparams["w"].dequantize() - params["w"])
    assert 0 < float(error.max()) < 0.05
    with pytest.raises(errors.GranularityError, match="ax"):
        qj.quantize_params(params, policy_for(PerBlock(4, 2)))


def test_a_plan_prints_its_blocks():
    plan = planned(CASES["dense"], policy_for(PerBlock(4, 2, remainder=SHORTER)))
    assert "block4x2" in str(plan)


def test_the_plan_says_which_axis_does_not_divide():
    with pytest.raises(errors.GranularityError, match="groups of 4 do not divide axis 0") as caught:
        planned(CASES["dense"], policy_for(PerBlock(4, 5)))
    assert "PerBlock(4, 5, remainder=qj.Remainder.SHORTER)" in caught.value.fix
    assert "weight" in caught.value.where


def test_axes_of_a_form():
    """What the tests above rely on: the axes of the table, not of the layout."""
    found = axes_of(FORMS["two_sums"][0])
    assert isinstance(found, Axes)
    assert found.w.contracted == (0, 1)
