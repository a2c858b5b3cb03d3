"""Roundings: named functions from reals to integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as npst
from numpy.testing import assert_array_equal

from quantjax import Rounding, encode, fake_quant, integer
from quantjax.affine import QParams
from quantjax.rounding import HALF_AWAY, HALF_EVEN

BOTH = pytest.mark.parametrize("rounding", [HALF_EVEN, HALF_AWAY], ids=lambda r: r.name)
TIES = np.arange(-8, 8, dtype=np.float32) + np.float32(0.5)
# Where adding 1/2 and taking the floor goes wrong: below a half, and beyond the fraction bits.
TRAPS = np.array([0.49999997, -0.49999997, 8388607.5, 8388609.0, 16777215.0, 3e38], np.float32)


def half_away(x: np.ndarray) -> np.ndarray:
    """Ties away from zero, in float64, where ``|x| + 1/2`` of a float32 below 2^28 is exact."""
    x = np.float64(x)
    return np.where(np.abs(x) < 2.0**24, np.copysign(np.floor(np.abs(x) + 0.5), x), x)


ORACLES = {HALF_EVEN: np.rint, HALF_AWAY: half_away}


@BOTH
@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
def test_ties_and_traps(rounding, transform):
    for x in (TIES, TRAPS):
        got = transform(rounding.apply)(jnp.asarray(x))
        assert got.dtype == jnp.float32
        assert_array_equal(np.asarray(got), ORACLES[rounding](x))


@BOTH
@given(x=npst.arrays(np.float32, 16))
def test_any_float_is_rounded_as_in_float64(rounding, x):
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)  # CPU flushes those
    assert_array_equal(np.asarray(rounding.apply(jnp.asarray(x))), ORACLES[rounding](x))


@BOTH
@given(x=npst.arrays(np.float32, 16))
def test_what_is_declared_nearest_is_within_a_half(rounding, x):
    x = x[np.isfinite(x)]
    assert rounding.is_nearest
    padded = np.resize(x, 16) if x.size else np.zeros(16, np.float32)
    rounded = np.asarray(rounding.apply(jnp.asarray(padded)), np.float64)
    assert (np.abs(rounded - padded) <= 0.5).all()
    assert (rounded == np.floor(rounded)).all()


@BOTH
def test_nan_and_infinities(rounding):
    got = rounding.apply(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    assert_array_equal(got, [np.nan, np.inf, -np.inf])


def test_the_two_differ_on_half_of_the_ties():
    even, away = (np.asarray(rounding.apply(jnp.asarray(TIES))) for rounding in ORACLES)
    assert (even != away).mean() == 0.5


@BOTH
def test_quantizers_use_the_rounding_that_they_are_given(rounding):
    x = jnp.asarray(TIES) * 0.25
    want = ORACLES[rounding](TIES)
    assert_array_equal(fake_quant(x, 0.25, rounding=rounding), want * 0.25)
    qparams = QParams(jnp.float32(0.25), jnp.float32(0), jnp.float32(8))
    assert_array_equal(encode(x, qparams, integer(), rounding=rounding).codes, want)


def test_a_rounding_of_ones_own():
    down = Rounding("down", jnp.floor, is_nearest=False)
    x = jnp.array([-1.2, -0.2, 0.9, 1.0])
    assert fake_quant(x, 1.0, rounding=down).tolist() == [-2, -1, 0, 1]
    # The clipped estimator looks at the code of the same rounding.
    edge = jnp.array([127.9, 128.1])
    grad = jax.grad(lambda x: fake_quant(x, 1.0, rounding=down).sum())(edge)
    assert grad.tolist() == [1, 0]
