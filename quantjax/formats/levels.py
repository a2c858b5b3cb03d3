"""Formats whose levels are a table: any numbers, in any distances.

A subclass of :class:`LevelFormat` says its name and its levels; everything else follows from them.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import numbers
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from quantjax import errors
from quantjax.arguments import expect
from quantjax.formats.base import Format, Law, Snapped, Theta
from quantjax.rounding import Rounding

MAX_TABLE_BITS = 8
_OURS = __name__.partition(".")[0] + "."
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
COMPARED = 64  # up to so many levels, comparing with each is faster than searching
# The resolution of float32 just below 2, where the coordinate of a value is rounded.
_STEP = 2.0**-23

ANY_LEVELS = frozenset({Law.IDEMPOTENT, Law.MONOTONE, Law.NEAREST, Law.RESCALED})
"""The laws that hold whatever the levels."""


def laws_of(rows: Mapping[int, Sequence[float]]) -> frozenset[Law]:
    """Which laws hold for formats with these levels (ascending and distinct) at each width.

    Zero stays zero where it is a level. A table is odd where it is symmetric and has a middle: with
    an even number of levels, ties between two go to the same index parity on either side, thus not
    to mirrored levels. Codes come back where every code of ``b`` bits has a level of its own.

    >>> sorted(law.name for law in laws_of({2: (-1.0, 0.0, 1.0)}) - ANY_LEVELS)
    ['ODD', 'ZERO']
    """
    laws = set(ANY_LEVELS)
    if all(0.0 in row for row in rows.values()):
        laws.add(Law.ZERO)
    if all(len(row) % 2 and all(-v in row for v in row) for row in rows.values()):
        laws.add(Law.ODD)
    if all(len(row) == 1 << bits for bits, row in rows.items()):
        laws.add(Law.ROUND_TRIP)
    return frozenset(laws)


def width_table(rows: Mapping[int, Sequence[float]], max_bits: int) -> np.ndarray:
    """``float32[max_bits + 1, 2^max_bits]``: the levels of each width, for :func:`row_of`.

    Each row repeats its highest level to the end. A width without a row of its own has that of the
    next width that has one, so that what is computed there and discarded is finite.

    Raises:
      FormatError: too many levels for a width, or none for the widest; levels that descend.

    >>> width_table({1: (0, 1), 2: (0, 1, 4)}, 2).tolist()
    [[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 4.0, 4.0]]
    """
    for bits, levels in rows.items():
        if bits > max_bits or bits == 0:
            continue  # rows of a longer table; nothing is looked up at bypass
        fits = bits > 0 and 0 < len(levels) <= 1 << bits
        if not fits or any(a > b for a, b in itertools.pairwise(levels)):
            raise errors.FormatError(
                f"{len(levels)} levels for a width of {bits} bits",
                where=f"a table of up to {max_bits} bits",
                why="b bits have up to 2^b levels, in ascending order",
                fix="width_table({1: (-1, 1), 2: (-1, 0, 1)}, 2)",
            )
    if max_bits not in rows:
        raise errors.FormatError(
            f"no levels for {max_bits} bits",
            where=f"a table of up to {max_bits} bits",
            fix=f"width_table(rows, {max(rows, default=1)}), or a row for {max_bits}",
        )
    table = np.empty((max_bits + 1, 1 << max_bits), np.float32)
    for bits in reversed(range(max_bits + 1)):
        row = rows.get(bits)
        if row is None:
            table[bits] = table[bits + 1]
        else:
            row = row[: 1 << max_bits]
            table[bits, : len(row)], table[bits, len(row) :] = row, row[-1]
    return table


def row_of(table: np.ndarray, bits: Float[Array, ""]) -> Float[Array, " levels"]:
    """The row of a :func:`width_table` for a width that may be traced."""
    width = jnp.clip(jnp.asarray(bits, jnp.float32), 0.0, float(len(table) - 1))
    return jnp.asarray(table)[width.astype(jnp.int32)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelFormat(Format):
    """A format whose levels are a table of at most 256 numbers; abstract.

    A subclass gives ``name`` and ``levels``; this class turns reals into the nearest level (or
    the one that the rounding chooses), levels into codes, codes into levels. The code of a level is
    its place among the levels, from 0 up. There is no zero point.

    Sharp edges: levels must be normal float32 numbers (or 0) up to ``2^126``; CPU takes subnormal
    ones for 0. Codes beyond the levels in use stand for the highest one. Levels that are computed
    (``0.77 * i + 0.01``) and not looked up may differ in the last place from program to program,
    where a compiler rounds a product and a sum together; their codes do not.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Fibonacci(LevelFormat):
    ...     signed: bool = False
    ...
    ...     @property
    ...     def name(self):
    ...         return "fibonacci"
    ...
    ...     def levels(self, bits, theta=()):
    ...         return row_of(width_table({1: (0, 1), 2: (0, 1, 2, 3)}, self.max_bits), bits)
    >>> from quantjax.rounding import HALF_EVEN
    >>> format, bits = Fibonacci(max_bits=2), jnp.float32(2)
    >>> format.snap(jnp.array([-1.0, 0.7, 9.0]), jnp.float32(0), bits, HALF_EVEN).level.tolist()
    [0.0, 1.0, 3.0]
    """

    def __post_init__(self) -> None:
        name = type(self).__name__
        expect(self.max_bits, numbers.Integral, argument="max_bits", where=name, fix="max_bits=4")
        if not 1 <= self.max_bits <= MAX_TABLE_BITS:
            raise errors.FormatError(
                f"tables of levels have 1 to {MAX_TABLE_BITS} bits, got {self.max_bits}",
                where=name,
                why="a table of 2^bits levels is searched for every entry",
                # Not every table has a row of one bit.
                fix=f"max_bits={min(max(self.max_bits, 2), MAX_TABLE_BITS)}",
            )

    @abc.abstractmethod
    def levels(self, bits: Float[Array, ""], theta: Theta = ()) -> Float[Array, " levels"]:
        """``float32[2^max_bits]``, ascending; beyond those in use, the highest one is repeated.

        Args:
          bits: a scalar that may be traced. At 0 and at widths that do not exist the levels are
            not used, but have to be finite.
          theta: parameters of the tensor, ``()`` for formats that have none, and where a format
            that has some is asked before a rule has found them: ``FormatError``, or the
            ``KeyError`` or ``TypeError`` of looking them up, says that there are no levels yet.
        """

    @property
    def laws(self) -> frozenset[Law]:
        """Those of any levels; a subclass that knows its own has :func:`laws_of` them."""
        return ANY_LEVELS

    def _table(self, bits: jax.Array, theta: Theta) -> jax.Array:
        """Levels along the last axis, after the axes of ``bits`` (stacked layers)."""
        bits = jnp.asarray(bits, jnp.float32)
        function = self.levels
        for _ in range(bits.ndim):
            function = jax.vmap(function)
        table = jnp.asarray(function(bits, theta), jnp.float32)
        if table.shape != (*bits.shape, 1 << self.max_bits):
            raise errors.FormatError(
                f"levels of shape {table.shape[bits.ndim :]} do not fill {self.max_bits} bits",
                where=f"{type(self).__name__}.levels",
                why="a table is for a whole tensor: theta has no axes of its groups",
                fix=f"return {1 << self.max_bits} levels, the highest repeated to the end",
            )
        return table

    def level_range(self, bits: jax.Array, theta: Theta = ()) -> tuple[jax.Array, jax.Array]:
        """First and last level."""
        table = self._table(bits, theta)
        return table[..., 0], table[..., -1]

    def steps(self, bits: jax.Array, *, symmetric: bool, theta: Theta = ()) -> jax.Array:
        """Symmetric: the largest magnitude of a level, as for full integers; else the span.

        Where the two ends differ, the end of smaller magnitude therefore saturates.
        """
        low, high = self.level_range(bits, theta)
        return jnp.maximum(jnp.abs(low), jnp.abs(high)) if symmetric else high - low

    def unit(self, bits: jax.Array, theta: Theta = ()) -> jax.Array:
        """The distance of the two highest levels; 1 where there is only one."""
        table = self._table(bits, theta)
        top = table[..., -1:]
        second = jnp.max(jnp.where(table < top, table, -jnp.inf), axis=-1)
        return jnp.where(jnp.isinf(second), 1.0, top[..., 0] - second)

    def snap(
        self,
        scaled: jax.Array,
        zero_point: jax.Array,
        bits: jax.Array,
        rounding: Rounding,
        theta: Theta = (),
    ) -> Snapped:
        """One of the two levels around each value; which, the rounding says.

        For neighbours ``l[i] <= x <= l[i+1]`` and ``t = (x - l[i]) / (l[i+1] - l[i])``:

        | rounding | level |
        |---|---|
        | half_even | the nearest; a tie goes to the even index |
        | half_away | the nearest; a tie goes away from 0, and up for ``x = 0`` |
        | floor, ceil | ``l[i]``, ``l[i+1]`` |
        | stochastic | ``l[i+1]`` with probability ``t``: unbiased, ``E[y] = x`` |

        Nearest is exact: ``2 x`` is compared with ``l[i] + l[i+1]``, whose rounding error is known.
        A level stays itself, whatever the rounding. Values outside saturate, and are ``unclipped``
        themselves.
        """
        del zero_point
        table = self._table(bits, theta)
        low, high = (_beside(table[..., i], scaled) for i in (0, -1))
        inside = jnp.clip(scaled, low, high)
        index, below, above = _neighbours(table, inside)
        fraction = _fraction(inside, below, above)
        # A whole number of the parity of the index and the sign of x: adding the index itself would
        # round the fraction away.
        anchor = (index & 1).astype(jnp.float32) - jnp.where(inside < 0.0, 2.0, 0.0)
        up = rounding.apply(anchor + fraction) - anchor > 0.5
        level = jnp.where(jnp.isnan(scaled), scaled, jnp.where(up, above, below))
        return Snapped(level, jnp.where((scaled < low) | (scaled > high), scaled, level))

    def encode(
        self, levels: Float[Array, "..."], bits: jax.Array, theta: Theta = ()
    ) -> UInt8[Array, "..."]:
        """The place of the nearest level: of equal ones, the first.

        The nearest, since levels that another program has computed may differ in the last place.
        """
        borders = _borders(self._table(bits, theta))
        return _count(borders, levels, strictly=True).astype(self.storage_dtype)

    def decode(
        self, codes: Int[Array, "..."], bits: jax.Array, theta: Theta = ()
    ) -> Float[Array, "..."]:
        """The table's entry, layer by layer where ``bits`` has the leading axes of ``codes``.

        Differentiable in ``theta``: the gradient of a level is the sum over the entries that have
        it.
        """
        return _look_up(self._table(bits, theta), codes)


def _beside(values: jax.Array, x: jax.Array) -> jax.Array:
    """``values``, of the leading axes of ``x``, so that they broadcast against it."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def _look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    def take(row: jax.Array, places: jax.Array) -> jax.Array:
        return row.at[places].get(mode="clip")

    for _ in range(table.ndim - 1):
        take = jax.vmap(take)
    return take(table, index.astype(jnp.int32))


