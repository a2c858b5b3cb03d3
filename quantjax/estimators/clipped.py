"""The clipped straight-through estimator."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.estimators.base import Estimator, Point


def inside(point: Point) -> jax.Array:
    """1 where the rounded level lies in the range, 0 elsewhere."""
    return point.is_inside.astype(jnp.float32)


CLIPPED = Estimator("clipped", inside)
"""Gradient 1 where the rounded code lies inside the range, 0 where it was clipped.

The scale then gets ``q - z - x/s`` inside and the bound's ``q - z`` outside; the zero point gets 0
inside and ``-s`` outside. The bound is taken on the *rounded* code, as
``torch.fake_quantize_per_tensor_affine`` does, so values up to half a step beyond the last code
still pass; :data:`LSQ` takes it on ``x/s``. At one signed bit the codes are -1 and 1, and values up
to 1.5 scales pass, where BinaryConnect has 1; the sign estimators (:data:`APPROX_SIGN` and others)
have their own windows.

Source: Jacob et al., Quantization and training of neural networks for efficient
integer-arithmetic-only inference, 2018, section 3.
"""
