"""Statistics: laws of update and merge, and an independent moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantjax import errors, statistics
from quantjax.statistics import TORCH_AVERAGING_CONSTANT, extremes

BATCHES = hnp.arrays(
    np.float32, (6, 5, 4), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)
SHAPES = [(1, 1), (1, 4), (1, 2), (5, 1)]


def observe(batches, shape, **options):
    state = statistics.init(shape, histogram_bins=None, **options)
    for batch in batches:
        state = statistics.update(state, jnp.asarray(batch))
    return state


def numpy_extremes(x, shape):
    """Minimum and maximum within each group, by explicit loops over the groups."""
    low, high = np.empty(shape, np.float32), np.empty(shape, np.float32)
    steps = [n // s for n, s in zip(x.shape, shape, strict=True)]
    for index in np.ndindex(*shape):
        part = x[tuple(slice(i * k, (i + 1) * k) for i, k in zip(index, steps, strict=True))]
        low[index], high[index] = part.min(), part.max()
    return low, high


@pytest.mark.thinned(2)
@pytest.mark.parametrize("shape", SHAPES)
@given(batches=BATCHES)
def test_extremes_are_those_of_all_values_in_any_order(shape, batches):
    state = observe(batches, shape)
    lows, highs = zip(*(numpy_extremes(batch, shape) for batch in batches), strict=True)
    np.testing.assert_array_equal(state.extremes.low, np.min(lows, axis=0))
    np.testing.assert_array_equal(state.extremes.high, np.max(highs, axis=0))
    backwards = observe(batches[::-1], shape)
    np.testing.assert_array_equal(state.extremes.low, backwards.extremes.low)
    np.testing.assert_array_equal(state.extremes.high, backwards.extremes.high)
    assert int(state.batches) == 6


@given(batches=BATCHES, cut=st.integers(0, 6))
def test_merging_two_parts_is_seeing_both(batches, cut):
    left, right = observe(batches[:cut], (1, 4)), observe(batches[cut:], (1, 4))
    merged = statistics.merge_unordered(left, right)
    whole = observe(batches, (1, 4))
    np.testing.assert_array_equal(merged.extremes.low, whole.extremes.low)
    np.testing.assert_array_equal(merged.extremes.high, whole.extremes.high)
    assert int(merged.batches) == int(whole.batches)
    assert np.all(np.isposinf(merged.moving.low))


@given(batches=BATCHES)
def test_merging_extremes_is_associative_with_identity(batches):
    a, b, c = (extremes.of_batch(jnp.asarray(batch), (1, 4)) for batch in batches[:3])
    left = extremes.merge(extremes.merge(a, b), c)
    right = extremes.merge(a, extremes.merge(b, c))
    np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(extremes.merge(extremes.init((1, 4)), a), a)


@pytest.mark.parametrize("constant", [TORCH_AVERAGING_CONSTANT, 0.5, 1.0])
def test_the_moving_average_equals_a_loop_in_float64(constant):
    batches = np.random.default_rng(0).normal(size=(20, 5, 4)).astype(np.float32)
    state = observe(batches, (1, 4), averaging_constant=constant)
    low, high = batches[0].min(0, keepdims=True), batches[0].max(0, keepdims=True)
    low, high = low.astype(np.float64), high.astype(np.float64)
    for batch in batches[1:]:
        low += np.float32(constant) * (batch.min(0, keepdims=True) - low)
        high += np.float32(constant) * (batch.max(0, keepdims=True) - high)
    np.testing.assert_allclose(state.moving.low, low, rtol=2e-6)
    np.testing.assert_allclose(state.moving.high, high, rtol=2e-6)
    assert TORCH_AVERAGING_CONSTANT == 0.01


def test_the_moving_average_depends_on_order():
    batches = np.random.default_rng(1).normal(size=(4, 5, 4)).astype(np.float32)
    forward, backward = observe(batches, (1, 1)), observe(batches[::-1], (1, 1))
    assert float(forward.moving.low[0, 0]) != float(backward.moving.low[0, 0])


def test_two_moving_averages_do_not_merge():
    batch = np.ones((2, 5, 4), np.float32)
    seen, nothing = observe(batch, (1, 1)), statistics.init((1, 1), histogram_bins=None)
    with pytest.raises(errors.StatisticsError, match="merge_unordered"):
        statistics.merge(seen, seen)
    assert statistics.merge(seen, nothing) is seen
    assert statistics.merge(nothing, seen) is seen


def test_a_merge_under_a_trace_is_refused_too():
    seen = observe(np.ones((1, 5, 4), np.float32), (1, 1))
    with pytest.raises(errors.StatisticsError):
        jax.jit(statistics.merge)(seen, seen)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4)])
def test_masked_rows_do_not_count(shape):
    x = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
    x[3:] = [[np.nan], [1e9]]
    mask = jnp.array([True, True, True, False, False])[:, None]
    masked = statistics.update(
        statistics.init(shape, histogram_bins=None), jnp.asarray(x), where=mask
    )
    kept = statistics.update(statistics.init(shape, histogram_bins=None), jnp.asarray(x[:3]))
    for got, want in zip(masked[:4], kept[:4], strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    # Sums over other shapes are other programs, with other last places.
    np.testing.assert_allclose(masked.moments, kept.moments, rtol=1e-6)


@pytest.mark.parametrize("seen", [0, 2])
def test_a_batch_without_values_changes_nothing(seen):
    state = observe(np.arange(2 * 5 * 4.0, dtype=np.float32).reshape(2, 5, 4)[:seen], (1, 4))
    nothing = statistics.update(state, jnp.ones((5, 4)), where=jnp.zeros((5, 1), bool))
    jax.tree.map(np.testing.assert_array_equal, nothing, state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad):
    x = np.ones((5, 4), np.float32)
    x[2, 1] = bad
    state = observe([x, np.ones((5, 4), np.float32)], (1, 4))
    values = np.stack([state.extremes.low, state.extremes.high])
    assert not np.isfinite(values[:, 0, 1]).all()
    assert np.isfinite(values[:, 0, [0, 2, 3]]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_statistics_are_float32_and_exact_in_every_dtype(dtype):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 4)), dtype)
    state = statistics.update(statistics.init((1, 1), histogram_bins=None), x)
    assert state.extremes.low.dtype == jnp.float32
    assert float(state.extremes.low[0, 0]) == float(np.asarray(x, np.float32).min())


def test_scan_vmap_and_jit_equal_the_loop():
    batches = np.random.default_rng(4).normal(size=(3, 7, 5, 4)).astype(np.float32)
    loops = [observe(stream, (1, 4)) for stream in batches]

    def scanned(stream):
        start = statistics.init((1, 4), histogram_bins=None)
        return jax.lax.scan(lambda s, b: (statistics.update(s, b), None), start, stream)[0]

    together = jax.jit(jax.vmap(scanned))(jnp.asarray(batches))
    for lane, loop in enumerate(loops):
        picked = jax.tree.map(lambda leaf, lane=lane: leaf[lane], together)
        np.testing.assert_array_equal(picked.extremes, loop.extremes)
        assert int(picked.batches) == 7
        np.testing.assert_allclose(picked.moving.low, loop.moving.low, rtol=1e-6)


def test_the_size_of_the_state_does_not_grow():
    few = observe(np.ones((1, 5, 4), np.float32), (1, 4))
    many = observe(np.ones((9, 5, 4), np.float32), (1, 4))
    assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)