def _count(table: jax.Array, x: jax.Array, *, strictly: bool) -> jax.Array:
    """How many levels are lower than ``x``; not strictly: how many but the first are not higher.

    At most all but one; int32, 0 for NaN.
    """
    size = table.shape[-1]
    count = jnp.zeros(x.shape, jnp.int32)
    if size <= COMPARED:
        for place in range(size - 1):
            level = _beside(table[..., place if strictly else place + 1], x)
            count += (level < x if strictly else level <= x).astype(jnp.int32)
        return count
    x = lax.optimization_barrier(
        x
    )  # else XLA computes x anew for each look-up, 2 to 4 times slower
    half = size // 2
    while half:
        # Invariant: at least `count` levels are counted.
        level = _look_up(table, count + (half - 1 if strictly else half))
        reached = level < x if strictly else level <= x
        count = jnp.where(reached, count + half, count)
        half //= 2
    return count


def _borders(table: jax.Array) -> jax.Array:
    """Above which numbers the next level is nearer: the middle, infinity above the highest.

    Where the middle rounds to the next level, the level itself.
    """
    following = jnp.roll(table, -1, axis=-1).at[..., -1].set(jnp.inf)
    following = jnp.where(following > table, following, jnp.inf)
    # Of equal levels, all have the border of the last.
    following = lax.cummin(following, axis=table.ndim - 1, reverse=True)
    middle = 0.5 * table + 0.5 * following
    return jnp.where(middle < following, middle, table)


