"""What every number format offers to the arithmetic of one tensor.

A format is static and hashable. It says which *levels* there are: the numbers that codes stand for,
before zero point and scale, ``x ≈ scale · (level - zero_point)``. The level of an integer code is
the code itself. The width in use is **not** part of the format: ``bits`` is an array argument of
each method, at most ``max_bits``, and so is ``theta``, whatever else of the format is an array (the
exponent bits of a minifloat, the levels of a codebook), so that one trace serves every width.
Levels travel as float32 arrays inside arithmetic, codes in ``storage_dtype`` inside a ``QTensor``.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax import errors
from quantjax._compat import concrete
from quantjax.formats.scales import REAL, ScaleRule
from quantjax.lean import elementwise, select
from quantjax.rounding import HALF_EVEN, Rounding

Theta = Any
"""A dictionary of float32 arrays, or ``()``; see the formats that have one."""


class Law(enum.Enum):
    """What a format may promise of ``y = fake_quant(x)`` at zero point 0, rounding to the nearest.

    :func:`quantjax.contract.check_format` checks what is declared. The tests of every format of the
    library also show a counterexample for what is not.
    """

    IDEMPOTENT = "fake_quant(y) is y"
    MONOTONE = "x <= x' implies y <= y'"
    NEAREST = "y is a level that no other level is closer to x than"
    ZERO = "0 stays 0"
    ODD = "fake_quant(-x) is -y"
    RESCALED = "fake_quant(2^k x, 2^k scale) is 2^k y"
    ROUND_TRIP = "every code of b bits that decodes to a level is what that level encodes to"
    INTEGER = "levels are integers"


ALL_LAWS = frozenset(Law)


class Snapped(NamedTuple):
    """What a real becomes.

    Attributes:
      level: float32, within the range.
      unclipped: the level before clipping; gradient estimators compare it with the range.
    """

    level: jax.Array
    unclipped: jax.Array


def nearest_width(bits: Any) -> jax.Array:
    """The nearest whole number, halves up; what is below a half stays, and is a width if it is 0.

    Rounded as integers do it, where they make a power of two of a width.

    >>> nearest_width(jnp.array([3.9999995, 2.5, 0.25, 0.0, -1e-6])).tolist()
    [4.0, 3.0, 0.25, 0.0, -9.999999974752427e-07]
    """
    bits = jnp.asarray(bits, jnp.float32)
    whole = elementwise(lax.sub, lax.floor(elementwise(lax.add, bits, 127.5)), 127.0)
    return select(elementwise(lax.lt, bits, 0.5), bits, whole)


def parameter(theta: Theta, name: str, family: str) -> jax.Array:
    """``theta[name]``; FormatError where it is missing."""
    if name not in theta:
        raise errors.FormatError(
            f"theta of {family} has no {name}",
            where=f"theta with {', '.join(map(str, theta))}",
            fix=f'theta={{"{name}": ...}}, or theta=() for what the format has by itself',
        )
    value: jax.Array = theta[name]
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(abc.ABC):
    """A family of levels and their codes.

    Attributes:
      max_bits: the storage container, the limit of the traced width.
      signed: whether levels go below zero.
      scale_rule: which scales there are, and which of them covers a span.
    """

    max_bits: int = 8
    signed: bool = True
    scale_rule: ScaleRule = REAL

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name, without the width: ``int``, ``uint``, ``int-narrow``."""

    def named(self, family: str) -> str:
        """The family's name, and the scale rule where scales are not any real numbers."""
        return family if self.scale_rule == REAL else family + self._suffix

    def label(self, bits: int) -> str:
        """How the format prints at a width: ``int4``, ``int4-pow2``."""
        family = self.name if self.scale_rule == REAL else self.name.removesuffix(self._suffix)
        return self.named(f"{family}{bits}")

    @property
    def _suffix(self) -> str:
        return f"-{self.scale_rule.name}"

    @property
    def laws(self) -> frozenset[Law]:
        """Which laws hold, at every width but one bit: two levels often lack a zero."""
        return ALL_LAWS - {Law.INTEGER}

    @property
    def has_zero_point(self) -> bool:
        """Whether a zero point can be subtracted from levels: only from integers."""
        return False

    @property
    def code_bits(self) -> int:
        """Bits that one stored code takes: 1, 2, 4, 8 or 16."""
        return next(n for n in (1, 2, 4, 8, 16) if n >= self.max_bits)

    @property
    def storage_dtype(self) -> jnp.dtype:
        """The dtype that holds one code of ``max_bits`` bits, before codes are packed."""
        return jnp.dtype(jnp.uint8 if self.max_bits <= 8 else jnp.uint16)

    @abc.abstractmethod
    def level_range(self, bits: jax.Array, theta: Theta = ()) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest level at width ``bits`` (float32, the shape of ``bits``)."""

    def holds_zero(self, like: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """Whether what is 0 stays 0, of the shape of ``like``, that of a scale."""
        zero = jnp.zeros_like(like)
        return self.snap(zero, zero, bits, HALF_EVEN, theta).level == 0.0

    def steps(self, bits: jax.Array, *, symmetric: bool, theta: Theta = ()) -> jax.Array:
        """How many scales a range spans: ``scale = span / steps``.

        The span is the largest magnitude for a symmetric range, ``max - min`` for an asymmetric
        one.
        """
        low, high = self.level_range(bits, theta)
        return high if symmetric else high - low

    def unit(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """The distance of levels in the highest binade; some scale rules go by it."""
        del theta
        return jnp.ones_like(jnp.asarray(bits, jnp.float32))

    @abc.abstractmethod
    def snap(
        self,
        scaled: jax.Array,
        zero_point: jax.Array,
        bits: jax.Array,
        rounding: Rounding,
        theta: Theta = (),
    ) -> Snapped:
        """The level for ``scaled + zero_point``, inside the range; NaN stays NaN.

        ``rounding.apply`` takes the values alone (:meth:`Rounding.given`).
        """

    def encode(self, levels: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """The code of each level, in ``storage_dtype``."""
        del bits, theta
        return levels.astype(self.storage_dtype)

    def decode(self, codes: jax.Array, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """The level of each code, float32."""
        del bits, theta
        return codes.astype(jnp.float32)

    def largest_centered_code(self, *, symmetric: bool) -> int | None:
        """Bound of ``|level - zero_point|`` at ``max_bits``, by which integer products are sized.

        None where levels are no integers.
        """
        del symmetric
        return None

    def valid_bits(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """Where ``bits`` is a width that the container holds, or 0 for bypass (bool)."""
        del theta
        return (bits >= 0.0) & (bits <= float(self.max_bits)) & (bits == jnp.floor(bits))

    def known_valid(self, bits: Any, theta: Theta = ()) -> bool | None:
        """Whether all of these widths are valid; None where one of them is not known yet."""
        known = [concrete(leaf) for leaf in jax.tree.leaves((bits, theta))]
        if any(array is None for array in known):
            return None
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):  # of one number
            return bool(_all_valid(self, jnp.asarray(bits, jnp.float32), theta))

    def holds_nearest(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """Where the whole number nearest to ``bits`` is a width, or 0 for bypass (bool)."""
        return self.valid_bits(nearest_width(bits), theta)

    def is_elementwise(self, theta: Theta) -> bool:
        """Whether widths may differ from entry to entry: ``bits`` then broadcasts against the data,
        and a code stands for the same level at every width.

        Where it is False, ``bits`` is a scalar and layers are taken one by one.
        """
        del theta
        return False

    def narrowed(self, bits: int) -> Format:
        """The format of the smallest container for codes of ``bits``; itself where codes differ."""
        del bits
        return self

    def map_groups(self, theta: Theta, function: Callable[[jax.Array], jax.Array]) -> Theta:
        """``theta`` with ``function`` applied to those of its arrays that are shaped as the scale.

        Such an array has an entry for each group that shares a scale, and goes where the scale
        goes; all others hold for the whole tensor.
        """
        del function
        return theta


@functools.partial(jax.jit, static_argnums=0)
def _all_valid(format: Format, bits: jax.Array, theta: Theta) -> jax.Array:
    """One program: called as it is, each of a format's operations would be one."""
    return jnp.all(format.valid_bits(bits, theta))
