"""Range rules, alone and stacked under a traced index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, statistics
from quantjax.ranges import MIN_MAX, MOVING_AVERAGE, IndexedRule, RangeRule, stack

TARGET = qj.ranges.Target(qj.integer(), True, jnp.float32(8))
RULES = (MIN_MAX, MOVING_AVERAGE)


@pytest.fixture(scope="module")
def seen():
    state = statistics.init((1, 3))
    for batch in np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32):
        state = statistics.update(state, jnp.asarray(batch))
    return state


def test_min_max_is_all_that_was_seen(seen):
    low, high, calibrated = MIN_MAX.range(seen, TARGET)
    np.testing.assert_array_equal(low, seen.extremes.low)
    np.testing.assert_array_equal(high, seen.extremes.high)
    assert bool(calibrated)


def test_moving_average_is_inside_the_whole_range(seen):
    low, high, calibrated = MOVING_AVERAGE.range(seen, TARGET)
    assert np.all(low >= seen.extremes.low)
    assert np.all(high <= seen.extremes.high)
    assert np.any(low > seen.extremes.low)
    assert bool(calibrated)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_one_batch_gives_its_own_range_by_every_rule(rule):
    x = jnp.array([[-2.0, 1.0], [3.0, 0.5]])
    state = statistics.update(statistics.init((1, 2)), x)
    low, high, _ = rule.range(state, TARGET)
    np.testing.assert_array_equal(low, [[-2.0, 0.5]])
    np.testing.assert_array_equal(high, [[3.0, 1.0]])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_nothing_seen_is_said(rule):
    assert not bool(rule.range(statistics.init((1, 3)), TARGET).calibrated)


def test_merged_shards_have_no_moving_average(seen):
    merged = statistics.merge_unordered(seen, seen)
    assert bool(MIN_MAX.range(merged, TARGET).calibrated)
    assert not bool(MOVING_AVERAGE.range(merged, TARGET).calibrated)


@pytest.mark.parametrize("index", [0, 1])
def test_a_stacked_rule_equals_the_rule_alone(seen, index):
    alone = RULES[index].range(seen, TARGET)
    rules = stack(RULES)
    jax.tree.map(np.testing.assert_array_equal, rules[index].range(seen, TARGET), alone)
    traced = jax.jit(lambda i: rules[i].range(seen, TARGET))(jnp.int32(index))
    jax.tree.map(np.testing.assert_array_equal, traced, alone)


@pytest.mark.parametrize("transform", ["vmap", "map"])
def test_the_rule_is_an_axis(seen, transform):
    rules = stack(RULES)

    def one(index):
        return rules[index].range(seen, TARGET)

    indices = jnp.arange(2)
    many = jax.vmap(one)(indices) if transform == "vmap" else jax.lax.map(one, indices)
    for index, rule in enumerate(RULES):
        picked = jax.tree.map(lambda leaf, index=index: leaf[index], many)
        jax.tree.map(np.testing.assert_array_equal, picked, rule.range(seen, TARGET))


def test_an_indexed_rule_is_a_pytree_argument(seen):
    rules, traces = stack(RULES), []

    @jax.jit
    def low(index):
        traces.append(1)
        rule = rules[index]
        assert isinstance(rule, IndexedRule)
        return rule.range(seen, TARGET).low

    assert not np.array_equal(low(jnp.int32(0)), low(jnp.int32(1)))
    assert len(traces) == 1


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_beyond_the_stack_raises(index):
    with pytest.raises(errors.PolicyError, match=r"min_max, moving_average[\s\S]*from 0 to 1"):
        stack(RULES)[index]


def test_a_stack_of_nothing_raises():
    with pytest.raises(errors.PolicyError, match="no rules"):
        stack([])


def test_a_rule_of_the_users_own_is_ten_lines(seen):
    def half_range(state, target):
        low, high, calibrated = MIN_MAX.range(state, target)
        return qj.ranges.Range(0.5 * low, 0.5 * high, calibrated)

    half = RangeRule("half", half_range)
    both = stack([MIN_MAX, half])
    np.testing.assert_array_equal(both[1].range(seen, TARGET).low, 0.5 * seen.extremes.low)
    assert both.names == ("min_max", "half")
    assert stack([MIN_MAX, half]) == both


@pytest.mark.parametrize("index", ["mse", 0.5, [0, 1]])
def test_a_stack_has_places_and_no_names(index):
    with pytest.raises(errors.PolicyError, match="one whole number"):
        stack(RULES)[index]
