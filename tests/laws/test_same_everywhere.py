"""One result, however it is computed: eager, jit, vmap, map, scan, or one element at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import QParams, encode, integer
from quantjax.arithmetic import Arithmetic
from quantjax.simulation import apply
from tests.laws.cases import FAMILIES, GROUPS, SHAPE, Case, container, spread_scale
from tests.oracles.integers import Integers, bounds

BATCH = 3


def batch(groups: tuple[int, ...], family: Integers, dtype=np.float32) -> Case:
    """Cases stacked along a leading axis: values of all sizes and ties, scales and zero points."""
    rng = np.random.default_rng(len(groups) * 100 + family.bits)
    scale = (2.0 ** rng.uniform(-8, 8, (BATCH, *groups))).astype(np.float32)
    steps = rng.normal(size=(BATCH, *SHAPE)) * 2.0 ** rng.uniform(-2, 8, (BATCH, *SHAPE))
    steps[:, ::2] = np.rint(steps[:, ::2]) + 0.5
    x = steps * np.stack([np.broadcast_to(spread_scale(s), SHAPE) for s in scale])
    low, high = bounds(family)
    zero_point = rng.integers(low, high + 1, (BATCH, *groups)).astype(np.float32)
    return Case(x.astype(dtype), scale, zero_point, family)


def both(x, scale, zero_point, bits, *, format):
    """Simulated values and stored codes."""
    qparams = QParams(scale, zero_point, bits)
    return apply(x, qparams, Arithmetic(format)), encode(x, qparams, format).codes


def arrays(case: Case) -> tuple[jax.Array, ...]:
    bits = np.full(BATCH, case.family.bits, np.float32)
    return tuple(map(jnp.asarray, (case.x, case.scale, case.zero_point, bits)))


def looped(function, operands) -> list[np.ndarray]:
    """The function of each case of a batch, its results stacked."""
    results = [function(*(operand[i] for operand in operands)) for i in range(BATCH)]
    return [np.stack(each) for each in zip(*results, strict=True)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("groups", "dtype"), [*((groups, np.float32) for groups in GROUPS), ((1, 8), jnp.bfloat16)]
)
def test_all_transforms_agree(groups, dtype):
    for bits, (signed, narrow) in zip((1, 3, 8, 16), FAMILIES, strict=True):
        case = batch(groups, Integers(bits, signed, narrow), dtype)
        operands, one = arrays(case), functools.partial(both, format=container(case.family))
        want = looped(one, operands)
        for got in (
            looped(jax.jit(one), operands),
            jax.vmap(one)(*operands),
            jax.jit(jax.vmap(one))(*operands),
            lax.map(lambda operands, one=one: one(*operands), operands),
            lax.scan(lambda _, operands, one=one: (None, one(*operands)), None, operands)[1],
        ):
            assert_array_equal(np.asarray(got[0]), want[0])
            assert_array_equal(np.asarray(got[1]), want[1])


@pytest.mark.parametrize(("signed", "narrow"), FAMILIES)
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_one_element_at_a_time(bits, signed, narrow):
    case = batch((1, 8), Integers(bits, signed, narrow))
    x, scale, zero_point, width = (operand[0] for operand in arrays(case))
    format = container(case.family)
    values, codes = both(x, scale, zero_point, width, format=format)
    for row, column in [(0, 0), (1, 7), (4, 3), (5, 5)]:
        element = (x[row, column], scale[0, column], zero_point[0, column], width)
        value, code = both(*element, format=format)
        assert value == values[row, column]
        assert code == codes[row, column]


def test_the_storage_container_does_not_change_codes():
    case = batch((1, 8), Integers(5))
    operands = [operand[0] for operand in arrays(case)]
    wide = both(*operands, format=container(case.family))
    tight = both(*operands, format=integer(max_bits=5))
    assert tight[1].dtype == jnp.int8
    assert wide[1].dtype == jnp.int16
    assert_array_equal(wide[0], tight[0])
    assert_array_equal(np.asarray(wide[1]), np.asarray(tight[1]))


def test_shared_scales_are_those_of_each_part():
    # A scale per group of two rows: each pair of rows alone, with its row of scales.
    case = batch((3, 8), Integers(4))
    x, scale, zero_point, width = (operand[0] for operand in arrays(case))
    format = container(case.family)
    values, codes = both(x, scale, zero_point, width, format=format)
    for group in range(3):
        rows, home = slice(2 * group, 2 * group + 2), slice(group, group + 1)
        part = both(x[rows], scale[home], zero_point[home], width, format=format)
        assert_array_equal(part[0], values[rows])
        assert_array_equal(part[1], codes[rows])
