"""The histogram: a function of the values alone, however they come."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import errors
from quantjax.statistics import BINS, Count, Extremes, Histogram, as_integer, extremes, histogram
from tests.oracles import histograms as oracle
from tests.oracles.groups import by_group
from tests.refused import refused

FEW, NUMBER, PARTS = 16, 12, 4
LARGEST = float(np.finfo(np.float32).max)
SHAPE, GROUPS = (4, 7), [(1, 1), (4, 1), (1, 7), (2, 3), (4, 7)]  # (2, 3) has a shorter last group


class Seen(NamedTuple):
    """A histogram and the extremes that go with it."""

    extremes: Extremes
    histogram: Histogram


def nothing(shape=(1,), bins=FEW) -> Seen:
    return Seen(extremes.init(shape), histogram.init(shape, bins))


def updated(seen: Seen, x, where=None) -> Seen:
    total = extremes.merge(
        seen.extremes, extremes.of_batch(x, seen.histogram.exponent.shape, where)
    )
    return Seen(total, histogram.update(seen.histogram, x, total, where))


def merged(left: Seen, right: Seen) -> Seen:
    total = extremes.merge(left.extremes, right.extremes)
    return Seen(total, histogram.merge(left.histogram, right.histogram, total))


update, merge = jax.jit(updated), jax.jit(merged)


def of(x, where=None, *, shape=(1,), bins=FEW) -> Seen:
    x = np.asarray(x, np.float32)
    return update(nothing(shape, bins), x, np.ones(x.shape, bool) if where is None else where)


def same(left, right) -> None:
    jax.tree.map(assert_array_equal, left, right)


def is_the_oracles(found: Histogram, x, where=True) -> None:
    """Counts and window of every group are those of the oracle."""
    some = np.broadcast_to(where, x.shape)
    counts = as_integer(found.counts)
    pairs = zip(by_group(x, found.exponent.shape), by_group(some, counts.shape[:-1]), strict=True)
    for (home, values), (_, kept) in pairs:
        want = oracle.histogram(values[kept], found.bins)
        assert (int(found.exponent[home]), int(found.origin[home])) == want.window
        assert counts[home].tolist() == want.counts


@st.composite
def drawn(draw, shape=(NUMBER,)):
    """Finite float32 numbers, near each other or of any magnitude, of one sign or of both."""
    kind = draw(st.sampled_from(("near", "wide", "round", "bits")))
    sign = draw(st.sampled_from(((1,), (-1,), (1, -1), (1, -1, 0))))
    top = draw(st.integers(-148, 127))
    mantissa = st.sampled_from((2**23, 2**24 - 1))
    if kind != "round":
        mantissa |= st.integers(2**23, 2**24 - 1)
    number = st.builds(
        lambda s, m, e: np.float32(s * np.ldexp(float(m), e - 23)),
        st.sampled_from(sign),
        mantissa,
        st.integers(top - (2 if kind == "near" else 60), top),
    )
    if kind == "bits":
        number = st.integers(0, 2**32 - 1).map(lambda bits: np.uint32(bits).view(np.float32))
    size = int(np.prod(shape))
    x = np.array(draw(st.lists(number, min_size=size, max_size=size)), np.float32).reshape(shape)
    return np.where(np.isfinite(x), x, np.float32(1))


parts = st.lists(st.integers(0, PARTS - 1), min_size=NUMBER, max_size=NUMBER).map(np.array)


def is_a_histogram(x, bins=FEW) -> None:
    seen = of(x, bins=bins).histogram
    is_the_oracles(seen, x)
    assert as_integer(seen.counts).sum() == x.size
    wide = oracle.edges(oracle.Window(int(seen.exponent[0]), int(seen.origin[0])), bins)
    assert_array_equal(as_integer(seen.counts)[0], np.histogram(oracle.flushed(x), wide)[0])
    assert_array_equal(seen.edges[0], np.clip(wide, -LARGEST, LARGEST))
    assert seen.edges.dtype == jnp.float32
    assert float(seen.width[0]) == 2.0 ** int(seen.exponent[0])


@given(x=drawn())
def test_counts_are_those_of_numpy_between_exact_edges(x):
    is_a_histogram(x)


ENDS = (0.0, -0.0, 1.0, 1 - 2.0**-24, 1 + 2.0**-23, 2.0**-126, 3 * 2.0**-127, 2.0**-149, LARGEST)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("high", ENDS)
@pytest.mark.parametrize("low", ENDS)
def test_counts_are_those_of_numpy_at_the_ends_of_float32(low, high):
    for left, right in ((low, high), (-low, high), (low, -high), (-low, -high)):
        for bins in (FEW, 4):
            is_a_histogram(np.float32([left] * 4 + [right] * (NUMBER - 4)), bins)


@given(x=drawn(), part=parts, order=st.permutations(range(NUMBER)))
def test_batches_and_their_order_do_not_matter(x, part, order):
    seen, shuffled = nothing(), x[order]
    for k in range(PARTS):
        seen = update(seen, shuffled, part == k)
    same(seen.histogram, of(x).histogram)
    one_by_one = nothing()
    for place in order:
        one_by_one = update(one_by_one, x, np.arange(NUMBER) == place)
    same(one_by_one.histogram, seen.histogram)


@given(x=drawn(), part=parts, data=st.data())
def test_shards_merge_in_any_tree(x, part, data):
    shards = [of(x, part == k) for k in range(PARTS)]
    while len(shards) > 1:
        left = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
        right = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
        shards.append(merge(left, right))
    same(shards[0].histogram, of(x).histogram)


@given(x=drawn(), part=parts)
def test_merging_is_associative_and_commutative_and_has_an_identity(x, part):
    a, b, c, _ = (of(x, part == k) for k in range(PARTS))
    same(merge(merge(a, b), c).histogram, merge(a, merge(b, c)).histogram)
    same(merge(a, b).histogram, merge(b, a).histogram)
    same(merge(a, nothing()).histogram, a.histogram)
    same(merge(nothing(), a).histogram, a.histogram)


@given(x=drawn(), where=npst.arrays(np.bool_, NUMBER))
def test_masked_values_do_not_count(x, where):
    for garbage in (np.nan, np.inf, -LARGEST):
        seen = of(np.where(where, x, np.float32(garbage)), where)
        is_the_oracles(seen.histogram, x, where)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@given(x=drawn(SHAPE), row=npst.arrays(np.bool_, (SHAPE[0], 1)), scales=st.permutations(range(7)))
@settings(max_examples=20)
def test_each_group_has_the_histogram_of_its_own_values(groups, x, row, scales):
    with np.errstate(over="ignore"):
        x = np.clip(x * 2.0 ** np.float32(scales), -LARGEST, LARGEST).astype(np.float32)
    is_the_oracles(of(x, np.ones(SHAPE, bool), shape=groups).histogram, x)
    is_the_oracles(of(x, np.broadcast_to(row, SHAPE), shape=groups).histogram, x, row)


def test_a_tensor_without_axes_has_a_histogram():
    one, other = (updated(nothing(()), jnp.float32(x)) for x in (-3, 5))
    found = jax.tree.map(lambda leaf: leaf[None], merged(one, other))
    same(found, of([-3, 5]))


@pytest.mark.parametrize("bins", [BINS, 4])
def test_any_number_of_bins_will_do(bins):
    x = np.random.default_rng(0).standard_t(2, 5000).astype(np.float32)
    whole, kept = of(x, bins=bins), np.arange(5000) % 3 == 0
    is_the_oracles(whole.histogram, x)
    assert bins // 4 <= np.ptp(np.flatnonzero(whole.histogram.counts.low)) + 1 <= bins
    same(merge(of(x, kept, bins=bins), of(x, ~kept, bins=bins)), whole)


# What grows.


@pytest.mark.parametrize("backwards", [False, True])
def test_no_count_is_lost_while_values_grow(backwards):
    rows = np.random.default_rng(1).uniform(-1, 1, (254, NUMBER)).astype(np.float32)
    rows = np.ldexp(rows, np.arange(-126, 128)[:, None]).astype(np.float32)

    def step(seen, x):
        after = updated(seen, x)
        return after, after.histogram.counts.low.sum()

    seen, totals = jax.jit(lambda xs: lax.scan(step, nothing(), xs))(
        rows[::-1] if backwards else rows
    )
    assert_array_equal(totals, NUMBER * np.arange(1, 255))
    is_the_oracles(seen.histogram, rows.ravel())


words = st.integers(0, 2**58)


@given(
    numbers=st.lists(words | st.sampled_from((2**32 - 1, 2**32, 2**58)), min_size=16, max_size=16),
    x=drawn(),
    scale=st.integers(0, 60),
)
def test_counts_of_any_size_move_exactly(numbers, x, scale):
    assume(np.abs(x).max() < 2.0**60)
    seen = of(x)
    old = oracle.histogram(x, FEW).window
    filled = [n if seen.histogram.counts.low[0, i] else 0 for i, n in enumerate(numbers)]
    low, high = ([[n >> shift & 0xFFFFFFFF for n in filled]] for shift in (0, 32))
    big = Count(jnp.array(low, jnp.uint32), jnp.array(high, jnp.uint32))
    wide = of(np.ldexp(x, scale))
    total = merge(seen._replace(histogram=seen.histogram._replace(counts=big)), wide)
    new = oracle.histogram(np.concatenate([x, np.ldexp(x, scale)]), FEW).window
    assert (int(total.histogram.exponent[0]), int(total.histogram.origin[0])) == new
    once = oracle.histogram(np.ldexp(x, scale), FEW)
    want = zip(
        oracle.moved(filled, old, new), oracle.moved(once.counts, once.window, new), strict=True
    )
    assert as_integer(total.histogram.counts)[0].tolist() == [a + b for a, b in want]


def test_its_size_is_constant_and_as_told():
    for shape, bins in (((), 4), ((1, 1), BINS), ((3, 2), 64)):
        seen = histogram.init(shape, bins)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(seen)) == histogram.memory(shape, bins)
    grown = merge(of(np.ones(NUMBER)), of(np.full(NUMBER, -1e30)))
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, nothing())


# What is not finite.


@pytest.mark.parametrize(
    "bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, np.inf]]
)
@given(x=drawn(), order=st.permutations(range(NUMBER)))
@settings(max_examples=10)
def test_nan_and_infinity_are_in_no_bin(bad, x, order):
    x[: len(bad)] = bad
    at_once = of(x).histogram
    assert as_integer(at_once.counts).sum() == NUMBER - len(bad)
    is_the_oracles(at_once, x)
    first, rest = (np.isin(np.arange(NUMBER), half) for half in (order[:6], order[6:]))
    same(update(of(x, first), x, rest).histogram, at_once)
    same(merge(of(x, first), of(x, rest)).histogram, at_once)
    assert np.isfinite(at_once.edges).all()


# How it is run.


def test_eager_scan_and_vmap_are_jit():
    x = np.random.default_rng(2).normal(size=(3, 5, *SHAPE)).astype(np.float32)
    x *= np.exp(np.random.default_rng(3).normal(size=(3, 5, 1, 1)) * 4).astype(np.float32)
    where = np.random.default_rng(4).random(x.shape) < 0.7
    loops = []
    for stream, masks in zip(x, where, strict=True):
        seen = nothing((1, 7))
        for batch, mask in zip(stream, masks, strict=True):
            seen = update(seen, batch, mask)
        loops.append(seen)
    eager = updated(
        updated(nothing((1, 7)), jnp.asarray(x[0, 0]), where[0, 0]), x[0, 1], where[0, 1]
    )
    same(eager, update(of(x[0, 0], where[0, 0], shape=(1, 7)), x[0, 1], where[0, 1]))
    same(merged(loops[0], eager), merge(loops[0], eager))

    def scanned(stream, masks):
        return lax.scan(
            lambda seen, b: (updated(seen, *b), None), nothing((1, 7)), (stream, masks)
        )[0]

    together = jax.jit(jax.vmap(scanned))(x, where)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *loops)
    same(together, stacked)
    pairs = jax.vmap(merged)(together, jax.tree.map(lambda leaf: leaf[::-1], together))
    same(pairs, jax.tree.map(lambda *p: np.stack(p), *map(merge, loops, loops[::-1])))


# What is refused.


@pytest.mark.parametrize("bins", [0, 1, 2, 3, 100, BINS - 1, 2 * histogram.MAX_BINS, -8])
def test_only_powers_of_two_are_numbers_of_bins(bins):
    with refused(errors.StatisticsError, f"a histogram of {bins} bins", "a power of two from 4"):
        histogram.init((1,), bins)


def test_other_numbers_of_bins_do_not_merge():
    with refused(errors.StatisticsError, "histograms of 16 and of 32 bins"):
        merged(nothing(bins=16), nothing(bins=32))
