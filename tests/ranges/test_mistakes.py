"""What a researcher gets wrong with rules, states and masks: each is named, none is silent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors, ranges, statistics
from quantjax.ranges import COSINE, MIN_MAX, MSE, SAWB, Range, RangeRule, derive
from tests import models
from tests.ranges.cases import ASYMMETRIC, SYMMETRIC, at_hand, drawn, losses, observed
from tests.refused import refused


@pytest.fixture(scope="module")
def calibrated():
    """A case, its plan and its state."""
    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=8, activation_bits=8))
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    return case, plan, state


@pytest.mark.parametrize(
    ("rule", "fix"),
    [
        ("mse", "qj.ranges.MSE"),
        (ranges.percentile, "call it: qj.ranges.percentile(...)"),
        (ranges.stack([MIN_MAX, MSE]), "stack[i]"),
        ([MSE], "qj.ranges.MSE"),
    ],
    ids=["name", "function", "stack", "list"],
)
def test_what_is_no_rule_is_named_before_any_work(calibrated, rule, fix):
    case, plan, state = calibrated
    for argument in ("rule", "weight_rule", "activation_rule"):
        with refused(errors.PolicyError, "is no range rule", fix):
            qj.calibrate(plan, state, case.params, **{argument: rule})
    with pytest.raises(errors.PolicyError) as caught:
        qj.calibrate(plan, state, case.params, rule=rule)
    assert "RangeRule(" not in str(caught.value)  # no text of Python's in it
    for make in (qj.weight_quantizer, qj.activation_quantizer):
        with refused(errors.PolicyError, "is no range rule", fix):
            make(bits=8, rule=rule)


def test_an_index_is_no_part_of_a_quantizer():
    with refused(errors.PolicyError, "one of min_max, mse", "stack[i]"):
        qj.weight_quantizer(bits=8, rule=ranges.stack([MIN_MAX, MSE])[0])


@pytest.mark.parametrize("index", [0.7, jnp.float32(1), jnp.arange(2)])
def test_an_index_is_one_whole_number(index):
    with refused(errors.PolicyError, "one whole number"):
        ranges.stack([MIN_MAX, MSE])[index]


def test_a_traced_index_beyond_the_rules_is_nan():
    seen, stacked = observed(drawn("gaussian")), ranges.stack([MIN_MAX, SAWB])
    run = jax.jit(jax.vmap(lambda i: derive(stacked[i], seen, SYMMETRIC)))
    assert_array_equal(np.isnan(run(jnp.array([-1, 0, 1, 2])).high[:, 0]), [1, 0, 0, 1])


def test_bounds_in_the_wrong_order_are_a_fault(calibrated):
    case, plan, state = calibrated
    swapped = RangeRule("swapped", lambda s, t: Range(s.extremes.high, s.extremes.low, True))
    with refused(errors.DataError, "range"):
        qj.calibrate(plan, state, case.params, activation_rule=swapped)


def test_a_rule_that_returns_no_range_is_named(calibrated):
    case, plan, state = calibrated
    pair = RangeRule("pair", lambda s, t: (s.extremes.low, s.extremes.high))
    with refused(errors.PolicyError, "the rule pair returned no range", "qj.ranges.Range"):
        qj.calibrate(plan, state, case.params, activation_rule=pair)


def test_a_rule_that_does_not_say_that_it_reads_has_nothing_to_read(calibrated):
    case, plan, state = calibrated
    rule = RangeRule("peeks", lambda s, t: Range(-s.sample.values[0], s.sample.values[0], True))
    for argument in ("weight_rule", "activation_rule"):
        with refused(errors.StatisticsError, "reads_distribution=True"):
            qj.calibrate(plan, state, case.params, **{argument: rule})


@pytest.mark.thinned(2)
@pytest.mark.parametrize("other", [MSE, ranges.KL_ONNXRUNTIME])
def test_a_rule_for_all_groups_sees_them_all_in_a_stack_too(calibrated, other):
    case, plan, state = calibrated

    def shared(seen, target):
        del target
        reach = jnp.broadcast_to(jnp.max(seen.extremes.high), seen.scale_shape)
        return Range(-reach, reach, seen.batches > 0)

    rule = RangeRule("shared", shared)
    want = qj.calibrate(plan, state, case.params, weight_rule=rule)
    for index, alone in enumerate((rule, other)):
        stacked = ranges.stack([rule, other])[index]
        got = qj.calibrate(plan, state, case.params, weight_rule=stacked)
        want = qj.calibrate(plan, state, case.params, weight_rule=alone)
        for name in got:
            assert_allclose(got[name]["weight"].scale, want[name]["weight"].scale, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [3.0, -0.2, 1e-20])
def test_cosine_leaves_a_constant_its_size(value, bits):
    x = np.full(64, value, np.float32)
    for target in (ASYMMETRIC, SYMMETRIC):
        target = target._replace(bits=jnp.float32(bits))
        found, whole = (derive(rule, observed(x), target) for rule in (COSINE, MIN_MAX))
        mine, theirs = losses(
            x, target, bits, *(np.ravel([a, b]) for a, b in zip(found[:2], whole[:2], strict=True))
        )
        assert mine <= theirs * 1.01 + 1e-12 * value**2


def test_sawb_of_one_sided_data_has_all_codes_on_their_side():
    x = drawn("relu")
    low, high = derive(SAWB, observed(x), ASYMMETRIC._replace(bits=jnp.float32(4)))[:2]
    assert low == 0.0
    assert 0.0 < high <= x.max()


def test_numbers_that_are_not_one_number_are_refused():
    for make in (
        lambda: ranges.percentile(jnp.array([0.9, 0.99])),
        lambda: ranges.constant(np.zeros(3), np.ones(3)),
        lambda: ranges.percentile("0.9"),
        lambda: ranges.l_p(None),
    ):
        with refused(errors.QuantizerError, "is no number", "jax.lax.map"):
            make()
    with refused(errors.QuantizerError, "inf standard deviations"):
        ranges.sigma(float("inf"))


def test_a_number_is_no_part_of_the_program():
    """Three percentiles are compiled once."""
    from importlib import import_module

    run = import_module("quantjax.ranges.derive")._run
    seen = observed(drawn("gaussian"))
    derive(ranges.percentile(0.9), seen, SYMMETRIC)
    before = run._cache_size()
    for share in (0.91, 0.92, 0.93):
        derive(ranges.percentile(share), seen, SYMMETRIC)
    assert run._cache_size() == before


def test_a_tuple_is_no_state(calibrated):
    case, plan, state = calibrated
    with refused(errors.CalibrationError, "the state is a tuple", "y, state = qj.observe"):
        qj.calibrate(plan, (0, state), case.params)


@pytest.mark.parametrize("constant", [-1.0, 99.0, float("nan")])
def test_averaging_constants_are_weights(constant):
    with refused(errors.StatisticsError, "averaging constant", "0.01"):
        statistics.init((1,), averaging_constant=constant)


def test_a_mask_is_boolean(calibrated):
    case, plan, _ = calibrated
    mask = np.ones(case.x.shape[0], np.float32)
    with refused(errors.DataError, "a mask of float32", "astype(bool)"):
        qj.observe(case.f, plan)(qj.init(plan), case.params, case.x, where=mask)
    with refused(errors.DataError, "a mask of int32", "where= of shape 3"):
        statistics.update(statistics.init((1,)), jnp.ones(3), where=np.arange(3, dtype=np.int32))
    listed = [True] * case.x.shape[0]
    _, one = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x, where=listed)
    _, other = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x, where=mask == 1)
    models.assert_same_bits(jax.device_get(one), jax.device_get(other))


def test_states_of_shards_merge_into_that_of_all(calibrated):
    case, plan, state = calibrated
    observe = jax.jit(qj.observe(case.f, plan))
    half = case.x.shape[0] // 2
    parts = [observe(qj.init(plan), case.params, x)[1] for x in (case.x[:half], case.x[half:])]
    merged = qj.merge_states(*parts)
    first = plan.quantized[0].site.name  # what came in is the data itself
    one, other = merged[first]["activation"], state[first]["activation"]
    for field in ("number", "extremes", "distribution"):
        models.assert_same_bits(getattr(one, field), getattr(other, field))
    with refused(errors.CalibrationError, "different plans", "one plan"):
        qj.merge_states(merged, {first: merged[first]})
    with refused(errors.StatisticsError, "statistics of shape (1,) and of (3,)"):
        statistics.merge(statistics.init((1,)), statistics.init((3,)))


def test_counts_keep_their_type_in_double_precision():
    with jax.enable_x64(True):
        x = jnp.ones((4, 8), jnp.float32)
        start = statistics.init((1,))

        def step(seen, row):
            return statistics.update(seen, row, where=row > 0), None

        seen, _ = jax.lax.scan(step, start, x)
        assert int(statistics.as_integer(seen.number)[0]) == 32
        assert seen.number.low.dtype == jnp.uint32


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 1, 1)])
def test_a_rule_that_returns_bounds_of_another_shape_is_named(shape):
    rule = RangeRule("mine", lambda s, t: Range(-jnp.ones(shape), jnp.ones(shape), s.batches > 0))
    seen = statistics_of_channels()
    with refused(errors.PolicyError, "the rule mine", f"shape {shape}", "(1, 2)"):
        derive(rule, seen, SYMMETRIC)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1), (1, 2)])
def test_bounds_that_hold_for_all_or_for_each_are_ranges(shape):
    rule = RangeRule("mine", lambda s, t: Range(-jnp.ones(shape), jnp.ones(shape), s.batches > 0))
    found = derive(rule, statistics_of_channels(), SYMMETRIC)
    assert float(jnp.max(found.high)) == 1.0


def statistics_of_channels():
    return statistics.of_tensor(jnp.ones((4, 2)), (1, 2), with_values=False)


class Unhashable:
    """A rule's function with settings that change."""

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Unhashable)

    def __call__(self, statistics, target):
        return ranges.Range(*statistics.extremes, statistics.batches > 0)


