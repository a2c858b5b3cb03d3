"""Every range rule on data at the edge: what comes out is defined, and never silent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors, ranges, statistics
from quantjax.affine import Fault, qparams_from_range
from quantjax.arithmetic import Arithmetic
from quantjax.formats import integer
from quantjax.ranges import MIN_MAX, MOVING_AVERAGE, Range, RangeRule, Target
from quantjax.simulation import apply
from tests import models
from tests.ranges import cases
from tests.ranges.cases import ASYMMETRIC, RULES, SYMMETRIC, at_hand, drawn, observed
from tests.refused import refused

pytestmark = pytest.mark.thinned(23)

ANY_RULE = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
ORDERED = [rule for rule in RULES if rule is not MOVING_AVERAGE]
GROUPS = (1, 4)


def channels(*batches: np.ndarray) -> statistics.Statistics:
    """Statistics of ``(n, 4)``, a group for each column."""
    seen = statistics.init(GROUPS)
    for batch in batches:
        seen = cases.updated(seen, jnp.asarray(batch))
    return seen


@functools.cache
def _qparams(rule: RangeRule, symmetric: bool):
    target = SYMMETRIC if symmetric else ASYMMETRIC

    def run(seen, bits):
        found = ranges.derive(rule, seen, target._replace(bits=bits))
        qparams = qparams_from_range(
            found.low,
            found.high,
            bits,
            format=target.format,
            symmetric=symmetric,
            calibrated=found.calibrated,
        )
        return found, qparams

    return jax.jit(run)


def derived(rule, seen, *, symmetric=False, bits=8):
    """The range, and the QParams that come of it."""
    return _qparams(rule, symmetric)(seen, jnp.float32(bits))


def usable(found: Range, qparams: qj.QParams) -> None:
    assert np.isfinite(found.low).all()
    assert np.isfinite(found.high).all()
    assert (np.asarray(found.low) <= np.asarray(found.high)).all()
    assert np.isfinite(qparams.scale).all()
    assert (np.asarray(qparams.scale) > 0).all()


@ANY_RULE
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_at_a_hundred_sigma(rule, symmetric):
    """The whole range covers it; moments and shares do not."""
    x = drawn("gaussian", 1)
    x[17] = 100.0
    for seen in (observed(*x.reshape(4, -1)), at_hand(x)):
        if rule is MOVING_AVERAGE and not isinstance(seen.distribution, statistics.Histogram):
            continue
        found, qparams = derived(rule, seen, symmetric=symmetric, bits=4)
        usable(found, qparams)
        if rule is MIN_MAX:
            assert found.high == 100.0
        elif rule.name.startswith(("aciq", "percentile", "sigma", "sawb")):
            assert found.high.item() < 35.0


@ANY_RULE
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_channel_of_zeros_beside_others(rule, symmetric):
    x = drawn("gaussian", 2).reshape(-1, 4)
    x[:, 2] = 0.0
    found, qparams = derived(rule, channels(x), symmetric=symmetric)
    usable(found, qparams)
    alone, _ = derived(rule, channels(np.delete(x, 2, 1)[:, [0, 1, 2, 2]]), symmetric=symmetric)
    assert_array_equal(found.low[0, [0, 1, 3]], alone.low[0, :3])
    assert_array_equal(found.high[0, [0, 1, 3]], alone.high[0, :3])
    target = Target(cases.SIGNED, True, jnp.float32(8)) if symmetric else ASYMMETRIC
    zero, _ = target.quantize(jnp.zeros(3), found.low[0, 2], found.high[0, 2])
    assert_array_equal(zero, np.zeros(3))


@ANY_RULE
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_sided_data(rule, sign, symmetric):
    x = np.float32(sign) * np.abs(drawn("laplacian", 3))
    found, qparams = derived(rule, observed(x), symmetric=symmetric)
    usable(found, qparams)
    if rule.name.startswith("constant"):
        return
    y = _round_trip(x, qparams, symmetric)
    assert np.abs(y - x).mean() < 0.3 * np.abs(x).mean()
    assert y.min() >= 0 if sign > 0 else y.max() <= 0


def _round_trip(x, qparams, symmetric):
    format = cases.SIGNED if symmetric else cases.UNSIGNED
    return np.asarray(apply(jnp.asarray(x), qparams, Arithmetic(format)))


@ANY_RULE
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 1e30])
def test_one_sample(rule, value):
    for symmetric in (True, False):
        found, qparams = derived(rule, observed(np.float32([value])), symmetric=symmetric)
        usable(found, qparams)


@ANY_RULE
def test_a_partial_last_batch_is_the_batch_without_what_is_masked(rule):
    x = drawn("gaussian", 4).reshape(4, -1)
    padded = x[3].copy()
    padded[100:] = 1e9
    mask = np.arange(x[3].size) < 100
    first = observed(*x[:3])
    masked = cases.updated(first, jnp.asarray(padded), where=jnp.asarray(mask))
    short = cases.updated(first, jnp.asarray(x[3][:100]))
    want, got = (derived(rule, seen)[0] for seen in (short, masked))
    # Sums of as many zeros more are added in another order.
    np.testing.assert_allclose(got.low, want.low, rtol=1e-5)
    np.testing.assert_allclose(got.high, want.high, rtol=1e-5)


@ANY_RULE
def test_bfloat16_is_its_values_in_float32(rule):
    x = jnp.asarray(drawn("gaussian", 5), jnp.bfloat16)
    for a, b in zip(
        *(
            derived(rule, cases.updated(statistics.init((1,)), v))[0]
            for v in (x, x.astype(jnp.float32))
        ),
        strict=True,
    ):
        assert_array_equal(a, b)


@ANY_RULE
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_a_fault_of_their_channel(rule, value):
    x = drawn("gaussian", 6).reshape(-1, 4)
    broken = x.copy()
    broken[7, 1] = value
    found, qparams = derived(rule, channels(broken))
    assert_array_equal(np.isnan(qparams.scale), [[False, True, False, False]])
    assert qparams.zero_point[0, 1] == Fault.NOT_FINITE
    clean, _ = derived(rule, channels(x))
    assert_array_equal(np.delete(found.high, 1), np.delete(clean.high, 1))


@pytest.mark.parametrize(
    "rule", [r for r in RULES if "constant" not in r.name], ids=lambda r: r.name
)
def test_what_was_never_seen_is_a_fault(rule):
    for seen in (
        statistics.init(GROUPS),
        cases.updated(statistics.init(GROUPS), jnp.zeros((8, 4)), where=jnp.zeros((8, 1), bool)),
    ):
        _, qparams = derived(rule, seen)
        assert np.isnan(qparams.scale).all()
        assert (np.asarray(qparams.zero_point) == Fault.NEVER_CALIBRATED).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "rule", [r for r in RULES if "constant" not in r.name], ids=lambda r: r.name
)
def test_a_channel_that_no_value_reached_is_a_fault_of_its_own(rule, symmetric):
    x = jnp.asarray(drawn("gaussian", 6).reshape(-1, 4))
    where = jnp.ones(x.shape, bool).at[:, 1].set(False)
    partly = cases.updated(statistics.init(GROUPS), x, where=where)
    found, qparams = derived(rule, partly, symmetric=symmetric)
    assert_array_equal(np.isnan(qparams.scale), [[False, True, False, False]])
    assert qparams.zero_point[0, 1] == Fault.NOT_FINITE
    whole, _ = derived(rule, channels(x), symmetric=symmetric)
    assert_array_equal(np.delete(found.high, 1), np.delete(whole.high, 1))


@ANY_RULE
@pytest.mark.parametrize("bits", [0, 1, 2, 8])
def test_every_width_of_the_container(rule, bits):
    for symmetric in (True, False):
        usable(*derived(rule, observed(drawn("student", 7)), symmetric=symmetric, bits=bits))


@pytest.mark.parametrize("rule", ORDERED, ids=lambda rule: rule.name)
def test_the_order_of_batches_and_their_sizes_matter_by_rounding_alone(rule):
    x = drawn("laplacian", 8)
    want, _ = derived(rule, observed(x))
    for batches in (x.reshape(8, -1), x[::-1].reshape(2, -1)):
        got, _ = derived(rule, observed(*batches))
        np.testing.assert_allclose(got.low, want.low, rtol=2e-5)
        np.testing.assert_allclose(got.high, want.high, rtol=2e-5)


def test_a_model_that_yields_nan_is_named():
    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=8, activation_bits=8))
    observe = jax.jit(qj.observe(case.f, plan))
    _, state = observe(qj.init(plan), case.params, case.x.at[0, 0].set(jnp.nan))
    with refused(errors.DataError, "the range holds NaN or infinity", "activation"):
        qj.calibrate(plan, state, case.params, activation_rule=ranges.MSE)


def test_lsq_of_the_smallest_numbers_is_no_empty_range():
    """Its scale vanishes; the values do not."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=500) * 1e-37, jnp.float32)
    seen = statistics.of_tensor(x, (1,), with_values=True)
    target = Target(integer(signed=False), False, jnp.float32(8))
    low, high, _ = ranges.derive(ranges.LSQ, seen, target)
    assert high - low >= np.abs(x).max()
    qparams = target.qparams(low, high)
    found = qj.fake_quant(x, qparams.scale[0], qparams.zero_point[0], signed=False, bits=8)
    assert np.abs(found - x).max() < 0.1 * np.abs(x).max()


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_asymmetric_codes_of_the_largest_numbers_are_finite(bits):
    """A rounded zero point moved an end of the range beyond float32, and it became -inf."""
    w = jnp.array([[3.4e38], [-3.4e38], [1e38], [-1e38]])
    quantizer = qj.weight_quantizer(bits=bits, symmetric=False, rule=ranges.MIN_MAX)
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=quantizer))])
    plan = qj.plan(policy, qj.sites(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((1, 4))))
    qstate = qj.calibrate(plan, {}, {"w": w})
    assert qj.check(qstate, plan) == []
    found = qj.dequantize_params(qj.freeze(plan, qstate, {"w": w}))["w"]
    assert np.isfinite(found).all()
    assert np.abs(found / 3.4e38 - w / 3.4e38).max() < 4.1 / 2**bits
