"""Powers of two and of its root: levels that lie evenly on the logarithmic scale (LogNet, INQ).

A product with such a level is a shift. Levels are the scale's own multiples ``±2^(-j/n)``, ``n`` of
them an octave, the highest is 1, and there is a zero.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax import errors
from quantjax.arguments import expect
from quantjax.formats.base import ALL_LAWS, Format, Law, Snapped, Theta
from quantjax.formats.scales import (
    INQ_SCALE,
    POWER_OF_TWO_NEAREST,
    SMALLEST_EXPONENT,
    ScaleRule,
    exponent_of,
    power_of_two,
    significand,
)
from quantjax.rounding import Rounding

SMALLEST_LEVEL = 2.0**SMALLEST_EXPONENT
LARGEST_FRACTION = 1.0 - 2.0**-24


def _float32_below(x: float) -> float:
    """The largest float32 up to ``x``: for an ``x`` that is none, ``m > x`` is ``m > that``."""
    nearest = np.float32(x)
    # As Python numbers: NumPy would round x to float32 before it compares.
    is_below = float(nearest) <= x
    return float(nearest if is_below else np.nextafter(nearest, np.float32(0.0)))


ROOT = _float32_below(math.sqrt(2.0))
FOURTH_ROOT = _float32_below(2.0**0.25)
FOURTH_ROOT_CUBED = _float32_below(2.0**0.75)


class Nearest(enum.Enum):
    """Where the border between two neighbouring levels ``a < b`` lies."""

    LOGARITHMIC = "sqrt(a b): nearest in exponent; only 0 becomes 0, all else below is the lowest"
    LINEAR = "(a + b) / 2: nearest in value; below half of the lowest level is 0"


class Magnitudes(enum.Enum):
    """How many magnitudes a width of ``b`` bits has, beside zero."""

    ALL = "2^(b-1) - 1 signed, 2^b - 1 unsigned: all that codes can hold"
    HALF = "2^(b-2) signed, 2^(b-1) unsigned: half of the codes"


class _Place(NamedTuple):
    """A magnitude between its neighbours: exponent of the lower one, and how far it is from it."""

    lower: jax.Array
    fraction: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogFormat(Format):
    """Levels ``0`` and ``±2^(-j/n)``, ``j = 0, 1, …``; construct with :func:`lognet`, :func:`inq`.

    Codes are unsigned: 0 is zero, ``j + 1`` the magnitude ``2^(-j/n)``, and the highest of
    ``max_bits`` bits the sign. A code means the same at every width; a wider one reaches lower.
    Codes that no level has decode to -0 (the sign alone) or NaN (below ``2^-126``).

    Levels below ``2^-126``, which no normal float32 is, are left out; that matters at 8 bits only.
    Subnormal quotients count as zero on every backend. Where level times scale is subnormal, CPU
    flushes the result to zero.

    At one bit, signed codes would have no magnitude: that width is refused.

    Attributes:
      per_octave: ``n``, 1 or 2: base 2 or √2. √2 itself is held as the float32 nearest to it.
      nearest: the border between levels. Roundings that are not to the nearest choose between
        the same neighbours by the coordinate that it names: the logarithm or the value. Stochastic
        rounding is therefore unbiased in value if linear and in exponent if logarithmic. Zero is
        infinitely far on a logarithmic scale: floor reaches it, stochastic rounding does not.
      magnitudes: how many there are.
    """

    per_octave: int = 1
    nearest: Nearest = Nearest.LOGARITHMIC
    magnitudes: Magnitudes = Magnitudes.ALL

    def __post_init__(self) -> None:
        where = type(self).__name__
        expect(self.max_bits, numbers.Integral, argument="max_bits", where=where, fix="max_bits=4")
        fewest = 2 if self.signed else 1
        if not fewest <= self.max_bits <= 8:
            raise errors.FormatError(
                f"logarithmic containers hold {fewest} to 8 bits, got {self.max_bits}",
                why="a sign and no magnitude would be left" if self.max_bits == 1 else "",
                fix=f"max_bits={min(max(self.max_bits, fewest), 8)}",
            )
        if self.per_octave not in (1, 2):
            raise errors.FormatError(
                f"levels are 1 or 2 an octave, got {self.per_octave}", fix="per_octave=2"
            )

    @property
    def name(self) -> str:
        """``log``, ``ulog-sqrt2``, ``log-linear-half-inq``: what differs from LogNet's base 2."""
        parts = ["log" if self.signed else "ulog"]
        parts += ["sqrt2"] if self.per_octave == 2 else []
        parts += ["linear"] if self.nearest is Nearest.LINEAR else []
        parts += ["half"] if self.magnitudes is Magnitudes.HALF else []
        return self.named("-".join(parts))

    def label(self, bits: int) -> str:
        """How it prints at a width: ``log4-pow2-nearest``, ``ulog4-sqrt2-pow2-nearest``."""
        return self.name.replace("log", f"log{bits}", 1)

    @property
    def laws(self) -> frozenset[Law]:
        """All but INTEGER; NEAREST if linear, ODD if signed."""
        missing = {Law.INTEGER}
        if self.nearest is Nearest.LOGARITHMIC:
            missing.add(Law.NEAREST)
        if not self.signed:
            missing.add(Law.ODD)
        return ALL_LAWS - missing

    def level_range(self, bits: jax.Array, theta: Theta = ()) -> tuple[jax.Array, jax.Array]:
        """``[-1, 1]`` or ``[0, 1]`` at every width: the maximum becomes the scale."""
        del theta
        high = jnp.ones_like(jnp.asarray(bits, jnp.float32))
        return (-high if self.signed else jnp.zeros_like(high)), high

    def valid_bits(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """0 and 1 or 2 (signed) to ``max_bits``."""
        held = super().valid_bits(bits, theta)
        return held & (bits != 1.0) if self.signed else held

    def is_elementwise(self, theta: Theta) -> bool:
        """A code means the same at every width."""
        del theta
        return True

    def snap(
        self,
        scaled: jax.Array,
        zero_point: jax.Array,
        bits: jax.Array,
        rounding: Rounding,
        theta: Theta = (),
    ) -> Snapped:
        """The level on the same side of zero whose exponent the rounding chooses.

        Ties, which linear borders alone have, go by the place of the level counted from zero: half
        to even from halfway below the lowest level to zero, for instance. NaN stays NaN.
        """
        del theta
        shifted = scaled + zero_point
        magnitude, side = jnp.abs(shifted), jnp.where(shifted < 0.0, -1.0, 1.0)
        count = self._count(bits)
        lower, fraction = self._place(magnitude, count, rounding)
        # Nearest rounding looks at the parity of the place. Adding the place itself, of up to 8
        # bits, would round the fraction; the others get the fraction alone.
        odd = ((lower + count) & 1).astype(jnp.float32) if rounding.is_nearest else 0.0
        up = side * rounding.apply(side * (odd + fraction)) - odd
        exponent = lower + up.astype(jnp.int32)

        def level(at: jax.Array) -> jax.Array:
            signed = jnp.where(exponent <= -count, 0.0, side * self._level(at))
            return jnp.where(jnp.isnan(shifted), shifted, signed)

        clipped, unclipped = level(jnp.minimum(exponent, 0)), level(exponent)
        return Snapped(clipped if self.signed else jnp.maximum(clipped, 0.0), unclipped)

    def encode(self, levels: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """Sign bit and ``j + 1``; uint8. NaN has the code of zero."""
        del bits, theta
        levels = jnp.asarray(levels, jnp.float32)
        mantissa, exponent = significand(levels), self.per_octave * exponent_of(levels)
        for border in (ROOT,) if self.per_octave == 1 else (FOURTH_ROOT, FOURTH_ROOT_CUBED):
            exponent += (mantissa > border).astype(jnp.int32)
        held = jnp.abs(levels) >= SMALLEST_LEVEL
        codes = jnp.where(held, jnp.clip(1 - exponent, 1, self._sign - 1), 0)
        if self.signed:
            negative = lax.bitcast_convert_type(levels, jnp.int32) < 0
            codes += jnp.where(negative & ~jnp.isnan(levels), self._sign, 0)
        return codes.astype(self.storage_dtype)

    def decode(self, codes: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """The level of each code, whatever the width."""
        del bits, theta
        whole = codes.astype(jnp.int32)
        place = whole & (self._sign - 1)
        magnitude = jnp.where(place == 0, 0.0, self._level(1 - place))
        magnitude = jnp.where(place > self._most, jnp.nan, magnitude)
        return jnp.where(whole >= self._sign, -magnitude, magnitude)

    @property
    def _sign(self) -> int:
        """The sign bit; of unsigned codes the bit above the highest."""
        return 1 << (self.max_bits - 1 if self.signed else self.max_bits)

    @property
    def _most(self) -> int:
        """How many magnitudes normal float32 numbers hold."""
        return -SMALLEST_EXPONENT * self.per_octave + 1

    def _count(self, bits: jax.Array) -> jax.Array:
        """How many magnitudes there are at a width; at least one, where bypass discards them."""
        whole = jnp.clip(jnp.asarray(bits, jnp.float32), 0.0, float(self.max_bits))
        free = whole.astype(jnp.int32) - (1 if self.signed else 0)
        if self.magnitudes is Magnitudes.HALF:
            count = 1 << jnp.maximum(free - 1, 0)
        else:
            count = (1 << jnp.maximum(free, 0)) - 1
        return jnp.clip(count, 1, self._most)

    def _level(self, exponent: jax.Array) -> jax.Array:
        """``2^(exponent / n)``."""
        if self.per_octave == 1:
            return power_of_two(exponent)
        return power_of_two(exponent >> 1) * jnp.where(exponent & 1 == 1, ROOT, 1.0)

    def _place(self, magnitude: jax.Array, count: jax.Array, rounding: Rounding) -> _Place:
        """The lower neighbour, zero being ``-count``, and the fraction of the way to the upper one.

        To the nearest, only the side of the border matters, and it is found by exact comparisons:
        the fraction is 1/4, 1/2 or 3/4.
        """
        mantissa, lower = significand(magnitude), self.per_octave * exponent_of(magnitude)
        base, following = jnp.ones_like(mantissa), jnp.full_like(mantissa, 2.0)
        border = jnp.full_like(mantissa, ROOT)
        if self.per_octave == 2:
            upper = mantissa >= ROOT
            lower += upper.astype(jnp.int32)
            base, following = jnp.where(upper, ROOT, 1.0), jnp.where(upper, 2.0, ROOT)
            border = jnp.where(upper, FOURTH_ROOT_CUBED, FOURTH_ROOT)
        lowest = self._level(1 - count)
        within = magnitude >= lowest
        if self.nearest is Nearest.LINEAR:
            # Differences of float32 numbers at most a factor 2 apart are exact.
            below = jnp.where(within, mantissa - base, magnitude)
            above = jnp.where(within, following - mantissa, lowest - magnitude)
            if rounding.is_nearest:
                # From zero: twice the magnitude, as half of the lowest level may be subnormal.
                far = jnp.where(within, above, lowest)
                near = jnp.where(within, below, magnitude + magnitude)
                fraction = jnp.where(near > far, 0.75, jnp.where(near < far, 0.25, 0.5))
            else:
                fraction = below / (below + above)
        else:
            if rounding.is_nearest:
                inside = jnp.where(mantissa > border, 0.75, 0.25)
            else:
                ratio = float(self.per_octave) * jnp.log2(mantissa / base)
                ratio = jnp.clip(ratio, 1.0 - LARGEST_FRACTION, LARGEST_FRACTION)
                inside = jnp.where(mantissa == base, 0.0, ratio)
            beneath = 0.75 if rounding.is_nearest else LARGEST_FRACTION
            fraction = jnp.where(within, inside, beneath)
        nothing = magnitude < SMALLEST_LEVEL
        return _Place(jnp.where(within, lower, -count), jnp.where(nothing, 0.0, fraction))


def lognet(
    *,
    max_bits: int = 4,
    signed: bool = True,
    per_octave: int = 1,
    scale_rule: ScaleRule = POWER_OF_TWO_NEAREST,
) -> LogFormat:
    """LogNet's levels: ``sign(x) · 2^(clip(round(n log2 |x|), …, n · log2 scale) / n)``, 0 for 0.

    Weights are signed, activations behind a ReLU are not. The lowest magnitude takes all that is
    smaller, exact zeros excepted; ``scale`` is ``2^FSR`` of the paper's full-scale range.

    Args:
      max_bits: the container with the sign, 2 to 8; unsigned 1 to 8.
      signed: whether there is a sign.
      per_octave: 1 for base 2, 2 for base √2.
      scale_rule: by default the power of two that the largest magnitude is rounded to.

    Raises:
      FormatError: a container or base that does not exist.

    Sharp edges: the nearest in exponent is not the nearest in value. Values between 1.5 and
    1.414… times a level go up.

    >>> from quantjax.rounding import HALF_EVEN
    >>> x, zero = jnp.array([0.0, 1e-9, 0.3, -0.36, 0.8, 9.0]), jnp.float32(0)
    >>> lognet().snap(x, zero, jnp.float32(4), HALF_EVEN).level.tolist()
    [0.0, 0.015625, 0.25, -0.5, 1.0, 1.0]

    Source: Miyashita et al., Convolutional neural networks using logarithmic data representation,
    2016, section 3.
    """
    return LogFormat(max_bits=max_bits, signed=signed, per_octave=per_octave, scale_rule=scale_rule)


def inq(*, max_bits: int = 5) -> LogFormat:
    """INQ's levels: 0 and ``±2^n2 … ±2^n1``, the nearest in value.

    ``n1 = ⌊log2(4 max|w| / 3)⌋`` by the scale rule, ``n2 = n1 + 1 - 2^(b-1)/2``. A weight becomes
    ``±β`` if ``(α + β)/2 <= |w| < 3β/2`` for neighbours ``α < β``, 0 being one: exactly so with
    ``HALF_AWAY``, while ``HALF_EVEN`` differs at those lower bounds.

    Args:
      max_bits: the container, 2 to 8; it counts the paper's bit for zero.

    Raises:
      FormatError: a container that does not exist.

    >>> from quantjax.rounding import HALF_AWAY
    >>> x, zero = jnp.array([0.06, 0.0625, 0.37, -0.375, 1.4]), jnp.float32(0)
    >>> inq().snap(x, zero, jnp.float32(4), HALF_AWAY).level.tolist()
    [0.0, 0.125, 0.25, -0.5, 1.0]

    Source: Zhou et al., Incremental network quantization: towards lossless CNNs with low-precision
    weights, 2017, section 2.1, equations 1 to 4.
    """
    return LogFormat(
        max_bits=max_bits,
        nearest=Nearest.LINEAR,
        magnitudes=Magnitudes.HALF,
        scale_rule=INQ_SCALE,
    )
