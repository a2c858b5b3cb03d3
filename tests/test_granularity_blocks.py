"""Groups with a remainder and blocks of two axes: shapes, expanding, refining, reducing."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax import granularity as granularity_of
from quantjax.granularity import (
    OperandAxes,
    PerBlock,
    PerChannel,
    PerGroup,
    Remainder,
    check_scale_shape,
    expand,
    group_size,
    reduce_to,
    refine,
)

SHORTER = Remainder.SHORTER
ALONG_FIRST = OperandAxes(free=(1,), contracted=(0,))
CONV = OperandAxes(free=(3,), contracted=(2,), window=(0, 1))


def runs(n: int, groups: int) -> list[int]:
    """Lengths of groups by the stated rule: ``⌈n / k⌉`` each until nothing is left."""
    length, lengths = -(-n // groups), []
    while n:
        lengths.append(min(length, n))
        n -= lengths[-1]
    return lengths


def numbers_of_groups(n: int) -> list[int]:
    """All that fit an axis of ``n`` entries."""
    return [k for k in range(1, n + 1) if len(runs(n, k)) == k]


def spread(scale: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Scales of groups, one for each entry of a tensor of ``shape``; by counting runs."""
    scale = np.asarray(scale)
    for axis, (n, groups) in enumerate(zip(shape, scale.shape, strict=True)):
        assert len(runs(n, groups)) == groups
        scale = np.repeat(scale, runs(n, groups), axis=axis)
    return scale


@given(n=st.integers(1, 5000), size=st.integers(1, 6000))
def test_shorter_groups_are_never_longer_than_asked_for(n, size):
    granularity = PerGroup(size, remainder=SHORTER)
    groups, free = granularity.scale_shape((n, 3), ALONG_FIRST, is_weight=True)
    lengths = runs(n, groups)
    assert (groups, free) == (-(-n // size), 3)
    assert len(lengths) == groups
    assert sum(lengths) == n
    assert max(lengths) == group_size(n, groups) <= size
    assert set(lengths[:-1]) <= {max(lengths)}
    check_scale_shape((n, 3), (groups, 1))


@given(n=st.integers(1, 3000), size=st.integers(1, 300))
def test_a_size_that_divides_gives_groups_of_that_size(n, size):
    for remainder in Remainder:
        granularity = PerGroup(size, remainder=remainder)
        assert granularity.scale_shape((n * size, 3), ALONG_FIRST, is_weight=True) == (n, 3)
    assert group_size(n * size, n) == size


@given(n=st.integers(1, 600), groups=st.integers(0, 700))
def test_which_numbers_of_groups_fit(n, groups):
    """Those, and only those, for which the runs are as many as they should be."""
    fits = groups >= 1 and len(runs(n, groups)) == groups
    if fits:
        check_scale_shape((n,), (groups,))
        return
    with pytest.raises(errors.GranularityError, match=rf"\({groups},\)"):
        check_scale_shape((n,), (groups,))


def test_an_axis_without_entries():
    for shape, groups in [((0, 4), (1, 1)), ((0, 4), (0, 2)), ((0, 4), (1, 4))]:
        expanded = expand(jnp.ones(groups), shape)
        assert jnp.broadcast_shapes(expanded.shape, shape) == shape
        assert reduce_to(jnp.ones(shape), groups, jnp.max, initial=-1.0).shape == groups
    with pytest.raises(errors.GranularityError):
        check_scale_shape((0, 4), (3, 4))


FITTING = [
    ((70,), (3,)),  # 24, 24, 22
    ((100,), (4,)),  # 25 each
    ((7, 5), (4, 1)),  # 2, 2, 2, 1
    ((7, 5), (2, 3)),  # 4, 3 by 2, 2, 1
    ((14, 2, 5), (4, 2, 2)),  # 4, 4, 4, 2 by 3, 2
    ((3, 11, 6), (1, 3, 3)),
]


@pytest.mark.parametrize(("shape", "groups"), FITTING)
def test_expanding(shape, groups):
    scale = np.arange(np.prod(groups), dtype=np.float32).reshape(groups)
    expanded = jax.jit(lambda scale: expand(scale, shape))(scale)
    assert_array_equal(np.broadcast_to(expanded, shape), spread(scale, shape))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "groups"), FITTING)
