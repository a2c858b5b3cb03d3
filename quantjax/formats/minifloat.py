"""Floating point of 2 to 16 bits: a sign, 1 to 8 exponent bits and 0 to 10 mantissa bits.

All of their numbers are float32 numbers, so levels are exact.
"""

from __future__ import annotations

import dataclasses
import enum
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax import errors
from quantjax.arguments import expect
from quantjax.formats import float_patterns as patterns
from quantjax.formats.base import ALL_LAWS, Format, Law, Snapped, Theta, parameter
from quantjax.formats.float_patterns import MAX_EXPONENT_BITS, MAX_MANTISSA_BITS, Layout, Specials
from quantjax.formats.scales import REAL, UNIT, ScaleRule, power_of_two
from quantjax.rounding import Rounding

MAX_CONTAINER_BITS = 16

WIDTHS_IN_THETA = frozenset({"exponent_bits"})
"""Entries of ``theta`` that are whole numbers, as widths are."""


class Overflow(enum.Enum):
    """What becomes of values that round to more than the highest finite number."""

    SATURATE = "the highest finite number"
    SPECIAL = "infinity, or NaN where there is none: what a cast does"


class FloatBits(NamedTuple):
    """A width in two parts, for formats whose exponent width varies in a sweep.

    Attributes:
      exponent: bits of the exponent, 1 to 8.
      mantissa: bits of the mantissa, at least 0.

    >>> width = FloatBits(4, 3)
    >>> float(width.bits), float(width.theta["exponent_bits"])
    (8.0, 4.0)
    """

    exponent: int | Float[Array, "..."]
    mantissa: int | Float[Array, "..."]

    @property
    def bits(self) -> Float[Array, "..."]:
        """``1 + e + m``, float32."""
        exponent = jnp.asarray(self.exponent, jnp.float32)
        return 1.0 + exponent + jnp.asarray(self.mantissa, jnp.float32)

    @property
    def theta(self) -> dict[str, Float[Array, "..."]]:
        """What overrides the format's own exponent bits."""
        return {"exponent_bits": jnp.asarray(self.exponent, jnp.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinifloatFormat(Format):
    """Floating point of ``e`` exponent bits and ``m = b - 1 - e`` mantissa bits, ``b`` an array.

    The width in use is ``bits``; the exponent keeps its bits and the mantissa loses them. An array
    ``theta = {"exponent_bits": e}`` takes the place of ``exponent_bits``; ``max_bits`` stays the
    limit. Construct with :func:`minifloat`; theta comes from :class:`FloatBits`.

    Codes are the bit patterns. Those of a narrower mantissa are stored as the container's pattern
    of the same number, so that decoding does not depend on ``bits``; with theta they are patterns
    of ``1 + e + m`` bits.

    A backend that flushes float32 subnormals, as XLA on CPU does, makes 0 of reals below ``2^-126``
    and of bfloat16's subnormals; ``encode`` and ``decode`` keep them.
    """

    exponent_bits: int = 4
    specials: Specials = Specials.FINITE
    overflow: Overflow = Overflow.SATURATE

    def __post_init__(self) -> None:
        _check_whole(max_bits=self.max_bits, exponent_bits=self.exponent_bits)
        _check(self)

    @property
    def mantissa_bits(self) -> int:
        """Mantissa bits of the container."""
        return self.max_bits - 1 - self.exponent_bits

    @property
    def name(self) -> str:
        """The container's label: ``e4m3fn``, ``e5m2``, ``e2m1-mx-floor``."""
        return self.label(self.max_bits)

    def label(self, bits: int) -> str:
        """How it prints at a width: ``e4m3fn``.

        By custom, e2m1, e2m3 and e3m2 are finite and e3m4, e4m3, e5m2 are IEEE without saying so.
        """
        mantissa = bits - 1 - self.exponent_bits
        fields = f"e{self.exponent_bits}m{mantissa}" if mantissa >= 0 else f"float{bits}"
        unsaid = Specials.FINITE if self.max_bits <= 6 else Specials.IEEE
        specials = {
            Specials.IEEE: "-ieee",
            Specials.FN: "fn",
            Specials.FNUZ: "fnuz",
            Specials.FINITE: "-finite",
            unsaid: "",
        }
        special = "-special" if self.overflow is Overflow.SPECIAL else ""
        return self.named(fields + specials[self.specials] + special)

    @property
    def laws(self) -> frozenset[Law]:
        """All but integers; with ``Overflow.SPECIAL`` nothing is nearest, nor is NaN ordered."""
        laws = ALL_LAWS - {Law.INTEGER}
        if self.overflow is Overflow.SATURATE:
            return laws
        unordered = set() if self.specials is Specials.IEEE else {Law.MONOTONE}
        return laws - {Law.NEAREST} - unordered

    def level_range(self, bits: jax.Array, theta: Theta = ()) -> tuple[jax.Array, jax.Array]:
        """The highest finite number, negated and as it is."""
        high = patterns.highest(self._in_use(bits, theta), self.specials)
        return -high, high

    def unit(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """``2^(e_max - m)``."""
        fields = self._in_use(bits, theta)
        return power_of_two(patterns.top_exponent(fields, self.specials) - fields.mantissa)

    def is_elementwise(self, theta: Theta) -> bool:
        """Codes are the container's patterns, unless ``theta`` says how wide the exponent is."""
        return not theta

    def snap(
        self,
        scaled: jax.Array,
        zero_point: jax.Array,
        bits: jax.Array,
        rounding: Rounding,
        theta: Theta = (),
    ) -> Snapped:
        """``round(x / u) u`` with ``u = 2^(max(⌊log2 |x|⌋, e_min) - m)``, then the overflow.

        Ties go to the even mantissa; without mantissa bits, to the larger number. ``zero_point``
        is not used: there is none. ``unclipped`` goes on as if the exponent had no end.
        """
        del zero_point
        fields = self._in_use(bits, theta).aligned(scaled.ndim)
        # Half a binade's reciprocal is always normal. A quotient would not do: XLA makes of
        # (x / scale) / power one division, whose divisor underflows.
        exponent = lax.bitcast_convert_type(scaled, jnp.int32) & patterns.EXPONENT_FIELD
        binade = jnp.clip(exponent, fields.lowest_field, patterns.LARGEST_BINADE)
        power = lax.bitcast_convert_type(binade, jnp.float32)
        inverse = lax.bitcast_convert_type(patterns.TWICE_RECIPROCAL - binade, jnp.float32)
        half_up, down = power_of_two(fields.mantissa - 1), power_of_two(-fields.mantissa)
        unclipped = rounding.apply(scaled * inverse * half_up) * down * power
        if self.specials is Specials.FNUZ:
            unclipped = jnp.where(unclipped == 0.0, 0.0, unclipped)  # -0 is not a number here
        return Snapped(self._bounded(unclipped, patterns.highest(fields, self.specials)), unclipped)

    def _bounded(self, unclipped: jax.Array, high: jax.Array) -> jax.Array:
        if self.overflow is Overflow.SATURATE:
            return jnp.clip(unclipped, -high, high)
        beyond = jnp.inf if self.specials is Specials.IEEE else jnp.nan
        levels = jnp.where(unclipped > high, beyond, unclipped)
        return jnp.where(unclipped < -high, -beyond, levels)

    def encode(self, levels: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """The pattern of each level.

        NaN is the quiet one of IEEE; where the format has none, NaN becomes the pattern of -0.
        """
        fields = self._stored(bits, theta).aligned(levels.ndim)
        codes = patterns.encode(levels.astype(jnp.float32), fields, self.specials)
        return codes.astype(self.storage_dtype)

    def decode(self, codes: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """The number of each pattern; NaN and infinities where the format has them."""
        fields = self._stored(bits, theta).aligned(codes.ndim)
        return patterns.decode(codes.astype(jnp.int32), fields, self.specials)

    def valid_bits(self, bits: Float[Array, "..."], theta: Theta = ()) -> Bool[Array, "..."]:
        """0, or whole numbers that have a sign and the exponent, up to the container.

        With theta, the exponent must be a whole number that the specials allow: 2 to 8 for IEEE,
        1 to 7 for all others, whose highest or lowest binade float32 would not hold otherwise; and
        IEEE's NaN needs a bit of mantissa.
        """
        bits = jnp.asarray(bits, jnp.float32)
        whole = (bits == jnp.floor(bits)) & (bits <= float(self.max_bits))
        exponent = jnp.asarray(self._exponent(theta), jnp.float32)
        least, most = _exponent_limits(self.specials)
        fits = (exponent == jnp.floor(exponent)) & (exponent >= least) & (exponent <= most)
        lowest = exponent + 1.0
        if self.specials is Specials.FN:
            lowest = jnp.where(exponent == 1.0, 3.0, lowest)  # a number besides 0 and NaN
        if self.specials is Specials.IEEE and isinstance(theta, dict):
            lowest = exponent + 2.0  # the pattern of NaN needs a mantissa
        return (bits == 0.0) | (whole & fits & (bits >= lowest))

    def _exponent(self, theta: Theta) -> int | jax.Array:
        if not isinstance(theta, dict):
            return self.exponent_bits
        return parameter(theta, "exponent_bits", self.name)

    def _in_use(self, bits: jax.Array, theta: Theta) -> Layout:
        return patterns.layout(self._exponent(theta), bits, self.specials)

    def _stored(self, bits: jax.Array, theta: Theta) -> Layout:
        width = bits if isinstance(theta, dict) else self.max_bits
        return patterns.layout(self._exponent(theta), width, self.specials)


def _check_whole(**widths: object) -> None:
    for name, width in widths.items():
        expect(width, numbers.Integral, argument=name, where="a minifloat", fix=f"{name}=4")


def _exponent_limits(specials: Specials) -> tuple[int, int]:
    """Fewest and most exponent bits whose numbers exist and are float32 numbers."""
    if specials is Specials.IEEE:
        return 2, MAX_EXPONENT_BITS  # one exponent bit would be 0 and infinity
    return 1, MAX_EXPONENT_BITS - 1


def _check(format: MinifloatFormat) -> None:
    exponent, mantissa, specials = format.exponent_bits, format.mantissa_bits, format.specials
    where = f"{exponent} exponent bits, {mantissa} mantissa bits, {specials}"
    least, most = _exponent_limits(specials)
    fewest = {Specials.IEEE: 1, Specials.FN: 1 if exponent == 1 else 0}.get(specials, 0)
    if not format.signed:
        raise errors.FormatError("a minifloat has a sign", where=where, fix="signed=True")
    if not least <= exponent <= most:
        raise errors.FormatError(
            f"a minifloat of this kind has {least} to {most} exponent bits, got {exponent}",
            where=where,
            why="fewer hold no number, more hold numbers that are no normal float32",
            fix="qj.minifloat(8, 7, specials=Specials.IEEE)"
            if exponent == MAX_EXPONENT_BITS
            else f"qj.minifloat({min(max(exponent, least), most)}, {max(mantissa, fewest)}, ...)",
        )
    if not fewest <= mantissa <= MAX_MANTISSA_BITS or format.max_bits > MAX_CONTAINER_BITS:
        held = min(MAX_MANTISSA_BITS, MAX_CONTAINER_BITS - 1 - exponent)
        raise errors.FormatError(
            f"a minifloat of this kind has {fewest} to {held} mantissa bits, got {mantissa}",
            where=where,
            why=f"containers hold {MAX_CONTAINER_BITS} bits; special patterns need a mantissa",
            fix=f"qj.minifloat({exponent}, {min(max(mantissa, fewest), held)}, ...)",
        )
    if specials is Specials.FINITE and format.overflow is Overflow.SPECIAL:
        raise errors.FormatError(
            "a finite minifloat has no pattern for what is beyond its range",
            where=where,
            fix="overflow=Overflow.SATURATE, or specials=Specials.IEEE",
        )


def minifloat(
    exponent_bits: int,
    mantissa_bits: int,
    *,
    specials: Specials = Specials.FINITE,
    overflow: Overflow = Overflow.SATURATE,
    scale_rule: ScaleRule = REAL,
) -> MinifloatFormat:
    """A floating point format with one sign bit, whose widths in use are at most ``1 + e + m``.

    Args:
      exponent_bits: ``e``, 1 to 7; 2 to 8 with ``Specials.IEEE``.
      mantissa_bits: ``m`` of the container, 0 to 10; the width in use is an array in ``QParams``.
      specials: which patterns are no numbers.
      overflow: what becomes of values beyond the range.
      scale_rule: which scales there are; microscaling has powers of two.

    Raises:
      FormatError: bits outside these ranges or more than 16 in all, a kind that has no number or no
        NaN at these bits, ``Overflow.SPECIAL`` where every pattern is a number.

    Sharp edges: with 7 and 8 exponent bits, levels are so large that sums of products overflow
    float32. A quantizer therefore takes these formats with the scale rule ``UNIT`` only, as
    ``BFLOAT16`` has it, which makes of quantizing a cast.

    >>> import jax.numpy as jnp
    >>> E2M1.decode(jnp.arange(8, dtype=jnp.uint8), jnp.float32(4)).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    >>> [float(high) for high in E4M3FN.level_range(jnp.array([7.0, 8.0]))[1]]
    [384.0, 448.0]

    Source: Micikevicius et al., FP8 formats for deep learning, 2022, section 3; Open Compute
    Project, OCP Microscaling Formats (MX) Specification v1.0, 2023, section 5.3.
    """
    _check_whole(exponent_bits=exponent_bits, mantissa_bits=mantissa_bits)
    return MinifloatFormat(
        max_bits=1 + exponent_bits + mantissa_bits,
        exponent_bits=exponent_bits,
        specials=specials,
        overflow=overflow,
        scale_rule=scale_rule,
    )


E2M1, E2M3, E3M2 = minifloat(2, 1), minifloat(2, 3), minifloat(3, 2)
E4M3FN = minifloat(4, 3, specials=Specials.FN)
E3M4 = minifloat(3, 4, specials=Specials.IEEE)
E4M3 = minifloat(4, 3, specials=Specials.IEEE)
E5M2 = minifloat(5, 2, specials=Specials.IEEE)
E4M3FNUZ = minifloat(4, 3, specials=Specials.FNUZ)
E5M2FNUZ = minifloat(5, 2, specials=Specials.FNUZ)
BFLOAT16 = minifloat(8, 7, specials=Specials.IEEE, scale_rule=UNIT)
FLOAT16 = minifloat(5, 10, specials=Specials.IEEE, scale_rule=UNIT)
