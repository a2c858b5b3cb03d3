"""int8 products on CPUs: the integers of XLA's own, and weights that are read as they lie."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax.integers import cpu, lowering
from tests.integers.visiting import int8
from tests.models import Case, normal, ready

ONE_ROW = {
    "row": ((1, 12), (12, 5), (((1,), (0,)), ((), ()))),
    "column": ((5, 12), (12, 1), (((1,), (0,)), ((), ()))),
    "vector": ((12,), (12, 5), (((0,), (0,)), ((), ()))),
    "vector on the right": ((5, 12), (12,), (((1,), (0,)), ((), ()))),
    "ones around": ((1, 3, 1, 4), (4, 2, 3, 5), (((1, 3), (2, 0)), ((), ()))),
    "ones around, on the right": ((4, 2, 3, 5), (1, 3, 4, 1), (((0, 2), (2, 1)), ((), ()))),
}
OTHERS = {
    "two vectors": ((12,), (12,), (((0,), (0,)), ((), ()))),
    "rows": ((3, 12), (12, 5), (((1,), (0,)), ((), ()))),
    "batch": ((2, 1, 12), (2, 12, 5), (((2,), (1,)), ((0,), (0,)))),
    "nothing": ((1, 0), (0, 5), (((1,), (0,)), ((), ()))),
    "empty": ((1, 3), (3, 0), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("name", [*ONE_ROW, *OTHERS])
def test_a_dot_has_the_integers_of_xlas_own(name):
    left, right, numbers = {**ONE_ROW, **OTHERS}[name]
    lhs, rhs = int8(0, *left), int8(1, *right)
    got = jax.jit(lambda a, b: cpu.rows_dot(a, b, dimension_numbers=numbers))(lhs, rhs)
    want = lax.dot_general(lhs.astype(jnp.int32), rhs.astype(jnp.int32), numbers)
    assert got.shape == want.shape
    assert_array_equal(got, want)


AXES = [axes for n in (1, 2, 3) for axes in itertools.permutations(range(3), n)]


@pytest.mark.parametrize("has_batch", [False, True])
def test_sums_are_those_of_reducing(has_batch):
    codes = int8(2, 3, 4, 5)
    for axes in [(), *AXES]:
        got = lowering.sums_over(codes, axes, has_batch=has_batch)
        want = np.sum(codes, axis=axes, keepdims=True, dtype=np.int32)
        assert_array_equal(got, want)
        assert got.dtype == jnp.int32


def test_sums_of_many_codes_leave_the_range_of_int8():
    codes = jnp.full((1000, 2), -128, jnp.int8)
    assert cpu.sums_by_product(codes, (0,)).tolist() == [[-128_000, -128_000]]


def layers(p, x):
    for w in p:
        x = jax.nn.relu(x @ w)
    return x


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA compiles for CPUs")
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_frozen_weights_are_not_widened(rows):
    """All of them were, to int32 ahead of the first product: 16 times what is live here."""
    weights = [normal(seed, 128, 128) for seed in range(8)]
    case = Case(layers, weights, normal(9, rows, 128))
    plan, _, qstate = ready(case, qj.uniform_policy())
    frozen = qj.freeze(plan, qstate, weights)
    run = jax.jit(qj.execute(layers, plan)).lower(qstate, frozen, case.x).compile()
    simulated = jax.jit(qj.fake_quantize(layers, plan))(qstate, weights, case.x)
    assert_array_equal(run(qstate, frozen, case.x), simulated)
    held = run.memory_analysis().temp_size_in_bytes
    assert held < 2 * 128 * 128 + 16 * rows * 128 * 4
