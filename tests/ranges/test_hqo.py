"""Half-quadratic optimization against its float64 model, its early stop and the squared error."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.formats import BUILT_IN, TERNARY, integer
from quantjax.ranges.hqo import HQO_SCALE, HQO_ZERO_POINT, Solved, _shrunk, hqo
from quantjax.ranges.least_squares import LEAST_SQUARES
from tests import models
from tests.oracles import fits as oracle
from tests.oracles.integers import Integers, bounds
from tests.ranges import fitting
from tests.ranges.fitting import coarse, drawn, fitted, loss
from tests.refused import refused

P = 0.7
ANY_KIND = pytest.mark.parametrize("kind", fitting.DRAWS)
BOTH = pytest.mark.parametrize("rule", [HQO_SCALE, HQO_ZERO_POINT], ids=lambda rule: rule.name)
FAMILIES = [Integers(b, True, n) for b in (2, 3, 4, 8) for n in (False, True)]
ASYMMETRIC = [*FAMILIES, *(Integers(b, False, n) for b in (2, 4, 8) for n in (False, True))]


def check_against_the_model(x: np.ndarray, family: Integers, *, symmetric: bool, **constants):
    """The loss of each row, and the parameters of most: a rounding can choose other codes."""
    format = integer(max_bits=8, signed=family.signed, narrow=family.narrow)
    solved = Solved.SCALE if symmetric else Solved.ZERO_POINT
    rule = hqo(solved=solved, **constants)
    qparams, _ = fitted(rule, x, family.bits, (12, 1), format)
    p, same = constants.get("p", P), 0
    names = {"iterations": "rounds"}
    model = {names.get(name, name): value for name, value in constants.items()}
    for row, scale, zero in zip(x, np.ravel(qparams.scale), qparams.zero_point, strict=True):
        iterates = oracle.half_quadratic(row, family, symmetric=symmetric, **model)
        losses = [oracle.error(row, at, family, p) for at in iterates]
        best = iterates[int(np.argmin(losses))]
        got = oracle.error(row, oracle.Affine(float(scale), zero.item()), family, p)
        rounding = row.size * (2.0**-23 * np.abs(row).max()) ** p
        assert got <= losses[0] * (1 + coarse(family.bits)) + rounding
        close = np.isclose(scale, best.scale, rtol=1e-5) and zero.item() == best.zero_point
        near = np.isclose(got, min(losses), rtol=40 * coarse(family.bits), atol=rounding)
        same += bool(near) and (bool(close) or family.bits == 8)
    assert same >= 11


@pytest.mark.parametrize("family", [*FAMILIES, Integers(1)], ids=str)
@ANY_KIND
def test_scales_are_those_of_the_float64_model(kind, family):
    check_against_the_model(drawn(kind), family, symmetric=True)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", ASYMMETRIC, ids=str)
@ANY_KIND
def test_zero_points_are_those_of_the_float64_model(kind, family):
    check_against_the_model(drawn(kind, 1), family, symmetric=False)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "constants",
    [{"p": 0.5}, {"p": 1.0, "beta": 3.0}, {"beta": 1.0, "kappa": 1.5}, {"iterations": 3}],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_constants_are_those_of_the_model_too(symmetric, constants):
    check_against_the_model(drawn("student", 2), Integers(3), symmetric=symmetric, **constants)


@ANY_KIND
@pytest.mark.parametrize("symmetric", [True, False])
def test_never_worse_than_an_early_stop(kind, symmetric):
    x, family = drawn(kind, 3), Integers(3)
    found = loss(HQO_SCALE if symmetric else HQO_ZERO_POINT, x, 3, power=P)
    stopped = []
    for row in x:
        iterates = oracle.half_quadratic(row, family, symmetric=symmetric)
        kept = oracle.first_that_is_no_better(iterates, row, family, P)
        stopped.append(oracle.error(row, kept, family, P))
    assert (found <= np.array(stopped) * (1 + 1e-3)).all()
    assert found.sum() <= np.sum(stopped)


@given(
    e=st.floats(-4.0, 4.0, width=32),
    beta=st.floats(0.5, 64.0, width=32),
    p=st.sampled_from([0.3, 0.5, 0.7, 1.0]),
)
def test_shrinking(e, beta, p):
    got = float(_shrunk(jnp.float32(e), jnp.float32(beta), p))
    want = float(oracle.shrunk(np.array([e]), beta, p)[0])
    assert_allclose(got, want, rtol=1e-4, atol=2e-5)
    assert abs(got) <= abs(e)
    assert got * e >= 0.0
    if abs(e) < 0.999 * beta ** (-1 / (2 - p)):
        assert got == 0.0


@settings(max_examples=30)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), skew=st.floats(-2.0, 2.0, width=32))
def test_without_the_scale_no_zero_point_is_better(seed, bits, skew):
    """Why the scale moves as well: that of the range clips nothing, whatever the zero point."""
    family = Integers(bits, False)
    row = np.float64(drawn("normal", seed, (1, 40))[0] + np.float32(skew))
    start = oracle.whole_range(row, family, symmetric=False)
    least = oracle.error(row, start, family, P)
    low, high = bounds(family)
    for zero in range(
        max(low, int(start.zero_point) - 3), min(high, int(start.zero_point) + 3) + 1
    ):
        assert oracle.error(row, oracle.Affine(start.scale, zero), family, P) > least * (1 - 1e-9)


@BOTH
def test_zero_points_are_integers_in_the_range(rule):
    for bits in (1, 2, 3, 8):
        for signed in (True, False):
            format = integer(max_bits=8, signed=signed)
            zero = fitted(rule, drawn("skewed", 4), bits, (12, 1), format)[0].zero_point
            low, high = bounds(Integers(bits, signed))
            assert_array_equal(zero, np.round(zero))
            assert (zero >= low).all()
            assert (zero <= high).all()
            if rule is HQO_SCALE:
                assert_array_equal(zero, np.zeros((12, 1)))


@pytest.mark.parametrize("bits", [2, 3])
def test_outliers_are_let_be(bits):
    """Least squares follows them; a small power of the error does not."""
    x = drawn("normal", 5, (8, 64))
    x[:, 0] *= 6.0
    mine, squared = (fitted(rule, x, bits, (8, 1))[0].scale for rule in (HQO_SCALE, LEAST_SQUARES))
    assert (mine <= squared).mean() > 0.7
    small, large = (loss(rule, x, bits, (8, 1), power=P) for rule in (HQO_SCALE, LEAST_SQUARES))
    assert small.sum() < large.sum()


def test_iterations_only_help():
    x = drawn("laplace", 6)
    for solved in Solved:
        found = [loss(hqo(solved=solved, iterations=n), x, 3, power=P) for n in (0, 1, 5, 20)]
        for before, after in itertools.pairwise(found):
            assert (after <= before * (1 + 1e-5)).all()
        assert found[-1].sum() < found[0].sum()


def test_unsigned_codes_of_positive_entries():
    x = np.abs(drawn("normal", 7))
    format = integer(max_bits=8, signed=False)
    scale, y = fitted(HQO_SCALE, x, 3, (12, 1), format)
    start = fitted(hqo(solved=Solved.SCALE, iterations=0), x, 3, (12, 1), format)[0]
    assert (scale.scale <= start.scale * 1.2).all()
    assert (y >= 0.0).all()


@pytest.mark.parametrize(
    "format", [f for f in BUILT_IN if not f.has_zero_point], ids=lambda f: f.label(f.max_bits)
)
def test_formats_without_a_zero_point_are_refused(format):
    with refused(errors.FormatError, format.name, "no zero point", "HQO_SCALE"):
        HQO_ZERO_POINT.fit(jnp.ones((2, 2)), (1, 1), format, jnp.float32(format.max_bits))


def test_live_ranges_take_it():
    case = models.dense()
    live = qj.activation_quantizer(bits=4, rule=HQO_ZERO_POINT, range=qj.RangeMode.LIVE)
    ready = models.ready(case, models.policy(qj.weight_quantizer(bits=4, rule=HQO_SCALE), live))
    y = qj.fake_quantize(case.f, ready.plan)(ready.qstate, case.params, case.x)
    assert np.isfinite(y).all()
    exact = case.f(case.params, case.x)
    assert np.abs(y - exact).max() < 0.5 * np.abs(exact).max()


def test_ternary_codes_have_a_scale_of_their_own():
    x = drawn("normal", 8)
    got, start = (
        loss(hqo(solved=Solved.SCALE, iterations=n), x, 2, (12, 1), TERNARY, P) for n in (20, 0)
    )
    assert got.sum() < 0.9 * start.sum()


def test_a_symmetric_quantizer_has_no_zero_point_to_find():
    with refused(errors.QuantizerError, "hqo-zero_point finds zero points", "symmetric=False"):
        qj.weight_quantizer(bits=3, rule=HQO_ZERO_POINT)
    case = models.dense()
    plan = models.planned(case, qj.uniform_policy(weight_bits=3, activation_bits=None))
    derive = lambda params: qj.calibrate(plan, {}, params, weight_rule=HQO_ZERO_POINT)  # noqa: E731
    for call in (derive, jax.jit(derive)):
        with refused(errors.QuantizerError, "the quantizer is symmetric"):
            call(case.params)


def own_fit(scale=0.5, zero_point=1.0):
    return qj.FitRule(
        "own",
        lambda x, shape, format, bits: qj.QParams(
            jnp.full(shape, scale), jnp.full(shape, zero_point), bits
        ),
    )


def test_zero_points_of_an_own_fit_are_refused_or_marked():
    case = models.dense()
    plan = models.planned(case, qj.uniform_policy(weight_bits=4, activation_bits=None))
    with refused(errors.QuantizerError, "the rule own finds zero points"):
        qj.calibrate(plan, {}, case.params, weight_rule=own_fit())
    weights = qj.weight_quantizer(bits=4, rule=own_fit(), granularity=qj.PerTensor())
    everywhere = qj.Policy([qj.rule(qj.everything(), qj.Scheme(weights=weights))])
    with refused(errors.QuantizerError, "the rule own finds zero points"):
        qj.quantize_params(case.params, everywhere)

    @jax.jit
    def traced(zero_point):
        rule = own_fit(zero_point=zero_point)
        return qj.calibrate(plan, {}, case.params, weight_rule=rule)

    assert qj.check(traced(0.0)) == []
    (problem,) = qj.check(traced(1.0))
    assert "a zero point for a symmetric quantizer" in problem.what


@pytest.mark.parametrize(
    ("fit", "fragments"),
    [
        (lambda x, shape, format, bits: jnp.ones(shape), ("returned no QParams", "ArrayImpl")),
        (
            lambda x, shape, format, bits: qj.QParams(jnp.ones((3, 3)), jnp.zeros(()), bits),
            ("shape (3, 3)", "(1, 5)"),
        ),
    ],
)
def test_what_an_own_fit_returns_is_checked(fit, fragments):
    case = models.dense()
    plan = models.planned(case, qj.uniform_policy(weight_bits=4, activation_bits=None))
    with refused(errors.PolicyError, "the rule own", *fragments):
        qj.calibrate(plan, {}, case.params, weight_rule=qj.FitRule("own", fit))
