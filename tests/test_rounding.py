"""Roundings: named functions from reals to integers; the random one has a file of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as npst
from numpy.testing import assert_array_equal

from quantjax import Rounding, encode, errors, fake_quant, integer
from quantjax.affine import QParams
from quantjax.rounding import CEIL, FLOOR, HALF_AWAY, HALF_EVEN, ROUNDINGS, STOCHASTIC

TIES = np.arange(-8, 8, dtype=np.float32) + np.float32(0.5)
# Where adding 1/2 and taking the floor goes wrong: below a half, and beyond the fraction bits.
TRAPS = np.array([0.49999997, -0.49999997, 8388607.5, 8388609.0, 16777215.0, 3e38], np.float32)


def half_away(x: np.ndarray) -> np.ndarray:
    """Ties away from zero, in float64, where ``|x| + 1/2`` of a float32 below 2^28 is exact."""
    x = np.float64(x)
    return np.where(np.abs(x) < 2.0**24, np.copysign(np.floor(np.abs(x) + 0.5), x), x)


ORACLES = {HALF_EVEN: np.rint, HALF_AWAY: half_away, FLOOR: np.floor, CEIL: np.ceil}
EACH = pytest.mark.parametrize("rounding", ORACLES, ids=lambda r: r.name)
NEAREST = pytest.mark.parametrize("rounding", [HALF_EVEN, HALF_AWAY], ids=lambda r: r.name)
DIRECTED = pytest.mark.parametrize("rounding", [FLOOR, CEIL], ids=lambda r: r.name)


@EACH
@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
def test_ties_and_traps(rounding, transform):
    for x in (TIES, TRAPS):
        got = transform(rounding.apply)(jnp.asarray(x))
        assert got.dtype == jnp.float32
        assert_array_equal(np.asarray(got), ORACLES[rounding](x))


@EACH
@given(x=npst.arrays(np.float32, 16))
def test_any_float_is_rounded_as_in_float64(rounding, x):
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)  # CPU flushes those
    assert_array_equal(np.asarray(rounding.apply(jnp.asarray(x))), ORACLES[rounding](x))


def distances(rounding: Rounding, x: np.ndarray) -> np.ndarray:
    """Rounded value minus value, in float64; what is not finite counts as 0."""
    x = np.where(np.isfinite(x), x, np.float32(0))
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    rounded = np.asarray(rounding.apply(jnp.asarray(x)), np.float64)
    assert (rounded == np.floor(rounded)).all()
    return rounded - x


@NEAREST
@given(x=npst.arrays(np.float32, 16))
def test_what_is_declared_nearest_is_within_a_half(rounding, x):
    assert rounding.is_nearest
    assert (np.abs(distances(rounding, x)) <= 0.5).all()


@DIRECTED
@given(x=npst.arrays(np.float32, 16))
def test_the_directed_ones_go_one_way_and_less_than_one_step(rounding, x):
    way = {FLOOR: -1.0, CEIL: 1.0}[rounding] * distances(rounding, x)
    # A whole step only where the float64 difference of 1 and a tiny value is rounded.
    assert (way >= 0).all()
    assert (way <= 1).all()


@DIRECTED
def test_the_directed_ones_are_not_nearest(rounding):
    assert not rounding.is_nearest
    assert np.abs(distances(rounding, np.array([0.25, 0.75], np.float32))).max() == 0.75


@given(x=npst.arrays(np.float32, 16))
def test_ceil_mirrors_floor(x):
    x = jnp.asarray(np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x))
    assert_array_equal(CEIL.apply(x), -FLOOR.apply(-x))


@EACH
def test_nan_and_infinities(rounding):
    got = rounding.apply(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    assert_array_equal(got, [np.nan, np.inf, -np.inf])


def test_the_two_differ_on_half_of_the_ties():
    even, away = (np.asarray(r.apply(jnp.asarray(TIES))) for r in (HALF_EVEN, HALF_AWAY))
    assert (even != away).mean() == 0.5


@EACH
def test_quantizers_use_the_rounding_that_they_are_given(rounding):
    x = jnp.asarray(TIES) * 0.25
    want = ORACLES[rounding](TIES)
    assert_array_equal(fake_quant(x, 0.25, rounding=rounding), want * 0.25)
    qparams = QParams(jnp.float32(0.25), jnp.float32(0), jnp.float32(8))
    assert_array_equal(encode(x, qparams, integer(), rounding=rounding).codes, want)


def test_a_rounding_of_ones_own():
    inwards = Rounding("inwards", jnp.trunc, is_nearest=False)
    x = jnp.array([-1.2, -0.2, 0.9, 1.0])
    assert fake_quant(x, 1.0, rounding=inwards).tolist() == [-1, 0, 0, 1]
    # The clipped estimator looks at the code of the same rounding.
    edge = jnp.array([127.9, 128.1])
    grad = jax.grad(lambda x: fake_quant(x, 1.0, rounding=inwards).sum())(edge)
    assert grad.tolist() == [1, 0]


def test_all_of_them():
    assert set(ROUNDINGS) == {*ORACLES, STOCHASTIC}
    assert len({rounding.name for rounding in ROUNDINGS}) == len(ROUNDINGS) == 5
    assert [r for r in ROUNDINGS if r.is_random] == [STOCHASTIC]
    assert [r for r in ROUNDINGS if r.is_nearest] == [HALF_EVEN, HALF_AWAY]


@EACH
def test_what_is_not_random_has_no_noise(rounding):
    assert rounding.noise(None, (3,)) is None
    assert rounding.noise(jax.random.key(0), (3,)) is None
    assert rounding.given(None) is rounding
    assert rounding.given(jnp.zeros(3)) is rounding


def test_what_is_random_needs_a_key():
    noise = STOCHASTIC.noise(None, (3,))
    assert noise is None
    with pytest.raises(errors.KeyMissingError, match="stochastic is random") as caught:
        STOCHASTIC.given(noise)
    assert isinstance(caught.value, ValueError)
    key = eval(caught.value.fix.removeprefix("key="), {"jax": jax})  # the suggested edit works
    assert STOCHASTIC.given(STOCHASTIC.noise(key, (3,))).apply(jnp.zeros(3)).tolist() == [0, 0, 0]


def test_given_noise_decides():
    x, noise = jnp.full(4, 2.5), jnp.array([0.0, 0.49, 0.5, 0.99])
    given = STOCHASTIC.given(noise)
    assert given.apply(x).tolist() == [3, 3, 2, 2]
    assert given.apply(-x).tolist() == [-2, -2, -3, -3]
    # Filled in, it is as any other: it needs no more noise, and refuses none.
    assert given.name == STOCHASTIC.name
    assert not given.is_random
    assert given.given(None) is given
    assert given.noise(jax.random.key(0), (4,)) is None
    assert STOCHASTIC.is_random
