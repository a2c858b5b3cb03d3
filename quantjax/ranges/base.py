"""What a range rule is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from quantjax.affine import QParams
from quantjax.formats import Format
from quantjax.statistics import Statistics


class Range(NamedTuple):
    """The interval that codes have to cover, at the shape of the scale.

    Attributes:
      low, high: the bounds, float32.
      calibrated: whether the rule had anything to go by.
    """

    low: Float[Array, "..."]
    high: Float[Array, "..."]
    calibrated: Bool[Array, ""]


class RangeRule(NamedTuple):
    """A pure function from statistics to a range, the same under any trace.

    Attributes:
      name: what it prints as.
      range: ``(statistics, format, bits) -> Range``; ``bits`` may be traced. Rules that do not
        look at the width ignore it.
    """

    name: str
    range: Callable[[Statistics, Format, jax.Array], Range]


class FitRule(NamedTuple):
    """A pure function from the tensor itself to QParams: for what no range determines.

    It serves weights, which are at hand when ``qj.calibrate`` runs, and live ranges.

    Attributes:
      name: what it prints as.
      fit: ``(tensor, scale_shape, format, bits) -> QParams``; the tensor is float32, the shape of
        its rank, ``bits`` a scalar that may be traced. Scales follow the format's scale rule
        where that has any meaning; a width of 0, a tensor that is not finite, and widths beyond the
        container are dealt with by the caller.
    """

    name: str
    fit: Callable[[jax.Array, tuple[int, ...], Format, jax.Array], QParams]
