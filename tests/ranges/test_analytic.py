"""Rules with a formula, against the formula in float64, published constants and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import optimize, special, stats

from quantjax import errors, integer, ranges
from quantjax.ranges import ACIQ_GAUSSIAN, ACIQ_LAPLACIAN, LSQ, MIN_MAX, SAWB
from quantjax.ranges.aciq import gaussian_clip, laplacian_clip
from quantjax.ranges.sawb import COEFFICIENTS, coefficients
from tests.ranges import cases
from tests.ranges.cases import ASYMMETRIC, SYMMETRIC, at_hand, derived, drawn, losses, observed
from tests.refused import refused

pytestmark = pytest.mark.thinned(6)

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
KINDS = st.sampled_from(sorted(cases.DRAWS))

# ACIQ

GAUSSIAN = {2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92}
LAPLACIAN = {2: 2.83, 3: 3.89, 4: 5.03, 5: 6.20, 6: 7.41, 7: 8.64, 8: 9.89}
"""The tables of Banner et al., 2019 (code), cut off after two digits."""


@pytest.mark.parametrize("bits", WIDTHS)
def test_aciq_has_the_published_constants(bits):
    for clip, table in ((gaussian_clip, GAUSSIAN), (laplacian_clip, LAPLACIAN)):
        assert clip(jnp.float32(bits)).item() == pytest.approx(table[bits], abs=0.0101)


@pytest.mark.parametrize("bits", range(1, 17))
def test_aciq_solves_its_equations(bits):
    """Laplacian: Lambert's function; Gaussian: the derivative of clipping and rounding error."""

    def slope(a: float) -> float:
        tail = stats.norm.pdf(a) - a * stats.norm.sf(a)
        return 4 * tail - 2 * a / (3 * 4.0**bits)

    want = optimize.brentq(slope, 0.1, 40.0, xtol=1e-12)
    assert gaussian_clip(jnp.float32(bits)).item() == pytest.approx(want, rel=2e-5)
    want = special.lambertw(3 * 4.0**bits).real
    assert laplacian_clip(jnp.float32(bits)).item() == pytest.approx(want, rel=2e-6)


def quantiles(kind: str, size: int = 60_000) -> np.ndarray:
    """As many quantiles at equal distances: a distribution without the chance of draws."""
    law = stats.norm if kind == "gaussian" else stats.laplace
    return np.float32(law.ppf((np.arange(size) + 0.5) / size))


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("rule", "kind"), [(ACIQ_GAUSSIAN, "gaussian"), (ACIQ_LAPLACIAN, "laplacian")]
)
@settings(max_examples=5)
@given(scale=st.floats(1e-6, 1e6))
def test_aciq_is_about_the_best_of_brute_force_on_its_own_distribution(rule, kind, bits, scale):
    """Within 2 % from 6 bits up, 5 % at 4 and 5, of the distribution: its quantiles, not draws."""
    x = np.float32(scale) * quantiles(kind)
    mine = losses(x, SYMMETRIC, bits, *derived(rule, observed(x), SYMMETRIC, bits)).item()
    assert mine <= cases.least(x, SYMMETRIC, bits, tries=100) * (1.05 if bits < 6 else 1.02)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("rule", [ACIQ_GAUSSIAN, ACIQ_LAPLACIAN], ids=lambda rule: rule.name)
def test_after_a_relu_it_is_half_of_the_distribution(rule, bits):
    """The range of the rectified data is that of all, with all codes on one side."""
    kind = "gaussian" if rule is ACIQ_GAUSSIAN else "laplacian"
    x = np.maximum(quantiles(kind), 0.0)
    low, high = derived(rule, observed(x), ASYMMETRIC, bits)
    assert low == 0.0
    clip = gaussian_clip if rule is ACIQ_GAUSSIAN else laplacian_clip
    assert high == pytest.approx(min(clip(jnp.float32(bits + 1)).item(), x.max()), rel=0.03)
    assert losses(x, ASYMMETRIC, bits, low, high) <= cases.least(x, ASYMMETRIC, bits) * 1.06


def test_aciq_moves_with_the_mean_where_codes_do():
    x = drawn("gaussian", 4, 50_000) * 0.1 - 3.0
    low, high = derived(ACIQ_GAUSSIAN, observed(x, -x[:100] * 0.01), ASYMMETRIC, 4)
    assert (low + high) / 2 == pytest.approx(-3.0, rel=0.03)
    low, high = derived(ACIQ_GAUSSIAN, observed(x), SYMMETRIC, 4)
    assert low <= -2.9


