"""What is static about the arithmetic of one quantized tensor."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantjax.affine import DIVIDED, QParams, Scaling, is_positive
from quantjax.estimators import CLIPPED, Estimator
from quantjax.formats import Format, IntegerFormat
from quantjax.lean import select
from quantjax.rounding import HALF_EVEN, Rounding


class Arithmetic(NamedTuple):
    """The static part of quantizing one tensor.

    Attributes:
      format, rounding, scaling: what a code is, and how a real becomes one.
      estimator: what its gradient is.
      symmetric: whether the zero point is known to be 0.
    """

    format: Format
    rounding: Rounding = HALF_EVEN
    estimator: Estimator = CLIPPED
    scaling: Scaling = DIVIDED
    symmetric: bool = False

    @property
    def has_no_zero_point(self) -> bool:
        """Whether codes are computed without one, in fewer operations."""
        return self.symmetric and isinstance(self.format, IntegerFormat)

    def usable_scale(self, qparams: QParams) -> jax.Array:
        """The scale; NaN where it is no positive finite number, such as one that training has moved
        below zero, or where a symmetric quantizer was given a zero point, which it cannot keep.

        As in frozen and executed models; with QParams that are known it is an error there.
        """
        usable = is_positive(qparams.scale)
        if self.has_no_zero_point:
            usable &= qparams.zero_point == 0.0
        return select(usable, qparams.scale, jnp.nan)

    def resolved(self, qparams: QParams, shape: tuple[int, ...]) -> QParams:
        """The scale, zero point and width in use, by the estimator; ``theta`` stays."""
        found = self.estimator.resolved(qparams, self.format, shape)
        if self.estimator.resolve is None:
            return found
        faulty = jnp.isnan(qparams.scale)  # of which the zero point is the fault
        keeps = faulty | self.has_no_zero_point  # where 0 need not be a code
        return found._replace(
            scale=jnp.where(faulty, jnp.nan, found.scale),
            zero_point=jnp.where(keeps, qparams.zero_point, found.zero_point),
        )
