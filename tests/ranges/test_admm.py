"""ADMM against its float64 model and against the least squares that it starts from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from quantjax.formats import E2M1, NF4, integer
from quantjax.ranges.admm import ADMM, admm
from quantjax.ranges.least_squares import LEAST_SQUARES
from tests.oracles import fits as oracle
from tests.oracles.integers import Integers
from tests.ranges import fitting
from tests.ranges.fitting import coarse, drawn, fitted, loss

KINDS = sorted(fitting.DRAWS)
FEW_BITS = pytest.mark.parametrize("bits", [2, 3, 4])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "laplace", "student"])
def test_it_is_the_float64_model(kind, bits, narrow):
    """A rounding can decide which codes come next, so the error is compared, and most scales."""
    x, family = drawn(kind), Integers(bits, True, narrow)
    format = integer(max_bits=8, narrow=narrow)
    scales = np.ravel(fitted(ADMM, x, bits, (12, 1), format)[0].scale)
    same = 0
    for row, got in zip(x, scales, strict=True):
        want = oracle.admm(row, family, rho=0.5, rounds=20, inner=2)
        errors = [oracle.error(row, oracle.Affine(float(s)), family) for s in (got, want)]
        same += bool(np.isclose(got, want, rtol=1e-5)) and bool(np.isclose(*errors, rtol=1e-5))
    assert same >= 11


@settings(max_examples=30)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 999), bits=st.integers(1, 8))
def test_never_worse_than_least_squares(kind, seed, bits):
    x = drawn(kind, seed)
    assert (loss(ADMM, x, bits) <= loss(LEAST_SQUARES, x, bits) * (1 + coarse(bits))).all()


@FEW_BITS
@pytest.mark.parametrize("kind", ["normal", "laplace", "student"])
def test_often_better_than_least_squares(kind, bits):
    """Rows of 16 entries: a fifth and more of them end lower, by several percent."""
    x = drawn(kind, 11, (40, 16))
    before, after = (loss(rule, x, bits, (40, 1)) for rule in (LEAST_SQUARES, ADMM))
    improved = after < before * (1 - 1e-4)
    assert improved.mean() > 0.2
    assert (1 - after[improved] / before[improved]).mean() > 0.03
    assert after.sum() < 0.99 * before.sum()


@FEW_BITS
def test_about_as_good_as_a_hundred_starts(bits):
    family, x = Integers(bits), drawn("normal", 12, (20, 128))
    found, least = loss(ADMM, x, bits, (20, 1)), []
    for row in x:
        whole = oracle.whole_range(row, family, symmetric=True).scale
        ends = [oracle.least_squares(row, family, s) for s in whole * np.linspace(0.1, 1.2, 100)]
        least.append(min(oracle.error(row, oracle.Affine(s), family) for s in ends))
    assert found.sum() < 1.01 * np.sum(least)
    assert (found > np.array(least) * (1 - 1e-5)).all()


@FEW_BITS
def test_a_penalty_of_one_gains_nothing(bits):
    """``y + λ`` is then ``w`` again, after one iteration and ever after."""
    x = drawn("laplace", 13)
    plain, stiff = (fitted(rule, x, bits)[0].scale for rule in (LEAST_SQUARES, admm(rho=1.0)))
    assert_allclose(stiff, plain, rtol=1e-5)


def test_no_iterations_leave_least_squares():
    x = drawn("normal", 14)
    got = fitted(admm(iterations=0), x, 3)[0].scale
    assert_allclose(got, fitted(LEAST_SQUARES, x, 3)[0].scale, rtol=1e-6)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("rho", "inner"), [(0.1, 1), (0.3, 2), (0.5, 5), (3.0, 2)])
def test_other_parameters_are_never_worse_either(rho, inner):
    x, rule = drawn("student", 15), admm(rho=rho, inner=inner, iterations=10)
    for bits in (2, 4):
        assert (loss(rule, x, bits) <= loss(LEAST_SQUARES, x, bits) * (1 + coarse(bits))).all()


@pytest.mark.parametrize("format", [NF4, E2M1], ids=lambda f: f.name)
def test_levels_that_are_no_integers(format):
    x = drawn("laplace", 16, (40, 16))
    before, after = (loss(r, x, 4, (40, 1), format) for r in (LEAST_SQUARES, ADMM))
    assert (after <= before * (1 + coarse(4))).all()
    assert after.sum() < 0.99 * before.sum()


def test_a_tensor_of_few_levels_is_found_exactly():
    """Least squares from the whole range misses the scale here, as ``max / 4`` is 0.75."""
    x = np.float32([[0.0, -6.0, -5.0, 9.0, -9.0, 6.0], [-2.0, -1.0, 0.0, 1.0, 0.0, 1.0]])
    qparams, y = fitted(ADMM, x, 2, (2, 1))
    assert qparams.scale[0].item() == 7.0
    assert_array_equal(y[1], x[1])
    assert_array_equal(qparams.zero_point, np.zeros((2, 1)))
