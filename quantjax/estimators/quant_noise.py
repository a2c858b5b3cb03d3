"""Quant-Noise: only some of the weights are quantized in each step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Parameters
from quantjax.estimators.straight_through import ones
from quantjax.formats import Format


def _start(qparams: QParams, format: Format) -> Parameters:
    del format
    return {"rate": jnp.full_like(qparams.scale, 0.5)}


def _chosen(parameters: Parameters, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    rate = jnp.where(_is_share(parameters), parameters["rate"], 2.0)  # all of what becomes NaN
    return jax.random.uniform(key, shape, jnp.float32) < rate


def _is_share(parameters: Parameters) -> jax.Array:
    return (parameters["rate"] >= 0.0) & (parameters["rate"] <= 1.0)


QUANT_NOISE = Estimator(
    "quant-noise", ones, parameters=("rate",), start=_start, chosen=_chosen, valid=_is_share
)
"""Each entry is quantized with probability ``theta["rate"]``, the others pass with exact gradients.

The quantized ones pass gradients straight through. The rate is 0.5 to start with, and 1 is plain
quantization: set it so for evaluation. Needs a key; ``qj.freeze`` quantizes every entry.

Source: Fan et al., Training with quantization noise for extreme model compression, 2021, section 4.
"""
