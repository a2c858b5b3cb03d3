"""``quantjax.lean`` against ``jax.numpy``, which it stands in for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from quantjax import lean
from tests.models import normal

SHAPES = [((), (3, 4)), ((1, 4), (3, 4)), ((3, 1), (3, 4)), ((1, 1), (3, 4)), ((3, 4), (3, 4))]


@pytest.mark.parametrize(("small", "large"), SHAPES, ids=str)
def test_spreading_is_broadcasting(small, large):
    x = normal(0, *small)
    np.testing.assert_array_equal(lean.spread(x, large), jnp.broadcast_to(x, large))
    assert lean.spread(x, (2, *large)).shape == (2, *large)


@pytest.mark.parametrize(("small", "large"), SHAPES, ids=str)
def test_a_choice_is_jnp_where(small, large):
    which, yes, no = normal(1, *large) > 0, normal(2, *small), normal(3, *large)
    np.testing.assert_array_equal(lean.select(which, yes, no), jnp.where(which, yes, no))
    np.testing.assert_array_equal(lean.select(which, 1.0, no), jnp.where(which, 1.0, no))
    np.testing.assert_array_equal(lean.select(which, 1.0, -2.0), jnp.where(which, 1.0, -2.0))
    one = normal(4, *small) > 0
    got = lean.select(one, yes, no)
    np.testing.assert_array_equal(got, jnp.where(one, yes, no))
    assert got.shape == large


def test_a_choice_is_mapped_over_cells():
    bits, no = jnp.array([0.0, 4.0]), normal(5, 2, 3)
    got = jax.vmap(lambda b, n: lean.select(b == 0.0, 1.0, n))(bits, no)
    np.testing.assert_array_equal(got, jnp.stack([jnp.ones(3), no[1]]))


@pytest.mark.parametrize(("small", "large"), SHAPES, ids=str)
def test_bounds_are_jnp_clip_and_keep_nan(small, large):
    x = normal(6, *large).at[0, 0].set(jnp.nan)
    low, high = -jnp.abs(normal(7, *small)), jnp.abs(normal(8, *small))
    np.testing.assert_array_equal(lean.clip(x, low, high), jnp.clip(x, low, high))
    assert np.isnan(lean.clip(x, low, high)[0, 0])
    np.testing.assert_array_equal(lean.clip(x, -0.5, high), jnp.clip(x, -0.5, high))
    whole = jnp.arange(5)
    np.testing.assert_array_equal(lean.clip(whole, 1, 3), jnp.clip(whole, 1, 3))


@pytest.mark.parametrize(("small", "large"), SHAPES, ids=str)
@pytest.mark.parametrize("op", [lax.add, lax.mul, lax.sub], ids=lambda op: op.__name__)
def test_functions_of_lax_broadcast_as_those_of_numpy(op, small, large):
    x, y = normal(9, *small), normal(10, *large)
    of_numpy = {lax.add: jnp.add, lax.mul: jnp.multiply, lax.sub: jnp.subtract}[op]
    for a, b in ((x, y), (y, x), (x, 2.0), (2, y)):
        got, want = lean.elementwise(op, a, b), of_numpy(a, b)
        np.testing.assert_array_equal(got, want)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


def test_smaller_ranks_are_aligned_on_the_right():
    x, y = normal(11, 4), normal(12, 3, 1)
    np.testing.assert_array_equal(lean.elementwise(lax.add, x, y), x[None] + y)


def test_a_choice_and_bounds_are_no_functions_of_their_own():
    """Which is all that they are for."""

    def f(x: jax.Array) -> jax.Array:
        return lean.clip(lean.select(x > 0.0, 1.0, x), jnp.float32(-1.0), jnp.float32(1.0))

    names = {eqn.primitive.name for eqn in jax.make_jaxpr(f)(jnp.ones(3)).eqns}
    assert names <= {"gt", "broadcast_in_dim", "select_n", "clamp"}


def test_a_number_takes_the_dtype_of_the_other_case():
    no = jnp.ones(2, jnp.bfloat16)
    assert lean.select(jnp.array([True, False]), 2.0, no).dtype == jnp.bfloat16


def test_what_is_narrowed_is_rounded_in_every_program():
    """XLA leaves a cast and its reverse out where it fuses a mean, and keeps them elsewhere."""
    x = normal(13, 4, 64, 16)

    def mean(x: jax.Array) -> jax.Array:
        return lean.narrowed(x * 3.0, jnp.bfloat16).mean(axis=1)

    cast = np.asarray((x * 3.0).astype(jnp.bfloat16), np.float64).mean(axis=1)
    np.testing.assert_array_equal(jax.jit(mean)(x), jnp.asarray(cast, jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrowing_is_a_cast(dtype):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 14, dtype=np.uint32)
    x = jnp.asarray(bits.view(np.float32))
    x = x[jnp.isfinite(x) & (jnp.abs(x) >= jnp.finfo(jnp.float32).tiny)]
    x = jnp.concatenate([x, jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, 3.4e38, 65519.0, 65520.0])])
    got, expected = (np.asarray(y, np.float32) for y in (lean.narrowed(x, dtype), x.astype(dtype)))
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert np.isnan(float(lean.narrowed(jnp.float32(jnp.nan), dtype)))


def test_gradients_pass_what_is_narrowed_as_they_pass_a_cast():
    x = normal(14, 8)
    loss = lambda cast: lambda x: (cast(x, jnp.bfloat16) ** 2).sum().astype(jnp.float32)  # noqa: E731
    plain = jax.grad(loss(lambda x, dtype: x.astype(dtype)))(x)
    np.testing.assert_array_equal(jax.grad(loss(lean.narrowed))(x), plain)
