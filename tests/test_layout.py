"""Laws of the moves between a parameter and its product, over random chains of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantjax import errors
from quantjax.granularity import check_scale_shape
from quantjax.interpreter import trace
from quantjax.layout import (
    STEP,
    Move,
    casts,
    codes_in_product,
    moves_of,
    scale_in_parameter,
    scale_in_product,
)
from tests.test_granularity_blocks import numbers_of_groups, runs, spread

SIZES = st.sampled_from([1, 2, 3, 4, 5, 6])


class Chain(NamedTuple):
    """A parameter, its way to a product, and a scale for blocks of the product."""

    shape: tuple[int, ...]
    path: tuple[Move, ...]
    steps: tuple[int, ...]
    product: tuple[int, ...]
    blocks: tuple[int, ...]


def factorizations(size: int, axes: int) -> list[tuple[int, ...]]:
    """All shapes of ``axes`` axes and ``size`` entries."""
    if axes == 1:
        return [(size,)]
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return [(n, *rest) for n in divisors for rest in factorizations(size // n, axes - 1)]


@st.composite
def chains(draw: st.DrawFn, most: int = 5) -> Chain:
    """At most so many moves; blocks of the product may leave a shorter last one."""
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    path: list[Move] = []
    steps: list[int] = []
    now = shape
    kinds = st.sampled_from(["reshape", "transpose", "rev", STEP])
    for kind in draw(st.lists(kinds, max_size=most)):
        if kind == STEP:
            if len(now) < 2 or len(steps) == 2:
                continue
            move = Move(STEP, {}, (now[0],), ())
            steps.append(now[0])
            now = now[1:]
        elif kind == "transpose":
            order = tuple(draw(st.permutations(range(len(now)))))
            after = tuple(now[axis] for axis in order)
            move = Move("transpose", {"permutation": order}, now, after)
            now = after
        elif kind == "rev":
            axes = tuple(axis for axis in range(len(now)) if draw(st.booleans()))
            move = Move("rev", {"dimensions": axes}, now, now)
        else:
            choices = factorizations(math.prod(now), draw(st.integers(1, 4)))
            after = draw(st.sampled_from(choices))
            name = draw(st.sampled_from(["reshape", "expand_dims", "squeeze"]))
            move = Move(name, {}, now, after)
            now = after
        path.append(move)
    blocks = [draw(st.sampled_from(numbers_of_groups(n))) for n in now]
    return Chain(shape, tuple(path), tuple(steps), now, tuple(blocks))


def moved(x: np.ndarray, path: tuple[Move, ...]) -> np.ndarray:
    """The moves in NumPy; leading axes of steps stay in front."""
    layers = 0
    for move in path:
        lead = tuple(range(layers))
        if move.name == STEP:
            layers += 1
        elif move.name == "transpose":
            x = x.transpose(*lead, *(axis + layers for axis in move.params["permutation"]))
        elif move.name == "rev":
            x = np.flip(x, [axis + layers for axis in move.params["dimensions"]])
        else:
            x = x.reshape(x.shape[:layers] + move.after)
    return x


def back(x: np.ndarray, chain: Chain) -> np.ndarray:
    """From the product to the parameter: each entry to where it came from."""
    where = moved(np.arange(x.size).reshape(chain.shape), chain.path)
    out = np.empty(x.size, x.dtype)
    out[where.ravel()] = x.ravel()
    return out.reshape(chain.shape)


def distinct(chain: Chain) -> np.ndarray:
    """A scale of the product in which every entry has a value of its own."""
    shape = (*chain.steps, *chain.blocks)
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@given(chains())
def test_codes_follow_the_moves(chain):
    x = np.arange(math.prod(chain.shape), dtype=np.int32).reshape(chain.shape)
    got = np.asarray(codes_in_product(x, chain.path))
    assert got.shape == (*chain.steps, *chain.product)
    np.testing.assert_array_equal(got, moved(x, chain.path))


@given(chains())
def test_a_scale_at_the_parameter_means_the_same_as_in_the_product(chain):
    """Expanding, then moving back, is moving back, then expanding."""
    scale = distinct(chain)
    at_parameter = np.asarray(scale_in_parameter(jnp.asarray(scale), chain.path, len(chain.steps)))
    assert at_parameter.ndim == len(chain.shape)
    check_scale_shape(chain.shape, at_parameter.shape)
    expanded = spread(scale, (*chain.steps, *chain.product))
    np.testing.assert_array_equal(spread(at_parameter, chain.shape), back(expanded, chain))


@given(chains())
def test_there_and_back_again(chain):
    scale = distinct(chain)
    at_parameter = scale_in_parameter(jnp.asarray(scale), chain.path, len(chain.steps))
    again = scale_in_product(at_parameter, chain.path, chain.blocks)
    np.testing.assert_array_equal(again, scale)


@given(chains(most=1))
@settings(max_examples=25)
def test_the_blocks_behind_one_move_are_the_coarsest(chain):
    """Two neighbouring runs along an axis are merged wherever that loses nothing.

    Not so of a chain: what one move cuts apart, a later one does not put together.
    """
    scale = distinct(chain)
    found = np.asarray(scale_in_parameter(jnp.asarray(scale), chain.path, len(chain.steps)))
    truth = back(spread(scale, (*chain.steps, *chain.product)), chain)
    for axis, (n, count) in enumerate(zip(chain.shape, found.shape, strict=True)):
        cuts = set(np.cumsum(runs(n, count)))
        for c in (c for c in numbers_of_groups(n) if c < count):
            if not set(np.cumsum(runs(n, c))) <= cuts:
                continue
            length = -(-n // c)
            first = np.take(truth, np.arange(n) // length * length, axis=axis)
            assert not np.array_equal(first, truth), f"axis {axis}: {c} blocks are enough"


def kernel_of_heads() -> tuple[Move, ...]:
    """``(heads, features, out)`` as ``(heads · features, out)``."""
    return (Move("reshape", {}, (4, 2, 3), (8, 3)),)


@pytest.mark.parametrize(
    ("groups", "at_parameter"),
    [
        (1, (1, 1, 3)),  # one for each output channel
        (2, (2, 1, 3)),  # a group is two heads
        (4, (4, 1, 3)),  # a group is a head
        (8, (4, 2, 3)),
    ],
)
def test_groups_across_heads(groups, at_parameter):
    scale = jnp.arange(3.0 * groups).reshape(groups, 3)
    found = scale_in_parameter(scale, kernel_of_heads(), 0)
    assert found.shape == at_parameter
    np.testing.assert_array_equal(
        np.repeat(scale, 8 // groups, axis=0), spread(np.asarray(found), (4, 2, 3)).reshape(8, 3)
    )


def test_groups_that_a_reshape_cuts():
    """Runs of 2 in 6 entries that are 2 rows of 3: no coarser blocks hold them apart."""
    found = scale_in_parameter(jnp.array([1.0, 2.0, 3.0]), (Move("reshape", {}, (2, 3), (6,)),), 0)
    np.testing.assert_array_equal(found, [[1.0, 1.0, 2.0], [2.0, 3.0, 3.0]])


def test_a_shorter_group_stays_last():
    """4, 4, 2 of 10 entries that are 5 rows of 2: two rows, two rows and one."""
    move = (Move("reshape", {}, (5, 2), (10,)),)
    found = scale_in_parameter(jnp.array([1.0, 2.0, 3.0]), move, 0)
    np.testing.assert_array_equal(found, [[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(scale_in_product(found, move, (3,)), [1.0, 2.0, 3.0])


def test_a_shorter_group_that_is_turned_to_the_front():
    """4, 4, 2 from behind is 2, 4, 4: five blocks of 2 hold it."""
    move = (Move("rev", {"dimensions": (0,)}, (10,), (10,)),)
    found = scale_in_parameter(jnp.array([1.0, 2.0, 3.0]), move, 0)
    np.testing.assert_array_equal(found, [3.0, 2.0, 2.0, 1.0, 1.0])
    np.testing.assert_array_equal(scale_in_product(found, move, (3,)), [1.0, 2.0, 3.0])


def test_a_scale_that_does_not_stand_for_the_groups_of_the_plan():
    """Groups of 5 know nothing of groups of 4."""
    transposed = (Move("transpose", {"permutation": (1, 0)}, (3, 10), (10, 3)),)
    with pytest.raises(errors.GranularityError, match=r"\(2, 1\).*\(3, 1\)"):
        scale_in_product(jnp.ones((1, 2)), transposed, (3, 1))
    with pytest.raises(errors.GranularityError, match="unknown"):
        scale_in_product(jnp.ones((4, 1)), (), (2, 1))


def test_the_moves_of_a_traced_weight():
    """From the parameter to the product, in order; casts are known, and move nothing."""

    def f(p, x):
        return x @ p["w"].astype(jnp.bfloat16).reshape(6, 4).T

    params, x = {"w": jnp.ones((2, 3, 4))}, jnp.ones((1, 4), jnp.bfloat16)
    (origin,) = trace(f, params, x).weights.values()
    path = moves_of(origin)
    assert [move.name for move in path if not move.neutral] == ["reshape", "transpose"]
    assert casts(path) == [jnp.bfloat16]
    codes = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(codes_in_product(codes, path), codes.reshape(6, 4).T)
