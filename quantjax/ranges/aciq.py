"""Analytical clipping: the range that is best for a Gaussian or a Laplacian."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quantjax.formats import divide_by_scale
from quantjax.lean import rounded_product
from quantjax.ranges.base import Range, RangeRule, Target, square_root, within_seen
from quantjax.statistics import Statistics

_HALVINGS = 60
_LARGEST = 64.0  # more than the clipping of all widths
_WIDTHS = 26  # up to 24 bits, and one bit more for data on one side


def _root(function: Callable[[float], float]) -> float:
    """Where a function that is positive below it and negative above changes sign, by bisection."""
    low, high = 0.0, _LARGEST
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if function(middle) > 0.0 else (low, middle)
    return 0.5 * (low + high)


def _noise_slope(bits: int) -> float:
    """``2 / (3 · 4^b)``: the derivative of ``α² / (3 · 4^b)`` by ``α``, over ``α``."""
    return 2.0 / 3.0 * 4.0**-bits


def _laplacian_slope(bits: int, a: float) -> float:
    return 2.0 * math.exp(-a) - _noise_slope(bits) * a


def _gaussian_slope(bits: int, a: float) -> float:
    density = math.exp(-0.5 * a * a) / math.sqrt(2.0 * math.pi)
    tail = 0.5 * math.erfc(a / math.sqrt(2.0))
    return 4.0 * (density - a * tail) - _noise_slope(bits) * a


@functools.cache
def _table(slope: Callable[[int, float], float]) -> tuple[float, ...]:
    """By width, in float64; arithmetic on it would round otherwise from program to program."""
    return tuple(_root(functools.partial(slope, bits)) for bits in range(_WIDTHS))


def _at(table: tuple[float, ...], bits: jax.Array) -> jax.Array:
    return jnp.asarray(table, jnp.float32)[jnp.clip(bits.astype(jnp.int32), 0, _WIDTHS - 1)]


def laplacian_clip(bits: jax.Array) -> jax.Array:
    """``α / b`` with ``(2/3) 4^-bits α/b = 2 exp(-α/b)``, of a whole width.

    >>> [round(float(laplacian_clip(jnp.float32(bits))), 3) for bits in (2, 3, 4)]
    [2.831, 3.897, 5.029]
    """
    return _at(_table(_laplacian_slope), bits)


def gaussian_clip(bits: jax.Array) -> jax.Array:
    """``a = α / σ`` with ``(2/3) 4^-bits a = 4 (φ(a) - a Q(a))``, density and tail of a Gaussian.

    >>> [round(float(gaussian_clip(jnp.float32(bits))), 3) for bits in (2, 3, 4)]
    [1.711, 2.152, 2.559]
    """
    return _at(_table(_gaussian_slope), bits)


def _one_sided(statistics: Statistics) -> jax.Array:
    low, high = statistics.extremes
    return (low >= 0.0) | (high <= 0.0)


def _ratio(statistics: Statistics) -> jax.Array:
    """``E x² / E|x|``: a share of exact zeros, as a ReLU leaves, cancels."""
    magnitude = statistics.moments.magnitude
    some = jnp.where(magnitude > 0.0, magnitude, 1.0)
    return divide_by_scale(statistics.moments.square, some)


def _range_of(clip: Callable[[jax.Array], jax.Array], half: float) -> Callable[..., Range]:
    def range_of(statistics: Statistics, target: Target, width: jax.Array) -> Range:
        one_sided = _one_sided(statistics)
        wasted = target.symmetric and target.format.signed  # codes on the side without data
        levels = target.bits + jnp.where(one_sided & (not wasted), 1.0, 0.0)
        center = jnp.where(one_sided, 0.0, statistics.moments.mean)
        center = jnp.zeros_like(center) if target.symmetric else center
        width = jnp.where(one_sided, half * _ratio(statistics), width)
        return within_seen(statistics, center, rounded_product(clip(levels), width))

    return range_of


def _gaussian(statistics: Statistics, target: Target) -> Range:
    moments = statistics.moments
    spread = moments.square if target.symmetric else moments.variance
    half = math.sqrt(2.0 / math.pi)
    return _range_of(gaussian_clip, half)(statistics, target, square_root(spread))


def _laplacian(statistics: Statistics, target: Target) -> Range:
    if target.symmetric:
        spread = statistics.moments.magnitude
    else:
        values, weights = statistics.sample
        away = jnp.sum(weights * jnp.abs(values - statistics.moments.mean))
        spread = divide_by_scale(away, jnp.maximum(jnp.sum(weights), 1.0))
    return _range_of(laplacian_clip, 0.5)(statistics, target, spread)


ACIQ_GAUSSIAN = RangeRule("aciq_gaussian", _gaussian)
"""``[μ - α, μ + α]`` where ``α`` is the best clipping of a Gaussian with the moments seen.

``α / σ`` solves ``d/dα (clipping error + α² / (3 · 4^b)) = 0``: 1.71, 2.15, 2.56, 2.94, 3.29, 3.62,
3.92 at 2 to 8 bits. Data on one side of zero are taken for half of a Gaussian about 0, with as many
zeros more as a ReLU leaves: ``σ = √(2/π) E x² / E|x|``, and, where codes are on that side alone,
the constant of one bit more. A symmetric quantizer has ``μ = 0`` and ``σ² = E x²``. No range is
wider than what was seen.

Sharp edges: the error of rounding is taken to be that of uniform noise with ``2^b`` steps from
``-α`` to ``α``. At 2 and 3 bits that is not so, and the searched range (``MSE``) is better.

Source: Banner, Nahshan and Soudry, Post training 4-bit quantization of convolutional networks for
rapid-deployment, 2019, section 3.
"""

ACIQ_LAPLACIAN = RangeRule("aciq_laplacian", _laplacian, reads_distribution=True)
"""``[μ - α, μ + α]`` where ``α`` is the best clipping of a Laplacian with ``b = E|x - μ|``.

``α / b = W(3 · 4^bits)``, Lambert's function: 2.83, 3.90, 5.03 at 2, 3 and 4 bits. Data on one side
of zero: ``b = E x² / (2 E|x|)``, and as for :data:`ACIQ_GAUSSIAN` in all else.

Source: Banner, Nahshan and Soudry, Post training 4-bit quantization of convolutional networks for
rapid-deployment, 2019, section 3.
"""