def check_levels(format: Format, bits: int) -> None:
    """Raise ``FormatError`` for levels of one's own that descend, or of which no trace can be made.

    Levels that come from ``theta`` are not there yet.
    """
    if not isinstance(format, LevelFormat) or type(format).__module__.startswith(_OURS):
        return  # ours are tested, and a program for each would be compiled here
    where = f"{type(format).__name__}.levels"
    try:
        jax.eval_shape(format.levels, jax.ShapeDtypeStruct((), jnp.float32))
    except _UNTRACEABLE as error:
        raise errors.FormatError(
            "levels that need the number of a width, as Python's if does",
            where=where,
            why="widths may be traced, and then they have none",
            fix="jnp.where(bits > 2, a, b), or quantjax.formats.row_of(table, bits)",
        ) from error
    except (errors.FormatError, KeyError, TypeError):
        return  # it has them from theta
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        made = format.levels(jnp.float32(bits))
    if made is None:
        raise errors.FormatError(
            "levels makes None, and an array is needed",
            where=where,
            fix="return jnp.asarray([-1.0, 0.0, 1.0, 1.0], jnp.float32)",
        )
    levels = np.asarray(made, np.float32)
    below = np.flatnonzero(np.diff(levels) < 0.0)
    if below.size:
        first, second = levels[below[0] : below[0] + 2]
        raise errors.FormatError(
            f"the level {second:g} comes behind {first:g}",
            where=f"{where} at {bits} bits",
            why="the code of a level is its place, and levels are searched: they have to ascend",
            fix="jnp.sort(levels)",
        )


