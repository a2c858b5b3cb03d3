"""Thresholds and levels of ternary weights: TWN and the starting point of TTQ."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.affine import QParams, qparams_from_range
from quantjax.formats import Format, divide_by_scale
from quantjax.formats.ternary import TernaryFormat
from quantjax.granularity import expand, reduce_to
from quantjax.ranges.base import Configured, FitRule, known_number, valid_where

TWN_FACTOR = 0.7


def _ternary(format: Format, rule: str) -> TernaryFormat:
    if isinstance(format, TernaryFormat):
        return format
    raise errors.FormatError(
        f"the format {format.name} has no threshold",
        where=f"the range rule {rule}",
        fix="quantjax.formats.ternary()",
    )


def _mean_where(
    values: jax.Array, where: jax.Array, scale_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The mean over some of the entries of each group, 0 over none, and how many there are."""
    total = reduce_to(jnp.where(where, values, 0.0), scale_shape, jnp.sum)
    count = reduce_to(where.astype(jnp.float32), scale_shape, jnp.sum)
    return total / jnp.maximum(count, 1.0), count


def _symmetric(reach: jax.Array, format: Format, bits: jax.Array) -> QParams:
    return qparams_from_range(
        -reach, reach, bits, format=format, symmetric=True, calibrated=jnp.asarray(True)
    )


def _twn(
    tensor: jax.Array, scale_shape: tuple[int, ...], format: Format, bits: jax.Array
) -> QParams:
    learned = _ternary(format, "twn").learned
    magnitudes = jnp.abs(tensor.astype(jnp.float32))
    reduce = jnp.mean if tensor.size else jnp.sum  # of nothing there is no mean
    delta = TWN_FACTOR * reduce_to(magnitudes, scale_shape, reduce)
    above = magnitudes > expand(delta, magnitudes.shape)
    alpha, _ = _mean_where(magnitudes, above, scale_shape)
    # Nothing lies above NaN or infinity: without this, a broken tensor would look all-zero.
    alpha = jnp.where(jnp.isfinite(delta), alpha, delta)
    qparams = _symmetric(alpha, format, bits)
    theta = {"threshold": divide_by_scale(delta, qparams.scale)}
    if learned:
        # Two arrays, so that their buffers can be donated.
        theta |= {name: jnp.ones_like(qparams.scale) for name in ("negative", "positive")}
    return qparams._replace(theta=theta)


TWN = FitRule("twn", _twn)
"""``Δ = 0.7 mean |w|``, ``scale = mean of |w| over |w| > Δ``, for each group.

Given ``Δ``, that scale minimizes ``‖w - scale · t‖²`` over ternary codes ``t``; the factor is the
paper's approximation of the best ``Δ``, for weights between uniform and normal. The threshold in
``theta`` is ``Δ / scale``, always below the level 1. Learned levels start at 1.

An all-zero group has scale 1 and threshold 0, and stays all-zero. No other group is without an
entry above its ``Δ``.

Raises:
  FormatError: a format that is not ternary.

Sharp edges: sums are accumulated in float32; where they overflow, the scale is NaN and the fault
``NOT_FINITE``. An entry within a rounding error of ``Δ`` may count for the scale and be zero.

>>> from quantjax.formats.ternary import TERNARY
>>> qparams = TWN.fit(jnp.array([0.0, 1.0, -3.0, 4.0]), (1,), TERNARY, jnp.float32(2))
>>> qparams.scale.tolist(), qparams.theta["threshold"].tolist()
([3.5], [0.4000000059604645])

Source: Li et al., Ternary weight networks, 2016, equations 5 and 6.
"""


def _ttq(
    tensor: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    *,
    threshold: float | jax.Array,
) -> QParams:
    if not _ternary(format, "ttq").learned:
        raise errors.FormatError(
            f"the levels of the format {format.name} cannot be learned",
            where="the range rule ttq",
            fix="quantjax.formats.ternary(learned=True)",
        )
    tensor = tensor.astype(jnp.float32)
    largest = reduce_to(jnp.abs(tensor), scale_shape, jnp.max, initial=0.0)
    qparams = _symmetric(largest, format, bits)
    border = divide_by_scale(threshold * largest, qparams.scale)
    # The quotient that the format compares, so that regions are those of the codes.
    scaled = divide_by_scale(tensor, expand(qparams.scale, tensor.shape))
    spread = expand(border, tensor.shape)
    positive, above = _mean_where(scaled, scaled > spread, scale_shape)
    negative, below = _mean_where(-scaled, scaled < -spread, scale_shape)
    either = jnp.where(above + below > 0.0, jnp.maximum(positive, negative), 1.0)
    theta = {
        "threshold": border,
        "negative": jnp.where(below > 0.0, negative, either),
        "positive": jnp.where(above > 0.0, positive, either),
    }
    return qparams._replace(theta=theta)


def _ttq_at(
    tensor: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    threshold: jax.Array,
) -> QParams:
    found = _ttq(tensor, scale_shape, format, bits, threshold=threshold)
    return valid_where((threshold >= 0.0) & (threshold < 1.0), found)


def ttq(*, threshold: float | jax.Array = 0.05) -> FitRule:
    """The starting point of trained ternary quantization, to be followed by gradients of ``theta``.

    ``scale = max |w|`` and ``threshold = t``. The levels start at the mean of ``|w| / scale`` over
    their own region, ``w > t max |w|`` or ``w < -t max |w|``, where the squared error is least;
    that start is a choice of this library. A region without entries takes the other's level; an
    all-zero group has scale and levels 1 and threshold 0.

    Args:
      threshold: ``t``, from 0 up to but not including 1; an array may be traced. It ends up in
        ``theta``, and the levels start by it.

    Raises:
      QuantizerError: a threshold outside [0, 1); scales are NaN where it is traced.
      FormatError, on use: a format that is not ``ternary(learned=True)``.

    Sharp edges: the paper passes gradients to weights scaled by the level, ``positive``, 1 or
    ``negative``; that is for the estimator to do. Sums are accumulated in float32.

    >>> from quantjax.formats.ternary import ternary
    >>> w = jnp.array([0.04, 1.0, -0.5, 0.5])
    >>> qparams = ttq().fit(w, (1,), ternary(learned=True), jnp.float32(2))
    >>> {name: round(float(array[0]), 2) for name, array in qparams.theta.items()}
    {'threshold': 0.05, 'negative': 0.5, 'positive': 0.75}

    Source: Zhu et al., Trained ternary quantization, 2017, section 3.
    """
    known = known_number(threshold, "ttq")
    if known is None:
        return FitRule("ttq", _ttq_at, parameters=(threshold,))
    if not 0.0 <= known < 1.0:
        raise errors.QuantizerError(
            f"a threshold of {known:g} times the maximum",
            why="no weight would be left beyond it, or zero would be no level",
            fix="threshold=0.05",
        )

    name = "ttq" if known == 0.05 else f"ttq({known:g})"
    return FitRule(name, Configured.of(_ttq, threshold=known))


TTQ = ttq()
"""``scale = max |w|``, threshold 0.05, levels at the means of their regions; see :func:`ttq`."""
