"""Counts in two words are Python's integers modulo 2^64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from quantjax.statistics import Count, as_float, as_integer, count

SIZE, ENTRIES, PLACES = 8, 24, 5
WORD, WRAP = 2**32, 2**64

# Near the ends of half words, words and float32, where a carry or a digit is lost first.
numbers = st.integers(0, WRAP - 1) | st.builds(
    lambda power, away: (2**power + away) % WRAP,
    st.sampled_from((0, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)),
    st.integers(-2, 2),
)


def lists(size, of=numbers):
    return st.lists(of, min_size=size, max_size=size)


def counted(values) -> Count:
    """Python integers in two words."""
    words = [[value % WORD for value in values], [value // WORD for value in values]]
    return Count(*(jnp.array(word, jnp.uint32) for word in words))


add, to_float = jax.jit(count.add), jax.jit(as_float)
scatter_add = jax.jit(count.scatter_add, static_argnums=2)


@given(lists(SIZE))
def test_integers_come_back_exactly(values):
    found = as_integer(counted(values))
    assert found.dtype == np.uint64
    assert found.tolist() == values


@given(lists(SIZE), lists(SIZE))
def test_the_sum_is_that_of_integers(left, right):
    found = add(counted(left), counted(right))
    assert found.low.dtype == found.high.dtype == jnp.uint32
    assert as_integer(found).tolist() == [(a + b) % WRAP for a, b in zip(left, right, strict=True)]


@given(lists(SIZE), lists(SIZE), lists(SIZE))
def test_addition_is_associative_and_commutative_and_has_an_identity(a, b, c):
    a, b, c = map(counted, (a, b, c))
    jax.tree.map(assert_array_equal, add(add(a, b), c), add(a, add(b, c)))
    jax.tree.map(assert_array_equal, add(a, b), add(b, a))
    jax.tree.map(assert_array_equal, add(a, count.zero((SIZE,))), a)


@given(st.lists(st.integers(0, WORD - 1), min_size=SIZE, max_size=SIZE))
def test_one_word_is_the_number_itself(values):
    assert as_integer(count.of(jnp.array(values, jnp.uint32))).tolist() == values


@pytest.mark.parametrize("start", [2**24 - 3, WORD - 3, 2**40 - 3])
def test_counting_by_one_goes_on_where_a_word_or_float32_ends(start):
    total, one = counted([start]), count.of(jnp.ones(1, jnp.uint32))
    for step in range(1, 7):
        total = add(total, one)
        assert as_integer(total).tolist() == [start + step]


def test_doubling_is_exact_up_to_the_last_bit():
    total = counted([3, 1])
    for step in range(1, 64):
        total = add(total, total)
        assert as_integer(total).tolist() == [3 * 2**step % WRAP, 2**step]


@given(lists(ENTRIES), lists(ENTRIES, st.integers(0, PLACES)))
def test_entries_of_one_place_are_added_up_exactly(values, places):
    found = scatter_add(counted(values), jnp.array(places, jnp.int32), PLACES)
    want = [0] * (PLACES + 1)  # the last place is none, and is dropped
    for value, place in zip(values, places, strict=True):
        want[place] = (want[place] + value) % WRAP
    assert as_integer(found).tolist() == want[:PLACES]


@pytest.mark.parametrize("value", [WORD - 1, WRAP - 1, 0xFFFF, 2**48 + WORD - 1])
def test_as_many_large_words_as_it_says_are_added_up_exactly(value):
    many = 2**16
    low, high = jnp.full(many, value % WORD, jnp.uint32), jnp.full(many, value // WORD, jnp.uint32)
    found = scatter_add(Count(low, high), jnp.ones(many, jnp.int32), 2)
    assert as_integer(found).tolist() == [0, many * value % WRAP]


@given(lists(SIZE))
def test_the_float_is_off_by_no_more_than_its_roundings(values):
    found = to_float(counted(values))
    assert found.dtype == jnp.float32
    for value, got in zip(values, np.float64(found).tolist(), strict=True):
        assert abs(got - value) <= 2.0**-23 * value


@given(lists(SIZE, st.integers(0, 2**24)), lists(SIZE, st.integers(0, 40)))
def test_the_float_is_exact_where_float32_holds_the_number(values, shifts):
    values = [value << shift for value, shift in zip(values, shifts, strict=True)]
    values = [value % WRAP for value in values]
    assert_array_equal(to_float(counted(values)), np.array(values, np.uint64).astype(np.float32))


@pytest.mark.parametrize("shape", [(), (1, 3), (2, 0)])
def test_nothing_is_zero_of_any_shape(shape):
    nothing = count.zero(shape)
    assert nothing.low.shape == nothing.high.shape == shape
    assert_array_equal(as_integer(nothing), np.zeros(shape, np.uint64))
    assert_array_equal(as_float(nothing), np.zeros(shape, np.float32))


def test_eager_and_batched_counts_are_those_under_jit():
    left = counted([WORD - 1, 2**40, 5, WRAP - 1])
    right = counted([1, WORD - 1, 2**33, 1])
    want = add(left, right)
    jax.tree.map(assert_array_equal, count.add(left, right), want)
    jax.tree.map(assert_array_equal, jax.vmap(count.add)(left, right), want)
    index = jnp.array([2, 0, 2, 1], jnp.int32)
    jax.tree.map(assert_array_equal, count.scatter_add(left, index, 3), scatter_add(left, index, 3))
