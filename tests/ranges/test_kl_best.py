"""Of the clips that a first look cannot tell apart, the one with the smallest divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantjax.ranges.kl_best import TOGETHER, best_of
from quantjax.ranges.rebin import magnitude_counts
from quantjax.statistics import of_tensor

CLIPS = 23
VALUES = st.lists(
    st.one_of(st.integers(0, 6).map(float), st.just(np.inf)), min_size=CLIPS, max_size=CLIPS
)


@jax.jit
def chosen(table, rough, enough):
    return best_of(lambda table, places: table[places], table, rough, enough)


def best(values, rough, enough):
    table, rough = jnp.asarray(values, jnp.float32), jnp.asarray(rough, jnp.float32)
    return int(chosen(table, rough, jnp.float32(enough)))


@given(VALUES, st.integers(0, 9))
def test_it_is_the_first_of_the_smallest(values, seed):
    """Where the first look is off by less than half of what it is allowed."""
    values = np.asarray(values)
    rough = values + np.random.default_rng(seed).uniform(-0.4, 0.4, CLIPS)
    want = int(np.argmin(values)) if np.isfinite(values).any() else CLIPS - 1
    assert best(values, rough, rough.min() + 0.9) == want


@given(st.integers(1, CLIPS), st.integers(0, 99))
def test_a_plateau_of_any_length_is_searched(length, seed):
    rng = np.random.default_rng(seed)
    place = rng.permutation(CLIPS)[:length]
    rough, values = np.full(CLIPS, 9.0), np.full(CLIPS, 9.0)
    rough[place], values[place] = 1.0, 1.0 + rng.integers(0, 3, length)
    assert best(values, rough, 1.5) == int(np.argmin(values))


def test_one_alone_is_not_looked_at_again():
    asked = []

    def values(nothing, places):
        jax.debug.callback(lambda p: asked.append(len(p)), places)
        return jnp.abs(places - 1).astype(jnp.float32)

    for enough, rounds in ((1.5, 0), (2.5, 1)):
        rough = jnp.asarray([3.0, 1.0, 2.0, jnp.inf, 4.0, 5.0])
        found = jax.jit(lambda r, e: best_of(values, (), r, e))(rough, jnp.float32(enough))
        jax.effects_barrier()
        assert int(found) == 1
        assert asked == [TOGETHER] * rounds


@pytest.mark.parametrize("enough", [np.inf, 0.0, np.nan])
def test_where_there_is_no_candidate_it_is_the_last(enough):
    assert best(np.zeros(CLIPS), np.full(CLIPS, np.inf), enough) == CLIPS - 1


def test_bins_of_held_tensors_hold_more_than_float32_counts():
    """One by one, float32 counts to 2^24."""
    x = jnp.zeros(2**24 + 9).at[0].set(1.0)

    @jax.jit
    def counts(x):
        group = jax.tree.map(
            lambda leaf: leaf[0] if leaf.ndim else leaf, of_tensor(x, (1,), with_values=True)
        )
        return magnitude_counts(group, 4)

    assert counts(x).tolist() == [2**24 + 8, 0.0, 0.0, 1.0]
