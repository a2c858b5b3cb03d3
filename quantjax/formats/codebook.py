"""Codebooks: levels that are listed, learned, or fitted to a tensor; NormalFloat."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax import errors
from quantjax.formats.base import Law, Theta
from quantjax.formats.levels import ANY_LEVELS, LevelFormat, laws_of, row_of, width_table
from quantjax.formats.scales import REAL, ScaleRule, power_of_two

LEVELS = "levels"
"""The key of a codebook in ``theta``."""
SMALLEST_LEVEL, LARGEST_LEVEL = 2.0**-126, 2.0**126


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookFormat(LevelFormat):
    """Any levels: static ones, or ``theta["levels"]``, an array for each tensor.

    | ``codebook`` | ``theta`` | levels | widths |
    |---|---|---|---|
    | listed | ``()`` | ``codebook`` | ``max_bits`` |
    | any | ``{"levels": float32[2^max_bits]}`` | its first ``2^bits``, sorted | 1 to ``max_bits`` |

    Construct with :func:`codebook` or :func:`learned_codebook`.

    A code is the **rank** of its level. Levels in ``theta`` are sorted wherever they are used, so
    that an optimizer may move one past another: values still become the nearest level, and the
    gradient of each level is that of the entries that have it. Codes that were stored before such a
    crossing stand for the levels of their ranks, not for the entries of ``theta`` that they were
    made from; encode anew. Entries beyond ``2^bits`` are ignored.

    Attributes:
      codebook: ascending, distinct in float32; empty where all levels come from ``theta``.
      family: what the format is called.
    """

    codebook: tuple[float, ...] = ()
    family: str = "codebook"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook:
            _check_levels(self.codebook)
        if len(self.codebook) > 1 << self.max_bits:
            raise errors.FormatError(
                f"{len(self.codebook)} levels do not fit into {self.max_bits} bits",
                where=self.name,
                fix=f"max_bits={math.ceil(math.log2(len(self.codebook)))}",
            )

    @property
    def name(self) -> str:
        """``family``, and the scale rule where it is not real."""
        return self.named(self.family)

    @property
    def laws(self) -> frozenset[Law]:
        """Those of the listed levels; those of any levels where none are listed."""
        return laws_of({self.max_bits: self.codebook}) if self.codebook else ANY_LEVELS

    def levels(self, bits: Float[Array, ""], theta: Theta = ()) -> Float[Array, " levels"]:
        """See the table of the class."""
        if _has_levels(theta):
            return _ranked(jnp.asarray(theta[LEVELS], jnp.float32), bits, self.max_bits)
        if not self.codebook:
            raise errors.FormatError(
                "a learned codebook has no levels yet",
                where=f"{self.name}, theta={theta!r}",
                why="its levels are an array of the tensor's QParams",
                fix="calibrate with the rule qj.ranges.K_MEANS, or set "
                f'theta={{"levels": jnp.linspace(-1, 1, {1 << self.max_bits})}}',
            )
        return jnp.asarray(width_table({self.max_bits: self.codebook}, self.max_bits)[-1])

    def valid_bits(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """Listed levels have one width, ``max_bits``; 0 is bypass."""
        valid = super().valid_bits(bits, theta)
        if self.codebook and not _has_levels(theta):
            return valid & ((bits == 0.0) | (bits == float(self.max_bits)))
        return valid


def _has_levels(theta: Theta) -> bool:
    # The rest of the dictionary may be an estimator's.
    return isinstance(theta, Mapping) and LEVELS in theta


def _ranked(levels: jax.Array, bits: jax.Array, max_bits: int) -> jax.Array:
    """The first ``2^bits`` in ascending order, the highest repeated to the end.

    What lies beyond is set aside before sorting: once the highest level has been trained, its
    repetitions are levels of their own.
    """
    if levels.shape != (1 << max_bits,):
        raise errors.FormatError(
            f"levels of shape {levels.shape} do not fill {max_bits} bits",
            where='theta["levels"]',
            fix=f"an array of {1 << max_bits} levels, the highest repeated to the end",
        )
    width = jnp.clip(jnp.asarray(bits, jnp.float32), 0.0, float(max_bits)).astype(jnp.int32)
    count = power_of_two(width).astype(jnp.int32)
    place = jnp.arange(levels.size, dtype=jnp.int32)
    ascending = jnp.sort(jnp.where(place < count, levels, jnp.inf))
    return ascending[jnp.minimum(place, count - 1)]


def _check_levels(levels: Sequence[float]) -> None:
    values = np.asarray(levels, np.float64)
    problem, fix = "", "levels that differ in float32, for instance (-1.0, 0.0, 1.0)"
    magnitudes = np.abs(values[values != 0.0])
    if not 2 <= values.size <= 256:
        problem = f"a codebook has 2 to 256 levels, got {values.size}"
    elif not np.isfinite(values).all():
        problem, fix = "a level is not finite", "finite levels only"
    elif (magnitudes > LARGEST_LEVEL).any() or (magnitudes < SMALLEST_LEVEL).any():
        problem = "the magnitude of a level is not between 2^-126 and 2^126"
        fix = "levels of about 1; the scale makes them as large as the tensor"
    elif np.unique(values.astype(np.float32)).size < values.size:
        problem = "two levels are equal in float32"
    elif (np.diff(values) <= 0.0).any():
        problem, fix = "levels are not in ascending order", "qj.formats.codebook, which sorts them"
    if problem:
        raise errors.FormatError(problem, where=f"codebook={tuple(levels)!r:.80}", fix=fix)


def codebook(
    levels: Sequence[float], *, name: str = "codebook", scale_rule: ScaleRule = REAL
) -> CodebookFormat:
    """A format with these levels, in the smallest container that holds them.

    Sharp edge: the larger end of a range is put on the largest level of either sign. Where levels
    do not reach equally far to both sides (-1 to 0.25), values beyond the nearer end are clipped;
    a search widens ranges to twice what was seen at most, ``qj.ranges.LEAST_SQUARES`` fits the
    scale itself.

    Args:
      levels: 2 to 256 numbers, distinct in float32, in any order.
      name: what it prints as, before its bits.
      scale_rule: which scales there are.

    Raises:
      FormatError: too few or too many levels, equal ones, or such as are not finite.

    >>> ternary = codebook([1, 0, -1], name="ternary")
    >>> ternary.codebook, ternary.max_bits, ternary.label(2)
    ((-1.0, 0.0, 1.0), 2, 'ternary2')
    """
    ascending = tuple(sorted(float(np.float32(level)) + 0.0 for level in levels))
    _check_levels(ascending)
    return CodebookFormat(
        codebook=ascending,
        family=name,
        max_bits=(len(ascending) - 1).bit_length(),
        signed=ascending[0] < 0.0,
        scale_rule=scale_rule,
    )


def learned_codebook(
    *, max_bits: int = 4, signed: bool = True, scale_rule: ScaleRule = REAL
) -> CodebookFormat:
    """A format whose levels are ``theta["levels"]``: fitted to each tensor, and trained if wished.

    Args:
      max_bits: 1 to 8; the width in use is an array.
      signed: whether levels may go below zero.
      scale_rule: which scales there are.

    Raises:
      FormatError: ``max_bits`` outside 1..8; levels asked for where ``theta`` has none.

    >>> format, theta = learned_codebook(max_bits=2), {"levels": jnp.array([3.0, -1.0, 0.0, 9.0])}
    >>> format.levels(jnp.float32(2), theta).tolist(), format.levels(jnp.float32(1), theta).tolist()
    ([-1.0, 0.0, 3.0, 9.0], [-1.0, 3.0, 3.0, 3.0])

    Source: Han et al., Deep compression, 2016, section 3.
    """
    return CodebookFormat(max_bits=max_bits, signed=signed, scale_rule=scale_rule)


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

NF4 = codebook(_NF4, name="nf")
"""NormalFloat of 4 bits, as published: quantiles of a normal distribution, 0 among them.

