"""``accumulate`` against sums of products in int64, term by term."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.integers import accumulate, int8_codes, shift_of
from tests.integers.visiting import int8, kept, run, site_of
from tests.oracles.integers import spread
from tests.products.forms import CONVS, FORMS, conv, dot
from tests.products.terms import product

pytestmark = pytest.mark.thinned(3)

MORE = {
    "outer_product": dot(
        "m,n->mn", (3,), (4,), lambda p, x: lax.dot_general(x, p["w"], (((), ()), ((), ())))
    ),
    "weight_left_batched": dot(
        "bkm,bnk->bnm", (2, 7, 3), (2, 5, 7), lambda p, x: jnp.matmul(p["w"], x)
    ),
    "contracts_all": dot("bij,ij->b", (2, 3, 4), (3, 4)),
    "conv_1d_strided_dilated": conv(
        (2, 9, 3), (3, 3, 4), strides=(2,), rhs_dilation=(2,), padding=((3, 1),)
    ),
    "conv_3d_lhs_dilated": conv(
        (1, 2, 3, 2, 2), (2, 2, 2, 2, 3), lhs_dilation=(2, 1, 2), padding=((1, 1), (0, 1), (1, 0))
    ),
    "depthwise_dilated": conv(
        (2, 6, 6, 4), (3, 3, 1, 4), groups=4, rhs_dilation=(2, 2), padding=((2, 2), (2, 2))
    ),
    "grouped_strided_same": conv(
        (1, 5, 5, 4), (3, 3, 2, 6), groups=2, strides=(2, 2), padding="SAME"
    ),
    "cropped_and_dilated": conv(
        (1, 4, 4, 2), (2, 2, 2, 3), lhs_dilation=(2, 2), padding=((-1, 1), (2, -2))
    ),
    "grouped_channels_first": conv(
        (1, 4, 4, 4), (6, 2, 3, 3), groups=2, padding="SAME", layouts=("NCHW", "OIHW", "NCHW")
    ),
    "padded_only": conv((2, 3, 3, 2), (3, 3, 2, 2), padding=((2, 2), (2, 2))),
}
ALL = FORMS | MORE
ZERO_POINTS = ("absent", "tensor", "free")  # a row of the left operand, a channel of the right one


def zero_point(kind: str, seed: int, shape: tuple[int, ...], free: tuple[int, ...]) -> Any:
    """In int8's numbering, both ends among them."""
    if kind == "absent":
        return None
    return int8(seed, *kept(shape, free if kind == "free" else ())).astype(np.int32)


def centered(codes: np.ndarray, zero: Any) -> np.ndarray:
    wide = codes.astype(np.int64)
    return wide if zero is None else wide - spread(zero.astype(np.int64), codes.shape)


@pytest.mark.parametrize("name", ALL)
def test_equals_the_int64_model(name):
    """Every pair of zero points, in one program for each form."""
    form = ALL[name]
    operands = {o.key: o for o in site_of(form).operands}
    x, w = int8(1, *form.x), int8(2, *form.w)
    choices = []
    for left, right in itertools.product(ZERO_POINTS, repeat=2):
        zeros = (
            zero_point(left, 3, form.x, operands["activation"].free),
            zero_point(right, 4, form.w, operands["weight"].free),
        )
        choices.append(zeros)

    @jax.jit
    def sums(x: Any, w: Any, choices: Any) -> Any:
        found = [{"activation": (a, None), "weight": (b, None)} for a, b in choices]
        return [run(form, accumulate, x, w, one) for one in found]

    terms = form.terms()
    results = []
    for (left, right), got in zip(choices, sums(x, w, choices), strict=True):
        want = product(terms, centered(x, left), centered(w, right))
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)
        results.append(want)
    assert len({result.tobytes() for result in results}) > 3  # zero points matter


@pytest.mark.parametrize("name", ["plain", "strided", "lhs_dilated", "cropped"])
def test_eagerly(name):
    form = ALL[name]
    x, w = int8(5, *form.x), int8(6, *form.w)
    zeros = np.int32(-128).reshape((1,) * x.ndim), np.int32(127).reshape((1,) * w.ndim)
    found = {"activation": (zeros[0], None), "weight": (zeros[1], None)}
    got = run(form, accumulate, jnp.asarray(x), jnp.asarray(w), found)
    want = product(form.terms(), centered(x, zeros[0]), centered(w, zeros[1]))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", CONVS)
