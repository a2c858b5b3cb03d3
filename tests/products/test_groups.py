"""Scales that vary along a sum, and live ranges: group by group, in order, bit for bit.

``out = Σ_groups float32(int64 sum) · (s_x · s_w)``, added in float32 one group after another.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.affine import QParams
from quantjax.products import Exactness
from tests.models import Case, assert_same_bits, planned
from tests.oracles.affine import float32_parameters
from tests.oracles.integers import Integers
from tests.products.forms import DOTS, Form, conv, dot, hand_made, plan_of, quantized
from tests.products.terms import PADDING, Terms, factors, product

pytestmark = pytest.mark.thinned(2)

FORMS = {
    "plain": (dot("mk,kn->mn", (3, 12), (12, 5), lambda p, x: x @ p["w"]), (0,)),
    "weight_left": (dot("km,nk->nm", (12, 3), (5, 12), lambda p, x: p["w"] @ x), (1,)),
    "batched": (dot("bmk,bkn->bmn", (2, 3, 12), (2, 12, 5)), (1,)),
    "two_axes": (dot("mij,ijn->mn", (3, 4, 6), (4, 6, 2)), (0, 1)),
    "conv_same": (conv((1, 4, 4, 6), (3, 3, 6, 4), padding="SAME"), (2,)),
    "conv_strided": (conv((2, 5, 4, 6), (2, 3, 6, 3), strides=(2, 1)), (2,)),
    "conv_of_groups": (conv((1, 4, 4, 8), (3, 3, 4, 6), padding="SAME", groups=2), (2,)),
    "conv_channels_first": (
        conv((1, 6, 4, 4), (4, 6, 3, 3), layouts=("NCHW", "OIHW", "NCHW")),
        (1,),
    ),
}


def blocks(form: Form, contracted: tuple[int, ...], size: int) -> np.ndarray:
    """Which block each term is in: runs of ``size`` along the contracted axes, flattened."""
    terms, shape = form.terms(), form.w
    position = np.zeros(shape, int)
    for axis in contracted:
        index = np.indices(shape)[axis]
        position = position * shape[axis] + index
    return (position // size).ravel()[terms.rhs]


def group_by_group(form: Form, ids: np.ndarray, x: Any, w: Any) -> np.ndarray:
    """The oracle: int64 within a block, float32 from block to block."""
    terms = form.terms()
    total = np.zeros(terms.shape, np.float32)
    for block in range(ids.max() + 1):
        part = Terms(*(column[ids == block] for column in terms[:3]), terms.shape)
        sums = product(part, x.centered, w.centered).astype(np.float32)
        total = total + sums * factors(part, x.scale, w.scale)
    return total


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", FORMS)
def test_weights_per_group(name, size):
    form, contracted = FORMS[name]
    if form.w[contracted[-1]] % size:
        size = 4
    case = form.case()
    plan = plan_of(case, qj.weight_quantizer(granularity=qj.PerGroup(size)))
    (entry,) = plan.quantized
    shape = next(o for o in entry.operands if o.is_weight).scale_shape
    assert shape[contracted[-1]] == form.w[contracted[-1]] // size
    qstate = hand_made(plan)
    x = quantized(case.x, qstate["w"]["activation"], signed=False)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
    want = group_by_group(form, blocks(form, contracted, size), x, w)
    fake = qj.fake_quantize(case.f, plan)
    assert_same_bits(jax.jit(fake)(qstate, case.params, case.x), want)
    if name in ("plain", "conv_same"):
        assert_same_bits(fake(qstate, case.params, case.x), want)


def test_groups_are_added_in_order():
    """The oracle's order matters: another one gives other bits, so the test above can fail."""
    form, contracted = FORMS["plain"]
    case = form.case()
    plan = plan_of(case, qj.weight_quantizer(granularity=qj.PerGroup(2)))
    qstate = hand_made(plan)
    x = quantized(case.x, qstate["w"]["activation"], signed=False)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
    ids = blocks(form, contracted, 2)
    forwards, backwards = (group_by_group(form, i, x, w) for i in (ids, ids.max() - ids))
    assert (forwards != backwards).any()
    np.testing.assert_allclose(forwards, backwards, rtol=1e-4)


def test_groups_of_a_window_axis_share():
    """A group lies along channels; the taps of a kernel have one scale."""
    form, _ = FORMS["conv_same"]
    plan = plan_of(form.case(), qj.weight_quantizer(granularity=qj.PerGroup(3)))
    assert next(o for o in plan.quantized[0].operands if o.is_weight).scale_shape == (1, 1, 2, 4)


