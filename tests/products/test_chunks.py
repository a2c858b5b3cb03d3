"""Sums longer than float32 holds exactly: cut into blocks, added in int32, still exact.

Codes of 8 bits reach 255 · 128, so 514 products may reach 2^24. The operands here are drawn near
their bounds, where summing in float32 alone is wrong.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.products import Exactness
from tests.models import Case, assert_same_bits
from tests.products.forms import Form, conv, dot, expected, hand_made, plan_of, quantized
from tests.products.terms import product

FORMS = {
    "dot": dot("mk,kn->mn", (2, 1300), (1300, 3)),
    "weight_left": dot("km,nk->nm", (1030, 2), (3, 1030), lambda p, x: p["w"] @ x),
    "batched": dot("bmk,bkn->bmn", (2, 2, 1100), (2, 1100, 2)),
    "two_axes": dot("mij,ijn->mn", (2, 40, 33), (40, 33, 2)),
    "conv": conv((1, 4, 4, 90), (3, 3, 90, 2)),
    "conv_same": conv((1, 3, 3, 120), (3, 3, 120, 2), padding="SAME"),
    "conv_grouped": conv((1, 3, 3, 180), (3, 3, 90, 4), groups=2),
    "conv_channels_first": conv((1, 100, 3, 4), (2, 100, 3, 3), layouts=("NCHW", "OIHW", "NCHW")),
}


def near_the_bounds(form: Form, seed: int = 0) -> Case:
    """Activations of 151..255 and weights of 97..127, so that sums grow instead of cancelling."""
    draw = np.random.default_rng(seed)
    x, w = draw.integers(151, 256, form.x), draw.integers(97, 128, form.w)
    return Case(form.f, {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32))


def zeroed(qstate: Any, zero_point: float) -> Any:
    """The same QParams with the activation's zero point at ``zero_point``."""
    qparams = qstate["w"]["activation"]
    moved = qparams._replace(zero_point=jnp.full_like(qparams.zero_point, zero_point))
    return {"w": {**qstate["w"], "activation": moved}}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FORMS)
def test_long_sums_are_exact_where_float32_is_not(name):
    form = FORMS[name]
    case = near_the_bounds(form)
    plan = plan_of(case)
    (entry,) = plan.quantized
    assert entry.sizing.exactness is Exactness.CHUNKED
    run = jax.jit(qj.fake_quantize(case.f, plan))

    unit = zeroed(hand_made(plan, unit=True), 0.0)
    sums = expected(form, case, unit["w"])
    assert_same_bits(run(unit, case.params, case.x), sums)
    exact = product(form.terms(), np.int64(case.x), np.int64(form.weight(case.params)))
    assert exact.max() > 2**24
    in_float = np.asarray(case.f(case.params, case.x))  # the same integers, summed in float32
    assert (np.int64(in_float) != exact).any()

    scaled = zeroed(hand_made(plan, 1), 2.0)
    assert_same_bits(run(scaled, case.params, case.x), expected(form, case, scaled["w"]))


def test_the_worst_case_of_all_fits_int32():
    """Every product at 255 · -128, as many as int32 holds."""
    k = (2**31 - 1) // (255 * 128)
    case = Case(lambda p, x: x @ p["w"], {"w": jnp.full((k, 1), -128.0)}, jnp.full((1, k), 255.0))
    plan = plan_of(case)
    assert plan.quantized[0].sizing.exactness is Exactness.CHUNKED
    qstate = zeroed(hand_made(plan, unit=True), 0.0)
    got = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    assert float(got[0, 0]) == float(np.float32(-255 * 128 * k))


@pytest.mark.parametrize("name", ["dot", "conv"])
def test_short_sums_of_a_long_product_are_exact_too(name):
    """Codes that cancel or are small may skip the blocks; the result is the same."""
    form = FORMS[name]
    case = form.case()
    plan = plan_of(case)
    run = jax.jit(qj.fake_quantize(case.f, plan))
    for qstate in (hand_made(plan, unit=True), hand_made(plan, 2)):
        assert_same_bits(run(qstate, case.params, case.x), expected(form, case, qstate["w"]))
        small = case._replace(params={"w": 0.01 * case.params["w"]})
        got = run(qstate, small.params, small.x)
        assert_same_bits(got, expected(form, small, qstate["w"]))


def test_the_block_is_as_long_as_float32_allows():
    """One more product a block and the sums would be rounded; one less would not be needed."""
    (entry,) = plan_of(near_the_bounds(FORMS["dot"])).quantized
    block = entry.sizing.block
    assert 255 * 128 * block <= 2**24 < 255 * 128 * (block + 1)


@pytest.mark.parametrize("k", [514, 515, 1028, 1029])
def test_lengths_about_a_multiple_of_the_block(k):
    form = dot("mk,kn->mn", (2, k), (k, 2))
    case = near_the_bounds(form, seed=k)
    plan = plan_of(case)
    assert (plan.quantized[0].sizing.exactness is Exactness.EXACT) == (k == 514)
    qstate = zeroed(hand_made(plan, unit=True), 0.0)
    got = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    assert_same_bits(got, expected(form, case, qstate["w"]))


@pytest.mark.parametrize("mapper", [jax.vmap, lambda f: lambda b: lax.map(f, b)])
def test_blocks_under_a_map_over_widths(mapper):
    form = FORMS["dot"]
    case = near_the_bounds(form)
    plan = plan_of(case)
    qstate = zeroed(hand_made(plan, unit=True), 0.0)

    def cell(bits: jax.Array) -> jax.Array:
        widths = jax.tree.map(lambda leaf: leaf, qstate)
        widths["w"]["weight"] = widths["w"]["weight"]._replace(bits=bits)
        return qj.fake_quantize(case.f, plan)(widths, case.params, case.x)

    eight, bypassed, again = jax.jit(mapper(cell))(jnp.array([8.0, 0.0, 8.0]))
    assert_same_bits(eight, expected(form, case, qstate["w"]))
    assert_same_bits(again, eight)
    x = quantized(case.x, qstate["w"]["activation"], signed=False)
    in_float = product(form.terms(), np.float64(x.centered), np.float64(case.params["w"]))
    np.testing.assert_allclose(bypassed, in_float, rtol=1e-6)


def test_gradients_pass_through_the_blocks():
    """They are those of one product: x gets the weight's codes, the weight those of x."""
    form = FORMS["dot"]
    case = near_the_bounds(form)
    plan = plan_of(case)
    qstate = zeroed(hand_made(plan, unit=True), 0.0)

    def total(params: Any, x: jax.Array) -> jax.Array:
        return qj.fake_quantize(case.f, plan)(qstate, params, x).sum()

    to_w, to_x = jax.jit(jax.grad(total, (0, 1)))(case.params, case.x)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True).centered
    x = quantized(case.x, qstate["w"]["activation"], signed=False).centered
    np.testing.assert_array_equal(to_x, np.tile(w.sum(axis=1), (2, 1)))
    np.testing.assert_array_equal(to_w["w"], np.tile(x.sum(axis=0)[:, None], (1, 3)))
    _, tangent = jax.jvp(lambda x: total(case.params, x), (case.x,), (jnp.ones_like(case.x),))
    assert float(tangent) == 2 * w.sum()
