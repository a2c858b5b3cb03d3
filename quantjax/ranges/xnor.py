"""The scale of XNOR-Net: the mean magnitude."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.affine import QParams, qparams_from_range
from quantjax.formats import Format, IntegerFormat
from quantjax.granularity import reduce_to
from quantjax.ranges.base import FitRule


def _fit(
    tensor: jax.Array, scale_shape: tuple[int, ...], format: Format, bits: jax.Array
) -> QParams:
    if not (isinstance(format, IntegerFormat) and format.signed):
        raise errors.FormatError(
            f"the format {format.name} has no one-bit codes -1 and +1",
            where="the range rule xnor",
            fix="qj.integer(max_bits=1)",
        )
    largest, mean = _magnitudes(tensor, scale_shape)
    # At one bit a range spans one scale, so the mean itself becomes the scale.
    reach = jnp.where(bits == 1.0, mean, largest)
    return qparams_from_range(
        -reach, reach, bits, format=format, symmetric=True, calibrated=jnp.asarray(True)
    )


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _magnitudes(tensor: jax.Array, scale_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The largest and the mean; one program where they are called eagerly, whose sum XLA orders as
    in any other.
    """
    magnitudes = jnp.abs(tensor.astype(jnp.float32))
    largest = reduce_to(magnitudes, scale_shape, jnp.max, initial=0.0)
    mean = reduce_to(magnitudes, scale_shape, jnp.mean) if tensor.size else largest
    return largest, mean


XNOR = FitRule("xnor", _fit)
"""``scale = mean |w|`` over each group: the ``α`` that minimizes ``‖w - α sign(w)‖²``.

That is a rule for one bit, codes -1 and +1. At every other width of a sweep, the scale is that of
the largest magnitude, ``max |w| / steps``, as by ``MIN_MAX`` with symmetric codes. The zero point
is 0; an all-zero group has scale 1, and at one bit, where 0 is no level, the smallest normal one. A
format with another scale rule than real numbers has the scale of that rule for the mean.

Raises:
  FormatError: a format that is no signed integer.

Sharp edges: the mean is accumulated in float32; where the sum overflows, the scale is NaN and the
fault ``NOT_FINITE``.

>>> from quantjax.formats import integer
>>> w = jnp.array([[1.0, -2.0], [3.0, 0.0]])
>>> XNOR.fit(w, (2, 1), integer(max_bits=1), jnp.float32(1)).scale.tolist()
[[1.5], [1.5]]

Source: Rastegari et al., XNOR-Net: ImageNet classification using binary convolutional neural
networks, 2016, section 3.1.
"""
