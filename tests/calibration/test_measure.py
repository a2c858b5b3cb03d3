"""Shares, ratios, levels and bars of samples whose answers are known."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import statistics
from quantjax.affine import QParams
from quantjax.calibration.measure import bars, decibels, measure, outermost, points
from quantjax.statistics import BINS, Sample
from quantjax.statistics.sample import POINTS, of_histogram
from tests.calibration import oracle, tiny

WEIGHTS = qj.weight_quantizer(bits=4)
ACTIVATIONS = qj.activation_quantizer(bits=4)


def qparams(scale, zero_point=0.0, bits=4.0) -> QParams:
    scale = jnp.asarray(scale, jnp.float32)
    return QParams(scale, jnp.full_like(scale, zero_point), jnp.float32(bits))


def sample(values, weights=None) -> Sample:
    values = jnp.asarray(values, jnp.float32)
    return Sample(values, jnp.ones_like(values) if weights is None else jnp.asarray(weights))


def observed(x, scale_shape=(1, 1), bins=BINS):
    return statistics.update(statistics.init(scale_shape, histogram_bins=bins), jnp.asarray(x))


def test_levels_cost_nothing_and_clip_nothing():
    found = measure(WEIGHTS, sample([-4.0, -0.5, 0.0, 3.5]), qparams(0.5))
    assert found == (0.0, math.inf)


def test_values_beyond_half_a_step_outside_are_saturated():
    # Codes -8 .. 7 of scale 1: 7.5 becomes 8, a tie to even, and has no level.
    values = [-8.6, -8.4, 7.4, 7.5, 7.6]
    found = measure(WEIGHTS, sample(values), qparams(1.0))
    assert found.saturated == pytest.approx(3 / 5)
    noise = 0.6**2 + 0.4**2 + 0.4**2 + 0.5**2 + 0.6**2
    assert found.sqnr == pytest.approx(oracle.sqnr(np.sum(np.square(values)), noise), abs=1e-5)


def test_weights_of_a_sample_count():
    once = measure(WEIGHTS, sample([0.3, 0.3, 0.3, 9.0]), qparams(1.0))
    thrice = measure(WEIGHTS, sample([0.3, 9.0, 5.0], [3.0, 1.0, 0.0]), qparams(1.0))
    assert once == thrice


def test_each_group_has_its_own_scale():
    groups = sample([[[0.3, 0.6]], [[30.0, 60.0]]])
    scales = jnp.array([[0.1], [10.0]])
    found = measure(WEIGHTS, groups, qparams(scales))
    assert found.saturated == 0.0
    assert found.sqnr > 100.0
    assert measure(WEIGHTS, groups, qparams(scales[::-1])).saturated == 0.5


def test_nothing_at_all_has_no_share():
    found = measure(WEIGHTS, sample([1.0], [0.0]), qparams(1.0))
    assert math.isnan(found.saturated)


def test_sums_are_exact_where_float32_would_lose_them():
    """2^26 values of 1 and one that is lost: its square is half a unit of a float32 sum."""
    found = measure(WEIGHTS, sample([1.0, 1.25], [2.0**26, 1.0]), qparams(1.0))
    assert found.sqnr == pytest.approx(10.0 * math.log10((2.0**26 + 1.5625) / 0.0625), abs=1e-9)


def test_a_signal_of_nothing():
    assert decibels(0.0, 1.0) == -math.inf
    assert decibels(0.0, 0.0) == math.inf


@pytest.mark.parametrize(
    ("quantizer", "zero_point", "bits", "expected"),
    [
        (WEIGHTS, 0.0, 4.0, (-2.0, 1.75)),
        (WEIGHTS, 0.0, 1.0, (-0.25, 0.25)),
        (ACTIVATIONS, 3.0, 4.0, (-0.75, 3.0)),
        (ACTIVATIONS, 2.6, 4.0, (-0.75, 3.0)),  # the zero point is rounded
        (qj.weight_quantizer(format=qj.integer(narrow=True)), 0.0, 3.0, (-0.75, 0.75)),
        (qj.weight_quantizer(format=qj.formats.E2M1), 0.0, 4.0, (-1.5, 1.5)),
    ],
)
def test_outermost_levels(quantizer, zero_point, bits, expected):
    low, high = outermost(quantizer, qparams([[0.25]], zero_point, bits))
    assert (low.item(), high.item()) == expected


def test_points_are_values_where_there_are_values_and_one_a_bin_elsewhere():
    x = jnp.asarray(tiny.draws("normal", 16, 12))
    values = points(statistics.of_tensor(x, (1, 12), with_values=True))
    np.testing.assert_array_equal(np.sort(values.values[0, 3]), np.sort(x[:, 3]))
    for number in (BINS, 64):
        found = points(observed(x, bins=number))
        assert found.values.shape == (1, 1, number)
        assert float(found.weights.sum()) == x.size


def test_a_histogram_has_as_many_points_as_asked_for():
    histogram = observed(tiny.draws("relu", 64, 32)).distribution
    for wanted in (16, POINTS, BINS, 4 * BINS):
        values, weights = of_histogram(histogram, points=wanted)
        assert values.shape == weights.shape == (1, 1, min(wanted, BINS))
        assert float(weights.sum()) == 64 * 32
    np.testing.assert_array_equal(of_histogram(histogram)[0], of_histogram(histogram, POINTS)[0])


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_more_points_measure_better_or_as_well(kind, bits):
    """What one value a bin is for: a narrow range within a wide histogram."""
    x = tiny.draws(kind, 256, 64)
    stats = observed(x)
    low, high = np.quantile(x, [0.005, 0.995])
    expected = oracle.asymmetric(x, low, high, bits)
    ends = (jnp.full((1, 1), end, jnp.float32) for end in (low, high))
    target = ACTIVATIONS.target(jnp.float32(bits)).qparams(*ends)
    errors = [
        abs(measure(ACTIVATIONS, found, target).sqnr - oracle.sqnr(expected.signal, expected.noise))
        for found in (points(stats), of_histogram(stats.distribution, 64))
    ]
    assert errors[0] < 0.1
    assert errors[0] <= errors[1] + 0.01


def test_bars_of_values_are_those_of_numpy():
    x = tiny.draws("normal", 40, 30)
    stats = statistics.of_tensor(jnp.asarray(x), (1, 30), with_values=True)
    edges, counts, bend = bars(stats, points(stats))
    assert bend == math.inf
    assert len(counts) == 2 * math.isqrt(x.size)
    np.testing.assert_allclose(edges, np.linspace(float(x.min()), float(x.max()), len(counts) + 1))
    np.testing.assert_array_equal(counts, np.histogram(x.astype(np.float64), edges)[0])


@pytest.mark.parametrize("scale_shape", [(1, 1), (1, 6)])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_bars_of_a_histogram_are_nearly_those_of_its_values(kind, scale_shape):
    x = tiny.draws(kind, 4096, 6)
    stats = observed(x, scale_shape)
    edges, counts, _ = bars(stats, points(stats))
    expected = np.histogram(x.astype(np.float64), edges)[0]
    assert counts.sum() == pytest.approx(x.size)
    # A value may be in the next bar, if the edge of the two lies in its bin.
    wrong = np.abs(np.cumsum(counts) - np.cumsum(expected))
    width = float(stats.distribution.width.max())
    near = [np.sum(np.abs(x - edge) <= width) for edge in edges[1:]]
    assert np.all(wrong <= np.array(near) + 1e-6)


@pytest.mark.parametrize(("number", "expected"), [(1, 20), (99, 20), (2500, 100), (40_000, 200)])
def test_few_values_have_few_bars(number, expected):
    x = jnp.linspace(-1.0, 1.0, number)
    stats = statistics.of_tensor(x, (1,), with_values=True)
    assert len(bars(stats, points(stats)).counts) == expected


def test_zeros_do_not_bend_the_axis():
    """Most values after a ReLU are zeros; what is left decides."""
    x = np.zeros((100, 100), np.float32)
    x[:1, :50] = np.linspace(1.0, 5.0, 50)
    stats = observed(x)
    assert bars(stats, points(stats)).bend == math.inf
    x[2, 0] = 500.0
    stats = observed(x)
    bend = bars(stats, points(stats)).bend
    assert bend == math.inf or bend >= 5.0


def test_bent_bars_ascend_and_end_at_what_was_seen():
    x = tiny.draws("outliers", 256, 64)
    stats = observed(x)
    edges, counts, bend = bars(stats, points(stats))
    assert bend < 0.1 * np.abs(x).max()
    assert np.mean(np.abs(x) <= bend) == pytest.approx(0.99, abs=0.003)
    assert (edges[0], edges[-1]) == (x.min(), x.max())
    np.testing.assert_allclose(np.diff(np.arcsinh(edges / bend), 2), 0.0, atol=1e-9)
    assert counts.sum() == x.size
