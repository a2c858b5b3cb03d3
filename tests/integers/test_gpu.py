"""The forms that GPUs take, against sums in int64; they run on any backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax import errors
from quantjax.integers import accumulate, gpu, lowering
from quantjax.interpreter import Op
from tests.integers.test_accumulate import ALL
from tests.integers.visiting import equations, int8, run
from tests.products.terms import product

pytestmark = pytest.mark.thinned(2)

SQUARE = (((1,), (0,)), ((), ()))
RAGGED = ((7, 5), (3, 5, 4)), ((40, 33), (2, 33, 6)), ((6, 64), (2, 64, 3))


def zeros(shape: tuple[int, ...], value: int | None) -> jax.Array | None:
    return None if value is None else jnp.full((1,) * len(shape), value, jnp.int32)


@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", ALL)
def test_sums_are_those_of_int64(name, with_zeros, monkeypatch):
    form = ALL[name]
    x, w = int8(1, *form.x), int8(2, *form.w)
    left, right = (5, -3) if with_zeros else (None, None)
    found = {"activation": (zeros(form.x, left), None), "weight": (zeros(form.w, right), None)}
    centered = [side.astype(np.int64) - (zero or 0) for side, zero in ((x, left), (w, right))]
    want = product(form.terms(), *centered)
    monkeypatch.setitem(lowering.TABLE, jax.default_backend(), lowering.GPU)
    monkeypatch.delitem(lowering.SUMS, jax.default_backend(), raising=False)
    got = jax.jit(lambda x, w: run(form, accumulate, x, w, found))(x, w)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ALL)
def test_all_sizes_of_dots_are_filled_up_and_no_convolution_is_left(name, monkeypatch):
    form = ALL[name]
    monkeypatch.setitem(lowering.TABLE, jax.default_backend(), lowering.GPU)
    monkeypatch.delitem(lowering.SUMS, jax.default_backend(), raising=False)
    found: dict[str, Any] = {"activation": (None, None), "weight": (zeros(form.w, 1), None)}
    jaxpr = jax.make_jaxpr(lambda x, w: run(form, accumulate, x, w, found))(
        jnp.zeros(form.x, jnp.int8), jnp.zeros(form.w, jnp.int8)
    ).jaxpr
    for eqn in equations(jaxpr):
        assert eqn.primitive.name != "conv_general_dilated"
        if eqn.primitive.name == "dot_general":
            for operand in eqn.invars:
                _, rows, terms = operand.aval.shape
                assert rows > 0 == rows % gpu.ROWS
                assert terms > 0 == terms % gpu.TERMS


@pytest.mark.parametrize(("x", "w"), RAGGED)
def test_ragged_sums_are_those_of_int64(x, w):
    sizes = jnp.asarray([x[0] - 2, *[1] * (w[0] - 1)], jnp.int32)
    operands = int8(3, *x), int8(4, *w)
    got = lowering.GPU[Op.RAGGED](*operands, group_sizes=sizes)
    left, right = (side.astype(np.int64) for side in operands)
    groups = np.repeat(np.arange(w[0]), sizes)
    want = np.einsum("mk,mkn->mn", left[: len(groups)], right[groups])
    np.testing.assert_array_equal(got[: len(groups)], want)


def test_sums_beyond_float32():
    """A thousand largest products and one more: no float32 holds their sum."""
    x = jnp.full((2, 1041), 127, jnp.int8).at[1, -1].set(1)
    w = jnp.full((1041, 3), 127, jnp.int8).at[-1].set(1)
    got = gpu.filled_dot(x, w, dimension_numbers=(((1,), (0,)), ((), ())))
    np.testing.assert_array_equal(got[:, 0], [1040 * 127 * 127 + 127, 1040 * 127 * 127 + 1])


@pytest.mark.parametrize(("size", "window"), [(2, 3), (2, 5), (1, 3)])
def test_an_input_smaller_than_the_window_has_no_output(size, window):
    x, w = int8(0, 1, size, size, 1), int8(1, window, window, 1, 2)
    numbers = jax.lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))
    got = lowering.gpu_conv(
        x,
        w,
        window_strides=(1, 1),
        padding=((0, 0), (0, 0)),
        lhs_dilation=(1, 1),
        rhs_dilation=(1, 1),
        dimension_numbers=numbers,
        feature_group_count=1,
    )
    assert got.shape == (1, 0, 0, 2)


@pytest.fixture
def unchecked():
    gpu.check_products.cache_clear()
    yield
    gpu.check_products.cache_clear()


@pytest.mark.usefixtures("unchecked")
def test_products_that_come_out_doubled_are_an_error_and_not_a_number(monkeypatch):
    right = gpu.filled_dot
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "filled_dot", lambda *a, **numbers: 2 * right(*a, **numbers))
    with pytest.raises(errors.BackendError, match="came out as 2 instead of 1"):
        jax.jit(lambda x: lowering.lowering(Op.DOT)(x, x, dimension_numbers=SQUARE))(int8(0, 2, 2))


@pytest.mark.usefixtures("unchecked")
def test_products_that_come_out_right_are_checked_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = int8(0, 2, 2)
    got = jax.jit(lambda x: lowering.lowering(Op.DOT)(x, x, dimension_numbers=SQUARE))(x)
    np.testing.assert_array_equal(got, x.astype(np.int32) @ x.astype(np.int32))
    lowering.lowering(Op.CONV)
    assert gpu.check_products.cache_info().misses == 1