@pytest.mark.parametrize(
    ("rule", "kind"), [(ACIQ_GAUSSIAN, "gaussian"), (ACIQ_LAPLACIAN, "laplacian")]
)
@pytest.mark.parametrize("bits", [4, 6])
def test_aciq_on_draws_is_off_by_their_largest_samples(rule, kind, bits):
    x = drawn(kind, 12, 60_000)
    mine = losses(x, SYMMETRIC, bits, *derived(rule, observed(x), SYMMETRIC, bits)).item()
    assert mine <= cases.least(x, SYMMETRIC, bits, tries=100) * 1.08


# Percentile


@settings(max_examples=40)
@given(kind=KINDS, seed=st.integers(0, 9999), size=st.integers(1, 300))
def test_all_of_the_values_is_min_max(kind, seed, size):
    x = drawn(kind, seed, 300)
    x[size:] = x[0]
    for seen in (at_hand(x), observed(x)):
        for target in (SYMMETRIC, ASYMMETRIC):
            whole = derived(MIN_MAX, seen, target)
            assert derived(ranges.percentile(1.0), seen, target) == whole == (x.min(), x.max())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("kind", cases.DRAWS)
def test_percentiles_are_those_of_numpy(kind, share):
    x = drawn(kind, 5)
    want = np.quantile(x, [(1 - np.float32(share)) / 2, (1 + np.float32(share)) / 2])
    got = derived(ranges.percentile(share), at_hand(x), SYMMETRIC)
    assert_allclose(got, want, atol=1e-5, rtol=5e-5)
    # Of a histogram to within the distance of neighbouring values and the width of a bin.
    found, order = derived(ranges.percentile(share), observed(x), SYMMETRIC), np.sort(x)
    for got, exact in zip(found, want, strict=True):
        near = order[np.clip(np.searchsorted(order, exact) + np.array([-3, 2]), 0, x.size - 1)]
        assert near[0] - 0.002 <= got <= near[1] + 0.002


def test_percentiles_are_ordered_and_traced():
    seen, shares = observed(drawn("student", 6)), jnp.linspace(0.0, 1.0, 11)
    run = jax.jit(jax.vmap(lambda p: ranges.derive(ranges.percentile(p), seen, SYMMETRIC)))
    found = run(shares)
    assert (np.diff(found.high[:, 0]) >= 0).all()
    assert (np.diff(found.low[:, 0]) <= 0).all()
    one = derived(ranges.percentile(0.5), seen, SYMMETRIC)
    assert (found.low[5].item(), found.high[5].item()) == pytest.approx(one, rel=1e-6)
    outside = run(jnp.float32([-0.1, 1.1]))
    assert np.isnan(outside.low).all()


# Moments


