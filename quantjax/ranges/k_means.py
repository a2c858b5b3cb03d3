"""Codebooks fitted by k-means in one dimension: exact, from one sort and integer prefix sums."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from quantjax import errors
from quantjax._compat import varying_like
from quantjax.affine import LARGEST_SCALE, SMALLEST_SCALE, QParams
from quantjax.formats import Format, Span, divide_by_scale, exponent_of, power_of_two
from quantjax.formats.codebook import CodebookFormat
from quantjax.granularity import expand, reduce_to
from quantjax.ranges.base import Configured, FitRule, checked_iterations

ITERATIONS = 100
_UNIT = 23  # entries are summed as multiples of 2^-23
_WHOLE_BITS = 25  # with a sign, of numbers below 2


class _Ordered(NamedTuple):
    """The entries of a tensor, ascending, and what makes every sum over a run of them exact.

    Attributes:
      values: ``[n]``.
      sums: integers ``[n + 1]``, one array for each digit: ``sums[d][i]`` is the sum of that digit
        over the first ``i`` entries.
      digit_bits: the size of a digit.
    """

    values: Float[Array, " n"]
    sums: tuple[Int[Array, " m"], ...]
    digit_bits: int


def _ordered(values: jax.Array) -> _Ordered:
    """Fixed-point digits so small that the sum over all entries fits into int32.

    Differences of float32 prefix sums would lose the small clusters of a large tensor, and their
    order of addition depends on the backend.
    """
    values = jnp.sort(values)
    digit_bits = min(max(31 - values.size.bit_length(), 1), 12)
    whole = jnp.round(values * 2.0**_UNIT).astype(jnp.int32)
    count = -(-_WHOLE_BITS // digit_bits)
    digits = [whole >> (digit_bits * d) for d in range(count)]  # the last one has the sign
    digits[:-1] = [digit & ((1 << digit_bits) - 1) for digit in digits[:-1]]
    zero = jnp.zeros(1, jnp.int32)
    sums = [jnp.concatenate([zero, jnp.cumsum(digit, dtype=jnp.int32)]) for digit in digits]
    return _Ordered(values, tuple(sums), digit_bits)


def _start(values: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """``count`` of the entries, ascending, about as dense as the best levels are.

    Those have the density ``f^(1/3)`` for entries of the density ``f ~ 1 / gap``, that is, equally
    many gaps to the power 2/3 between any two. Gaps of 0 do not count, so that the zeros of a
    pruned tensor do not take most of the codebook, and none counts for more than one level. Where
    there are no more than ``count`` distinct entries, each of them.
    """
    odd = 2 * jnp.minimum(jnp.arange(size, dtype=jnp.int32), count - 1) + 1
    gaps = values[1:] - values[:-1]
    # 1/2 + 1/8 + 1/32 is 2/3, nearly: square roots are rounded correctly, other powers are not.
    power = jnp.sqrt(gaps)
    eighth = jnp.sqrt(jnp.sqrt(power))
    power *= eighth * jnp.sqrt(jnp.sqrt(eighth))
    power = jnp.minimum(power, _one_share(power, count, size))
    reached = jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(power)])
    share = odd.astype(jnp.float32) / (2 * count).astype(jnp.float32)
    # Of the two ends of a gap the outer one, which may be an outlier: on either side alike.
    many = jnp.searchsorted(reached, share * reached[-1])
    many = jnp.where(odd < count, jnp.maximum(many - 1, 0), many)
    place = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(gaps > 0.0, dtype=jnp.int32)])
    distinct = place[-1] + 1
    few = jnp.searchsorted(place, odd * jnp.minimum(distinct, count) // (2 * count))
    return values[jnp.minimum(jnp.where(distinct <= count, few, many), values.size - 1)]


def _one_share(power: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """The cap ``c`` with ``Σ min(power, c) = count · c``, so that no gap has more than one level.

    The gap below an outlier would take many, all of them at the outlier itself.
    """
    ascending = jnp.sort(power)
    # What is left without the m largest; apart from the width, which vmap may batch.
    rest = jnp.cumsum(ascending)[::-1][:size]
    m = jnp.arange(rest.size, dtype=jnp.int32)
    caps = rest / jnp.maximum(count - m, 1).astype(jnp.float32)
    # Cutting one more gap lowers the cap as long as that gap is above it, and raises it after.
    return jnp.min(jnp.where(m < count, caps, jnp.inf), initial=jnp.inf)


def _means(ordered: _Ordered, centers: jax.Array, count: jax.Array) -> jax.Array:
    """The mean of what is nearest to each center; a center that nothing is nearest to stays."""
    values, sums, digit_bits = ordered
    middles = 0.5 * (centers[:-1] + centers[1:])
    in_use = jnp.arange(1, centers.size, dtype=jnp.int32) < count
    inner = jnp.searchsorted(values, jnp.where(in_use, middles, jnp.inf), side="right")
    ends = jnp.concatenate(
        [jnp.zeros(1, inner.dtype), inner, jnp.full(1, values.size, inner.dtype)]
    )
    first, last = ends[:-1], ends[1:]
    entries = jnp.maximum(last - first, 1).astype(jnp.float32)
    means = jnp.zeros_like(centers)
    for d, digit in enumerate(sums):
        unit = 2.0 ** (digit_bits * d - _UNIT)
        means += (digit[last] - digit[first]).astype(jnp.float32) / entries * unit
    # Entries have more digits than the sums where they are small. A mean is never outside the
    # entries, which makes it exact where they are all equal.
    inside = jnp.clip(means, values[first], values[jnp.maximum(last - 1, 0)])
    return jnp.where(last > first, inside, centers)


def _scale(
    x: jax.Array, scale_shape: tuple[int, ...], format: Format, bits: jax.Array
) -> jax.Array:
    largest = reduce_to(jnp.abs(x), scale_shape, jnp.max, initial=0.0)
    # Levels are not known yet. They fill [-1, 1], and are about this far apart.
    one, unit = jnp.float32(1.0), power_of_two(1 - bits.astype(jnp.int32))
    scale = format.scale_rule.scale(Span(largest, largest, one, unit))
    # No level need be 0: an all-zero group becomes as small as there are numbers.
    return jnp.clip(jnp.where(largest == 0.0, 0.0, scale), SMALLEST_SCALE, LARGEST_SCALE)


def _fit(
    x: jax.Array, scale_shape: tuple[int, ...], format: Format, bits: jax.Array, *, iterations: int
) -> QParams:
    if not isinstance(format, CodebookFormat) or format.codebook:
        raise errors.FormatError(
            f"k-means fits levels, and those of {format.name} are given",
            where=f"K_MEANS for a tensor of shape {x.shape}",
            fix="qj.formats.learned_codebook(max_bits=4), or another range rule",
        )
    x, bits = jnp.asarray(x, jnp.float32), jnp.asarray(bits, jnp.float32)
    width = jnp.clip(bits, 0.0, float(format.max_bits))
    scale = _scale(x, scale_shape, format, width)
    size, count = 1 << format.max_bits, power_of_two(width.astype(jnp.int32)).astype(jnp.int32)
    if x.size == 0:
        levels = jnp.zeros(size, jnp.float32)
    else:
        scaled = divide_by_scale(x, expand(scale, x.shape)).ravel()
        largest = jnp.max(jnp.abs(scaled))
        # A scale rule may leave x as it is. Powers of two change no digit.
        unit = jnp.where(largest > 0.0, power_of_two(exponent_of(largest)), 1.0)
        ordered = _ordered(divide_by_scale(scaled, unit))
        start = _start(ordered.values, count, size)
        start = varying_like(start, (ordered, count))
        levels = lax.fori_loop(0, iterations, lambda _, c: _means(ordered, c, count), start)
        levels = levels[jnp.minimum(jnp.arange(size, dtype=jnp.int32), count - 1)] * unit
    return QParams(scale, jnp.zeros_like(scale), bits, {"levels": levels})


@functools.lru_cache
def k_means(*, iterations: int = ITERATIONS) -> FitRule:
    """Levels that make the squared error small: Lloyd's algorithm on ``x / s``, for each tensor.

    ``s = max |x|`` of each group (or what the format's scale rule makes of it). ``2^bits`` centers
    start at quantiles, not of the entries, but of what they have to the power 1/3 as density: the
    best levels are distributed so. Then ``iterations`` times every entry goes to the nearest
    center, and every center to the mean of its entries. Each round lowers ``Σ (x/s - level)²`` or
    keeps it. Groups count alike, whatever their scale.

    The entries and their gaps are sorted once, O(N log N); a round costs O(2^bits log N), and no
    array is larger than N. Sums are of integers, so that the means do not depend on the order of
    addition. Deterministic; the same under ``jit`` and ``vmap``; ``bits`` may be traced.

    Args:
      iterations: how often the centers move; 0 leaves the start.

    Returns:
      A rule that gives ``QParams(scale, 0, bits, {"levels": float32[2^max_bits]})``, for formats of
      :func:`quantjax.formats.learned_codebook`; FormatError for others.

    Sharp edges: entries are summed in steps of ``2^-23`` of the largest, and the mean of a cluster
    is off by up to such a step. With no more distinct entries than levels, each is a level, the
    error is 0, and the levels left over repeat one. The zeros of a pruned tensor share a level with
    the entries next to them, and come out near 0 but not at it. Lloyd's algorithm finds a local
    minimum; from quantiles of the entries themselves it stays 4 (normal) to 35 (Student's t) times
    above this error at 8 bits.

    >>> from quantjax.formats.codebook import learned_codebook
    >>> x = jnp.array([[-4.0, -4.0, 0.0, 1.0, 1.0, 2.0]])
    >>> fitted = K_MEANS.fit(x, (1, 1), learned_codebook(max_bits=2), jnp.float32(2))
    >>> fitted.scale.tolist(), fitted.theta["levels"].tolist()
    ([[4.0]], [-1.0, 0.0, 0.25, 0.5])

    Source: Lloyd, Least squares quantization in PCM, 1982; for weights: Han et al., Deep
    compression, 2016, section 3 (whose best start is evenly spaced); the density: Panter, Dite,
    Quantization distortion in pulse-count modulation with nonuniform spacing of levels, 1951.
    """
    iterations = checked_iterations(iterations, "k_means")
    name = "k_means" if iterations == ITERATIONS else f"k_means-{iterations}"
    return FitRule(name, Configured.of(_fit, iterations=iterations))


K_MEANS = k_means()
"""A codebook for each tensor by :func:`k_means`."""
