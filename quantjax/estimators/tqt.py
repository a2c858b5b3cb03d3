"""Trained quantization thresholds: scales that are powers of two."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Need, Parameters
from quantjax.estimators.clipped import inside
from quantjax.estimators.gradients import ceil_through, clip_through
from quantjax.formats import Format


@jax.custom_jvp
def _two_to(exponent: jax.Array) -> jax.Array:
    """``2^e`` of whole numbers, exact, with the derivative ``2^e ln 2``."""
    return jnp.ldexp(jnp.ones_like(exponent), exponent.astype(jnp.int32))


@_two_to.defjvp
def _two_to_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    value = _two_to(*primals)
    return value, value * math.log(2.0) * tangents[0]


def _bits_of_magnitude(qparams: QParams, format: Format) -> jax.Array:
    """``b - 1`` for signed integers, ``b`` for unsigned ones."""
    return jnp.round(qparams.bits) - (1.0 if format.signed else 0.0)


def _log2(x: jax.Array) -> jax.Array:
    """Exact at powers of two, where ``jnp.log2`` is not: the ceiling would double the scale."""
    mantissa, exponent = jnp.frexp(x)
    exponent = exponent.astype(jnp.float32)
    return jnp.where(mantissa == 0.5, exponent - 1.0, exponent + jnp.log2(mantissa))


def _start(qparams: QParams, format: Format) -> Parameters:
    return {"log2_threshold": _log2(qparams.scale) + _bits_of_magnitude(qparams, format)}


def _resolve(qparams: QParams, own: Parameters, format: Format, shape: tuple[int, ...]) -> QParams:
    del shape
    threshold = own["log2_threshold"]
    exponent = ceil_through(threshold) - _bits_of_magnitude(qparams, format)
    scale = _two_to(clip_through(exponent, -126.0, 127.0))
    return qparams._replace(scale=scale)


def _is_finite(own: Parameters) -> jax.Array:
    return jnp.isfinite(own["log2_threshold"])


TQT = Estimator(
    "tqt",
    inside,
    parameters=("log2_threshold",),
    start=_start,
    resolve=_resolve,
    needs=frozenset({Need.FIXED_RANGE, Need.INTEGERS}),
    valid=_is_finite,
)
"""The logarithm of the threshold is learned, and the scale is the power of two above it.

``s = 2^ceil(log2 t) / 2^(b-1)`` (``2^b`` for unsigned codes). ``ceil`` is passed straight through:
``∂y/∂(log2 t) = s ln 2 · (q - x/s)`` inside the range, ``s ln 2 · q`` at its bounds. The scale of
the QParams is not used. For integers.

Source: Jain et al., Trained quantization thresholds for accurate and efficient fixed-point
inference of deep neural networks, 2020, section 3.
"""