>>> NF4.label(4), NF4.codebook[7]
('nf4', 0.0)

Source: Dettmers et al., QLoRA: Efficient finetuning of quantized LLMs, 2023, appendix E.
"""


@functools.lru_cache
def _normal_rows(max_bits: int) -> dict[int, tuple[float, ...]]:
    quantile = statistics.NormalDist().inv_cdf
    rows: dict[int, tuple[float, ...]] = {}
    for bits in range(2, max_bits + 1):
        tail = 0.5 * (0.5 / 2**bits + 0.5 / (2**bits - 1))
        half = 1 << (bits - 1)
        sides = []
        for count in (half, half - 1):  # one more above zero than below
            steps = [tail + (0.5 - tail) * i / count for i in range(count)]
            sides.append([quantile(p) / quantile(tail) for p in steps])
        above, below = sides
        rows[bits] = (*(-v for v in below), 0.0, *reversed(above))
    if max_bits >= 4:
        rows[4] = _NF4
    return rows


@functools.lru_cache
def _normal_table(max_bits: int) -> np.ndarray:
    return width_table(_normal_rows(max_bits), max_bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalFloatFormat(LevelFormat):
    """NormalFloat of 2 to ``max_bits`` bits; construct with :func:`normal_float`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_bits < 2 or not self.signed:
            raise errors.FormatError(
                f"NormalFloat is signed and has 2 to 8 bits, got max_bits={self.max_bits}, "
                f"signed={self.signed}",
                why="zero and both ends of the range are levels",
                fix="qj.formats.normal_float(max_bits=4)",
            )

    @property
    def name(self) -> str:
        """``nf``, and the scale rule where it is not real."""
        return self.named("nf")

    @property
    def laws(self) -> frozenset[Law]:
        """Zero is a level and every code has one; the levels are not symmetric."""
        return laws_of(_normal_rows(self.max_bits))

    def levels(self, bits: Float[Array, ""], theta: Theta = ()) -> Float[Array, " levels"]:
        """The row of the width."""
        del theta
        return row_of(_normal_table(self.max_bits), bits)

    def valid_bits(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """2 to ``max_bits``, or 0 for bypass: one bit has no level below zero."""
        return super().valid_bits(bits, theta) & (bits != 1.0)


def normal_float(*, max_bits: int = 4, scale_rule: ScaleRule = REAL) -> NormalFloatFormat:
    """NormalFloat at any width: normal quantiles, one more above zero than below, normalized to 1.

    With ``δ = (1/2^(b+1) + 1/(2^(b+1) - 2)) / 2`` and ``Φ⁻¹`` the normal quantile function, the
    levels below zero are ``-Φ⁻¹(p)/Φ⁻¹(δ)`` at ``2^(b-1) - 1`` evenly spaced ``p`` from ``δ`` up to
    1/2 (left out), those above ``Φ⁻¹(p)/Φ⁻¹(δ)`` at ``2^(b-1)`` of them. Four bits have the
    published values (:data:`NF4`), which are these to 1e-6.

    Args:
      max_bits: 2 to 8; the width in use is an array.
      scale_rule: which scales there are.

    Raises:
      FormatError: ``max_bits`` outside 2..8.

    Sharp edges: the source fixes ``δ`` for four bits only, as the number 1 - 0.9677083. Here it
    follows the width by the formula that gives this number; LoftQ keeps the number at 2 bits, where
    its levels are -1, 0, 0.34 and 1.

    >>> [round(v, 3) for v in normal_float().levels(jnp.float32(2)).tolist()[:4]]
    [-1.0, 0.0, 0.436, 1.0]

    Source: Dettmers et al., QLoRA: Efficient finetuning of quantized LLMs, 2023, section 3 and
    appendix E; the formula of δ: Yoshida, NF4 isn't information theoretically optimal (and that's
    good), 2023, section 2.
    """
    return NormalFloatFormat(max_bits=max_bits, scale_rule=scale_rule)
