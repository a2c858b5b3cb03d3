"""Range rules alone and stacked under a traced index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import RangeRule, errors, integer, ranges, statistics
from quantjax.affine import Fault, qparams_from_range
from quantjax.ranges import MIN_MAX, MOVING_AVERAGE, Range, Target
from tests.oracles.extremes import group_extremes, moving_average

FORMAT, BITS, GROUPS = integer(), jnp.float32(8), (1, 3)
TARGET = Target(FORMAT, True, BITS)
X = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)


def target(bits) -> Target:
    return TARGET._replace(bits=bits)


def collect(*batches, where=None) -> statistics.Statistics:
    collected = statistics.init(GROUPS)
    for batch in batches:
        collected = statistics.update(collected, jnp.asarray(batch), where=where)
    return collected


def half(collected: statistics.Statistics, target: Target) -> Range:
    """A rule that looks at the width: half the range at one bit, less at more."""
    low, high = collected.extremes
    return Range(low / (target.bits + 1), high / (target.bits + 1), collected.batches > 0)


HALF = RangeRule("half", half)
RULES = (MIN_MAX, MOVING_AVERAGE, HALF)


def test_min_max_is_the_whole_range():
    low, high, calibrated = MIN_MAX.range(collect(*X), TARGET)
    want = group_extremes(X.reshape(20, 3), GROUPS)
    assert_array_equal(low, want[0])
    assert_array_equal(high, want[1])
    assert bool(calibrated)


def test_moving_average_is_that_of_each_batchs_range():
    low, high, calibrated = MOVING_AVERAGE.range(collect(*X), TARGET)
    ends = np.array([group_extremes(batch, GROUPS) for batch in X])
    for got, end in ((low, 0), (high, 1)):
        want = [moving_average(ends[:, end, 0, column], 0.01) for column in range(3)]
        np.testing.assert_allclose(got[0], want, rtol=1e-6)
    assert bool(calibrated)


@pytest.mark.parametrize("rule", [MIN_MAX, MOVING_AVERAGE], ids=lambda rule: rule.name)
def test_a_rule_is_the_same_under_any_trace_and_width(rule):
    collected = collect(*X)
    want = rule.range(collected, TARGET)
    for bits in (jnp.float32(0), jnp.float32(16), jnp.float32(jnp.nan)):
        jitted = jax.jit(lambda s, b: rule.range(s, target(b)))(collected, bits)
        jax.tree.map(assert_array_equal, jitted, want)


@pytest.mark.parametrize("rule", [MIN_MAX, MOVING_AVERAGE], ids=lambda rule: rule.name)
def test_a_rule_without_data_says_so(rule):
    assert bool(rule.range(collect(jnp.zeros((0, 3)), X[0]), TARGET).calibrated)
    for empty in (
        collect(),
        collect(jnp.zeros((0, 3))),
        collect(X[0], where=jnp.zeros((4, 3), bool)),
    ):
        low, high, calibrated = rule.range(empty, TARGET)
        assert not bool(calibrated)
        qparams = qparams_from_range(
            low, high, BITS, format=FORMAT, symmetric=True, calibrated=calibrated
        )
        assert np.isnan(qparams.scale).all()
        assert (qparams.zero_point == Fault.NEVER_CALIBRATED).all()


def test_merged_shards_have_a_whole_range_and_no_average():
    merged = statistics.merge_unordered(collect(X[0]), collect(X[1]))
    assert bool(MIN_MAX.range(merged, TARGET).calibrated)
    assert not bool(MOVING_AVERAGE.range(merged, TARGET).calibrated)


@pytest.mark.parametrize("rule", [MIN_MAX, MOVING_AVERAGE], ids=lambda rule: rule.name)
def test_nan_in_one_channel_is_a_fault_of_that_channel(rule):
    broken = X[1].copy()
    broken[2, 1] = np.nan
    low, high, calibrated = rule.range(collect(X[0], broken, X[2]), TARGET)
    qparams = qparams_from_range(
        low, high, BITS, format=FORMAT, symmetric=False, calibrated=calibrated
    )
    assert_array_equal(np.isnan(qparams.scale), [[False, True, False]])
    assert qparams.zero_point[0, 1] == Fault.NOT_FINITE


def test_a_stack_is_each_rule_alone():
    stacked, collected = ranges.stack(RULES), collect(*X)

    def at(index, bits):
        return stacked[index].range(collected, target(bits))

    indices = jnp.array([2, 0, 1, 0, 2])
    widths = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    vmapped = jax.jit(jax.vmap(at))(indices, widths)
    mapped = jax.jit(lambda *sweep: lax.map(lambda cell: at(*cell), sweep))(indices, widths)
    for i, index in enumerate([2, 0, 1, 0, 2]):
        want = RULES[index].range(collected, target(widths[i]))
        for got in (
            jax.tree.map(lambda leaf, i=i: leaf[i], vmapped),
            jax.tree.map(lambda leaf, i=i: leaf[i], mapped),
            at(index, widths[i]),
            jax.jit(at)(indices[i], widths[i]),
        ):
            jax.tree.map(assert_array_equal, Range(*got), Range(*want))


def test_a_stack_runs_under_vmap_of_statistics():
    each = [collect(X[i]) for i in range(3)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    stacked = ranges.stack(RULES)
    got = jax.vmap(lambda s, i: stacked[i].range(s, TARGET))(many, jnp.arange(3))
    for i, rule in enumerate(RULES):
        want = rule.range(each[i], TARGET)
        assert_array_equal(got.low[i], want.low)
        assert_array_equal(got.high[i], want.high)


@pytest.mark.parametrize("index", [-1, 3, np.int64(99), jnp.int32(3)])
def test_an_index_that_does_not_exist_raises(index):
    with pytest.raises(errors.PolicyError, match=f"rule {int(index)} does not exist") as caught:
        ranges.stack(RULES)[index]
    assert "min_max, moving_average, half" in caught.value.where
    assert "0 to 2" in caught.value.fix


def test_a_stack_is_a_sequence_of_its_rules():
    rules = (ranges.MIN_MAX, ranges.MSE, ranges.percentile(0.9))
    stack = ranges.stack(rules)
    assert len(stack) == 3
    assert [one.rules[int(one.chosen)] for one in stack] == list(rules)


def test_stacks_are_values_and_never_empty():
    assert ranges.stack(RULES) == ranges.stack(list(RULES))
    assert ranges.stack(RULES).names == ("min_max", "moving_average", "half")
    with pytest.raises(errors.PolicyError, match="no rules"):
        ranges.stack([])


def test_equal_rules_have_the_same_hash_whatever_their_numbers_were_made_of():
    for made in (ranges.percentile, ranges.l_p, ranges.sqnr, ranges.sigma):
        one, other = made(np.float32(0.99)), made(0.99)
        assert one != other or hash(one) == hash(other)
        assert made(np.float64(0.5)) == made(0.5) == made(np.float32(0.5))
        assert hash(made(np.float32(0.5))) == hash(made(0.5))
