"""Laws of all rules that try one scale after another, and of what they share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.affine import SMALLEST_SCALE, qparams_from_range
from quantjax.arithmetic import Arithmetic
from quantjax.formats import BUILT_IN, NVFP4, POWER_OF_TWO, integer, learned_codebook
from quantjax.ranges import MIN_MAX
from quantjax.ranges.admm import ADMM, admm
from quantjax.ranges.hqo import HQO_SCALE, HQO_ZERO_POINT, Solved, hqo
from quantjax.ranges.iterates import bounds_of, problem_of, quantized, whole_range
from quantjax.ranges.least_squares import LEAST_SQUARES, least_squares
from quantjax.simulation import apply
from tests import models
from tests.ranges import fitting
from tests.ranges.fitting import INTEGERS, SHAPE, coarse, drawn, fitted, losses

pytestmark = pytest.mark.thinned(17)

SYMMETRIC = (LEAST_SQUARES, ADMM, HQO_SCALE)
RULES = (*SYMMETRIC, HQO_ZERO_POINT)
ANY_RULE = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
KINDS = st.sampled_from(sorted(fitting.DRAWS))
FEW = settings(max_examples=25)
POWERS = {LEAST_SQUARES.name: 2.0, ADMM.name: 2.0}  # 0.7 for all others


def power(rule) -> float:
    return POWERS.get(rule.name, 0.7)


@functools.cache
def min_max(symmetric: bool, groups, format=INTEGERS):
    """The quantized tensor with the scales of the whole range, derived as for any rule."""

    def run(x, bits):
        quantizer = qj.Quantizer(
            format=format, bits=format.max_bits, symmetric=symmetric, granularity=qj.PerTensor()
        )
        qparams = quantizer.qparams_of(x, bits, scale_shape=groups, rule=MIN_MAX)
        return qparams, apply(x, qparams, Arithmetic(format))

    return jax.jit(run)


@ANY_RULE
@FEW
@given(kind=KINDS, seed=st.integers(0, 999), bits=st.integers(1, 8), place=st.integers(0, 5))
def test_never_worse_than_min_max(rule, kind, seed, bits, place):
    groups, x = fitting.GROUPS[place], drawn(kind, seed)
    symmetric = rule is not HQO_ZERO_POINT
    _, y = min_max(symmetric, groups)(x, jnp.float32(bits))
    before = losses(x, y, groups, power(rule))
    after = losses(x, fitted(rule, x, bits, groups)[1], groups, power(rule))
    assert (after <= before * (1 + coarse(bits))).all()


@ANY_RULE
@pytest.mark.parametrize("kind", ["normal", "laplace", "student"])
def test_better_than_min_max_at_few_bits(rule, kind):
    x, groups = drawn(kind, 1), (12, 1)
    symmetric = rule is not HQO_ZERO_POINT
    for bits in (2, 3):
        _, y = min_max(symmetric, groups)(x, jnp.float32(bits))
        after = losses(x, fitted(rule, x, bits)[1], groups, power(rule)).sum()
        assert after < 0.97 * losses(x, y, groups, power(rule)).sum()


@pytest.mark.parametrize("rule", [LEAST_SQUARES, HQO_SCALE], ids=lambda rule: rule.name)
@pytest.mark.parametrize("format", BUILT_IN, ids=lambda f: f.label(f.max_bits))
def test_every_format_that_has_levels(rule, format):
    x = drawn("laplace", 2)
    x = x if format.signed else np.abs(x)
    bits, groups = jnp.float32(format.max_bits), (12, 1)
    if format == learned_codebook(max_bits=4):
        with pytest.raises(errors.FormatError):
            rule.fit(jnp.asarray(x), groups, format, bits)
        return
    qparams, y = fitted(rule, x, bits, groups, format)
    _, before = min_max(True, groups, format)(x, bits)
    assert np.isfinite(y).all()
    assert (qparams.scale > 0).all()
    assert_array_equal(qparams.zero_point, np.zeros(groups))
    if format.scale_rule.is_power_of_two:
        assert_array_equal(np.frexp(qparams.scale)[0], np.full(groups, 0.5))
    less, more = (losses(x, v, groups, power(rule)) for v in (y, before))
    if format == NVFP4:  # scales depend on those of other groups
        less, more = less.sum(), more.sum()
    assert (less <= more * (1 + coarse(format.max_bits))).all()


@pytest.mark.parametrize("rule", [LEAST_SQUARES, HQO_SCALE], ids=lambda rule: rule.name)
def test_neighbouring_powers_of_two_are_tried(rule):
    """A fitted scale a little below a power of two would be taken back to it for ever."""
    x = np.concatenate([drawn("normal", 3, (4, 60)), np.full((4, 1), 4.2, np.float32)], 1)
    format = integer(max_bits=8, scale_rule=POWER_OF_TWO)
    qparams, y = fitted(rule, x, 4, (4, 1), format)
    start, before = min_max(True, (4, 1), format)(x, jnp.float32(4))
    assert set(np.ravel(qparams.scale / start.scale)) <= {0.5, 0.25}
    less, more = (losses(x, v, (4, 1), power(rule)) for v in (y, before))
    assert (less < more).all()


def test_scales_that_depend_on_other_groups_never_raise_the_whole_error():
    for seed in range(4):
        rows = np.float32(2.0) ** np.arange(-6, 6, dtype=np.float32)[:, None]
        x = drawn("student", seed) * rows
        for rule in (LEAST_SQUARES, HQO_SCALE):
            qparams, y = fitted(rule, x, 4, (12, 1), NVFP4)
            _, before = min_max(True, (12, 1), NVFP4)(x, jnp.float32(4))
            less, more = (losses(x, v, (12, 1), power(rule)).sum() for v in (y, before))
            assert less <= more * (1 + coarse(4))
            # A set of scales that the rule itself gives: that of what it covers, again.
            assert np.unique(np.float64(qparams.scale) / np.float64(qparams.scale).max()).size > 1


@ANY_RULE
@FEW
@given(exponent=st.integers(-80, 80), kind=KINDS, bits=st.integers(1, 8))
def test_powers_of_two_go_into_the_scale(rule, exponent, kind, bits):
    x, factor = drawn(kind, 4), np.float32(2.0**exponent)
    x[np.abs(x) < 1e-9] = 0.0
    one, other = fitted(rule, x, bits)[0], fitted(rule, x * factor, bits)[0]
    assert_array_equal(one.scale * factor, other.scale)
    assert_array_equal(one.zero_point, other.zero_point)


@ANY_RULE
@pytest.mark.parametrize("bits", [2, 4])
def test_the_order_of_entries_matters_by_rounding_alone(rule, bits):
    x, draw = drawn("normal", 5), np.random.default_rng(0)
    one, _ = fitted(rule, x, bits)
    for _ in range(3):
        other, _ = fitted(rule, draw.permuted(x, axis=1), bits)
        assert_allclose(other.scale, one.scale, rtol=1e-5)
        assert_array_equal(other.zero_point, one.zero_point)


@ANY_RULE
def test_traced_widths_are_static_widths(rule):
    x, widths = jnp.asarray(drawn("laplace", 6)), jnp.float32([1, 2, 3, 8])
    together = jax.jit(jax.vmap(fitting.program(rule), in_axes=(None, 0)))(x, widths)[0]
    for place, bits in enumerate((1, 2, 3, 8)):
        mine = jax.tree.map(lambda leaf, i=place: leaf[i], together)
        jitted, _ = fitted(rule, x, bits)
        static = jax.jit(lambda x, b=bits: rule.fit(x, (12, 1), INTEGERS, jnp.float32(b)))(x)
        for other in (jitted, static):
            jax.tree.map(functools.partial(assert_allclose, rtol=1e-5), mine, other)
            assert float(other.bits) == bits
    eager = rule.fit(x, (12, 1), INTEGERS, widths[2])
    assert_allclose(eager.scale, together.scale[2], rtol=1e-5)
    stack = jnp.stack([x, 2.0 * x])
    both = jax.vmap(lambda x: rule.fit(x, (12, 1), INTEGERS, widths[1]).scale)(stack)
    assert_array_equal(both[1], 2.0 * both[0])


@ANY_RULE
@pytest.mark.parametrize("groups", fitting.GROUPS[1:])
def test_each_group_is_fitted_on_its_own(rule, groups):
    """Those that are shorter, at the end of an axis, among them."""
    x = drawn("student", 7)
    qparams, _ = fitted(rule, x, 3, groups)
    scales, zeros = np.ravel(qparams.scale), np.ravel(qparams.zero_point)
    sizes = set()
    for home, entries in enumerate(fitting.groups_of(x, groups)):
        if home in (0, len(scales) - 1):
            alone = fitted(rule, entries, 3, (1,))[0]
            assert_allclose(scales[home], alone.scale[0], rtol=1e-5)
            assert zeros[home] == alone.zero_point[0]
        sizes.add(entries.size)
    assert len(sizes) == (2 if groups in ((1, 3), (2, 3)) else 1)


@ANY_RULE
def test_zero_single_and_tiny_groups(rule):
    x = drawn("normal", 8)
    x[0], x[1], x[2] = 0.0, 1e-41, 3e-38
    x[3], x[4] = 1e38 * x[3], 1e-30 * x[4]
    x[5], x[5, 3] = 0.0, -0.3
    for bits in (1, 2, 8):
        qparams, y = fitted(rule, x, bits)
        assert np.isfinite(qparams.scale).all()
        assert (qparams.scale > 0).all()
        assert qparams.scale[0, 0] == (SMALLEST_SCALE if bits == 1 else 1.0)
        assert np.isfinite(y).all()
        if bits > 1:
            assert_array_equal(y[0], np.zeros(16))
            assert_allclose(y[5], x[5], rtol=3e-7)
    for value in (0.37, -0.37, 1e-35, -3e38):
        single = np.float32([[value]])
        for bits in (1, 2, 3, 8):
            assert_allclose(fitted(rule, single, bits, (1, 1))[1], single, rtol=3e-7)
    empty = rule.fit(jnp.zeros((0, 4)), (1, 1), INTEGERS, jnp.float32(4))
    assert empty.scale.tolist() == [[1.0]]


def test_what_the_caller_deals_with_gives_no_nan_scale_by_accident():
    x = drawn("normal", 9)
    quantizer = qj.weight_quantizer(bits=4, rule=LEAST_SQUARES)
    fit = lambda x, bits: quantizer.qparams_of(x, jnp.float32(bits), scale_shape=(12, 1))  # noqa: E731
    bypass, beyond = fit(x, 0), fit(x, 9)
    assert_array_equal(bypass.scale, np.ones((12, 1)))
    assert np.isnan(beyond.scale).all()
    x[3, 3], clean = np.nan, fit(x, 4)
    broken = fit(x, 4)
    assert np.isnan(broken.scale[3]).all()
    assert_array_equal(np.delete(broken.scale, 3), np.delete(clean.scale, 3))


@pytest.mark.parametrize("symmetric", [True, False])
def test_bounds_and_scales_are_one_thing(symmetric):
    x = jnp.asarray(1e-20 * drawn("skewed", 10))
    problem = problem_of(x, (12, 1), INTEGERS, jnp.float32(4), symmetric=symmetric)
    assert_array_equal(problem.x * problem.unit, x)
    assert 1.0 <= float(jnp.abs(problem.x).max(1).min()) < 2.0
    start = whole_range(problem)
    now = quantized(problem, start, problem.x)
    again = quantized(problem, bounds_of(problem, now.scale, now.zero_point), problem.x)
    assert_allclose(again.scale, now.scale, rtol=2e-7)
    assert_array_equal(again.zero_point, now.zero_point)
    assert_array_equal(again.centered, now.centered)
    ends = jnp.abs(x).max(1, keepdims=True), jnp.maximum(x.max(1, keepdims=True), 0.0)
    low = -ends[0] if symmetric else jnp.minimum(x.min(1, keepdims=True), 0.0)
    want = qparams_from_range(
        low,
        ends[0] if symmetric else ends[1],
        jnp.float32(4),
        format=INTEGERS,
        symmetric=symmetric,
        calibrated=jnp.bool_(True),
    )
    assert_allclose(now.scale * problem.unit, want.scale, rtol=1e-7)
    assert_array_equal(now.zero_point, want.zero_point)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: least_squares(iterations=-1), "-1 iterations"),
        (lambda: least_squares(iterations=1.5), "1.5 iterations"),
        (lambda: admm(iterations=-2), "-2 iterations"),
        (lambda: admm(inner=0), "0 inner"),
        (lambda: admm(rho=0.0), "rho of 0.0"),
        (lambda: admm(rho=float("nan")), "rho of nan"),
        (lambda: admm(rho=float("inf")), "rho of inf"),
        (lambda: hqo(solved=Solved.SCALE, p=0.0), "p=0.0"),
        (lambda: hqo(solved=Solved.SCALE, p=1.5), "p=1.5"),
        (lambda: hqo(solved=Solved.SCALE, beta=0.0), "beta=0.0"),
        (lambda: hqo(solved=Solved.SCALE, kappa=0.9), "kappa=0.9"),
        (lambda: hqo(solved=Solved.SCALE, iterations=-1), "-1 iterations"),
    ],
)
def test_bad_parameters_are_refused(make, problem):
    with pytest.raises(errors.QuantizerError, match=problem) as caught:
        make()
    assert caught.value.fix


def test_rules_are_values_and_named():
    assert least_squares() == LEAST_SQUARES == least_squares(iterations=100)
    assert admm() == ADMM == admm(rho=0.5, inner=2)
    assert hqo(solved=Solved.SCALE) == HQO_SCALE == hqo(solved=Solved.SCALE, beta=10)
    assert hqo(solved=Solved.ZERO_POINT, p=0.7) == HQO_ZERO_POINT
    names = [rule.name for rule in RULES]
    assert names == ["least_squares", "admm", "hqo-scale", "hqo-zero_point"]
    assert least_squares(iterations=3).name == "least_squares-3"
    assert admm(rho=0.3).name == "admm(0.3,20,2)"
    assert hqo(solved=Solved.SCALE, p=0.5).name == "hqo-scale(0.5,10,1.01,20)"
    assert len({hash(rule) for rule in RULES}) == len(RULES)


@ANY_RULE
def test_a_model_runs_with_it(rule):
    """Plan, calibrate by the quantizer's rule and by argument, simulate, freeze, execute."""
    case, symmetric = models.mlp(), rule is not HQO_ZERO_POINT
    own = qj.weight_quantizer(bits=3, rule=rule, symmetric=symmetric)
    plans = [
        models.planned(case, qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))]))
        for weights in (own, qj.weight_quantizer(bits=3, symmetric=symmetric))
    ]
    qstate = jax.jit(functools.partial(qj.calibrate, plans[0], {}))(case.params)
    given_ = jax.jit(functools.partial(qj.calibrate, plans[1], {}, rule=rule))(case.params)
    models.assert_same_bits(jax.device_get(qstate), jax.device_get(given_))
    without = jax.jit(functools.partial(qj.calibrate, plans[1], {}))(case.params)
    scales = [np.concatenate([s.ravel() for s in jax.tree.leaves(q)]) for q in (qstate, without)]
    assert not np.array_equal(*scales)
    simulated = jax.jit(qj.fake_quantize(case.f, plans[0]))(qstate, case.params, case.x)
    frozen = jax.jit(functools.partial(qj.freeze, plans[0]))(qstate, case.params)
    executed = jax.jit(qj.execute(case.f, plans[0]))(qstate, frozen, case.x)
    assert_allclose(executed, simulated, rtol=1e-5, atol=1e-5)
    assert SHAPE == (12, 16)