def test_padding_holds_the_code_of_zero(name):
    """An input that is 0 everywhere sums to 0, whatever its zero point; not so with a 0 as code."""
    form = CONVS[name]
    w = int8(7, *form.w)
    zero = np.full((1,) * len(form.x), 93, np.int32)
    found = {"activation": (jnp.asarray(zero), None), "weight": (None, None)}
    run_it = jax.jit(lambda x, w, found: run(form, accumulate, x, w, found))
    assert not np.any(run_it(jnp.full(form.x, 93, jnp.int8), w, found))


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("zero", [-128, 127])
def test_the_largest_centered_codes(code, zero):
    """255 in magnitude on both sides, where zero point and codes are at opposite ends."""
    form = FORMS["plain"]
    x, w = np.full(form.x, code, np.int8), np.full(form.w, -1 - code, np.int8)
    zeros = np.full((1, 1), zero, np.int32), np.full((1, 1), -1 - zero, np.int32)
    found = {"activation": (zeros[0], None), "weight": (zeros[1], None)}
    got = run(form, accumulate, jnp.asarray(x), jnp.asarray(w), found)
    assert np.all(np.asarray(got) == 7 * (code - zero) * (zero - code))


LONG = (1 << 17) + 1024
LONG_FORMS = {
    "dot": dot("mk,kn->mn", (2, LONG), (LONG, 2)),
    "conv": conv((1, 2, 2, LONG // 4), (2, 2, LONG // 4, 2)),
}


@pytest.mark.parametrize("form", LONG_FORMS)
def test_partial_sums_may_wrap_around(form):
    """``Σ q_x q_w`` is beyond 2^31; with zero points folded in, the result fits again."""
    form = LONG_FORMS[form]
    x, w = np.full(form.x, -128, np.int8), np.full(form.w, -128, np.int8)
    flat = x.reshape(-1)
    flat[::1009] = -125  # not all alike
    zeros = np.full((1,) * x.ndim, -127, np.int32), np.full((1,) * w.ndim, -120, np.int32)
    unfolded = np.abs(np.sum(x.reshape(-1)[:LONG].astype(np.int64) * -128))
    assert unfolded > 2**31 - 1
    run_it = jax.jit(lambda x, w, found: run(form, accumulate, x, w, found))
    got = run_it(x, w, {"activation": (zeros[0], None), "weight": (zeros[1], None)})
    left = centered(x, zeros[0])
    rows = left.reshape(-1, LONG) if got.ndim == 2 else left.reshape(1, LONG)
    want = (rows.sum(axis=1) * -8)[:, None] * np.ones(2, np.int64)
    assert 0 < np.abs(want).max() < 2**31
    np.testing.assert_array_equal(np.asarray(got).reshape(want.shape), want)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_move_into_int8_in_order(signed):
    format = qj.integer(signed=signed)
    low, high = (-128, 127) if signed else (0, 255)
    codes = jnp.arange(low, high + 1, dtype=format.storage_dtype)
    moved = int8_codes(codes, format)
    assert moved.dtype == jnp.int8
    assert moved.tolist() == list(range(-128, 128))
    assert shift_of(format) == low + 128 == (0 if signed else 128)


def test_unsigned_codes_and_zero_points_move_together():
    """255 and 0 of unsigned codes: the sums are those of ``q - z`` in the original numbering."""
    form, format = FORMS["plain"], qj.integer(signed=False)
    x = np.array([[0, 255, 128, 127, 1, 254, 200]] * 3, np.uint8)
    w = int8(8, *form.w)
    for zero in (0, 128, 255):
        moved = jnp.full((1, 1), zero - shift_of(format), jnp.int32)
        found = {"activation": (moved, None), "weight": (None, None)}
        got = run(form, accumulate, int8_codes(jnp.asarray(x), format), jnp.asarray(w), found)
        np.testing.assert_array_equal(got, (x.astype(np.int64) - zero) @ w.astype(np.int64))


def test_the_model_can_fail():
    """A zero point off by one, or a padding of 0, gives other sums."""
    form = FORMS["conv_2d_same"]
    x, w = int8(1, *form.x), int8(2, *form.w)
    terms, zero = form.terms(), np.full((1,) * 4, 90)
    want = product(terms, centered(x, zero), centered(w, None))
    assert (want != product(terms, centered(x, zero + 1), centered(w, None))).any()
    assert (want != product(terms, centered(x, zero), centered(w, None), pad=-90)).any()