def test_reducing(shape, groups, masked):
    """Exact whatever the reduction: a last group is neither filled up nor weighted by a length."""
    draw = np.random.default_rng(len(shape))
    x = draw.integers(-9, 9, shape).astype(np.float32)
    mask = draw.random(shape) > 0.3 if masked else np.ones(shape, bool)
    ids = spread(np.arange(np.prod(groups)).reshape(groups), shape)
    members = [x[(ids == group) & mask] for group in range(np.prod(groups))]
    options = {"where": jnp.asarray(mask)} if masked else {}

    @jax.jit
    def found(x: Any) -> Any:
        bounds = {"initial": jnp.inf}, {"initial": -jnp.inf}
        return (
            reduce_to(x, groups, jnp.min, **bounds[0], **options),
            reduce_to(x, groups, jnp.max, **bounds[1], **options),
            reduce_to(x, groups, jnp.sum, **options),
            reduce_to(x, groups, jnp.mean, **options),
        )

    low, high, total, mean = found(x)
    assert_array_equal(low.ravel(), [m.min(initial=np.inf) for m in members])
    assert_array_equal(high.ravel(), [m.max(initial=-np.inf) for m in members])
    assert_array_equal(total.ravel(), [m.sum() for m in members])
    wanted = [np.float32(m.sum()) / np.float32(m.size) if m.size else np.nan for m in members]
    np.testing.assert_allclose(mean.ravel(), wanted, rtol=2e-7)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("shape", "groups"), FITTING)
def test_reducing_undoes_expanding(shape, groups):
    scale = jnp.arange(float(np.prod(groups))).reshape(groups)
    spread_out = jnp.broadcast_to(expand(scale, shape), shape)
    for reduce in (jnp.min, jnp.max, jnp.median):
        assert_array_equal(reduce_to(spread_out, groups, reduce), scale)


def test_a_reduction_that_knows_no_mask_and_no_initial_value():
    x = jnp.array([4.0, 1.0, 3.0, 2.0, 9.0])
    assert reduce_to(x, (2,), jnp.median).tolist() == [3.0, 5.5]
    assert reduce_to(x, (2,), jnp.ptp).tolist() == [3.0, 7.0]


def test_scales_mean_the_same_in_a_slice_along_another_axis():
    """Nothing but the two shapes says what a group is, so vmap and scan change nothing."""
    scale = jnp.arange(12.0).reshape(4, 3)
    whole = expand(scale, (4, 7))
    assert_array_equal(whole, jax.vmap(lambda s: expand(s, (7,)))(scale))
    assert_array_equal(whole[2:], expand(scale[2:], (2, 7)))


def test_the_gradient_of_a_scale_sums_over_its_group():
    counts = jax.grad(lambda scale: jnp.sum(expand(scale, (70,))))(jnp.ones(3))
    assert counts.tolist() == [24.0, 24.0, 22.0]


@given(n=st.integers(1, 40), data=st.data())
def test_finer_scales_lie_in_coarser_ones(n, data):
    coarse, fine = (data.draw(st.sampled_from(numbers_of_groups(n))) for _ in range(2))
    cuts = [set(np.cumsum(runs(n, groups))) for groups in (coarse, fine)]
    scale = np.arange(coarse, dtype=np.float32)
    if cuts[0] <= cuts[1]:
        finer = refine(jnp.asarray(scale), (n,), (fine,))
        assert_array_equal(spread(finer, (n,)), spread(scale, (n,)))
    else:
        with pytest.raises(errors.GranularityError, match="not coarser"):
            refine(jnp.asarray(scale), (n,), (fine,))


@pytest.mark.parametrize(
    ("granularity", "shape", "axes", "want"),
    [
        (PerBlock(128, 128), (512, 256), ALONG_FIRST, (4, 2)),
        (PerBlock(2, 5), (6, 10), ALONG_FIRST, (3, 2)),
        (PerBlock(1, 10), (6, 10), ALONG_FIRST, (6, 1)),
        (PerBlock(8, 4), (3, 3, 16, 32), CONV, (1, 1, 2, 8)),
        (PerBlock(2, 3), (5, 4, 6), OperandAxes((0, 2), (1,)), (5, 2, 2)),
        (PerBlock(2, 3), (4, 8, 6), OperandAxes((2,), (1, 0)), (2, 8, 2)),
        (PerBlock(2, 3), (4, 8, 6), OperandAxes((2,), (0, 1)), (4, 4, 2)),
        (PerBlock(3, 2, axes=(-1, 0)), (4, 8, 6), OperandAxes((), ()), (2, 8, 2)),
        (PerBlock(32, 32, remainder=SHORTER), (70, 100), ALONG_FIRST, (3, 4)),
        (PerBlock(128, 128, remainder=SHORTER), (3, 3, 1, 8), CONV, (1, 1, 1, 1)),
        (PerGroup(32, remainder=SHORTER), (3, 3, 70, 8), CONV, (1, 1, 3, 8)),
        (PerGroup(4, axis=1, remainder=SHORTER), (3, 7), OperandAxes((), ()), (3, 2)),
    ],
    ids=str,
)
def test_scale_shapes(granularity, shape, axes, want):
    assert granularity.scale_shape(shape, axes, is_weight=True) == want


