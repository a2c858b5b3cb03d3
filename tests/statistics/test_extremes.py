"""Unordered statistics: how batches are split, ordered, masked or merged does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import errors, statistics
from quantjax.statistics import Statistics
from tests.oracles.extremes import group_extremes

ROWS, COLUMNS = 8, 6
GROUPS = [(1, 1), (1, 6), (1, 3)]  # no axis of the batch, which may be split
tensors = npst.arrays(
    np.float32,
    (ROWS, COLUMNS),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)
GROUPINGS = pytest.mark.parametrize("groups", GROUPS, ids=str)


def collect(groups, *batches, where=None) -> Statistics:
    collected = statistics.init(groups, histogram_bins=None)
    for batch in batches:
        collected = statistics.update(collected, jnp.asarray(batch), where=where)
    return collected


def same(left: statistics.Extremes, right: statistics.Extremes) -> None:
    assert_array_equal(left.low, right.low)
    assert_array_equal(left.high, right.high)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("groups", [*GROUPS, (8, 1), (4, 2), (8, 6)], ids=str)
@given(x=tensors)
def test_extremes_are_those_of_numpy(groups, x):
    collected = collect(groups, x)
    assert collected.scale_shape == groups
    low, high = group_extremes(x, groups)
    same(collected.extremes, statistics.Extremes(low, high))
    assert collected.batches == 1


@GROUPINGS
@given(x=tensors, order=st.permutations(range(ROWS)))
def test_splits_and_order_do_not_matter(groups, x, order):
    at_once = collect(groups, x).extremes
    same(collect(groups, x[:4], x[4:]).extremes, at_once)
    one_by_one = collect(groups, *(x[i : i + 1] for i in order))
    same(one_by_one.extremes, at_once)
    assert one_by_one.batches == ROWS


@GROUPINGS
@given(x=tensors)
def test_merging_shards_is_seeing_all(groups, x):
    parts = [collect(groups, x[2 * i : 2 * i + 2]) for i in range(4)]
    merge = statistics.merge_unordered
    left = merge(merge(merge(*parts[:2]), parts[2]), parts[3])
    right = merge(parts[3], merge(parts[2], merge(parts[1], parts[0])))
    for merged in (left, right):
        same(merged.extremes, collect(groups, x).extremes)
        assert merged.batches == 4


@given(x=tensors, mask=npst.arrays(np.bool_, (ROWS, COLUMNS)))
def test_masked_entries_do_not_count(x, mask):
    garbage = np.where(mask, x, np.float32(np.nan))
    kept = collect((1, 6), garbage, where=jnp.asarray(mask))
    low = np.where(mask, x, np.inf).min(0, keepdims=True)
    high = np.where(mask, x, -np.inf).max(0, keepdims=True)
    same(kept.extremes, statistics.Extremes(low, high))
    assert kept.batches == int(mask.any())


@pytest.mark.parametrize("shape", [(8, 1), (1, 6), (1, 1)])
def test_masks_broadcast(shape):
    x = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    mask = np.arange(np.prod(shape)).reshape(shape) % 2 == 0
    full = np.broadcast_to(mask, x.shape)
    same(
        collect((1, 6), x, where=jnp.asarray(mask)).extremes,
        collect((1, 6), x, where=jnp.asarray(full)).extremes,
    )


@pytest.mark.parametrize("where", [None, jnp.zeros((ROWS, COLUMNS), bool)])
def test_batches_without_values_change_nothing(where):
    x = jnp.ones((ROWS, COLUMNS) if where is not None else (0, COLUMNS))
    before = collect((1, 6), np.arange(48, dtype=np.float32).reshape(8, 6))
    for start in (before, statistics.init((1, 6), histogram_bins=None)):
        after = statistics.update(start, x, where=where)
        jax.tree.map(assert_array_equal, after, start)


def test_nan_stays():
    x = np.ones((ROWS, COLUMNS), np.float32)
    with_nan = x.copy()
    with_nan[3, 2] = np.nan
    for batches in ((with_nan, x), (x, with_nan)):
        low, high = collect((1, 6), *batches).extremes
        assert_array_equal(np.isnan(low), [[False, False, True, False, False, False]])
        assert_array_equal(np.isnan(low), np.isnan(high))
    merged = statistics.merge_unordered(collect((1, 6), x), collect((1, 6), with_nan))
    assert np.isnan(merged.extremes.low).sum() == 1


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_value_is_a_value(value):
    x = np.ones((ROWS, COLUMNS), np.float32)
    x[3, 2] = value
    collected = collect((1, 6), x, np.zeros_like(x))
    same(
        collected.extremes,
        statistics.Extremes(
            *group_extremes(np.append(x, np.zeros((1, COLUMNS), np.float32), 0), (1, 6))
        ),
    )
    all_infinite = collect((1, 6), np.full_like(x, value))
    assert all_infinite.batches == 1
    assert (all_infinite.extremes.low == value).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_collected_in_float32(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, COLUMNS)), dtype)
    collected = collect((1, 6), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(collected)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
        jnp.dtype("uint32"),
    }
    same(collected.extremes, collect((1, 6), x.astype(jnp.float32)).extremes)


def test_scan_vmap_and_jit_collect_the_same():
    batches = jnp.asarray(
        np.random.default_rng(0).normal(size=(5, ROWS, COLUMNS)).astype(np.float32)
    )
    want = collect((1, 3), *batches)
    scanned, _ = lax.scan(
        lambda s, x: (statistics.update(s, x), None),
        statistics.init((1, 3), histogram_bins=None),
        batches,
    )
    jitted = jax.jit(lambda b: collect((1, 3), *b))(batches)
    for got in (scanned, jitted):
        same(got.extremes, want.extremes)
        assert got.batches == want.batches == 5
    # A batch axis of independent statistics: one for each layer, or each cell of a sweep.
    each = jax.vmap(statistics.update)(
        jax.vmap(lambda _: statistics.init((1, 3), histogram_bins=None))(jnp.arange(5)), batches
    )
    for i, batch in enumerate(batches):
        same(
            jax.tree.map(lambda leaf, i=i: leaf[i], each).extremes, collect((1, 3), batch).extremes
        )


@pytest.mark.parametrize("groups", [(1, 4), (5, 6), (1,), ()])
def test_shapes_that_do_not_fit_raise(groups):
    with pytest.raises(errors.GranularityError, match=r"\(8, 6\)"):
        collect(groups, np.ones((ROWS, COLUMNS), np.float32))


def test_scalars_are_tensors():
    collected = collect((), jnp.float32(2), jnp.float32(-3))
    assert collected.scale_shape == ()
    assert [float(end) for end in collected.extremes] == [-3, 2]
    masked = statistics.update(collected, jnp.float32(9), where=jnp.bool_(False))
    jax.tree.map(assert_array_equal, masked, collected)
