"""Additive powers of two: levels that are sums of a few powers of two."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import numpy as np
from jaxtyping import Array, Float

from quantjax import errors
from quantjax.formats.base import Law, Theta
from quantjax.formats.levels import LevelFormat, laws_of, row_of, width_table
from quantjax.formats.scales import REAL, ScaleRule


def magnitudes(bits: int) -> tuple[float, ...]:
    """The ``2^bits`` levels from 0 to 1 of ``bits`` magnitude bits, ascending.

    ``n = ⌊bits / 2⌋`` terms of two bits each, ``p_i ∈ {0, 2^-i, 2^-(i+n), 2^-(i+2n)}``; an odd bit
    is one more term of one bit, ``{0, 2^-2n}``, and the last exponent of the others then makes room
    for it, ``2^-(i+2n+1)``. All sums, divided by the largest.

    >>> magnitudes(2)
    (0.0, 0.25, 0.5, 1.0)
    """
    count, odd = divmod(bits, 2)
    terms = [(0.0, *(2.0**-e for e in (i, i + count, i + 2 * count + odd))) for i in range(count)]
    if odd:
        terms.append((0.0, 2.0 ** -(2 * count)))
    # Sums of different powers of two are different, and exact in float64.
    sums = sorted(sum(chosen) for chosen in itertools.product(*terms))
    return tuple(value / sums[-1] for value in sums)


@functools.lru_cache
def _rows(max_bits: int, *, signed: bool) -> dict[int, tuple[float, ...]]:
    if not signed:
        return {bits: magnitudes(bits) for bits in range(1, max_bits + 1)}
    halves = {bits: magnitudes(bits - 1) for bits in range(2, max_bits + 1)}
    return {bits: (*(-v for v in half[:0:-1]), *half) for bits, half in halves.items()}


@functools.lru_cache
def _table(max_bits: int, *, signed: bool) -> np.ndarray:
    return width_table(_rows(max_bits, signed=signed), max_bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApotFormat(LevelFormat):
    """Additive powers of two of up to ``max_bits`` bits; construct with :func:`apot`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signed and self.max_bits < 2:
            raise errors.FormatError(
                "one signed bit has no magnitude bits, so 0 would be the only level",
                where=f"ApotFormat(max_bits={self.max_bits})",
                fix="qj.formats.apot(max_bits=2), or signed=False",
            )

    @property
    def name(self) -> str:
        """``apot`` or ``uapot``, and the scale rule where it is not real."""
        return self.named("apot" if self.signed else "uapot")

    @property
    def laws(self) -> frozenset[Law]:
        """Signed levels are symmetric; unsigned ones have every code."""
        return laws_of(_rows(self.max_bits, signed=self.signed))

    def levels(self, bits: Float[Array, ""], theta: Theta = ()) -> Float[Array, " levels"]:
        """The row of the width."""
        del theta
        return row_of(_table(self.max_bits, signed=self.signed), bits)

    def valid_bits(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """Signed levels need two bits: a sign and a magnitude."""
        valid = super().valid_bits(bits, theta)
        return valid & (bits != 1.0) if self.signed else valid


def apot(*, max_bits: int = 8, signed: bool = True, scale_rule: ScaleRule = REAL) -> ApotFormat:
    """Additive powers of two: sums of ``n`` powers of two, dense around zero, cheap to multiply by.

    With ``m`` magnitude bits (``b - 1`` signed, ``b`` unsigned) and ``n = m / 2``, the levels are
    ``γ Σ_i p_i`` with ``p_i ∈ {0, 2^-i, 2^-(i+n), 2^-(i+2n)}``, ``i = 0..n-1``, and ``γ`` such that
    the highest is 1 (the paper's k = 2). Signed levels are these and their negatives, one fewer
    than there are codes, because +0 and -0 are one level. For odd ``m`` the authors' program adds a
    term of one bit; see :func:`magnitudes`.

    Args:
      max_bits: 2 to 8 signed, 1 to 8 unsigned; the width in use is an array.
      signed: a sign bit and ``b - 1`` magnitude bits, or ``b`` magnitude bits.
      scale_rule: which scales there are.

    Raises:
      FormatError: ``max_bits`` outside that.

    Sharp edges: the container is what costs. 256 levels are searched, up to 64 are compared with
    each value, so that 4 bits take a sixteenth of the time under ``max_bits=4``, and ``max_bits=8``
    is for sweeps. Codes are places among the levels, not the exponents that a shift-and-add unit
    would read. The authors' program has 2 to 6 magnitude bits; for 1, 7 and 8 the same rule goes
    on. Its ties go to whichever level its unordered table has first, here to the even place.

    >>> import jax.numpy as jnp
    >>> [round(v, 3) for v in apot(max_bits=4).levels(jnp.float32(4)).tolist()[7:]]
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.0]

    Source: Li, Dong, Wang, Additive powers-of-two quantization: an efficient non-uniform
    discretization for neural networks, 2020, equations 4 and 5; odd widths: the authors'
    repository yhhhli/APoT_Quantization, ``build_power_value``.
    """
    return ApotFormat(max_bits=max_bits, signed=signed, scale_rule=scale_rule)
