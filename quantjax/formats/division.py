"""The one division by a scale, correctly rounded on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantjax.formats.scales import SMALLEST_EXPONENT, exponent_of, power_of_two, significand
from quantjax.lean import spread

_SPLIT = 4097.0  # 2^12 + 1, which halves a float32


def divide_by_scale(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x / scale`` with a true IEEE division, elementwise, in float32.

    XLA rewrites a division by a broadcast value into a product with its reciprocal, which moves
    12 % of exact ties to the other code. A divisor that depends on ``x`` keeps the division. It
    depends by a comparison with NaN, which is never true; the barrier keeps XLA from knowing so,
    and from evaluating the comparison where ``x`` is a constant of the program. GPUs divide only
    approximately (2 % of ties moved): there the quotient is corrected by its remainder.

    Sharp edge: of a quotient, XLA divides once by the product of both divisors, unless a barrier
    stands between the two. On a GPU quotients that are no normal numbers are as the GPU has them.

    Args:
      x: float32 values.
      scale: positive, broadcastable against ``x`` (equal rank or scalar).

    >>> float(divide_by_scale(jnp.float32(0.0825), jnp.float32(0.033)))
    2.5
    """
    never = lax.optimization_barrier(lax.full((), jnp.nan, x.dtype))
    is_never = lax.eq(x, spread(never, x.shape))
    scale = lax.select(is_never, lax.stop_gradient(x), spread(scale, x.shape))
    quotient = lax.div(x, scale)
    if jax.default_backend() != "gpu" or quotient.dtype != jnp.float32:
        return quotient
    missing = corrected(*lax.stop_gradient((x, scale, quotient))) - lax.stop_gradient(quotient)
    is_off = jnp.isfinite(quotient) & (missing != 0.0)
    return jnp.where(is_off, quotient + missing, quotient)  # -0 + 0 would be 0


def corrected(
    x: Float[Array, "..."], divisor: Float[Array, "..."], quotient: Float[Array, "..."]
) -> Float[Array, "..."]:
    """``x / divisor`` as IEEE rounds it, from a quotient that is a few last places off.

    Of significands, ``q' = q + (x - q d) / d`` is at most one place off; of it and both neighbors
    the one with the smallest remainder is the correctly rounded one, since no quotient of two
    float32 numbers lies halfway between two. The remainder is exact: ``q d`` is computed in two
    parts (Dekker, A floating-point technique for extending the available precision, 1971).
    Operands or quotients that are not normal keep the quotient given.
    """
    exponents = exponent_of(x), exponent_of(divisor)
    numerator, denominator = significand(x), significand(divisor)
    exponent = exponents[0] - exponents[1]
    # Significands lie in [1, 2), the quotient of two in (1/2, 2).
    given = significand(quotient) * power_of_two(exponent_of(quotient) - exponent)
    best = given + _remainder(numerator, denominator, given) / denominator
    remainder = _remainder(numerator, denominator, best)
    up = jnp.where(best < 1.0, jnp.float32(2.0**-24), jnp.float32(2.0**-23))
    down = jnp.where(best <= 1.0, jnp.float32(2.0**-24), jnp.float32(2.0**-23))
    is_low = jnp.abs(remainder - up * denominator) < jnp.abs(remainder)
    is_high = jnp.abs(remainder + down * denominator) < jnp.abs(remainder)
    best = jnp.where(is_low, best + up, jnp.where(is_high, best - down, best))
    sign = jnp.sign(x) * jnp.sign(divisor)
    found = sign * best * power_of_two(exponent)
    normal = [(e > -127) & (e < 128) for e in exponents]
    is_usual = normal[0] & normal[1] & (exponent > SMALLEST_EXPONENT) & (exponent < 127)
    return jnp.where(is_usual, found, quotient)


def _remainder(x: jax.Array, divisor: jax.Array, quotient: jax.Array) -> jax.Array:
    """``x - quotient · divisor``, exact where the quotient is a few places off."""
    whole = quotient * divisor
    (a, b), (c, d) = _halves(quotient), _halves(divisor)
    rest = ((a * c - whole) + a * d + b * c) + b * d
    return (x - whole) - rest


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers of 12 bits each whose sum is ``x``."""
    moved = _SPLIT * x
    high = moved - (moved - x)
    return high, x - high
