"""The moving average of ranges: PyTorch's recursion, in order, one batch after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import errors, statistics
from quantjax.statistics import TORCH_AVERAGING_CONSTANT
from tests.oracles.extremes import group_extremes, moving_average
from tests.refused import refused

BATCHES, SHAPE, GROUPS = 7, (4, 6), (1, 3)
batches_of_values = npst.arrays(
    np.float32, (BATCHES, *SHAPE), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)
)
X = np.random.default_rng(0).normal(size=(BATCHES, *SHAPE)).astype(np.float32)


def collect(batches, constant=TORCH_AVERAGING_CONSTANT, groups=GROUPS) -> statistics.Statistics:
    collected = statistics.init(groups, averaging_constant=constant, histogram_bins=None)
    for batch in batches:
        collected = statistics.update(collected, jnp.asarray(batch))
    return collected


def averages(batches, constant) -> tuple[np.ndarray, np.ndarray]:
    """The recursion in Python floats, group by group."""
    ends = np.array([group_extremes(batch, GROUPS) for batch in batches])
    result = np.empty(ends.shape[1:])
    for index in np.ndindex(result.shape):
        result[index] = moving_average([end[index] for end in ends], constant)
    return result[0], result[1]


@given(batches_of_values, st.sampled_from([TORCH_AVERAGING_CONSTANT, 0.1, 0.5, 1.0, 0.0]))
def test_the_recursion_is_that_of_a_loop_in_float64(batches, constant):
    moving = collect(batches, constant).moving
    low, high = averages(batches, constant)
    size = np.abs(batches).max() + 1e-30
    assert_allclose(moving.low, low, rtol=1e-6, atol=1e-6 * size)
    assert_allclose(moving.high, high, rtol=1e-6, atol=1e-6 * size)


def test_the_constant_is_that_of_pytorch():
    # torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.01)
    assert TORCH_AVERAGING_CONSTANT == 0.01
    moving = collect([np.full(SHAPE, 1.0), np.full(SHAPE, 2.0), np.full(SHAPE, 0.0)]).moving
    assert_allclose(moving.low, np.full(GROUPS, 1.01 * 0.99), rtol=1e-6)


def test_the_first_batch_counts_whole_and_a_constant_of_one_keeps_the_last():
    first, last = collect(X[:1]).moving, collect(X, constant=1.0).moving
    for moving, batch in ((first, X[0]), (last, X[-1])):
        low, high = group_extremes(batch, GROUPS)
        assert_allclose(moving.low, low, rtol=1e-6)
        assert_allclose(moving.high, high, rtol=1e-6)


def test_order_matters():
    forth, back = collect(X, 0.5).moving, collect(X[::-1], 0.5).moving
    assert not np.allclose(forth.low, back.low)
    assert_allclose(back.low, averages(X[::-1], 0.5)[0], rtol=1e-6)


def test_scan_and_jit_and_a_sweep_of_constants():
    def scanned(constant):
        start = statistics.init(GROUPS, averaging_constant=constant, histogram_bins=None)
        return lax.scan(lambda s, x: (statistics.update(s, x), None), start, jnp.asarray(X))[
            0
        ].moving

    constants = jnp.array([0.01, 0.3, 1.0])
    swept = jax.jit(jax.vmap(scanned))(constants)
    for i, constant in enumerate(constants):
        want = collect(X, constant).moving
        assert_allclose(swept.low[i], want.low, rtol=1e-6)
        assert_allclose(swept.high[i], want.high, rtol=1e-6)
        assert swept.constant[i] == constant


@pytest.mark.parametrize("where", [None, jnp.zeros((4, 1), bool)])
def test_batches_without_values_change_nothing(where):
    nothing = jnp.full(SHAPE if where is not None else (0, 6), jnp.nan)
    for start in (collect(X), collect(())):
        jax.tree.map(assert_array_equal, statistics.update(start, nothing, where=where), start)


def test_a_group_without_values_waits_for_its_own_first_batch():
    mask = jnp.arange(6)[None] < 4  # leaves the last of three groups out
    start = statistics.init(GROUPS, averaging_constant=0.5, histogram_bins=None)
    once = statistics.update(start, jnp.full(SHAPE, 8.0), where=mask)
    assert_array_equal(once.moving.low, [[8.0, 8.0, np.inf]])
    twice = statistics.update(once, jnp.full(SHAPE, 4.0))
    assert_array_equal(twice.moving.low, [[6.0, 6.0, 4.0]])
    assert_array_equal(twice.moving.high, [[6.0, 6.0, 4.0]])


def test_nan_stays():
    moving = collect([X[0], np.full(SHAPE, np.nan), X[1]]).moving
    assert np.isnan(moving.low).all()
    assert np.isnan(moving.high).all()


def test_bfloat16_is_averaged_in_float32():
    batches = [jnp.asarray(batch, jnp.bfloat16) for batch in X]
    moving = collect(batches).moving
    assert moving.low.dtype == moving.constant.dtype == jnp.float32
    low, _ = averages([np.asarray(batch, np.float32) for batch in batches], 0.01)
    assert_allclose(moving.low, low, rtol=1e-6)


def test_merging_with_nothing_is_the_identity():
    full, empty = collect(X), statistics.init(GROUPS, histogram_bins=None)
    for merged in (statistics.merge(full, empty), statistics.merge(empty, full)):
        jax.tree.map(assert_array_equal, merged, full)
    assert statistics.merge(empty, empty).batches == 0
    masked = statistics.update(empty, jnp.asarray(X[0]), where=jnp.zeros(SHAPE, bool))
    jax.tree.map(assert_array_equal, statistics.merge(full, masked), full)


def test_merging_two_averages_is_refused():
    left, right = collect(X[:3]), collect(X[3:])
    with pytest.raises(errors.StatisticsError, match="moving averages cannot be merged") as caught:
        statistics.merge(left, right)
    assert "3 and 4 batches" in caught.value.where
    assert "merge_unordered" in caught.value.fix
    with pytest.raises(errors.StatisticsError):
        jax.jit(statistics.merge)(left, right)
    with pytest.raises(errors.StatisticsError):
        jax.jit(lambda right: statistics.merge(left, right))(
            statistics.init(GROUPS, histogram_bins=None)
        )


def test_merging_without_order_drops_the_average_alone():
    left, right = collect(X[:3], constant=0.2), collect(X[3:])
    for merge in (statistics.merge_unordered, jax.jit(statistics.merge_unordered)):
        merged = merge(left, right)
        assert merged.batches == BATCHES
        assert_array_equal(merged.extremes.low, collect(X).extremes.low)
        assert np.isposinf(merged.moving.low).all()
        assert np.isneginf(merged.moving.high).all()
        assert merged.moving.constant == np.float32(0.2)
    # It starts anew: the next batch counts whole.
    again = statistics.update(merged, jnp.asarray(X[0]))
    assert_array_equal(again.moving.low, group_extremes(X[0], GROUPS)[0])


def test_a_constant_that_is_an_array_is_not_shared():
    """Buffers of two sites that are one could not be donated."""
    constant = jnp.float32(0.25)
    first, second = (
        statistics.init(GROUPS, averaging_constant=constant, histogram_bins=None) for _ in range(2)
    )
    update = jax.jit(lambda states, x: [statistics.update(s, x) for s in states], donate_argnums=0)
    once = update([first, second], jnp.asarray(X[0]))
    assert float(once[0].moving.constant) == float(constant) == 0.25


def test_the_first_batch_makes_no_nan_on_the_way():
    with jax.debug_nans(True):
        state, update = statistics.init(GROUPS, histogram_bins=None), jax.jit(statistics.update)
        for x in X[:2]:
            state = update(state, jnp.asarray(x))
        assert np.isfinite(state.moving.low).all()


@pytest.mark.parametrize("constant", [1.5, -3.0, float("nan")])
def test_a_traced_constant_that_is_no_weight_makes_no_range(constant):
    """Eagerly it is refused; under a trace it gave a range, and no word."""

    @jax.jit
    def averaged(constant):
        seen = statistics.init((1, 1), averaging_constant=constant, histogram_bins=None)
        for batch in (jnp.ones((4, 1)), 3.0 * jnp.ones((4, 1))):
            seen = statistics.update(seen, batch)
        return seen.moving.low, seen.moving.high

    assert np.isnan(averaged(constant)).all()
    assert np.isfinite(averaged(0.01)).all()
    with refused(errors.ArgumentError, "averaging_constant is a str"):
        statistics.init((1,), averaging_constant="a")
    with refused(errors.ArgumentError, "histogram_bins is a float"):
        statistics.init((1,), histogram_bins=8.0)
