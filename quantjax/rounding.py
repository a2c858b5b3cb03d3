"""How a real number becomes an integer: named values, never implied.

A :class:`Rounding` is a named pure function. The default of every quantizer is :data:`HALF_EVEN`,
which is what IEEE 754, ONNX, TFLite's float kernels and NumPy's ``rint`` do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax


class Rounding(NamedTuple):
    """A rule ``ℝ → ℤ`` applied elementwise to float32 values.

    Attributes:
      name: what it prints as.
      apply: float32 array -> float32 array of the same shape holding integers.
      is_nearest: whether ``|apply(x) - x| <= 1/2`` everywhere (the half-step law holds).
    """

    name: str
    apply: Callable[[jax.Array], jax.Array]
    is_nearest: bool


def _half_even(values: jax.Array) -> jax.Array:
    return lax.round(values, lax.RoundingMethod.TO_NEAREST_EVEN)


def _half_away(values: jax.Array) -> jax.Array:
    return lax.round(values, lax.RoundingMethod.AWAY_FROM_ZERO)


HALF_EVEN = Rounding("half_even", _half_even, is_nearest=True)
"""Nearest integer, ties to the even one.

>>> import jax.numpy as jnp
>>> [float(v) for v in HALF_EVEN.apply(jnp.array([-1.5, -0.5, 0.5, 1.5, 2.5]))]
[-2.0, -0.0, 0.0, 2.0, 2.0]

Source: IEEE Std 754-2019, section 4.3.1, roundTiesToEven.
"""

HALF_AWAY = Rounding("half_away", _half_away, is_nearest=True)
"""Nearest integer, ties away from zero: C's ``round``, and what several fixed-point runtimes do.

>>> [float(v) for v in HALF_AWAY.apply(jnp.array([-1.5, -0.5, 0.5, 1.5, 2.5]))]
[-2.0, -1.0, 1.0, 2.0, 3.0]

Source: IEEE Std 754-2019, section 4.3.1, roundTiesToAway.
"""
