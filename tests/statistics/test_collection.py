"""Statistics as a whole: one update fills every field, and none of them hides anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import errors, statistics
from quantjax.statistics import Held, Statistics, as_integer
from tests.models import assert_same_bits
from tests.oracles import histograms as oracle
from tests.oracles.groups import by_group
from tests.refused import refused

SHAPE, FEW = (4, 7), 32
GROUPS = [(1, 1), (4, 1), (2, 3)]  # 3 groups along 7 have a shorter last one
tensors = npst.arrays(
    np.float32, SHAPE, elements=st.floats(-(2.0**30), 2.0**30, width=32, allow_subnormal=False)
)
masks = npst.arrays(np.bool_, SHAPE)
EVERYTHING = np.ones(SHAPE, bool)


@jax.jit
def updated(state, x, where) -> Statistics:
    return statistics.update(state, x, where=where)


merge_unordered = jax.jit(statistics.merge_unordered)


def nothing(groups=(1, 1), bins=FEW) -> Statistics:
    return statistics.init(groups, histogram_bins=bins)


def of(*batches, where=EVERYTHING, groups=(1, 1), bins=FEW) -> Statistics:
    state = nothing(groups, bins)
    for x in batches:
        state = updated(state, jnp.asarray(x), where)
    return state


def exact(state: Statistics) -> Statistics:
    """Without the moments, which are sums of rounded numbers."""
    return state._replace(moments=None)


def close(left: Statistics, right: Statistics) -> None:
    """The same bits, but for the last places of moments."""
    assert_same_bits(exact(left), exact(right))
    for got, want in zip(left.moments, right.moments, strict=True):
        assert_allclose(got, want, rtol=1e-5, atol=1e-6 * float(np.abs(want).max()))


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@given(x=tensors, where=masks)
def test_one_update_fills_every_field(groups, x, where):
    state = of(x, where=where, groups=groups)
    assert state.scale_shape == groups
    assert int(state.batches) == int(where.any())
    pairs = zip(by_group(x, groups), by_group(where, groups), strict=True)
    for (home, values), (_, kept) in pairs:
        some = values[kept]
        assert int(as_integer(state.number)[home]) == some.size
        want = oracle.histogram(some, FEW)
        assert as_integer(state.distribution.counts)[home].tolist() == want.counts
        for ends in (state.extremes, state.moving):
            assert float(ends.low[home]) == (some.min() if some.size else np.inf)
            assert float(ends.high[home]) == (some.max() if some.size else -np.inf)
        mean = np.float64(some).mean() if some.size else 0.0
        size = np.abs(np.float64(some)).mean() if some.size else 0.0
        assert abs(float(state.moments.mean[home]) - mean) <= 1e-5 * size + 1e-37
        assert_allclose(state.moments.magnitude[home], size, rtol=1e-5, atol=1e-37)


@given(batches=st.lists(tensors, min_size=3, max_size=3), where=masks)
def test_fields_agree_after_several_updates(batches, where):
    state, kept = of(*batches, where=where), np.concatenate([x[where] for x in batches])
    assert int(as_integer(state.number)[0, 0]) == kept.size
    assert int(as_integer(state.distribution.counts).sum()) == kept.size
    assert int(state.batches) == 3 * int(where.any())
    found = oracle.histogram(kept, FEW)
    assert as_integer(state.distribution.counts)[0, 0].tolist() == found.counts
    if kept.size:
        assert state.distribution.edges[0, 0, 0] <= state.extremes.low[0, 0]
        assert state.extremes.high[0, 0] <= state.distribution.edges[0, 0, -1]
        assert state.sample.weights.sum() == kept.size


# What is left out.


@pytest.mark.thinned(2)
@pytest.mark.parametrize("groups", [(1, 1), (1, 7), (1, 3)], ids=str)
@given(x=tensors, rows=st.integers(1, 3), garbage=st.sampled_from((0.0, np.nan, np.inf, -3e38)))
@settings(max_examples=20)
def test_a_filled_up_last_batch_is_the_batch_alone(groups, x, rows, garbage):
    first, filled = x[::-1].copy(), x.copy()
    filled[rows:] = garbage
    mask = np.broadcast_to(np.arange(SHAPE[0])[:, None] < rows, SHAPE)
    start = of(first, groups=groups)
    got = updated(start, filled, mask)
    want = updated(start, x[:rows], np.ones((rows, SHAPE[1]), bool))
    close(got, want)
    assert_same_bits(got.number, want.number)


@given(x=tensors, state=st.sampled_from(("empty", "seen")))
def test_an_update_without_values_is_no_batch(x, state):
    start = nothing() if state == "empty" else of(x)
    for garbage in (x, np.full(SHAPE, np.nan, np.float32)):
        assert_same_bits(updated(start, garbage, ~EVERYTHING), start)
    nobody = statistics.update(start, jnp.zeros((0, 7)))
    jax.tree.map(assert_array_equal, nobody, start)


def test_one_value_is_every_statistic():
    state = statistics.update(nothing((1,)), jnp.array([-2.5]))
    assert int(as_integer(state.number)[0]) == int(state.batches) == 1
    for value in (*state.extremes, *state.moving[:2], state.moments.mean):
        assert value.tolist() == [-2.5]
    assert state.moments.variance.tolist() == [0.0]
    assert state.moments.magnitude.tolist() == [2.5]
    assert int(as_integer(state.distribution.counts)[0, 0]) == 1
    assert float(state.distribution.edges[0, 0]) == -2.5


# What is not float32, or not finite.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@given(x=tensors)
@settings(max_examples=20)
def test_narrow_floats_are_their_float32_values(dtype, x):
    narrow = jnp.asarray(np.clip(x, -6e4, 6e4), dtype)
    assert_same_bits(of(narrow, groups=(1, 7)), of(narrow.astype(jnp.float32), groups=(1, 7)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_what_is_not_finite_stays_visible(bad, when):
    batches = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    batches[when, 2, 5] = bad
    state = of(*batches, groups=(1, 7))
    others = np.arange(7) != 5
    for ends in (state.extremes, state.moving):
        found = np.stack([ends.low, ends.high])[:, 0]
        assert np.isfinite(found[:, others]).all()
        assert not np.isfinite(found[:, 5]).all()
    extreme = {np.inf: state.extremes.high, -np.inf: state.extremes.low}.get(bad)
    if extreme is None:
        assert np.isnan(np.stack(state.extremes)[:, 0, 5]).all()
    else:
        assert float(extreme[0, 5]) == bad
    assert not np.isfinite(np.stack(state.moments)[:, 0, 5]).any()
    assert np.isfinite(np.stack(state.moments)[:, 0, others]).all()
    assert as_integer(state.number)[0].tolist() == [12] * 7
    in_bins = as_integer(state.distribution.counts).sum(-1)[0]
    assert in_bins.tolist() == [12 - (column == 5) for column in range(7)]


@pytest.mark.parametrize("groups", [(1, 1), (1, 64), (64, 1), (1, 2)], ids=str)
def test_one_nan_shows_in_a_tensor_of_any_size(groups):
    # XLA's own reduction to a minimum loses it where it takes several values at once.
    x = np.ones((64, 64), np.float32)
    for row, column in ((0, 0), (2, 3), (40, 63)):
        broken = x.copy()
        broken[row, column] = np.nan
        state = updated(nothing(groups), broken, np.ones(x.shape, bool))
        want = np.full(groups, False)
        want[row * groups[0] // 64, column * groups[1] // 64] = True
        for field in (*state.extremes, *state.moving[:2], *state.moments):
            assert_array_equal(np.isnan(field), want)


# Merging.


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@given(x=tensors, y=tensors, where=masks)
@settings(max_examples=20)
def test_shards_merge_to_what_was_seen_together(groups, x, y, where):
    left, right = of(x, where=where, groups=groups), of(y, groups=groups)
    want = updated(left, y, EVERYTHING)
    unmoved = statistics.init(groups).moving
    for merged in (merge_unordered(left, right), merge_unordered(right, left)):
        close(merged, want._replace(moving=unmoved))
    alone = merge_unordered(left, nothing(groups))
    assert_same_bits(alone, left._replace(moving=unmoved))
    assert statistics.merge(left, nothing(groups)) is left


def test_counts_have_no_limit_that_merging_reaches():
    x = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    once = state = of(x, groups=(2, 3))
    for _ in range(40):
        state = merge_unordered(state, state)
    assert as_integer(state.number).tolist() == (as_integer(once.number) * 2**40).tolist()
    counts = as_integer(state.distribution.counts)
    assert counts.tolist() == (as_integer(once.distribution.counts) * 2**40).tolist()
    assert counts.max() > 2**32
    assert_same_bits(state.extremes, once.extremes)
    assert_same_bits(state.moments, once.moments)
    # One more value still counts, and one beyond all bins moves them all.
    x[0, 0] = 1e6
    more = updated(state, x, np.arange(28).reshape(SHAPE) == 0)
    assert int((as_integer(more.number) - as_integer(state.number)).sum()) == 1
    assert int(as_integer(more.distribution.counts).sum() - counts.sum()) == 1


def test_two_moving_averages_are_refused():
    left, right = of(np.ones(SHAPE)), of(np.ones(SHAPE), np.ones(SHAPE))
    with refused(errors.StatisticsError, "after 1 and 2 batches", "merge_unordered"):
        statistics.merge(left, right)
    with refused(errors.StatisticsError, "two moving averages cannot be merged"):
        jax.jit(statistics.merge)(left, nothing())


@pytest.mark.parametrize("merge", [statistics.merge_unordered, jax.jit(statistics.merge_unordered)])
def test_other_granularities_are_refused(merge):
    with refused(errors.StatisticsError, "(1, 1) and of (1, 7)", "qj.init(plan)"):
        merge(nothing((1, 1)), nothing((1, 7)))


def test_a_histogram_and_none_are_refused():
    pair = nothing(), nothing(bins=None)
    for left, right in (pair, pair[::-1]):
        with refused(errors.StatisticsError, "one of the two holds a histogram"):
            statistics.merge_unordered(left, right)
    with refused(errors.StatisticsError, "histograms of 32 and of 64 bins"):
        statistics.merge_unordered(nothing(), nothing(bins=64))


# With the values, or with neither.


def test_values_of_one_tensor_take_in_no_other():
    x = jnp.ones(SHAPE)
    held = statistics.of_tensor(x, (1, 7), with_values=True)
    assert isinstance(held.distribution, Held)
    for attempt in (
        lambda: statistics.update(held, x),
        lambda: statistics.merge_unordered(held, held),
        lambda: statistics.merge_unordered(nothing((1, 7)), held),
    ):
        with refused(errors.StatisticsError, "hold the values of one tensor"):
            attempt()


def test_statistics_without_histogram_have_no_sample():
    x = np.random.default_rng(2).normal(size=(3, *SHAPE)).astype(np.float32)
    lean, full = of(*x, bins=None), of(*x)
    assert lean.distribution is None
    assert_same_bits(lean, full._replace(distribution=None))
    merged = statistics.merge_unordered(lean, lean)
    assert merged.distribution is None
    assert int(as_integer(merged.number)[0, 0]) == 2 * x.size
    for state in (lean, merged, statistics.of_tensor(jnp.asarray(x[0]), (1, 1), with_values=False)):
        with refused(errors.StatisticsError, "hold no histogram", "histogram_bins"):
            _ = state.sample


@pytest.mark.parametrize("with_values", [False, True])
def test_statistics_of_a_tensor_are_those_of_one_update(with_values):
    x = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    found = statistics.of_tensor(jnp.asarray(x), (2, 3), with_values=with_values)
    close(found._replace(distribution=None), of(x, groups=(2, 3), bins=None))


# Devices, as vmap with a named axis has them; test_devices.py has real ones.


def test_a_named_axis_gives_every_device_the_statistics_of_all():
    x = np.random.default_rng(4).normal(size=(5, *SHAPE)).astype(np.float32)
    where = np.random.default_rng(5).random(x.shape) < 0.6
    where[3] = False  # one of them has nothing

    def device(state, x, where):
        return statistics.update(state, x, where=where, axis_name="device")

    start = of(x[0] * 3, groups=(1, 7))
    each = jax.vmap(device, (None, 0, 0), axis_name="device")(start, x, where)
    want = updated(start, x.reshape(-1, 7), where.reshape(-1, 7))
    unmasked = jax.vmap(
        lambda state, x: statistics.update(state, x, axis_name="device"),
        (None, 0),
        axis_name="device",
    )(start, x)
    whole = updated(start, x.reshape(-1, 7), np.ones((20, 7), bool))
    for k in range(5):
        close(jax.tree.map(lambda leaf, k=k: leaf[k], each), want)
        close(jax.tree.map(lambda leaf, k=k: leaf[k], unmasked), whole)
    assert as_integer(whole.number)[0].tolist() == [24] * 7