def test_functions_that_cannot_be_hashed_are_refused_by_name():
    for reads in (False, True):
        rule = ranges.RangeRule("own", Unhashable(), reads)
        with refused(errors.PolicyError, "the rule own cannot be hashed", "frozen=True"):
            qj.weight_quantizer(rule=rule)
        with refused(errors.PolicyError, "the rule own cannot be hashed", "frozen=True"):
            ranges.derive(rule, at_hand(drawn("gaussian")), SYMMETRIC)


@pytest.mark.parametrize("returned", [(-1.0, 1.0), None, (jnp.zeros(3), jnp.ones(3), True)])
def test_a_rule_in_a_stack_is_checked_like_one_alone(returned):
    own = ranges.RangeRule("own", lambda seen, target: returned)
    for rule in (own, ranges.stack([ranges.MIN_MAX, own])[1]):
        with refused(errors.PolicyError, "the rule own returned"):
            ranges.derive(rule, at_hand(drawn("gaussian")), SYMMETRIC)


def test_fits_with_theta_of_other_structure_are_no_stack():
    def fit(tensor, shape, format, bits):
        return qj.QParams(jnp.ones(shape), jnp.zeros(shape), bits, {"levels": jnp.zeros(4)})

    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=4, activation_bits=None))
    rule = ranges.stack([ranges.FitRule("own", fit), ranges.MIN_MAX])[0]
    with refused(errors.PolicyError, "own and min_max give theta of other structure"):
        qj.calibrate(plan, {}, case.params, weight_rule=rule)


