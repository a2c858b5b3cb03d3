"""What a gradient estimator is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax


class Estimator(NamedTuple):
    """The derivative that stands in for that of a rounded and clipped code.

    A code is ``q = clip(round(x/s) + z, low, high)``. Its derivative with respect to ``x/s`` is
    zero almost everywhere; the estimator puts ``slope`` in its place, and all gradients follow:

    ``∂y/∂x = slope``, ``∂y/∂s = (q - z) - slope · x/s``, ``∂y/∂z = s · (slope - 1)``
    for ``y = s · (q - z)``.

    Attributes:
      name: what it prints as.
      slope: ``(unclipped, low, high) -> float32 array``, with ``unclipped = round(x/s) + z``. It
        does not depend on the incoming gradient, so the rule is linear and both forward-mode and
        reverse-mode differentiation work.
    """

    name: str
    slope: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