def test_names():
    assert PerBlock(128, 64).name == "block128x64"
    assert PerBlock(1, 2, axes=(0, 1), remainder=SHORTER).name == "block1x2"
    assert PerGroup(32, remainder=SHORTER).name == "group32"


def test_values_are_equal_and_hashable():
    """They are part of a plan, which is a static argument."""
    assert PerBlock(2, 3, remainder=SHORTER) != PerBlock(2, 3)
    assert len({PerGroup(2), PerGroup(2), PerGroup(2, remainder=SHORTER)}) == 2
    assert hash(PerBlock(2, 3, axes=(0, 1))) == hash(PerBlock(2, 3, axes=(0, 1)))


@pytest.mark.parametrize("axes", [None, (0, 1)])
@pytest.mark.parametrize(("rows", "columns"), [(4, 5), (3, 4), (5, 7), (7, 11)])
def test_a_block_that_does_not_divide(rows, columns, axes):
    granularity = PerBlock(rows, columns, axes=axes)
    with pytest.raises(errors.GranularityError, match="do not divide axis") as caught:
        granularity.scale_shape((6, 10), ALONG_FIRST, is_weight=True)
    assert "(6, 10)" in caught.value.where
    shorter = eval(caught.value.fix, {"qj": granularity_of})
    assert shorter == PerBlock(rows, columns, axes=axes, remainder=SHORTER)
    shorter.scale_shape((6, 10), ALONG_FIRST, is_weight=True)
    other = re.search(r"qj\.\w+\(.*\)", caught.value.why)
    assert other
    divides = eval(other[0], {"qj": granularity_of})
    assert divides.axes == axes
    found = divides.scale_shape((6, 10), ALONG_FIRST, is_weight=True)
    assert found == (6 // divides.rows, 10 // divides.columns)


def test_one_edit_serves_all_operands_that_blocks_do_not_divide():
    """Sizes that divide one side here divide none of another weight."""
    params = {"a": jnp.ones((32, 32)), "c": jnp.ones((32, 6))}
    table = qj.sites(lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"], params, jnp.ones((2, 32)))

    def planned(granularity: Any) -> qj.Plan:
        return qj.plan(qj.uniform_policy(weight_granularity=granularity), table)

    with pytest.raises(errors.GranularityError, match="do not divide") as caught:
        planned(PerBlock(8, 8))
    shapes = [
        operand.scale_shape
        for entry in planned(eval(caught.value.fix, {"qj": qj})).sites
        for operand in entry.operands
        if operand.is_weight
    ]
    assert shapes == [(4, 4), (4, 1)]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        *((partial(PerGroup, size), "groups of") for size in (0, -2, True, np.nan, np.bool_(1))),
        *((partial(PerBlock, *s), "blocks of") for s in ((0, 0), (8, -1), (2.5, 8), (8, True))),
        (partial(PerGroup, -3, remainder=SHORTER), "groups of"),
        *((partial(PerChannel, axis=axis), "axis") for axis in ("a", 1.0, True, (0,))),
        (partial(PerGroup, 4, axis="a"), "axis 'a'"),
        *((partial(PerBlock, 8, 8, axes=a), "a pair") for a in ([0, 1], (0,), (0, "a"), 1)),
    ],
)
def test_what_no_tensor_fits_is_refused_when_made(make, match):
    with pytest.raises(errors.GranularityError, match=match) as caught:
        make()
    assert "qj.Per" in caught.value.where
    assert type(eval(caught.value.fix, {"qj": qj})) is make.func


@pytest.mark.parametrize("make", [partial(PerGroup, 4), partial(PerBlock, 4, 4)])
def test_a_remainder_is_named_not_switched_on(make):
    with pytest.raises(errors.ArgumentError, match="remainder is a bool") as caught:
        make(remainder=True)
    assert make(remainder=eval(caught.value.fix.removeprefix("remainder="), {"qj": qj}))


def test_whole_numbers_of_numpy_are_sizes_and_axes():
    assert PerGroup(np.int64(4), axis=np.int32(-1)) == PerGroup(4, axis=-1)
    assert PerBlock(np.int64(4), 2, axes=(np.int8(0), 1)) == PerBlock(4, 2, axes=(0, 1))


@pytest.mark.parametrize(
    ("granularity", "axes", "match"),
    [
        (PerBlock(2, 2), OperandAxes((0, 1), ()), "no contracted axis"),
        (PerBlock(2, 2), OperandAxes((), (0, 1)), "no free axis"),
        (PerBlock(2, 2, axes=(1, -1)), ALONG_FIRST, "both lie along axis 1"),
        (PerBlock(2, 2, axes=(0, 2)), ALONG_FIRST, "axis 2 does not exist"),
    ],
)
def test_blocks_without_two_axes(granularity, axes, match):
    with pytest.raises(errors.GranularityError, match=match):
        granularity.scale_shape((4, 4), axes, is_weight=True)
