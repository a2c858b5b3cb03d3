"""Rotations, causal attention with shared key heads, and the float cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.attention import (
    FLOAT_CACHE,
    Cache,
    attend,
    attend_with_cache,
    check_tokens,
    empty_cache,
    rotate,
    rotations,
)
from experiments.models.errors import ModelShapeError
from tests.experiments.models.oracles import softmax, turned
from tests.models import normal

POSITIONS = jnp.arange(5)
QUERY, KEYS, VALUES = normal(1, 2, 5, 4, 6), normal(2, 2, 5, 2, 6), normal(3, 2, 5, 2, 6)


def test_rotations_keep_lengths():
    x = normal(0, 2, 5, 3, 6)
    lengths = [np.linalg.norm(np.asarray(a), axis=-1) for a in (x, rotate(x, POSITIONS, 1e4))]
    np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-6)


def test_position_0_is_not_turned():
    x = normal(0, 2, 1, 3, 6)
    np.testing.assert_array_equal(rotate(x, jnp.array([0]), 1e4), x)


def test_a_product_depends_on_the_distance_of_positions_alone():
    query, key = normal(4, 1, 1, 1, 8), normal(5, 1, 1, 1, 8)

    def product(at: int, other: int) -> jax.Array:
        return jnp.sum(
            rotate(query, jnp.array([at]), 100.0) * rotate(key, jnp.array([other]), 100.0)
        )

    np.testing.assert_allclose(product(7, 3), product(24, 20), rtol=2e-5)
    assert abs(product(7, 3) - product(7, 4)) > 0.1


def test_rotations_are_those_of_complex_numbers():
    x = normal(0, 2, 5, 3, 6)
    expected = [
        [[turned(np.float64(x[b, t, h]), 2 * t + 1, 1e4) for h in range(3)] for t in range(5)]
        for b in range(2)
    ]
    np.testing.assert_allclose(rotate(x, 2 * POSITIONS + 1, 1e4), expected, atol=1e-5)


def test_tables_are_of_the_right_angles():
    cos, sin = rotations(jnp.array([0, 511]), 8, 1e4)
    angles = 511 * 1e4 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(cos[1], np.cos(angles), atol=5e-5)
    np.testing.assert_allclose(sin[1], np.sin(angles), atol=5e-5)
    assert (cos[0] == 1).all()
    assert (sin[0] == 0).all()


def test_attention_is_softmax_over_what_came_before():
    q, k, v = (np.asarray(a, np.float64) for a in (QUERY, KEYS, VALUES))
    expected = np.zeros_like(q)
    for b, t, h in np.ndindex(2, 5, 4):
        scores = k[b, : t + 1, h // 2] @ q[b, t, h] / np.sqrt(6)
        expected[b, t, h] = softmax(scores) @ v[b, : t + 1, h // 2]
    np.testing.assert_allclose(attend(QUERY, KEYS, VALUES, POSITIONS), expected, atol=1e-6)


def test_the_first_token_sees_itself_alone():
    out = attend(QUERY, KEYS, VALUES, POSITIONS)
    np.testing.assert_allclose(out[:, 0], jnp.repeat(VALUES[:, 0], 2, axis=1), rtol=1e-6)


def test_what_comes_later_is_not_seen():
    later = KEYS.at[:, 3:].set(100.0), VALUES.at[:, 3:].set(-7.0)
    before, after = attend(QUERY, KEYS, VALUES, POSITIONS), attend(QUERY, *later, POSITIONS)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert not np.allclose(before[:, 3:], after[:, 3:])


def test_shared_keys_are_repeated_keys():
    repeated = (jnp.repeat(a, 2, axis=2) for a in (KEYS, VALUES))
    shared, own = attend(QUERY, KEYS, VALUES, POSITIONS), attend(QUERY, *repeated, POSITIONS)
    np.testing.assert_allclose(shared, own, atol=1e-6)


def test_a_float_cache_reads_what_was_written():
    store = FLOAT_CACHE.empty((2, 8, 2, 6))
    np.testing.assert_array_equal(FLOAT_CACHE.read(store), 0.0)
    store = FLOAT_CACHE.write(store, KEYS, jnp.int32(2))
    np.testing.assert_array_equal(FLOAT_CACHE.read(store)[:, 2:7], KEYS)
    np.testing.assert_array_equal(FLOAT_CACHE.read(store)[:, :2], 0.0)
    np.testing.assert_array_equal(FLOAT_CACHE.read(store)[:, 7:], 0.0)


def _stores(positions: int) -> Cache:
    return Cache(*(FLOAT_CACHE.empty((2, positions, 2, 6)) for _ in range(2)))


def test_one_at_a_time_with_a_cache_is_all_at_once():
    cache: Cache | None = _stores(6)
    one = jax.jit(lambda q, k, v, at, cache: attend_with_cache(q, k, v, at, cache, FLOAT_CACHE))
    out = []
    for t in range(5):
        at = slice(t, t + 1)
        y, cache = one(QUERY[:, at], KEYS[:, at], VALUES[:, at], POSITIONS[at], cache)
        out.append(y)
    expected, none = attend_with_cache(QUERY, KEYS, VALUES, POSITIONS, None, FLOAT_CACHE)
    assert none is None
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), expected, atol=1e-6)


@pytest.mark.parametrize(("start", "fits"), [(0, True), (1, True), (2, False), (9, False)])
def test_beyond_the_end_of_a_cache_all_is_nan(start: int, fits: bool):
    """Where the update was clamped silently, the last keys would stand at other positions."""
    out, _ = attend_with_cache(QUERY, KEYS, VALUES, POSITIONS + start, _stores(6), FLOAT_CACHE)
    assert bool(jnp.isfinite(out).all()) == fits
    assert bool(jnp.isnan(out).all()) != fits


def test_more_tokens_than_a_cache_has_positions_raise():
    with pytest.raises(ModelShapeError, match="5 tokens for a cache of 4 positions"):
        attend_with_cache(QUERY, KEYS, VALUES, POSITIONS, _stores(4), FLOAT_CACHE)


def test_every_layer_has_a_store_of_its_own():
    cache = empty_cache(FLOAT_CACHE, (2, 8, 2, 6), layers=3)
    assert jax.tree.map(jnp.shape, cache) == Cache((3, 2, 8, 2, 6), (3, 2, 8, 2, 6))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.zeros((2, 3)), "tokens are float32"),
        (jnp.zeros(3, jnp.int32), r"shape \(3,\)"),
        (jnp.zeros((2, 9), jnp.int32), "9 tokens for 8 positions"),
        (jnp.zeros((2, 0), jnp.int32), "0 tokens"),
    ],
)
def test_other_tokens_are_refused(tokens: jax.Array, message: str):
    with pytest.raises(ModelShapeError, match=message):
        check_tokens(tokens, 8)
