"""Three levels, told apart by a threshold: TWN's {-1, 0, +1}, and TTQ's, which are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.formats.base import ALL_LAWS, Format, Law, Snapped, Theta, parameter
from quantjax.formats.scales import REAL, ScaleRule
from quantjax.rounding import Rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryFormat(Format):
    """Codes ``{-1, 0, +1}`` for the levels ``{-negative, 0, +positive}``.

    ``level = positive`` if ``x/s > threshold``, ``-negative`` if ``x/s < -threshold``, else 0.

    ``theta`` is a dictionary of float32 arrays of the scale's shape, in units of the scale:
    ``threshold``, and where levels are learned ``negative`` and ``positive``. ``()`` stands for
    ``threshold = 1/2``, ``negative = positive = 1``. Construct with :func:`ternary`.

    Attributes:
      learned: whether the two levels are arrays of ``theta``. Without, they are -1 and +1, integers
        that integer products take.

    Sharp edges: a threshold not below the levels breaks idempotence, one of 1 or more for levels
    that are not learned: what they stand for is then taken for zero. A learned level that is
    exactly 0 has no gradient.
    """

    max_bits: int = 2
    learned: bool = False

    def __post_init__(self) -> None:
        if self.max_bits != 2 or not self.signed:
            raise errors.FormatError(
                "ternary codes are signed and have 2 bits, "
                f"got max_bits={self.max_bits}, signed={self.signed}",
                fix="quantjax.formats.ternary()",
            )

    @property
    def name(self) -> str:
        """``ternary`` or ``ternary-learned``, and the scale rule: ``ternary-pow2``."""
        return self.named("ternary-learned" if self.learned else "ternary")

    def label(self, bits: int) -> str:
        """The name: there is one width."""
        del bits
        return self.name

    @property
    def laws(self) -> frozenset[Law]:
        """Never NEAREST, which holds at the threshold 1/2 alone.

        Of a threshold below the levels. Learned levels need not be, nor be equal: they are not
        idempotent or odd, and no integers.
        """
        missing = {Law.NEAREST}
        if self.learned:
            missing |= {Law.IDEMPOTENT, Law.ODD, Law.INTEGER}
        return ALL_LAWS - missing

    @property
    def storage_dtype(self) -> jnp.dtype:
        """int8."""
        return jnp.dtype(jnp.int8)

    def level_range(self, bits: jax.Array, theta: Theta = ()) -> tuple[jax.Array, jax.Array]:
        """``-negative`` and ``positive``; the shape of ``bits``, or of ``theta`` where learned."""
        _, negative, positive = self._levels(theta)
        ones = jnp.ones_like(jnp.asarray(bits, jnp.float32))
        return -negative * ones, positive * ones

    def steps(self, bits: jax.Array, *, symmetric: bool, theta: Theta = ()) -> jax.Array:
        """1, or 2 from end to end: the maximum becomes the scale, whatever was learned."""
        del theta
        ones = jnp.ones_like(jnp.asarray(bits, jnp.float32))
        return ones if symmetric else 2.0 * ones

    def is_elementwise(self, theta: Theta) -> bool:
        """Not with a threshold, and levels, of each layer."""
        return not theta

    def snap(
        self,
        scaled: jax.Array,
        zero_point: jax.Array,
        bits: jax.Array,
        rounding: Rounding,
        theta: Theta = (),
    ) -> Snapped:
        """The level by the threshold; NaN stays NaN.

        Roundings that are not to the nearest have no threshold. They take ``x/s`` in units of the
        level on its side, clipped to [-1, 1]; the stochastic one thus has ``P(±1) = |x/s|`` for
        levels ±1, and no bias between the levels.

        The cell of a level reaches as far above it as below; ``unclipped`` is the quotient
        itself beyond. The clipped estimator stops gradients there, the straight-through one
        passes them everywhere, as TWN does; TTQ multiplies those of values at a level other than 0
        by its magnitude, which none does here.
        """
        del bits
        threshold, negative, positive = self._levels(theta)
        shifted = scaled + zero_point
        if rounding.is_nearest:
            signs = jnp.where(shifted > threshold, 1.0, 0.0)
            signs = jnp.where(shifted < -threshold, -1.0, signs)
        else:
            extent = jnp.where(shifted > 0.0, positive, negative)
            ratio = jnp.where(shifted == 0.0, 0.0, shifted / extent)
            signs = rounding.apply(jnp.clip(ratio, -1.0, 1.0))
        level = jnp.where(signs > 0.0, positive, jnp.where(signs < 0.0, -negative, 0.0))
        magnitude = jnp.abs(level)
        beyond = (signs != 0.0) & (jnp.abs(shifted) - magnitude > jnp.abs(magnitude - threshold))
        unclipped = jnp.where(beyond, shifted, level)
        lost = jnp.isnan(shifted)
        return Snapped(jnp.where(lost, shifted, level), jnp.where(lost, shifted, unclipped))

    def encode(self, levels: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """-1, 0 or +1; NaN has the code 0. Of learned levels of one sign, the nearer decides."""
        del bits
        _, negative, positive = self._levels(theta)
        signs = jnp.where(jnp.abs(levels - positive) <= jnp.abs(levels + negative), 1, -1)
        none = (levels == 0.0) | jnp.isnan(levels)
        return jnp.where(none, 0, signs).astype(self.storage_dtype)

    def decode(self, codes: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """The level of each code; differentiable in ``theta``. Other codes are NaN.

        The gradient of ``positive`` is the sum over the entries that have its code.
        """
        del bits
        _, negative, positive = self._levels(theta)
        level = jnp.where(codes > 0, positive, jnp.where(codes < 0, -negative, 0.0))
        return jnp.where(jnp.abs(codes) > 1, jnp.nan, level)

    def largest_centered_code(self, *, symmetric: bool) -> int | None:
        """1; None where levels are learned."""
        del symmetric
        return None if self.learned else 1

    def valid_bits(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """2, or 0 for bypass."""
        del theta
        return (bits == 2.0) | (bits == 0.0)

    def map_groups(self, theta: Theta, function: Callable[[jax.Array], jax.Array]) -> Theta:
        """All arrays have the shape of the scale."""
        return {name: function(array) for name, array in theta.items()} if theta else theta

    def _levels(self, theta: Theta) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Threshold, negative and positive level."""
        one = jnp.ones((), jnp.float32)
        if not theta:
            return 0.5 * one, one, one
        if not self.learned:
            return parameter(theta, "threshold", self.name), one, one
        threshold, negative, positive = (
            parameter(theta, name, self.name) for name in ("threshold", "negative", "positive")
        )
        return threshold, negative, positive


def ternary(*, learned: bool = False, scale_rule: ScaleRule = REAL) -> TernaryFormat:
    """Codes {-1, 0, +1}; the threshold, and the levels if ``learned``, are arrays in ``theta``.

    Range rules that give one: :data:`quantjax.ranges.TWN` and, for learned levels,
    :data:`quantjax.ranges.TTQ`. Any other leaves the threshold at half the scale.

    Args:
      learned: whether the levels are arrays, of which gradients can be taken.
      scale_rule: which scales there are.

    >>> from quantjax.rounding import HALF_EVEN
    >>> x, zero, two = jnp.array([-0.9, -0.3, 0.2, 0.4, 3.0]), jnp.float32(0), jnp.float32(2)
    >>> ternary().snap(x, zero, two, HALF_EVEN, {"threshold": jnp.float32(0.3)}).level.tolist()
    [-1.0, 0.0, 0.0, 1.0, 1.0]

    Source: Li et al., Ternary weight networks, 2016, equation 3; Zhu et al., Trained ternary
    quantization, 2017, section 3.
    """
    return TernaryFormat(learned=learned, scale_rule=scale_rule)


TERNARY = ternary()
"""Ternary codes for the levels -1, 0 and +1."""
