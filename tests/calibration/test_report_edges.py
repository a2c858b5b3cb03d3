"""Which operands a report is about, other formats and granularities, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, formats, rounding
from quantjax.calibration import Model, calibration_report, collect
from quantjax.calibration.measure import points
from quantjax.ranges import (
    ADMM,
    LEAST_SQUARES,
    MIN_MAX,
    MSE,
    SAWB,
    TWN,
    XNOR,
    RangeRule,
    percentile,
    stack,
)
from quantjax.statistics import BINS
from tests.calibration import tiny
from tests.models import policy

pytestmark = pytest.mark.thinned(2)

NOWHERE = RangeRule(
    "nowhere", lambda seen, target: MIN_MAX.range(seen, target)._replace(low=jnp.nan)
)
LIVE = qj.activation_quantizer(granularity=qj.PerToken(), range=qj.RangeMode.LIVE)


@pytest.fixture(scope="module")
def two_layers():
    model = tiny.model()
    return model, collect(model, [(b,) for b in tiny.batches()], qj.uniform_policy())


def report(two_layers, rules=(MIN_MAX,), **options):
    model, collected = two_layers
    return calibration_report(collected.plan, collected.state, model.params, rules=rules, **options)


def of_policy(policy, rules=(MIN_MAX,), kind="normal", **options):
    model, _, collected = tiny.seen(kind, policy=policy)
    return calibration_report(collected.plan, collected.state, model.params, rules=rules, **options)


def keys(found):
    return [(one.site, one.operand) for one in found]


def test_operands_come_in_program_order(two_layers):
    found = report(two_layers)
    assert keys(found) == [(s, o) for s in ("first", "second") for o in ("activation", "weight")]
    assert len(found) == 4
    assert {one.bits for one in found} == {8}


def test_widths_by_site(two_layers):
    found = report(two_layers, weight_bits={"second": 3}, activation_bits=jnp.float32(5))
    assert [one.bits for one in found] == [5, 8, 5, 3]
    assert [one.quantizer for one in found] == [
        "uint5/tensor",
        "int8/channel",
        "uint5/tensor",
        "int3/channel",
    ]


def test_operands_of_width_0_are_left_out(two_layers):
    assert keys(report(two_layers, weight_bits=0)) == [
        ("first", "activation"),
        ("second", "activation"),
    ]
    assert keys(report(two_layers, activation_bits={"first": 0}, weight_bits=0)) == [
        ("second", "activation")
    ]


def test_live_ranges_are_left_out():
    weights = qj.weight_quantizer(bits=4)
    assert keys(of_policy(policy(weights=weights, activations=LIVE))) == [("w", "weight")]


def test_fits_serve_weights(two_layers):
    found = report(two_layers, [MIN_MAX, LEAST_SQUARES, ADMM], weight_bits=3)
    for site in ("first", "second"):
        assert [one.rule for one in found[site, "activation"].rules] == ["min_max"]
        least, squares, admm = found[site, "weight"].rules
        assert least.sqnr <= squares.sqnr + 1e-6
        assert squares.sqnr <= admm.sqnr + 1e-6
        np.testing.assert_array_equal(squares.low, squares.clip_low)
        np.testing.assert_array_equal(squares.high, squares.clip_high)


def test_operands_that_no_rule_serves_are_left_out(two_layers):
    found = report(two_layers, [XNOR], weight_bits=1)
    assert keys(found) == [("first", "weight"), ("second", "weight")]
    kernel = np.abs(np.asarray(two_layers[0].params["first"]))
    one = found["first", "weight"].rules[0]
    np.testing.assert_allclose(one.clip_high[0], kernel.mean(0), rtol=1e-6)


def test_layers_of_width_0_are_left_out():
    def f(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0]

    params = {"w": jnp.asarray(tiny.draws("normal", 3, 4, 4))}
    weights_only = qj.uniform_policy(activation_bits=None)
    collected = collect(Model(f, params), [(tiny.draws("normal", 8, 4),)], weights_only)
    found = calibration_report(
        collected.plan,
        collected.state,
        params,
        rules=[MIN_MAX, LEAST_SQUARES],
        weight_bits=jnp.array([4.0, 0.0, 2.0]),
    )
    assert [(one.layer, one.bits) for one in found] == [((0,), 4), ((2,), 2)]


@pytest.mark.parametrize(
    "weights",
    [
        qj.weight_quantizer(format=formats.E4M3FN),
        qj.weight_quantizer(format=formats.NF4),
        qj.weight_quantizer(format=formats.MXFP4, granularity=qj.PerGroup(4)),
        qj.weight_quantizer(format=formats.NVFP4, granularity=qj.PerGroup(4)),
        qj.weight_quantizer(bits=4, granularity=qj.PerGroup(8), symmetric=False),
        qj.weight_quantizer(bits=4, granularity=qj.PerTensor(), rounding=rounding.HALF_AWAY),
        qj.weight_quantizer(bits=3, format=qj.integer(scale_rule=formats.POWER_OF_TWO)),
    ],
    ids=str,
)
def test_other_formats_and_granularities(weights):
    """Against the forward pass itself."""
    found = of_policy(policy(weights=weights), [MIN_MAX, percentile(0.9)])
    model, _, collected = tiny.seen("normal", policy=policy(weights=weights))
    weight = np.asarray(model.params["w"], np.float64)
    for rule, one in zip((MIN_MAX, percentile(0.9)), found["w", "weight"].rules, strict=True):
        qstate = qj.calibrate(collected.plan, {}, model.params, rule=rule)
        identity = qj.fake_quantize(model.apply, collected.plan)
        quantized = np.asarray(identity(qstate, model.params, jnp.eye(16)), np.float64)
        noise = np.sum((quantized - weight) ** 2)
        assert one.sqnr == pytest.approx(10 * np.log10(np.sum(weight**2) / noise), abs=0.01)
        assert np.all(one.clip_low <= 0.0)
        assert np.all(one.clip_high >= 0.0)
        assert np.all(one.clip_high > one.clip_low)


def test_a_fit_with_parameters_of_its_own():
    ternary = qj.weight_quantizer(bits=2, format=formats.TERNARY, rule=TWN)
    found = of_policy(policy(weights=ternary), [TWN, MIN_MAX])["w", "weight"]
    assert found["twn"].sqnr > found["min_max"].sqnr
    np.testing.assert_array_equal(found["twn"].clip_low, -found["twn"].clip_high)


def test_random_roundings_are_measured_without_a_key():
    exact, random = (
        of_policy(policy(weights=qj.weight_quantizer(bits=4, rounding=how)))
        for how in (rounding.HALF_EVEN, rounding.STOCHASTIC)
    )
    assert random["w", "weight"].rules[0].sqnr == exact["w", "weight"].rules[0].sqnr


def test_exponent_bits_are_given_as_for_calibrate():
    weights = qj.weight_quantizer(format=formats.minifloat(4, 3))
    bits = [qj.FloatBits(exponent, 7 - exponent) for exponent in (2, 5)]
    few, many = (
        of_policy(policy(weights=weights), weight_bits=b)["w", "weight"].rules[0].sqnr for b in bits
    )
    assert few > many + 10.0  # normal numbers need digits, not range


def test_a_product_without_a_weight_has_two_observed_operands():
    def f(params, x):
        return jnp.einsum("bij,bkj->bik", x * params["s"], x)

    params = {"s": jnp.ones((1, 1, 4))}
    everywhere = policy(activations=qj.activation_quantizer(bits=4))
    collected = collect(Model(f, params), [(tiny.draws("normal", 8, 3, 4),)], everywhere)
    found = calibration_report(collected.plan, collected.state, params, rules=[MIN_MAX])
    assert [one.operand for one in found] == ["lhs", "rhs"]
    assert found.operands[0].rules[0].sqnr == pytest.approx(found.operands[1].rules[0].sqnr)


def test_constant_and_zero_tensors():
    for value in (0.0, 3.0):
        model = Model(tiny.product, {"w": jnp.full((4, 2), value)})
        collected = collect(model, [(np.full((8, 4), value, np.float32),)], qj.uniform_policy())
        found = calibration_report(
            collected.plan, collected.state, model.params, rules=[MIN_MAX, SAWB]
        )
        for one in found:
            edges, counts, bend = one.bars
            assert edges[0] < value < edges[-1]
            assert counts.sum() == one.number
            assert bend == np.inf
            assert "nan" not in str(one)
        assert found["w", "activation"]["min_max"].sqnr == np.inf


def test_points_lie_within_what_was_seen():
    _, data, collected = tiny.seen("shifted")
    stats = collected.state["w"]["activation"]
    values, weights = points(stats)
    assert values.shape == (1, 1, BINS)
    assert values.min() == np.min(data)
    assert values.max() == np.max(data)
    assert weights.sum() == np.size(data)


def test_outliers_bend_the_bars():
    _, data, collected = tiny.seen("outliers")
    found = calibration_report(
        collected.plan, collected.state, {"w": jnp.ones((16, 12))}, rules=[MIN_MAX]
    )
    edges, counts, bend = found["w", "activation"].bars
    assert 2.0 < bend < 5.0
    assert np.mean(np.abs(np.concatenate(data)) < bend) == pytest.approx(0.99, abs=0.005)
    inner = np.flatnonzero(np.abs(edges) < bend)
    assert len(inner) > 0.2 * len(edges)
    assert np.diff(edges).max() > 20.0 * np.diff(edges).min()
    assert counts.sum() == pytest.approx(np.size(data))


def test_each_rule_is_told_of(two_layers):
    steps = []
    report(two_layers, [MIN_MAX, SAWB, LEAST_SQUARES], on_rule=steps.append)
    assert steps == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rules": []}, errors.PolicyError, "a report of no rules"),
        ({"rules": [MIN_MAX, MSE, MIN_MAX]}, errors.PolicyError, "min_max is asked for twice"),
        ({"rules": ["mse"]}, errors.PolicyError, "'mse' is no rule"),
        ({"rules": [stack([MIN_MAX])[0]]}, errors.PolicyError, "is no rule"),
        ({"weight_bits": 9}, errors.BitsError, "9 bits are outside the format int"),
        ({"weight_bits": {"third": 4}}, errors.PolicyError, "no weight is quantized"),
        ({"weight_bits": 0, "activation_bits": 0}, errors.CalibrationError, "has a fixed range"),
        ({"rules": [TWN]}, errors.FormatError, "int has no threshold"),
        ({"rules": [NOWHERE]}, errors.DataError, "the rule nowhere: the range holds NaN"),
    ],
)
def test_refusals(two_layers, options, error, message):
    with pytest.raises(error) as caught:
        report(two_layers, **options)
    assert message in str(caught.value)
    assert "try:" in str(caught.value)


def test_one_rule_and_a_stack_are_rules(two_layers):
    for rules, names in ((MIN_MAX, ["min_max"]), (stack([MIN_MAX, MSE]), ["min_max", "mse"])):
        for operand in report(two_layers, rules):
            assert [one.rule for one in operand.rules] == names


def test_what_was_never_observed_or_without_a_histogram(two_layers):
    model, collected = two_layers
    for state, message in (
        (qj.init(collected.plan), "calibration was never run"),
        ({}, "the state has no statistics"),
    ):
        with pytest.raises(errors.CalibrationError, match=message):
            calibration_report(collected.plan, state, model.params)
    _, state = qj.observe(model.apply, collected.plan)(
        qj.init(collected.plan, histogram_bins=None), model.params, tiny.batches()[0]
    )
    with pytest.raises(errors.CalibrationError) as caught:
        calibration_report(collected.plan, state, model.params, rules=[MIN_MAX])
    assert "a calibration report reads a histogram, and none was kept" in str(caught.value)


def test_weights_that_are_not_finite(two_layers):
    model, collected = two_layers
    broken = {**model.params, "second": model.params["second"].at[0, 0].set(jnp.inf)}
    with pytest.raises(errors.DataError) as caught:
        calibration_report(collected.plan, collected.state, broken, rules=[MIN_MAX])
    assert "a weight is NaN or infinite" in str(caught.value)
    assert "site second, weight" in str(caught.value)


def test_other_parameters(two_layers):
    model, collected = two_layers
    with pytest.raises(errors.PlanMismatchError):
        calibration_report(collected.plan, collected.state, {"first": model.params["first"]})


def test_tracers_are_refused(two_layers):
    model, collected = two_layers

    def traced(state):
        calibration_report(collected.plan, state, model.params, rules=[MIN_MAX])

    with pytest.raises(errors.CalibrationError, match="these are tracers"):
        jax.jit(traced)(collected.state)
    with pytest.raises(errors.CalibrationError, match="these are tracers"):
        jax.jit(lambda bits: report(two_layers, weight_bits=bits))(4.0)


def test_each_role_has_its_own_width_and_biases_are_left_out():
    def f(params, x):
        return x @ params["a"] + params["b"][None, :]

    params = {"a": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.array([0.1, -0.2, 0.3])}
    x = jax.random.normal(jax.random.key(1), (16, 4))
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=8),
        activations=qj.activation_quantizer(bits=8),
        outputs=qj.activation_quantizer(bits=8),
        biases=qj.bias_quantizer(),
    )
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, x))
    _, state = qj.observe(f, plan)(qj.init(plan), params, x)
    options = {"rules": [MIN_MAX], "activation_bits": 4}
    shown = {o.operand: o for o in calibration_report(plan, state, params, **options)}
    assert set(shown) == {"weight", "activation", "output"}
    qstate = qj.calibrate(plan, state, params, activation_bits=4)["a"]
    narrower = {
        o.operand: o for o in calibration_report(plan, state, params, output_bits=4, **options)
    }
    assert "uint4" in str(shown["activation"])
    assert "uint8" in str(shown["output"])
    assert float(qstate["output"].bits) == 8.0
    assert "uint4" in str(narrower["output"])
    asleep = calibration_report(plan, state, params, rules=[MIN_MAX], activation_bits=0)
    assert {o.operand for o in asleep} == {"weight", "output"}


def test_a_layer_without_outputs_is_named():
    params = {"w": jnp.ones((4, 6)), "none": jnp.ones((6, 0))}
    f = lambda p, x: (x @ p["w"]) @ p["none"]  # noqa: E731
    x = jnp.ones((3, 4))
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    _, state = qj.observe(f, plan)(qj.init(plan), params, x)
    with pytest.raises(errors.DataError, match="weight without entries has no range") as caught:
        calibration_report(plan, state, params, rules=[MIN_MAX])
    assert "site none, 6x0" in str(caught.value)