def _neighbours(table: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Index of the highest level that is not above, that level, and the next; ``x`` in range."""
    size = table.shape[-1]
    index = _count(table, x, strictly=False)
    if size > COMPARED:
        return index, _look_up(table, index), _look_up(table, index + 1)
    levels = [_beside(table[..., place], x) for place in range(size)]
    below, above = (jnp.broadcast_to(levels[end], x.shape) for end in (0, -1))
    for level in levels[1:]:
        below = jnp.where(level <= x, level, below)
    for level in reversed(levels):
        above = jnp.where(level > x, level, above)
    return index, below, above


def _fraction(x: jax.Array, below: jax.Array, above: jax.Array) -> jax.Array:
    """How far ``x`` is from ``below`` to ``above``: 0 at a level, else in ``[2^-23, 1 - 2^-23]``.

    Less than, equal to or greater than a half exactly where ``x`` is nearer to ``below``, a tie, or
    nearer to ``above``: a quotient of rounded differences would not tell.
    """
    gap = above - below
    fraction = jnp.clip((x - below) / jnp.where(gap > 0.0, gap, 1.0), _STEP, 1.0 - _STEP)
    # total + rest is exactly below + above (Knuth, The art of computer programming, volume 2,
    # 1997, section 4.2.2, theorem B).
    total = below + above
    part = total - below
    rest = (below - (total - part)) + (above - part)
    twice = x + x
    nearer = (twice < total) | ((twice == total) & (rest > 0.0))
    tie = (twice == total) & (rest == 0.0)
    farther = jnp.where(tie, 0.5, jnp.maximum(fraction, 0.5 + _STEP))
    fraction = jnp.where(nearer, jnp.minimum(fraction, 0.5 - _STEP), farther)
    return jnp.where(x > below, fraction, 0.0)
