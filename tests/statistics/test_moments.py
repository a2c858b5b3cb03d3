"""Mean, variance and mean magnitude: those of float64, however the values come."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal

from quantjax.statistics import Moments, moments
from tests.oracles.groups import by_group

SHAPE, PARTS = (6, 8), 3
GROUPS = [(1, 1), (6, 1), (1, 4), (2, 3)]  # 3 groups along 8 have a shorter last one
tensors = npst.arrays(
    np.float32, SHAPE, elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)
)
parts = npst.arrays(np.int64, SHAPE, elements=st.integers(0, PARTS - 1))


class Seen(NamedTuple):
    """Moments and how many values they are of."""

    moments: Moments
    number: jax.Array


def nothing(groups=(1, 1)) -> Seen:
    return Seen(moments.init(groups), jnp.zeros(groups, jnp.float32))


@jax.jit
def batch(x, where, number) -> Moments:
    return moments.of_batch(x, number.shape, where, number)


@jax.jit
def merge(left: Seen, right: Seen) -> Seen:
    merged = moments.merge(left.moments, right.moments, left.number, right.number)
    return Seen(merged, left.number + right.number)


def of(x, where=True, groups=(1, 1)) -> Seen:
    where = np.broadcast_to(where, x.shape)
    number = np.empty(groups, np.float32)
    for home, kept in by_group(where, groups):
        number[home] = kept.sum()
    return Seen(batch(x, where, number), jnp.asarray(number))


def in_float64(x, where=True, groups=(1, 1)) -> Moments:
    """By NumPy, group by group; 0 of nothing."""
    found = Moments(*(np.zeros(groups) for _ in range(3)))
    pairs = zip(by_group(x, groups), by_group(np.broadcast_to(where, x.shape), groups), strict=True)
    for (home, values), (_, kept) in pairs:
        some = np.float64(values[kept])
        if some.size:
            for moment, value in zip(
                found, (some.mean(), some.var(), np.abs(some).mean()), strict=True
            ):
                moment[home] = value
    return found


def close(got: Moments, want: Moments) -> None:
    """Equal but for roundings, which are of the size of the values."""
    size = np.float64(want.magnitude)
    for moment, expected, least in zip(got, want, (size, (0.03 * size) ** 2, size), strict=True):
        assert moment.dtype == jnp.float32
        error = np.abs(np.float64(moment) - expected)
        assert (error <= 1e-5 * (np.abs(expected) + least) + 1e-36).all(), (got, want)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@given(x=tensors)
def test_moments_are_those_of_float64(groups, x):
    found = of(x, groups=groups).moments
    close(found, in_float64(x, groups=groups))
    assert (np.asarray(found.variance) >= 0).all()


@pytest.mark.parametrize("groups", [(1, 1), (2, 3)], ids=str)
@given(x=tensors, where=npst.arrays(np.bool_, SHAPE))
def test_masked_values_do_not_count(groups, x, where):
    want = in_float64(x, where, groups)
    for garbage in (np.nan, np.inf, 3e38):
        close(of(np.where(where, x, np.float32(garbage)), where, groups).moments, want)


@given(x=tensors)
def test_the_square_is_the_second_moment(x):
    want = (np.float64(x) ** 2).mean()
    assert_allclose(of(x).moments.square, [[want]], rtol=1e-5, atol=1e-36)


@pytest.mark.parametrize("groups", [(1, 1), (1, 4)], ids=str)
@given(x=tensors, part=parts, order=st.permutations(range(PARTS)))
def test_batches_and_their_order_matter_for_no_more_than_roundings(groups, x, part, order):
    seen, want = nothing(groups), in_float64(x, groups=groups)
    for k in order:
        seen = merge(seen, of(x, part == k, groups))
    close(seen.moments, want)
    a, b, c = (of(x, part == k, groups) for k in order)
    close(merge(a, merge(b, c)).moments, want)
    close(merge(b, a).moments, merge(a, b).moments)
    assert_array_equal(seen.number, of(x, groups=groups).number)


@pytest.mark.parametrize(("mean", "spread"), [(1e3, 0.1), (-1e4, 1.0), (3e6, 100.0)])
def test_a_large_mean_costs_the_variance_no_digits(mean, spread):
    noise = np.random.default_rng(0).normal(size=(20, *SHAPE))
    x = np.float32(mean + spread * noise)
    seen = nothing()
    for rows in x:
        seen = merge(seen, of(rows))
    want = np.float64(x).var()
    assert_allclose(seen.moments.variance, [[want]], rtol=1e-3)
    assert_allclose(seen.moments.mean, [[np.float64(x).mean()]], rtol=1e-6)
    # What E x² - (E x)² comes to in float32 is not even near.
    square = np.mean(x * x, dtype=np.float32) - np.mean(x, dtype=np.float32) ** 2
    assert abs(square - want) > 0.05 * want


def test_drifting_means_widen_the_variance():
    x = np.float32(np.arange(6)[:, None] * 100.0 + np.random.default_rng(1).normal(size=SHAPE))
    rows = [of(x, np.arange(6)[:, None] == k) for k in range(6)]
    seen = nothing()
    for row in rows:
        assert float(row.moments.variance[0, 0]) < 5
        seen = merge(seen, row)
    assert_allclose(seen.moments.variance, [[np.float64(x).var()]], rtol=1e-5)
    assert float(seen.moments.variance[0, 0]) > 1e4


@given(x=tensors)
def test_merging_with_nothing_changes_nothing(x):
    seen = of(x, groups=(1, 4))
    jax.tree.map(assert_array_equal, merge(seen, nothing((1, 4))), seen)
    jax.tree.map(assert_array_equal, merge(nothing((1, 4)), seen), seen)
    jax.tree.map(assert_array_equal, merge(nothing(), nothing()), nothing())
    jax.tree.map(assert_array_equal, of(x, where=False), nothing())


@given(x=tensors, numbers=st.tuples(*[st.integers(1, 2**40)] * 2))
def test_equal_moments_stay_as_they_are(x, numbers):
    seen = of(x).moments
    left, right = (jnp.full((1, 1), number, jnp.float32) for number in numbers)
    jax.tree.map(assert_array_equal, merge(Seen(seen, left), Seen(seen, right)).moments, seen)


@pytest.mark.parametrize("many", [2.0**24, 2.0**40, 2.0**63])
def test_as_many_values_as_there_are_weigh_as_much(many):
    left = Seen(
        Moments(*(jnp.full((1, 1), x, jnp.float32) for x in (1, 4, 2))), jnp.full((1, 1), many)
    )
    right = Seen(Moments(*(jnp.full((1, 1), x, jnp.float32) for x in (5, 4, 6))), 3 * left.number)
    for merged in (merge(left, right), merge(right, left)):
        assert_allclose(merged.moments.mean, [[4.0]], rtol=1e-6)
        assert_allclose(merged.moments.variance, [[4.0 + 16 * 3 / 16]], rtol=1e-6)
        assert_allclose(merged.moments.magnitude, [[5.0]], rtol=1e-6)
    one = merge(left, Seen(right.moments, jnp.ones((1, 1))))
    assert_allclose(one.moments.mean, [[1.0]], rtol=1e-6)


def test_few_values_far_away_cost_the_mean_of_many_no_digits():
    far, near = (Moments(*(jnp.full((1, 1), x, jnp.float32),) * 3) for x in (2.0**30, 1.0))
    few, many = Seen(far, jnp.ones((1, 1))), Seen(near, jnp.full((1, 1), 2.0**40))
    for merged in (merge(few, many), merge(many, few)):
        assert_allclose(merged.moments.mean, [[1 + 2.0**-10]], rtol=1e-6)
        assert_allclose(merged.moments.magnitude, [[1 + 2.0**-10]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(bad):
    x = np.ones(SHAPE, np.float32)
    x[2, 5] = bad  # in the third of four groups
    seen = merge(of(x, groups=(1, 4)), of(np.ones(SHAPE, np.float32), groups=(1, 4))).moments
    for moment, want in zip(seen, (1, 0, 1), strict=True):
        assert not np.isfinite(moment[0, 2])
        assert_array_equal(moment[0, [0, 1, 3]], np.full(3, want))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_summed_in_float32(dtype):
    x = jnp.asarray(100 + np.random.default_rng(2).normal(size=SHAPE), dtype)
    close(of(x).moments, in_float64(np.asarray(x, np.float32)))