@settings(max_examples=20)
@given(kind=KINDS, seed=st.integers(0, 9999), factor=st.floats(0.1, 6.0))
def test_sigma_is_the_mean_and_standard_deviations(kind, seed, factor):
    x = np.float64(drawn(kind, seed, 4096))
    low, high = derived(ranges.sigma(factor), observed(np.float32(x)), SYMMETRIC)
    assert low == pytest.approx(max(x.mean() - factor * x.std(), x.min()), rel=1e-4, abs=1e-5)
    assert high == pytest.approx(min(x.mean() + factor * x.std(), x.max()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("bits", sorted(COEFFICIENTS))
def test_sawb_is_its_formula(bits):
    x = np.float64(drawn("gaussian", 7))
    c1, c2 = COEFFICIENTS[bits]
    want = c1 * np.sqrt((x**2).mean()) + c2 * np.abs(x).mean()
    got = derived(SAWB, observed(np.float32(x)), SYMMETRIC, bits)
    assert got == pytest.approx((-want, want), rel=1e-4)


def test_sawb_between_the_published_widths_and_beyond_them():
    first, second = (np.array(c) for c in coefficients(jnp.float32([5, 6, 7, 8])))
    assert_allclose(np.diff(first, 2), 0.0, atol=1e-4)
    assert_allclose(np.diff(second, 2), 0.0, atol=1e-4)
    x = drawn("gaussian", 8)
    for bits in (1, 9, 16):
        assert derived(SAWB, at_hand(x), SYMMETRIC, bits)[1] == np.abs(x).max()
    equal = np.full(64, -2.0, np.float32)  # E|w| = √E[w²]: the formula is negative at 3 bits
    assert derived(SAWB, at_hand(equal), SYMMETRIC, 4) == (-2.0, 2.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_is_its_formula(bits):
    x = np.float64(drawn("laplacian", 9))
    q_max = 2 ** (bits - 1) - 1
    scale = 2 * np.abs(x).mean() / np.sqrt(q_max)
    low, high = derived(LSQ, observed(np.float32(x)), SYMMETRIC, bits)
    assert high == -low
    got = SYMMETRIC._replace(bits=jnp.float32(bits)).qparams(jnp.float32(low), jnp.float32(high))
    assert got.scale.item() == pytest.approx(scale, rel=1e-5)
    # One-sided data with unsigned codes: all of the span is on their side.
    positive = np.abs(x)
    low, high = derived(LSQ, observed(np.float32(positive)), ASYMMETRIC, bits)
    levels = 2**bits - 1
    assert low == 0.0
    assert high == pytest.approx(levels * 2 * positive.mean() / np.sqrt(levels), rel=1e-5)


# Constant


def test_a_constant_is_itself_whatever_was_seen():
    from quantjax import statistics

    rule = ranges.constant(0.0, 6.0)
    for seen in (statistics.init((1,)), observed(drawn("gaussian", 10))):
        found = ranges.derive(rule, seen, ASYMMETRIC)
        assert (found.low.item(), found.high.item(), bool(found.calibrated)) == (0.0, 6.0, True)
    run = jax.jit(lambda low, high: ranges.derive(ranges.constant(low, high), seen, ASYMMETRIC))
    assert run(-1.0, 2.0).high.item() == 2.0
    assert np.isnan(run(2.0, -1.0).high).all()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: ranges.percentile(99.9), "a share of 99.9"),
        (lambda: ranges.percentile(-0.1), "a share of -0.1"),
        (lambda: ranges.percentile(float("nan")), "a share of nan"),
        (lambda: ranges.sigma(0.0), "0 standard deviations"),
        (lambda: ranges.sigma(float("nan")), "nan standard deviations"),
        (lambda: ranges.constant(1.0, 0.0), "a range from 1 to 0"),
        (lambda: ranges.constant(0.0, float("inf")), "a range from 0 to inf"),
    ],
)
def test_parameters_without_a_meaning_are_refused(make, problem):
    with refused(errors.QuantizerError, problem, "the range rule"):
        make()


def test_a_signed_quantizer_with_one_sided_data_has_the_constant_of_its_own_width():
    """Half of its codes are on the other side."""
    x = np.maximum(drawn("gaussian", 11, 100_000), 0.0)
    target = SYMMETRIC._replace(format=integer(max_bits=8))
    high = derived(ACIQ_GAUSSIAN, observed(x), target, 4)[1]
    assert high == pytest.approx(gaussian_clip(jnp.float32(4)).item(), rel=0.03)


@pytest.mark.parametrize("rule", cases.MOMENTS, ids=lambda rule: rule.name)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("target", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_moments_that_vanish_or_overflow_leave_what_was_seen(rule, size, target):
    x = np.float32(cases.drawn("gaussian") * size)
    low, high = derived(rule, observed(x), target, 8)
    assert np.isfinite([low, high]).all()
    assert low < high
    assert 0.1 * x.max() <= high <= 32.0 * x.max()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("target", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_eager_compiled_and_mapped_ranges_are_the_same_bits(bits, target):
    seen = observed(*cases.drawn("shifted", 2).reshape(4, -1))
    for rule in cases.MOMENTS:
        at = lambda bits, rule=rule: ranges.derive(rule, seen, target._replace(bits=bits))  # noqa: E731
        eager, width = at(jnp.float32(bits)), jnp.float32(bits)
        compiled = jax.jit(lambda s, b, rule=rule: ranges.derive(rule, s, target._replace(bits=b)))
        for found in (
            compiled(seen, width),
            jax.tree.map(lambda a: a[0], jax.lax.map(at, width[None])),
        ):
            np.testing.assert_array_equal(found.low, eager.low)
            np.testing.assert_array_equal(found.high, eager.high)
