"""A tensor that is quantized on its own, beside any product: rows, outputs, biases."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from quantjax.affine import QParams
from quantjax.arithmetic import Arithmetic
from quantjax.estimators.gradients import round_through
from quantjax.formats import divide_by_scale
from quantjax.lean import narrowed
from quantjax.simulation import apply

MOST_IN_INT32 = 2.0**31 - 2.0**7  # the last float32 below 2^31


def rounded(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "..."]:
    """``fake_quant(x)``, whose last product is rounded before anything is added to it.

    XLA would contract ``codes · scale`` and a sum behind it into one multiply-add in some programs
    and not in others, as it would for the sums of a product (see ``products.groups.times``).
    """
    return _settled(apply(x, qparams, arithmetic, key), qparams.scale)


def rounded_product(codes: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """``codes · scale``, rounded before anything is added to it."""
    return _settled(codes * scale, scale)


def _settled(y: jax.Array, scale: jax.Array) -> jax.Array:
    return _held(y, scale) if y.dtype == jnp.float32 else y


@jax.custom_jvp
@functools.partial(jax.jit, inline=True)  # one program where it is called eagerly
def _held(y: jax.Array, scale: jax.Array) -> jax.Array:
    # The mask is 0 unless a scale is NaN, which compilers do not know.
    mask = jnp.any(jnp.isnan(scale)).astype(jnp.int32)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(y, jnp.int32) ^ mask, jnp.float32)


@_held.defjvp
def _held_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _held(*primals), tangents[0]


def bias_at_sums(
    bias: Float[Array, "..."], scale: Float[Array, "..."], bypass: jax.Array
) -> Float[Array, "..."]:
    """The bias in multiples of the scale of the sums, as many as int32 holds.

    Gradients pass straight through the rounding, and end where codes do. Where each row of the
    sums has a scale of its own, so has the bias: codes for each row.

    Args:
      bypass: where an operand has no codes, and the bias is left as it is.
    """
    shape = jnp.broadcast_shapes(bias.shape, scale.shape)
    wide, scale = (jnp.broadcast_to(a, shape) for a in (bias.astype(jnp.float32), scale))
    codes = jnp.clip(round_through(divide_by_scale(wide, scale)), -MOST_IN_INT32, MOST_IN_INT32)
    float_bias = jnp.broadcast_to(bias, shape)
    return jnp.where(bypass, float_bias, narrowed(rounded_product(codes, scale), bias.dtype))
