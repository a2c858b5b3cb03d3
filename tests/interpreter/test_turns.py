"""Which transpositions stand next to a product."""

import jax
import jax.numpy as jnp
import pytest

from quantjax.interpreter.turns import Turns, turned

X = jnp.ones((4, 8))
W = jnp.ones((6, 8))
SQUARE = jnp.ones((8, 8))
STACK = jnp.ones((3, 4, 8))


def turns(f, *operands) -> Turns:
    """Around the first product of ``f``."""
    jaxpr = jax.make_jaxpr(f)(*operands).jaxpr
    eqn = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general")
    return turned(jaxpr).around(eqn)


@pytest.mark.parametrize(
    ("f", "operands", "expected"),
    [
        (lambda x, w: x @ w, (X, SQUARE), Turns()),
        (lambda x, w: x @ w.T, (X, W), Turns(rhs=True)),
        (lambda x, w: w.T @ x, (X, jnp.ones((4, 2))), Turns(lhs=True)),
        (lambda x, w: (x.T @ w.T).T, (SQUARE, SQUARE), Turns(lhs=True, rhs=True, out=True)),
        (lambda x, w: jax.vmap(lambda row: w @ row)(x), (X, W), Turns(out=True)),
        (lambda x, w: jnp.tanh(x @ w).T, (X, SQUARE), Turns()),
        (lambda x, w: x @ (2 * w.T), (X, W), Turns()),
    ],
    ids=["none", "right", "left", "all", "mapped", "behind a function", "ahead of a function"],
)
def test_transposed_matrices_are_found(f, operands, expected):
    assert turns(f, *operands) == expected


def test_a_result_that_something_else_reads_stays_as_it_is():
    assert turns(lambda x, w: ((y := x @ w).T, y), X, SQUARE) == Turns()
    assert turns(lambda x, w: (y := x @ w).T @ y, X, SQUARE) == Turns()


def test_only_matrices_count():
    assert turns(lambda x, w: jnp.moveaxis(x @ w, 1, 2), STACK, SQUARE) == Turns()
    assert turns(lambda x, y: x @ jnp.swapaxes(y, 1, 2), STACK, STACK) == Turns()
