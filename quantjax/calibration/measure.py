"""What a range does to the values that it is for: how many it clips, and how much is lost."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Bool, Float

from quantjax.affine import QParams
from quantjax.arithmetic import Arithmetic
from quantjax.calibration.results import Bars
from quantjax.quantizer import Quantizer
from quantjax.rounding import HALF_EVEN
from quantjax.simulation import apply, is_clipped
from quantjax.statistics import Histogram, Sample, Statistics, as_float
from quantjax.statistics.sample import of_histogram

FEWEST, MOST = 20, 200  # bars
INNER, OUTLYING = 0.99, 0.1
Floats = npt.NDArray[np.float64]


class Measured(NamedTuple):
    """What quantization does to a sample.

    Attributes:
      saturated: the share of values for which there is no level, in 0..1.
      sqnr: ``10 log10(Σ x² / Σ (Q(x) - x)²)`` in dB; infinite where nothing is lost.
    """

    saturated: float
    sqnr: float


def points(statistics: Statistics) -> Sample:
    """Values and weights that stand for what was seen: the tensor itself, or one value a bin.

    None of them lies outside of what was seen, which the outermost bins reach beyond.
    """
    distribution = statistics.distribution
    if not isinstance(distribution, Histogram):
        return statistics.sample
    values, weights = of_histogram(distribution, points=distribution.bins)
    low, high = statistics.extremes
    return Sample(jnp.clip(values, low[..., None], high[..., None]), weights)


def measure(quantizer: Quantizer, sample: Sample, qparams: QParams) -> Measured:
    """Quantize a sample, each group by its own QParams; sums are float64.

    By the estimator's parameters as calibration starts them. Random roundings are taken to be half
    to even, and of an estimator that draws which entries are quantized all are, because there is no
    key.

    Args:
      sample: ``[*scale, n]``.
      qparams: at the shape of the scale.
    """
    arithmetic = quantizer.arithmetic
    if arithmetic.rounding.is_random:
        arithmetic = arithmetic._replace(rounding=HALF_EVEN)
    arithmetic = arithmetic._replace(estimator=arithmetic.estimator._replace(chosen=None))
    outcome = _quantized(arithmetic, sample.values, quantizer.started(qparams))
    weights = np.asarray(sample.weights, np.float64)
    values, quantized, clipped = (
        np.asarray(array, np.float64) for array in (sample.values, *outcome)
    )
    total = float(np.sum(weights))
    return Measured(
        float(np.sum(weights * clipped)) / total if total else math.nan,
        decibels(
            float(np.sum(weights * values * values)),
            float(np.sum(weights * (quantized - values) ** 2)),
        ),
    )


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite without noise.

    >>> decibels(1000.0, 1.0), decibels(1.0, 0.0)
    (30.0, inf)
    """
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf


@functools.partial(jax.jit, static_argnums=0)
def _quantized(
    arithmetic: Arithmetic, values: Float[Array, "... n"], qparams: QParams
) -> tuple[Float[Array, "... n"], Bool[Array, "... n"]]:
    """Quantized values, and which were clipped; a scale has an axis of 1 for a group's values."""
    with_values, estimator = functools.partial(jnp.expand_dims, axis=-1), arithmetic.estimator
    theta = arithmetic.format.map_groups(estimator.rest(qparams.theta), with_values)
    own = jax.tree.map(with_values, estimator.own(qparams.theta))
    qparams = qparams._replace(
        scale=with_values(qparams.scale),
        zero_point=with_values(qparams.zero_point),
        theta={**(theta or {}), **own} if own else theta,
    )
    return apply(values, qparams, arithmetic), is_clipped(values, qparams, arithmetic)


def outermost(quantizer: Quantizer, qparams: QParams) -> tuple[jax.Array, jax.Array]:
    """The reals that the lowest and the highest level stand for: what all beyond becomes."""
    estimator = quantizer.estimator
    qparams = quantizer.arithmetic.resolved(quantizer.started(qparams), qparams.scale.shape)
    qparams = qparams._replace(theta=estimator.rest(qparams.theta))
    low, high = quantizer.format.level_range(qparams.bits, qparams.theta)
    zero = jnp.round(qparams.zero_point)
    return (low - zero) * qparams.scale, (high - zero) * qparams.scale


def bars(statistics: Statistics, sample: Sample) -> Bars:
    """A histogram of at most 200 bars, all groups together; fewer values have fewer, wider bars.

    Bars are equally wide, unless outliers would leave less than a tenth of the picture to 99 % of
    the values. Then they are equal parts of ``asinh(x / bend)``, with the 99 % below ``bend``.

    Args:
      sample: of these statistics.
    """
    low, high = (
        float(end) for end in (statistics.extremes.low.min(), statistics.extremes.high.max())
    )
    if not low < high:  # a constant, shown in the middle
        reach = 0.5 * abs(low) or 0.5
        low, high = low - reach, high + reach
    values, weights = (np.asarray(array, np.float64).ravel() for array in sample)
    parts = min(max(2 * math.isqrt(int(weights.sum())), FEWEST), MOST)
    bend = _inner(values, weights)
    if bend > OUTLYING * max(abs(low), abs(high)):
        bend, edges = math.inf, np.linspace(low, high, parts + 1)
    else:
        ends = np.arcsinh(low / bend), np.arcsinh(high / bend)
        edges = bend * np.sinh(np.linspace(*ends, parts + 1))
        edges[0], edges[-1] = low, high
    distribution = statistics.distribution
    if isinstance(distribution, Histogram):
        return Bars(edges, _regrouped(distribution, edges), bend)
    return Bars(edges, np.histogram(values, edges, weights=weights)[0], bend)


def _inner(values: Floats, weights: Floats) -> float:
    """The magnitude that 99 % of all values but zeros do not exceed; infinite without such."""
    magnitudes = np.abs(values)
    weights = np.where(magnitudes > 0.0, weights, 0.0)
    coarse, places = np.histogram(
        magnitudes, 64 * MOST, (0.0, float(magnitudes.max()) or 1.0), weights=weights
    )
    sums = np.cumsum(coarse)
    return float(places[1 + np.searchsorted(sums, INNER * sums[-1])]) if sums[-1] else math.inf


def _regrouped(histogram: Histogram, edges: Floats) -> Floats:
    """Counts between other edges; a bin on one of them is shared out evenly.

    The outermost bars have what lies beyond: bins may be wider than all that was seen.
    """
    bins = np.asarray(histogram.edges, np.float64).reshape(-1, histogram.bins + 1)
    counts = np.asarray(as_float(histogram.counts), np.float64).reshape(-1, histogram.bins)
    inner, found = edges[1:-1], np.zeros(len(edges) - 1)
    for places, held in zip(bins, counts, strict=True):
        below = np.interp(inner, places, np.concatenate([[0.0], np.cumsum(held)]))
        found += np.diff(np.concatenate([[0.0], below, [held.sum()]]))
    return found
