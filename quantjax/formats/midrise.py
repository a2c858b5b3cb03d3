"""Uniform levels on both sides of zero, without zero: odd integers."""

from __future__ import annotations

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.arguments import expect
from quantjax.formats.base import ALL_LAWS, Format, Law, Snapped, Theta
from quantjax.formats.scales import REAL, ScaleRule, power_of_two
from quantjax.rounding import Rounding

MAX_CONTAINER_BITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MidriseFormat(Format):
    """Levels ``-(2^b - 1), ..., -3, -1, 1, 3, ..., 2^b - 1``. Construct with :func:`midrise`."""

    def __post_init__(self) -> None:
        expect(
            self.max_bits,
            numbers.Integral,
            argument="max_bits",
            where="qj.formats.midrise",
            fix="max_bits=8",
        )
        if not 1 <= self.max_bits <= MAX_CONTAINER_BITS or not self.signed:
            raise errors.FormatError(
                f"midrise levels of {self.max_bits} bits, signed={self.signed}",
                why=f"they lie on both sides of zero, in containers of 1 to {MAX_CONTAINER_BITS}",
                fix="qj.formats.midrise()",
            )

    @property
    def name(self) -> str:
        """``midrise``, and the scale rule."""
        return self.named("midrise")

    @property
    def laws(self) -> frozenset[Law]:
        """All, but ZERO, which is no level, and ODD, because of ties: 0 goes to 1."""
        return ALL_LAWS - {Law.ZERO, Law.ODD}

    @property
    def storage_dtype(self) -> jnp.dtype:
        """int8: the code of level ``2c + 1`` is ``c``."""
        return jnp.dtype(jnp.int8)

    def level_range(self, bits: jax.Array, theta: Theta = ()) -> tuple[jax.Array, jax.Array]:
        """``∓(2^b - 1)``."""
        del theta
        high = power_of_two(jnp.asarray(bits, jnp.float32).astype(jnp.int32)) - 1.0
        return -high, high

    def is_elementwise(self, theta: Theta) -> bool:
        """A code stands for the same level at every width."""
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
        """``2 round((x/s - 1)/2) + 1``, clipped.

        The whole part is taken off first: beside it, half of a small distance would be rounded. A
        tie keeps it, since the parity and the sign of what is rounded decide there.
        """
        low, high = self.level_range(bits, theta)
        half = 0.5 * (scaled + zero_point)
        whole = jnp.where(jnp.isinf(half), 0.0, jnp.floor(half))
        tie = half == whole
        rounded = rounding.apply(jnp.where(tie, whole, half - whole) - 0.5)
        unclipped = 2.0 * (jnp.where(tie, 0.0, whole) + rounded) + 1.0
        return Snapped(jnp.clip(unclipped, low, high), unclipped)

    def encode(self, levels: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """``(level - 1) / 2``."""
        del bits, theta
        return (0.5 * levels - 0.5).astype(jnp.int8)

    def decode(self, codes: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """``2 code + 1``."""
        del bits, theta
        return 2.0 * codes.astype(jnp.float32) + 1.0

    def narrowed(self, bits: int) -> MidriseFormat:
        """The same codes in a container of ``bits``."""
        return dataclasses.replace(self, max_bits=min(max(bits, 1), self.max_bits))


def midrise(*, max_bits: int = 8, scale_rule: ScaleRule = REAL) -> MidriseFormat:
    """Odd integers: ``2^b`` levels that are symmetric, of which none is zero.

    The weights of DoReFa-Net: ``2 round((2^b - 1)(t/2 + 1/2)) - (2^b - 1)`` over ``2^b - 1``. Two
    bits are ``-3, -1, 1, 3``, one bit is ``-1, 1``.

    Raises:
      FormatError: ``max_bits`` outside 1..8.

    >>> import jax.numpy as jnp
    >>> import quantjax as qj
    >>> x = jnp.array([-9.0, -1.2, -0.1, 0.0, 1.9, 2.1])
    >>> [int(y) for y in qj.fake_quant(x, 1.0, bits=2, format=midrise())]
    [-3, -1, -1, 1, 1, 3]

    Source: Zhou et al., DoReFa-Net, 2016, section 2.3.
    """
    return MidriseFormat(max_bits=max_bits, scale_rule=scale_rule)
