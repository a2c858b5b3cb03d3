"""Granularities: shapes of scales, repeating groups, reducing to them, and errors that help."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import quantjax
from quantjax import PerChannel, PerGroup, PerTensor, PerToken, errors
from quantjax.granularity import (
    Granularity,
    OperandAxes,
    Remainder,
    expand,
    reduce_to,
)
from tests.oracles.extremes import group_extremes
from tests.oracles.integers import spread

KERNEL = ((64, 10), OperandAxes(free=(1,), contracted=(0,)))
CONV = ((3, 3, 16, 32), OperandAxes(free=(3,), contracted=(2,), window=(0, 1)))
EINSUM = ((8, 12, 6), OperandAxes(free=(0,), contracted=(1, 2)))
TOKENS = ((32, 128, 64), OperandAxes(free=(0, 1), contracted=(2,)))
IMAGE = ((5, 14, 14, 16), OperandAxes(free=(0,), contracted=(3,), window=(1, 2)))


@pytest.mark.parametrize(
    ("granularity", "operand", "is_weight", "want"),
    [
        (PerTensor(), KERNEL, True, (1, 1)),
        (PerTensor(), IMAGE, False, (1, 1, 1, 1)),
        (PerTensor(), ((), OperandAxes((), ())), False, ()),
        (PerChannel(), KERNEL, True, (1, 10)),
        (PerChannel(), CONV, True, (1, 1, 1, 32)),
        (PerChannel(), EINSUM, True, (8, 1, 1)),
        (PerChannel(), TOKENS, False, (1, 1, 64)),
        (PerChannel(), IMAGE, False, (1, 1, 1, 16)),
        (PerChannel(axis=0), KERNEL, True, (64, 1)),
        (PerChannel(axis=-2), CONV, True, (1, 1, 16, 1)),
        (PerChannel(axis=1), TOKENS, False, (1, 128, 1)),
        (PerToken(), TOKENS, False, (32, 128, 1)),
        (PerToken(), IMAGE, False, (5, 1, 1, 1)),
        (PerGroup(16), KERNEL, True, (4, 10)),
        (PerGroup(64), KERNEL, True, (1, 10)),
        (PerGroup(1), KERNEL, True, (64, 10)),
        (PerGroup(8), CONV, True, (1, 1, 2, 32)),
        (PerGroup(3), EINSUM, True, (8, 12, 2)),
        (PerGroup(32), TOKENS, False, (32, 128, 2)),
        (PerGroup(16, axis=-2), KERNEL, True, (4, 10)),
        (PerGroup(5, axis=1), KERNEL, True, (64, 2)),
        (PerGroup(8, axis=-1), CONV, True, (3, 3, 16, 4)),
    ],
    ids=str,
)
def test_scale_shapes(granularity, operand, is_weight, want):
    assert granularity.scale_shape(*operand, is_weight=is_weight) == want


def test_names():
    granularities = [
        PerTensor(),
        PerToken(),
        PerChannel(),
        PerChannel(axis=1),
        PerGroup(32, axis=0),
    ]
    assert [g.name for g in granularities] == ["tensor", "token", "channel", "channel", "group32"]


@given(n=st.integers(1, 400), size=st.integers(1, 500), axis=st.sampled_from([None, -2, 0]))
def test_a_group_that_does_not_divide_is_told_of_remainders_and_of_one_that_does(n, size, axis):
    operand = ((n, 10), OperandAxes(free=(1,), contracted=(0,)))
    granularity = PerGroup(size, axis=axis)
    if n % size == 0:
        assert granularity.scale_shape(*operand, is_weight=True) == (n // size, 10)
        return
    with pytest.raises(errors.GranularityError) as caught:
        granularity.scale_shape(*operand, is_weight=True)
    text = str(caught.value)
    assert all(part in text for part in (f"groups of {size} ", f"size {n}", f"({n}, 10)"))
    allowed = eval(caught.value.fix, {"qj": quantjax})
    assert allowed == PerGroup(size, axis=axis, remainder=Remainder.SHORTER)
    assert allowed.scale_shape(*operand, is_weight=True) == (-(-n // size), 10)
    divides = re.search(r"qj\.\w+\(.*\)", caught.value.why)
    assert divides
    suggested = eval(divides[0], {"qj": quantjax})
    assert suggested == PerGroup(suggested.size, axis=axis)
    assert suggested.scale_shape(*operand, is_weight=True) == (n // suggested.size, 10)
    nearer = [
        d for d in range(1, n + 1) if n % d == 0 and abs(d - size) < abs(suggested.size - size)
    ]
    assert not nearer


@pytest.mark.parametrize("axis", [2, -3, 7])
@pytest.mark.parametrize(
    "granularity", [lambda a: PerChannel(axis=a), lambda a: PerGroup(2, axis=a)]
)
def test_an_axis_that_does_not_exist(granularity, axis):
    with pytest.raises(errors.GranularityError, match=rf"axis {axis} does not exist") as caught:
        granularity(axis).scale_shape(*KERNEL, is_weight=True)
    assert "(64, 10)" in caught.value.where
    assert re.findall(r"-?\d+", caught.value.fix) == ["-2", "1"]


def test_what_has_no_meaning():
    with pytest.raises(errors.GranularityError, match="no tokens"):
        PerToken().scale_shape(*KERNEL, is_weight=True)
    with pytest.raises(errors.GranularityError, match="contracts no axis"):
        PerGroup(2).scale_shape((4, 4), OperandAxes((0, 1), ()), is_weight=False)
    with pytest.raises(errors.GranularityError, match="PerTensor"):
        Granularity().scale_shape(*KERNEL, is_weight=True)


FITTING = [
    ((6, 8), (1, 1)),
    ((6, 8), (6, 8)),
    ((6, 8), (3, 8)),
    ((6, 8), (1, 4)),
    ((6, 8), (2, 2)),
    ((4, 3, 6), (2, 1, 3)),
    ((5,), (1,)),
]


@pytest.mark.parametrize(("shape", "groups"), FITTING)
def test_expand_repeats_groups(shape, groups):
    scale = np.arange(np.prod(groups), dtype=np.float32).reshape(groups)
    expanded = expand(jnp.asarray(scale), shape)
    assert_array_equal(np.broadcast_to(expanded, shape), spread(scale, shape))
    # What is shared by a whole axis stays of size 1.
    assert all(
        e == (1 if g == 1 else n) for e, g, n in zip(expanded.shape, groups, shape, strict=True)
    )


def test_expand_leaves_scalars():
    assert expand(jnp.float32(2), (3, 4)).shape == ()


@pytest.mark.parametrize(("shape", "groups"), FITTING)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_reduce_to_reduces_each_group(shape, groups, transform):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    low, high = group_extremes(x, groups)
    assert_array_equal(transform(lambda x: reduce_to(x, groups, jnp.min))(x), low)
    assert_array_equal(transform(lambda x: reduce_to(x, groups, jnp.max))(x), high)
    count = reduce_to(jnp.ones(shape), groups, jnp.sum)
    assert_array_equal(count, np.full(groups, np.prod(shape) // np.prod(groups)))


@pytest.mark.parametrize("mask_shape", [(6, 8), (6, 1), (1, 8)])
def test_reduce_to_leaves_out_what_is_masked(mask_shape):
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(6, 8)).astype(np.float32), rng.random(mask_shape) > 0.4
    kept = np.where(mask, x, -np.inf)
    got = reduce_to(jnp.asarray(x), (3, 2), jnp.max, initial=-jnp.inf, where=jnp.asarray(mask))
    assert_array_equal(got, group_extremes(kept, (3, 2))[1])


def test_expanding_undoes_reducing_what_is_constant_in_each_group():
    scale = jnp.arange(6.0).reshape(3, 2)
    assert_array_equal(
        reduce_to(jnp.broadcast_to(expand(scale, (6, 8)), (6, 8)), (3, 2), jnp.max), scale
    )


@pytest.mark.parametrize("groups", [(8,), (1, 1, 1), (4, 8), (1, 5), (12, 8), (0, 8), (6, 16)])
def test_scales_that_do_not_fit(groups):
    calls = (
        lambda: expand(jnp.ones(groups), (6, 8)),
        lambda: reduce_to(jnp.ones((6, 8)), groups, jnp.max),
    )
    for call in calls:
        with pytest.raises(errors.GranularityError) as caught:
            call()
        assert str(groups) in str(caught.value)
        assert "(6, 8)" in str(caught.value)
