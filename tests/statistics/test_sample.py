"""A sample stands for a distribution: the tensor itself, or weighted values of its histogram."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_array_equal

from quantjax import statistics
from quantjax.statistics import BINS, Histogram, as_integer, extremes, histogram, sample
from tests.oracles.groups import by_group

pytestmark = pytest.mark.thinned(2)

SHAPE = (4, 7)
GROUPS = [(1, 1), (4, 1), (2, 3), (1, 4), (4, 7)]  # 3 and 4 along 7 have a shorter last group
finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
of_tensor = jax.jit(lambda x, groups: sample.of_tensor(x, groups).sample, static_argnums=1)
of_histogram = jax.jit(sample.of_histogram)


@jax.jit
def seen(x: jax.Array, start: Histogram) -> Histogram:
    ends = extremes.of_batch(x, start.exponent.shape)
    return histogram.update(start, x, ends)


def histogram_of(x, groups=(1,), bins=BINS) -> Histogram:
    return seen(jnp.asarray(x, jnp.float32), histogram.init(groups, bins))


# Of a tensor.


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@given(x=npst.arrays(np.float32, SHAPE, elements=finite))
def test_it_is_every_entry_of_each_group_once(groups, x):
    found = of_tensor(x, groups)
    sizes = [-(-n // g) for n, g in zip(SHAPE, groups, strict=True)]
    assert found.values.shape == found.weights.shape == (*groups, np.prod(sizes))
    assert found.values.dtype == found.weights.dtype == jnp.float32
    for home, values in by_group(x, groups):
        weights = np.asarray(found.weights[home])
        assert set(weights.tolist()) <= {0.0, 1.0}
        assert_array_equal(found.values[home][weights == 1], values.ravel())


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@given(x=npst.arrays(np.float32, SHAPE, elements=finite), bad=npst.arrays(np.bool_, SHAPE))
def test_what_is_not_finite_has_weight_zero_and_a_finite_value(groups, x, bad):
    for value in (np.nan, np.inf, -np.inf):
        found = of_tensor(np.where(bad, np.float32(value), x), groups)
        assert np.isfinite(found.values).all()
        pairs = zip(by_group(x, groups), by_group(bad, groups), strict=True)
        for (home, values), (_, out) in pairs:
            kept = np.asarray(found.values[home])[np.asarray(found.weights[home]) == 1]
            assert_array_equal(kept, values[~out])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_their_float32_values(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), dtype)
    got, want = of_tensor(x, (2, 3)), of_tensor(x.astype(jnp.float32), (2, 3))
    assert got.values.dtype == jnp.float32
    jax.tree.map(assert_array_equal, got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_tensor_is_held_in_the_bytes_it_has_and_one_more_each(dtype):
    held = sample.of_tensor(jnp.ones(SHAPE, dtype), (2, 1))
    assert sum(leaf.nbytes for leaf in held) == jnp.ones(SHAPE, dtype).nbytes + np.prod(SHAPE)


def test_of_doubles_float32_is_held():
    with jax.enable_x64(True):
        held = sample.of_tensor(jnp.full(SHAPE, 0.1), (1, 1))
    assert held.values.dtype == jnp.float32


# Of a histogram.


@pytest.mark.parametrize("bins", [4, 64, 2048, 4096, BINS, 1 << 16])
def test_no_more_points_than_it_says(bins):
    found = of_histogram(histogram_of(np.arange(10.0), bins=bins))
    assert found.values.shape == found.weights.shape == (1, min(bins, sample.POINTS))
    assert sample.POINTS == 2048
    assert float(found.weights.sum()) == 10


@pytest.mark.parametrize("bins", [16, 4096, BINS])
@given(x=npst.arrays(np.float32, 20, elements=finite))
def test_weights_are_counts_and_values_lie_in_their_bins(bins, x):
    source = histogram_of(x, bins=bins)
    found = of_histogram(source)
    together = max(bins // sample.POINTS, 1)
    assert_array_equal(found.weights[0], as_integer(source.counts)[0].reshape(-1, together).sum(-1))
    values, edges = np.float64(found.values[0]), np.float64(source.edges[0])
    assert (edges[:-1:together] <= values).all()
    assert (values <= edges[together::together]).all()
    assert (np.diff(values) >= 0).all()
    # Each entry is stood for by a value that is no further away than its bins are wide.
    index = np.searchsorted(edges[together:-1:together], np.float64(x), side="right")
    assert (np.abs(values[index] - x) <= together * float(source.width[0])).all()
    assert_array_equal(np.bincount(index, minlength=len(values)), found.weights[0])


@pytest.mark.parametrize("bins", [16, 4096, BINS])
def test_zero_stands_for_what_begins_at_zero(bins):
    x = np.maximum(np.random.default_rng(1).normal(size=1000), 0.0)
    x[0] = 4.0
    found = of_histogram(histogram_of(x, bins=bins))
    assert float(found.values[0, 0]) == 0.0
    assert float(found.weights[0, 0]) >= (x == 0.0).sum() > 400


def test_zero_in_the_midst_is_kept_where_a_bin_begins_there():
    found = of_histogram(histogram_of([-3.0, 0.0, 0.0, 4.0], bins=16))
    at_zero = np.flatnonzero(found.values[0] == 0.0)
    assert found.weights[0, at_zero].tolist() == [2.0]


def test_values_are_spread_evenly_over_their_bins():
    source = histogram_of(np.linspace(1.0, 2.0, 4000))
    found, together = of_histogram(source), BINS // sample.POINTS
    starts = source.edges[0, :-1:together]
    places = (found.values[0] - starts) / (source.width[0] * together)
    gaps = np.diff(np.concatenate([[0.0], np.sort(places), [1.0]]))
    assert gaps.max() < 3 / sample.POINTS + 1e-3  # 1e-3 for the digits that a value near 1 has
    assert np.abs(np.diff(places)).min() > 0.3  # neighbours are at different places


@pytest.mark.parametrize("groups", [(4, 1), (2, 3)], ids=str)
def test_every_group_has_its_own(groups):
    x = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32) * [
        [1.0],
        [9.0],
        [80.0],
        [1e5],
    ]
    found = of_histogram(histogram_of(x, groups, bins=64))
    for home, values in by_group(np.float32(x), groups):
        alone = of_histogram(histogram_of(values.ravel(), bins=64))
        assert_array_equal(found.values[home], alone.values[0])
        assert_array_equal(found.weights[home], alone.weights[0])


def test_nothing_seen_has_no_weight():
    found = of_histogram(histogram.init((1, 3), 64))
    assert np.isfinite(found.values).all()
    assert_array_equal(found.weights, np.zeros((1, 3, 64)))


def test_the_largest_numbers_have_finite_values():
    x = np.array([-1.0, -0.5, 1.0], np.float32) * np.finfo(np.float32).max
    found = of_histogram(histogram_of(x))
    counted = np.asarray(found.weights[0]) > 0
    assert np.isfinite(np.asarray(found.values[0])[counted]).all()
    assert float(found.weights.sum()) == 3


# Of statistics, which hold either.


def test_statistics_offer_whichever_they_hold():
    x = jnp.asarray(np.random.default_rng(3).normal(size=SHAPE), jnp.float32)
    held = statistics.of_tensor(x, (2, 3), with_values=True)
    jax.tree.map(assert_array_equal, held.sample, of_tensor(x, (2, 3)))
    counted = statistics.update(statistics.init((2, 3), histogram_bins=64), x)
    jax.tree.map(assert_array_equal, counted.sample, of_histogram(counted.distribution))
