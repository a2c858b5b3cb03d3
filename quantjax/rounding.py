"""How a real number becomes an integer: named values, never implied.

A :class:`Rounding` is a named pure function. The default of every quantizer is :data:`HALF_EVEN`,
which is what IEEE 754, ONNX, TFLite's float kernels and NumPy's ``rint`` do. Every number format
rounds by the same five: a format says where a real lies between its neighbours, in units of their
distance, and the rounding says which of the two it becomes.

Python keeps no text for a value: ``help(qj.rounding.FLOOR)`` shows what all of them have. What is
said of each one stands below it in this file.

| value | result |
|---|---|
| ``HALF_EVEN`` | the nearest, ties to the even one |
| ``HALF_AWAY`` | the nearest, ties away from zero |
| ``FLOOR`` | the largest that is not above |
| ``CEIL`` | the smallest that is not below |
| ``STOCHASTIC`` | one of the two at random, right on average; needs a key |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax import errors
from quantjax.arguments import expect_key


class Rounding(NamedTuple):
    """A rule ``ℝ → ℤ`` applied elementwise to float32 values.

    Attributes:
      name: what it prints as.
      apply: float32 array -> float32 array of the same shape holding integers; NaN stays NaN, and
        infinities stay. One that is random takes a second array of that shape, uniform on (0, 1).
      is_nearest: whether ``|apply(x) - x| <= 1/2`` everywhere (the half-step law holds).
      is_random: whether ``apply`` still needs noise, and so a key.
    """

    name: str
    apply: Callable[..., jax.Array]
    is_nearest: bool
    is_random: bool = False

    def given(self, noise: jax.Array | None) -> Rounding:
        """The same rule with its noise filled in, so that ``apply`` takes the values alone.

        What is random is so no longer: the noise decides. The result lives in the trace of the
        noise and is no static value; it equals no other.

        Raises:
          KeyMissingError: no noise for a random rounding.
        """
        if not self.is_random:
            return self
        if noise is None:
            raise errors.KeyMissingError(
                f"the rounding {self.name} is random and was given no key",
                why="randomness comes from explicit keys only",
                fix="key=jax.random.key(0)",
            )
        return self._replace(apply=lambda values: self.apply(values, noise), is_random=False)

    def noise(self, key: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
        """What :meth:`given` needs: a uniform float32 number on (0, 1) for each value, or None.

        None where the rounding is not random, and without a key (:meth:`given` then raises).
        The numbers are ``(k + 1/2) / 2^23``, ``k`` uniform on ``0 .. 2^23 - 1``: the centres of
        2^23 equal intervals. Their left ends, which ``jax.random.uniform`` returns, would round
        values between two such numbers up a little too often.
        """
        if not self.is_random or key is None:
            return None
        expect_key(key, where=f"the rounding {self.name}")
        k = jax.random.bits(key, shape, jnp.uint32) >> jnp.uint32(9)
        return (k.astype(jnp.float32) + 0.5) * 2.0**-23


def expect_whole(rounding: Rounding, *, where: str) -> None:
    """Raise ``QuantizerError`` for a rule that is none from real numbers to whole ones.

    It is tried on a few numbers: what simulates keeps the fraction that codes cannot have.
    """
    wrong = "" if rounding in ROUNDINGS else _wrong_with(rounding)
    if wrong:
        raise errors.QuantizerError(
            f"the rounding {rounding.name} {wrong}",
            where=where,
            why="it takes float32 numbers, each to one of the whole numbers next to it",
            fix='qj.Rounding("down", jnp.floor, is_nearest=False)',
        )


@functools.lru_cache(maxsize=64)
def _wrong_with(rounding: Rounding) -> str:
    tried = np.array([-130.5, -2.0, -1.5, -0.75, -0.0, 0.25, 0.5, 1.0, 6.9, 2.0**24], np.float32)
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        values, noise = jnp.asarray(tried), jnp.full(tried.shape, 0.5, jnp.float32)
        try:
            found = rounding.given(noise).apply(values)
            alone = rounding.given(noise[:1]).apply(values[:1])
        except (TypeError, ValueError) as error:
            takes = "values and noise" if rounding.is_random else "values, without is_random=True"
            return f"cannot be called with {takes}: {error}"
    if jnp.result_type(found) != jnp.float32 or jnp.shape(found) != tried.shape:
        shape = "x".join(map(str, jnp.shape(found))) or "scalar"
        return f"makes {jnp.result_type(found)}[{shape}] of float32[{tried.size}]"
    whole = np.asarray(found)
    odd = (whole != np.floor(whole)) | (np.abs(whole - tried) > (0.5 if rounding.is_nearest else 1))
    odd[:1] |= whole[:1] != np.asarray(alone)
    if odd.any():
        return f"makes {whole[odd][0]:g} of {tried[odd][0]:g}"
    return ""


def _half_even(values: jax.Array) -> jax.Array:
    return lax.round(values, lax.RoundingMethod.TO_NEAREST_EVEN)


def _half_away(values: jax.Array) -> jax.Array:
    return lax.round(values, lax.RoundingMethod.AWAY_FROM_ZERO)


def _stochastic(values: jax.Array, noise: jax.Array) -> jax.Array:
    # Not floor(values + noise): that sum is rounded, so that large values lose their fraction and
    # integers beyond 2^23 move. The fraction of NaN and of infinities is NaN; no noise is below it.
    below = lax.floor(values)
    return below + (noise < values - below).astype(values.dtype)


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

FLOOR = Rounding("floor", lax.floor, is_nearest=False)
"""The largest integer that is not above.

>>> [float(v) for v in FLOOR.apply(jnp.array([-1.5, -0.5, 0.5, 1.0]))]
[-2.0, -1.0, 0.0, 1.0]

Source: IEEE Std 754-2019, section 4.3.2, roundTowardNegative.
"""

CEIL = Rounding("ceil", lax.ceil, is_nearest=False)
"""The smallest integer that is not below.

>>> [float(v) for v in CEIL.apply(jnp.array([-1.5, 0.5, 1.0]))]
[-1.0, 1.0, 1.0]

Source: IEEE Std 754-2019, section 4.3.2, roundTowardPositive.
"""

STOCHASTIC = Rounding("stochastic", _stochastic, is_nearest=False, is_random=True)
"""``⌊x⌋ + 1`` with probability ``x - ⌊x⌋``, else ``⌊x⌋``: unbiased, ``E[q] = x``.

Integers stay, whatever the noise. Needs a key. The probability is a multiple of ``2^-23``: exact
for all ``|x| >= 1`` and off by less than ``2^-23``, to either side, below that. A fraction of
``2^-24`` or less never rounds up.

>>> import jax
>>> noise = STOCHASTIC.noise(jax.random.key(0), (10_000,))
>>> values = STOCHASTIC.given(noise).apply(jnp.full(10_000, 2.25))
>>> sorted({float(v) for v in values}), bool(abs(values.mean() - 2.25) < 0.02)
([2.0, 3.0], True)

Source: Gupta et al., Deep learning with limited numerical precision, 2015, section 3.1.
"""

ROUNDINGS = (HALF_EVEN, HALF_AWAY, FLOOR, CEIL, STOCHASTIC)
"""All of them."""
