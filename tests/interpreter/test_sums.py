"""Which products are read by sums: those that others read as they lie in memory need no fence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from quantjax.interpreter import Op
from quantjax.interpreter.sums import summed

X = jnp.ones((4, 8))
W = jnp.ones((8, 8))
B = jnp.ones((1, 8))
IMAGES = jnp.ones((2, 8, 8, 3))
KERNEL = jnp.ones((3, 3, 3, 5))


def first_is_summed(f, *operands) -> bool:
    """Whether the first product of ``f`` is, which the program itself holds."""
    jaxpr = jax.make_jaxpr(f)(*operands).jaxpr
    found = summed(jaxpr)
    names = {op.value for op in Op}
    return next(eqn.outvars[0] in found for eqn in jaxpr.eqns if eqn.primitive.name in names)


def behind(f):
    """A product, ``f`` of it, and another product of that."""
    return lambda x, w: f(x @ w) @ w


SCALED = jnp.linspace(0.5, 1.0, 8)[None]


@pytest.mark.parametrize(
    "f",
    [
        lambda y: y,
        lambda y: jax.nn.relu(y + B),
        lambda y: jnp.maximum(y, 0.1) - B,
        jnp.tanh,
        nn.gelu,
        nn.silu,
        lambda y: y * y,
        lambda y: 2.0 * y,
        lambda y: y.T.reshape(4, 8),
        lambda y: jnp.concatenate([y, y])[:4],
        lambda y: jnp.tanh(jnp.split(y, 2)[0]),
        lambda y: jnp.stack(jnp.unstack(y), axis=1).T,
        lambda y: jnp.where(y > 0, y, 0.1 * y),
        lambda y: jax.checkpoint(jnp.sin)(y),
        lambda y: y - y.max(),
    ],
)
def test_elementwise_functions_lead_from_product_to_product(f):
    assert not first_is_summed(behind(f), X, W)


@pytest.mark.parametrize(
    "f",
    [
        lambda y: y + y.mean(axis=0, keepdims=True),
        lambda y: y - y.sum(),
        lambda y: jax.nn.softmax(y),
        lambda y: y / jnp.linalg.norm(y),
        lambda y: jnp.cumsum(y, axis=0),
        lambda y: jnp.zeros((4, 8)).at[0].add(y[0]),
        lambda y: jax.jit(lambda y: y + y.mean())(y),
        lambda y: jax.lax.scan(lambda c, r: (c + r, r), B[0], y)[1],
        lambda y: jax.lax.fori_loop(0, 2, lambda i, y: y + 1.0, y),
    ],
)
def test_sums_and_what_is_not_known_are_found(f):
    assert first_is_summed(behind(f), X, W)


@pytest.mark.parametrize(
    "f",
    [
        lambda y: y * SCALED,
        lambda y: y / SCALED,
        lambda y: jnp.maximum(y, SCALED),
        lambda y: jnp.where(y > 0, y, y * (SCALED + 1.0)),
        lambda y: jax.jit(jnp.multiply)(y, jnp.broadcast_to(SCALED, y.shape)),
    ],
)
def test_a_factor_that_is_broadcast_has_a_sum_in_its_derivative(f):
    assert first_is_summed(behind(f), X, W)


def test_a_result_that_leaves_the_program_may_be_summed_outside():
    assert first_is_summed(lambda x, w: x @ w, X, W)
    assert first_is_summed(lambda x, w: jax.nn.relu(x @ w), X, W)
    assert first_is_summed(lambda x, w: (y := x @ w, y @ w), X, W)


def test_one_of_several_readers_is_enough():
    def f(x, w):
        y = x @ w
        return (y @ w) * y.mean()

    assert first_is_summed(f, X, W)


def test_pools_of_maxima_add_nothing_and_pools_of_means_do():
    def convolved(pooled):
        def f(x, w):
            y = jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return pooled(jax.nn.relu(y)).reshape(2, -1) @ jnp.ones((80, 2))

        return f

    def of_sums(y):
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, window, window, "VALID")

    maxima = convolved(lambda y: nn.max_pool(y, (2, 2), (2, 2)))
    assert not first_is_summed(maxima, IMAGES, KERNEL)
    assert first_is_summed(convolved(of_sums), IMAGES, KERNEL)