def live_scheme(granularity: qj.Granularity, weights: qj.Granularity | None = None) -> qj.Policy:
    activations = qj.activation_quantizer(granularity=granularity, range=qj.RangeMode.LIVE)
    scheme = qj.Scheme(weights=qj.weight_quantizer(granularity=weights), activations=activations)
    return qj.Policy([qj.rule(qj.weighted(), scheme)])


def live_qparams(x: np.ndarray, shape: tuple[int, ...]) -> QParams:
    """Min-max of each group of entries, by the float32 formula, unsigned 8 bits."""
    split = [n for g, s in zip(shape, x.shape, strict=True) for n in (g, s // g)]
    axes = tuple(range(1, 2 * x.ndim, 2))
    low, high = (r(x.reshape(split), axis=axes) for r in (np.min, np.max))
    found = float32_parameters(low, high, Integers(8, False), symmetric=False)
    return QParams(found.scale, found.zero_point, np.float32(8))


@pytest.mark.parametrize("name", ["plain", "weight_left", "batched", "dense_general"])
def test_live_ranges_per_token(name):
    """Each row has the range that it has now; nothing was calibrated."""
    form = DOTS[name]
    case = form.case()
    plan = planned(case, live_scheme(qj.PerToken()))
    (entry,) = plan.quantized
    operand = next(o for o in entry.operands if not o.is_weight)
    shape = tuple(n if a in operand.operand.free else 1 for a, n in enumerate(form.x))
    qstate = qj.calibrate(plan, qj.init(plan), case.params)
    run = jax.jit(qj.fake_quantize(case.f, plan))
    terms = form.terms()
    for x in (case.x, 0.01 * case.x[..., ::-1]):
        left = quantized(x, live_qparams(np.asarray(x), shape), signed=False)
        right = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
        want = product(terms, left.centered, right.centered).astype(np.float32)
        want = want * factors(terms, left.scale, right.scale)
        assert_same_bits(run(qstate, case.params, x), want)


def test_live_groups_of_both_operands():
    """Activations in groups of 4, weights in groups of 6: sums in runs of 2."""
    form, contracted = FORMS["plain"]
    case = form.case()
    plan = planned(case, live_scheme(qj.PerGroup(4), qj.PerGroup(6)))
    qstate = qj.calibrate(plan, qj.init(plan), case.params)
    x = quantized(case.x, live_qparams(np.asarray(case.x), (3, 3)), signed=False)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
    assert w.scale.shape == (12, 5)
    want = group_by_group(form, blocks(form, contracted, 2), x, w)
    assert_same_bits(jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x), want)


@pytest.mark.parametrize(("groups", "size"), [(1, 2), (2, 2), (2, 4), (4, 2), (8, 4)])
def test_live_groups_of_channels_in_a_grouped_convolution(groups, size):
    """Groups of channels and the convolution's own groups need not agree."""
    form = conv((1, 4, 4, 8), (3, 3, 8 // groups, 8), padding="SAME", groups=groups)
    case = form.case()
    plan = planned(case, live_scheme(qj.PerGroup(size)))
    qstate = qj.calibrate(plan, qj.init(plan), case.params)
    shape = (1, 1, 1, 8 // size)
    x = quantized(case.x, live_qparams(np.asarray(case.x), shape), signed=False)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
    want = product(form.terms(), x.centered * np.float64(x.scale), w.centered * w.scale)
    got = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    terms = form.terms()
    assert (terms.lhs == PADDING).any()


@pytest.mark.parametrize(("size", "exact"), [(512, True), (1024, False)])
def test_groups_too_long_for_float32_say_that_their_sums_are_rounded(size, exact):
    form = dot("mk,kn->mn", (2, 2048), (2048, 2))
    weights = qj.weight_quantizer(granularity=qj.PerGroup(size))
    plan = plan_of(Case(form.f, {"w": jnp.ones(form.w)}, jnp.ones(form.x)), weights)
    sums = plan.quantized[0].sizing
    assert (sums.exactness is Exactness.EXACT) == exact
    if not exact:
        assert sums.exactness is Exactness.ROUNDED
        assert "groups have 1024" in sums.reason
        assert "rounded to float32" in " ".join(str(plan).split())
