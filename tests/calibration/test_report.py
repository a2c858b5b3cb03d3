"""A report's figures are those of the values themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.calibration import Model, batched, calibration_report, collect
from quantjax.ranges import (
    ACIQ_GAUSSIAN,
    LSQ,
    MIN_MAX,
    MOVING_AVERAGE,
    MSE,
    SAWB,
    derive,
    percentile,
    sigma,
)
from quantjax.statistics import BINS
from tests.calibration import oracle, tiny
from tests.refused import refused

pytestmark = pytest.mark.thinned(3)

RULES = (MIN_MAX, MOVING_AVERAGE, percentile(0.99), sigma(2.0), SAWB, ACIQ_GAUSSIAN, LSQ)
NAMES = [rule.name for rule in RULES]
BITS = (1, 2, 4, 8)


@pytest.fixture(scope="module", params=tiny.KINDS)
def case(request):
    """Model, data, what was collected, and a report at four bits."""
    model, data, collected = tiny.seen(request.param)
    report = calibration_report(collected.plan, collected.state, model.params, rules=RULES)
    return model, np.concatenate(data), collected, report


def again(case, **options):
    model, _, collected, _ = case
    return calibration_report(collected.plan, collected.state, model.params, rules=RULES, **options)


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_measured_exactly(case, bits):
    weight = np.asarray(case[0].params["w"])
    found = again(case, weight_bits=bits)["w", "weight"]
    assert (found.groups, found.number, found.bits) == (12, weight.size, bits)
    for one in found.rules:
        columns = [
            oracle.symmetric(weight[:, c], one.low[0, c], one.high[0, c], bits) for c in range(12)
        ]
        if bits > 1:  # one bit has the codes -1 and +1
            expected = oracle.sqnr(sum(c.signal for c in columns), sum(c.noise for c in columns))
            assert one.sqnr == pytest.approx(expected, abs=0.01), one.rule
            assert one.saturated == sum(c.clipped for c in columns) / weight.size
            np.testing.assert_allclose(one.clip_low[0], [c.low for c in columns], rtol=1e-6)
            np.testing.assert_allclose(one.clip_high[0], [c.high for c in columns], rtol=1e-6)
        else:
            np.testing.assert_array_equal(one.clip_low, -one.clip_high)


@pytest.mark.parametrize("bits", BITS)
def test_activations_are_measured_as_well_as_the_histogram_tells(case, bits):
    x = case[1]
    found = again(case, activation_bits=bits)["w", "activation"]
    assert (found.groups, found.number) == (1, x.size)
    assert (found.low, found.high) == (x.min(), x.max())
    width = 2.0 * (x.max() - x.min()) / BINS
    for one in found.rules:
        low, high = one.low.item(), one.high.item()
        expected = oracle.asymmetric(x, low, high, bits)
        decibels = oracle.sqnr(expected.signal, expected.noise)
        assert one.sqnr == pytest.approx(decibels, abs=0.5), one.rule
        assert one.clip_low.item() == pytest.approx(expected.low, rel=1e-6, abs=1e-12)
        assert one.clip_high.item() == pytest.approx(expected.high, rel=1e-6, abs=1e-12)
        # Beyond half a step outside of the outermost levels, up to the bins that lie across.
        step = (expected.high - expected.low) / (2**bits - 1)
        beyond = [
            np.mean(
                (x < expected.low - 0.5 * step - slack) | (x > expected.high + 0.5 * step + slack)
            )
            for slack in (width, -width)
        ]
        assert beyond[0] <= one.saturated <= beyond[1], one.rule


def test_ranges_are_those_that_a_rule_derives(case):
    model, _, collected, report = case
    state, plan = collected.state["w"], collected.plan.sites[0]
    for operand in plan.operands:
        stats = state.get(operand.key) or qj.statistics.of_tensor(
            model.params["w"], (1, 12), with_values=True
        )
        for rule in RULES:
            target = operand.quantizer.target(jnp.float32(4))
            expected, found = derive(rule, stats, target), report["w", operand.key][rule.name]
            np.testing.assert_array_equal(found.low, expected.low)
            np.testing.assert_array_equal(found.high, expected.high)


def test_outermost_levels_are_those_of_calibrate(case):
    model, _, collected, report = case
    for rule in RULES:
        qstate = qj.calibrate(collected.plan, collected.state, model.params, rule=rule)["w"]
        for key, (low, high) in {"activation": (0, 15), "weight": (-8, 7)}.items():
            scale, zero = qstate[key].scale, qstate[key].zero_point
            one = report["w", key][rule.name]
            np.testing.assert_array_equal(one.clip_low, (low - zero) * scale)
            np.testing.assert_array_equal(one.clip_high, (high - zero) * scale)


def test_figures_of_weights_are_those_of_compare(case):
    """And of activations nearly, on the batch that was observed."""
    model, x, collected, report = case
    qstate = qj.calibrate(collected.plan, collected.state, model.params)
    compared = qj.compare(model.apply, collected.plan)(qstate, model.params, x)["w"].operands
    one = {key: report["w", key]["min_max"] for key in ("weight", "activation")}
    assert one["weight"].sqnr == pytest.approx(float(compared["weight"].sqnr), abs=1e-3)
    assert one["weight"].saturated == pytest.approx(float(compared["weight"].saturation))
    assert one["activation"].sqnr == pytest.approx(float(compared["activation"].sqnr), abs=0.2)


def test_the_whole_range_of_activations_saturates_nothing(case):
    assert case[3]["w", "activation"]["min_max"].saturated == 0.0


@pytest.mark.parametrize("key", ["weight", "activation"])
def test_a_searched_range_is_the_best(case, key):
    model, _, collected, report = case
    searched = calibration_report(collected.plan, collected.state, model.params, rules=[MSE])
    best = searched["w", key].rules[0].sqnr
    assert best >= report["w", key].best.sqnr - 0.1
    assert best >= report["w", key]["min_max"].sqnr - 0.01


@pytest.mark.parametrize("rule", ["min_max", "percentile(0.99)"])
def test_more_bits_are_better(case, rule):
    found = [again(case, weight_bits=b)["w", "weight"][rule].sqnr for b in (2, 4, 6, 8)]
    assert found == sorted(found)


def test_bars_hold_every_value(case):
    model, x, _, report = case
    for key, values in {"activation": x, "weight": np.asarray(model.params["w"])}.items():
        edges, counts, _ = report["w", key].bars
        assert counts.sum() == pytest.approx(values.size)
        assert (edges[0], edges[-1]) == (values.min(), values.max())
        assert np.all(np.diff(edges) > 0.0)
        assert len(counts) <= 200


def test_the_order_of_rules_is_kept_and_each_is_found_by_name(case):
    for operand in case[3]:
        assert [found.rule for found in operand.rules] == NAMES
        assert operand["sawb"] is operand.rules[4]
        assert operand.best.sqnr == max(found.sqnr for found in operand.rules)
    with refused(errors.NotFoundError, "no rule 'mse'", "try:   ['"):
        case[3]["w", "activation"]["mse"]
    with refused(errors.NotFoundError, "no operand ('v', 'activation')", "('w', 'activation')"):
        case[3]["v", "activation"]


def test_how_the_data_was_cut_into_batches_does_not_matter():
    model, data, _ = tiny.seen("normal")
    rules = [MIN_MAX, percentile(0.99), SAWB]
    reports = []
    for rows in (16, 256):
        policy = qj.uniform_policy(weight_bits=4, activation_bits=4)
        collected = collect(model, batched(data, rows=rows), policy)
        state = collected.state
        reports.append(calibration_report(collected.plan, state, model.params, rules=rules))
    for one, other in zip(*(r["w", "activation"].rules for r in reports), strict=True):
        np.testing.assert_allclose(one.high, other.high, rtol=1e-5)
        assert one.sqnr == pytest.approx(other.sqnr, abs=1e-2)
        assert one.saturated == pytest.approx(other.saturated, abs=1e-3)


def test_layers_of_a_stack_are_reported_each():
    stack = (
        jnp.asarray(tiny.draws("normal", 3, 8, 8, seed=1))
        * jnp.array([1.0, 2.0, 4.0])[:, None, None]
    )

    def f(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    x = jnp.asarray(tiny.draws("normal", 32, 8))
    rules = [MIN_MAX, percentile(0.9)]
    collected = collect(Model(f, {"w": stack}), [(x,)], qj.uniform_policy())
    report = calibration_report(collected.plan, collected.state, {"w": stack}, rules=rules)
    assert [one.layer for one in report] == [(0,), (1,), (2,)] * 2
    h = x
    for layer in range(3):
        alone = collect(Model(tiny.product, {"w": stack[layer]}), [(h,)], qj.uniform_policy())
        expected = calibration_report(alone.plan, alone.state, {"w": stack[layer]}, rules=rules)
        for key in ("activation", "weight"):
            found, one = report["w", key, layer], expected["w", key]
            assert found.title == f"w[{layer}] {key}"
            assert (found.number, found.groups) == (one.number, one.groups)
            for a, b in zip(found.rules, one.rules, strict=True):
                np.testing.assert_allclose(a.low, b.low, rtol=1e-5, atol=1e-7)
                assert a.sqnr == pytest.approx(b.sqnr, abs=0.01)
                assert a.saturated == pytest.approx(b.saturated, abs=0.01)
        h = jnp.tanh(h @ stack[layer])


def test_two_reports_are_told_apart_without_comparing_arrays(case):
    report = case[3]
    assert report in [report]
    assert report != object()
    assert len({report, *report}) == 1 + len(report)