def test_a_fit_may_return_python_numbers():
    def fit(tensor, shape, format, bits):
        return qj.QParams(jnp.ones(shape, jnp.bfloat16), 0, 4)

    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=4, activation_bits=None))
    qstate = qj.calibrate(plan, {}, case.params, weight_rule=ranges.FitRule("own", fit))
    for operands in qstate.values():
        assert {leaf.dtype for leaf in jax.tree.leaves(operands)} == {jnp.dtype(jnp.float32)}
        assert operands["weight"].bits == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ranges.k_means(iterations=-1), "-1 iterations"),
        (lambda: ranges.k_means(iterations=1.5), "iterations is a float"),
        (lambda: ranges.least_squares(iterations=True), "iterations is a bool"),
        (lambda: ranges.admm(iterations="2"), "iterations is a str"),
        (lambda: ranges.hqo(solved=None), "solved is None"),
        (lambda: ranges.kl_onnxruntime(bins=1025.0), "bins is a float"),
    ],
)
def test_settings_of_another_kind_are_refused_when_a_rule_is_made(make, said):
    with refused(errors.QuantjaxError, said):
        make()


def test_a_traced_factor_that_is_infinite_is_none():
    seen = observed(*drawn("gaussian", 0).reshape(4, -1))
    rule = lambda k: derive(ranges.sigma(k), seen, SYMMETRIC)  # noqa: E731
    assert np.isnan(jax.jit(rule)(jnp.float32(jnp.inf)).high).all()


def test_a_place_beyond_a_stack_of_fits_is_told_by_check():
    case = models.mlp()
    plan = models.planned(case, models.policy(qj.weight_quantizer()))
    stack = ranges.stack([ranges.ADMM, ranges.LEAST_SQUARES])
    qstate = jax.jit(lambda i: qj.calibrate(plan, {}, case.params, weight_rule=stack[i]))(7)
    problems = qj.check(qstate, plan)
    assert {problem.what for problem in problems} == {
        "the range holds NaN or infinity, or nothing was seen of some channel"
    }
