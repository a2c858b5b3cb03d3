"""Alternating least squares against its float64 model, XNOR-Net's scale and its own conditions."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import formats
from quantjax.formats import integer
from quantjax.ranges.least_squares import LEAST_SQUARES, least_squares
from quantjax.ranges.xnor import XNOR
from tests.oracles import fits as oracle
from tests.oracles.integers import Integers
from tests.ranges import fitting
from tests.ranges.fitting import drawn, fitted, loss

FAMILIES = [Integers(b, True, n) for b in (1, 2, 3, 4, 8) for n in (False, True)]
FAMILIES += [Integers(b, False) for b in (1, 2, 4)]
ANY_KIND = pytest.mark.parametrize("kind", fitting.DRAWS)


def container(family: Integers):
    return integer(max_bits=8, signed=family.signed, narrow=family.narrow)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@ANY_KIND
def test_it_is_the_float64_model(kind, family):
    x = drawn(kind)
    scale = np.ravel(fitted(LEAST_SQUARES, x, family.bits, (12, 1), container(family))[0].scale)
    for row, got in zip(x, scale, strict=True):
        start = oracle.whole_range(row, family, symmetric=True).scale
        want = oracle.least_squares(row, family, start)
        assert_allclose(got, want, rtol=2e-6)


@pytest.mark.thinned(3)
@ANY_KIND
@pytest.mark.parametrize("groups", fitting.GROUPS)
def test_one_signed_bit_has_the_scale_of_xnor(kind, groups):
    x, one = drawn(kind, 1), jnp.float32(1)
    got = fitted(LEAST_SQUARES, x, 1, groups)[0]
    want = XNOR.fit(jnp.asarray(x), groups, fitting.INTEGERS, one)
    assert_allclose(got.scale, want.scale, rtol=1e-6)
    assert_array_equal(got.zero_point, want.zero_point)


@ANY_KIND
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_neither_codes_nor_scale_can_move(kind, bits):
    """The conditions of a fixed point: the scale is best for its codes, which are its own."""
    x, family = drawn(kind, 2), Integers(bits)
    qparams, y = fitted(LEAST_SQUARES, x, bits)
    for row, out, scale in zip(x, y, np.ravel(qparams.scale), strict=True):
        codes = oracle.centered(row, oracle.Affine(float(scale)), family)
        assert_allclose(np.float64(out), codes * np.float64(scale), rtol=1e-6)
        assert_allclose(scale, oracle.closed_form(np.float64(row), codes, 0.0), rtol=2e-6)
        for factor in (0.999, 1.001):  # and with those codes, every other one is worse
            other = ((row - codes * np.float64(scale) * factor) ** 2).sum()
            assert other > ((row - codes * np.float64(scale)) ** 2).sum() * (1 - 1e-9)


@ANY_KIND
def test_the_error_never_rises_with_iterations(kind):
    x = drawn(kind, 3)
    found = [loss(least_squares(iterations=n), x, 3) for n in (0, 1, 2, 5, 100)]
    for before, after in itertools.pairwise(found):
        assert (after <= before * (1 + 2e-6)).all()
    assert found[-1].sum() < found[0].sum()


def test_one_iteration_by_hand():
    x = np.float32([[0.0, -6.0, -5.0, 9.0, -9.0, 6.0]])  # codes 0 -1 -1 1 -2 1 at the scale 4.5
    got = [fitted(least_squares(iterations=n), x, 2, (1, 1))[0].scale.item() for n in (0, 1)]
    assert_allclose(got, [4.5, (6 + 5 + 9 + 18 + 6) / (1 + 1 + 1 + 4 + 1)])


def test_ternary_weights_are_fitted_in_threshold_and_scale():
    """With the threshold at half the scale, codes are the nearest ones and both converge."""
    x = drawn("normal", 4, (1, 4096))
    qparams, y = fitted(LEAST_SQUARES, x, 2, (1, 1), formats.TERNARY)
    # The best ternary quantizer of a normal variable: levels ±1.224, error 0.1902 (Max, Quantizing
    # for minimum distortion, 1960, for 3 levels).
    assert_allclose(qparams.scale.item(), 1.224, rtol=0.03)
    assert_allclose(((x - y) ** 2).mean() / x.var(), 0.1902, rtol=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_large_groups_reach_the_best_uniform_quantizer_of_a_normal_variable(bits):
    """Max's step and error for an even number of levels are for mid-rise codes; these have a zero,
    and one level fewer above it, so that the error lies between those of ``2^b ∓ 1`` levels."""
    x = drawn("normal", 5, (1, 8192))
    between = {2: (0.1902, 0.0824), 3: (0.0440, 0.0296), 4: (0.01313, 0.0104)}[bits]
    error = loss(LEAST_SQUARES, x, bits, (1, 1)).item() / (x.size * x.var())
    assert between[1] * 0.95 < error < between[0] * 1.05


def test_levels_whose_squares_leave_float32_keep_the_start():
    x = drawn("normal", 6)
    huge = formats.minifloat(7, 8)
    got = fitted(LEAST_SQUARES, x, 16, (12, 1), huge)[0].scale
    start = fitted(least_squares(iterations=0), x, 16, (12, 1), huge)[0].scale
    assert_array_equal(got, start)
    assert np.isfinite(got).all()
