"""Exact ties: the codes are those of NumPy's true division followed by ``rint``, every one.

XLA replaces a division by a broadcast value by a product with its reciprocal; on values halfway
between two codes the last bit of the quotient decides, so that a grid of them shows it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import QParams, encode, fake_quant, integer
from quantjax.formats import divide_by_scale

ROWS, STEPS, GROUPS = 4000, 256, 8
CODES = np.arange(-STEPS // 2, STEPS // 2, dtype=np.float64)


def grid(seed: int, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """``x[i, k] = s[i] (k + 1/2)`` in float32, and the scales, (ROWS, groups)."""
    scale = 10.0 ** np.random.default_rng(seed).uniform(-5, 3, (ROWS, groups))
    scale = scale.astype(np.float32)
    each = np.repeat(scale.astype(np.float64), STEPS // groups, axis=1)
    return np.float32(each * (CODES + 0.5)), scale


X, SCALE = grid(0)
QUOTIENT = X / SCALE
TIES = np.rint(QUOTIENT)


def qparams(scale) -> QParams:
    scale = jnp.asarray(scale)
    return QParams(scale, jnp.zeros_like(scale), jnp.float32(8))


def row_codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    return encode(x, qparams(scale), integer()).codes


def test_the_grid_is_one_of_ties():
    exact = np.float64(X) / np.float64(SCALE)
    assert (np.abs(exact - (CODES + 0.5)) <= np.abs(CODES + 0.5) * 2.0**-24).all()
    # Most quotients round to the tie itself; all of them lie within one rounding of it.
    assert (np.abs(QUOTIENT) % 1 == 0.5).mean() > 0.5


def naive(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.round(x / scale)


@pytest.mark.parametrize("transform", [naive, jax.jit(naive), jax.vmap(naive)])
def test_a_plain_division_gives_other_codes(transform):
    # If this fails, XLA divides truly and the helper is no longer needed.
    wrong = np.asarray(transform(jnp.asarray(X), jnp.asarray(SCALE))) != TIES
    assert wrong.mean() > 0.01


def mapped(x: jax.Array, scale: jax.Array) -> jax.Array:
    return lax.map(lambda row: divide_by_scale(*row), (x, scale[:, 0]))


@pytest.mark.parametrize(
    "transform",
    [
        divide_by_scale,
        jax.jit(divide_by_scale),
        jax.vmap(divide_by_scale),
        jax.jit(jax.vmap(divide_by_scale)),
        lambda x, scale: jax.vmap(divide_by_scale)(x, scale[:, 0]),
        mapped,
        jax.jit(mapped),
        jax.jit(jax.checkpoint(divide_by_scale)),
        jax.jit(lambda x, scale: jax.jvp(divide_by_scale, (x, scale), (x, scale))[0]),
    ],
    ids=["eager", "jit", "vmap", "jit-vmap", "scalar-vmap", "map", "jit-map", "remat", "jvp"],
)
def test_quotients_are_those_of_numpy(transform):
    assert_array_equal(np.asarray(transform(jnp.asarray(X), jnp.asarray(SCALE))), QUOTIENT)


@pytest.mark.parametrize("row", range(0, ROWS, ROWS // 8))
def test_scalar_scales_as_argument_and_as_constant(row: int):
    x, scale, want = jnp.asarray(X[row]), float(SCALE[row, 0]), QUOTIENT[row]
    assert_array_equal(divide_by_scale(x, jnp.float32(scale)), want)
    assert_array_equal(jax.jit(divide_by_scale)(x, jnp.float32(scale)), want)
    assert_array_equal(jax.jit(lambda x: divide_by_scale(x, jnp.float32(scale)))(x), want)
    constant = jax.jit(lambda x: fake_quant(x, scale))
    assert_array_equal(constant(x), np.clip(TIES[row], -128, 127) * SCALE[row])
    assert_array_equal(fake_quant(x, scale), constant(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, scale: divide_by_scale(x, jnp.asarray(SCALE)),
        lambda x, scale: divide_by_scale(jnp.asarray(X), scale),
        lambda x, scale: divide_by_scale(jnp.asarray(X), jnp.asarray(SCALE)),
        lambda x, scale: jax.vmap(lambda s: divide_by_scale(jnp.asarray(X), s))(scale[None]),
    ],
    ids=["scale", "tensor", "both", "tensor under vmap"],
)
def test_constants_of_the_program(function):
    # What is closed over is a constant to XLA, which evaluates all that it can beforehand.
    assert_array_equal(np.asarray(jax.jit(function)(X, SCALE)).reshape(X.shape), QUOTIENT)


@pytest.mark.parametrize(
    "transform",
    [
        row_codes,
        jax.jit(row_codes),
        jax.jit(jax.vmap(lambda x, scale: row_codes(x[None], scale[None])[0])),
        jax.jit(lambda x, s: lax.map(lambda row: row_codes(row[0], row[1][0]), (x, s))),
    ],
    ids=["eager", "jit", "vmap", "map"],
)
def test_codes_are_those_of_numpy(transform):
    codes = transform(jnp.asarray(X), jnp.asarray(SCALE))
    assert codes.dtype == jnp.int8
    assert_array_equal(codes, np.clip(TIES, -128, 127))


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
def test_simulated_values_are_those_of_numpy(transform):
    simulate = transform(lambda x, scale: fake_quant(x, scale, bits=8))
    assert_array_equal(
        simulate(jnp.asarray(X), jnp.asarray(SCALE)), np.clip(TIES, -128, 127) * SCALE
    )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_group_scales(transform):
    x, scale = grid(1, GROUPS)
    want = np.rint(x / np.repeat(scale, STEPS // GROUPS, axis=1))
    assert_array_equal(
        transform(row_codes)(jnp.asarray(x), jnp.asarray(scale)), np.clip(want, -128, 127)
    )


def test_a_zero_point_is_added_after_rounding():
    # Added before, an odd zero point would turn ties to the other neighbour.
    codes = jax.jit(
        lambda x, s: encode(x, QParams(s, jnp.ones_like(s), jnp.float32(8)), integer()).codes
    )
    assert_array_equal(codes(jnp.asarray(X), jnp.asarray(SCALE)), np.clip(TIES + 1, -128, 127))
