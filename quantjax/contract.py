"""What every number format must keep, as a check that anybody can run on a format of their own.

The tests run it over all formats of the library, granularities, roundings and dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax.affine import QParams
from quantjax.arguments import expect_declared
from quantjax.arithmetic import Arithmetic
from quantjax.formats import ALL_LAWS, Format, Law, Theta
from quantjax.formats.levels import check_levels
from quantjax.granularity import expand
from quantjax.qtensor import encode
from quantjax.rounding import HALF_EVEN, Rounding
from quantjax.simulation import apply, centered_codes

SAMPLES = 512
_SAFE = 2.0**-100  # smaller reals may be flushed to zero on the way
_TOP = 16.0  # where the highest level is brought by the scale, so that float16 holds all values


class Trial(NamedTuple):
    """How a format is tried.

    Attributes:
      rounding: any; laws about the nearest level are asked of those to the nearest only.
      scales: multiples of a scale that brings the highest level to about 16; positive, of the shape
        that a scale of the granularity has.
      shape: of the tensor.
      dtype: of the tensor.
      theta: the format's parameters, for the whole tensor.
    """

    rounding: Rounding = HALF_EVEN
    scales: np.ndarray = np.ones((1, 1), np.float32)
    shape: tuple[int, int] = (1, 1)
    dtype: Any = jnp.float32
    theta: Theta = ()

    @property
    def is_exact(self) -> bool:
        """Whether a level times its scale, divided by it, is that level."""
        powers = np.frexp(self.scales)[0] == 0.5
        return bool(powers.all()) and self.dtype in (jnp.float32, jnp.float64)

    @property
    def laws(self) -> frozenset[Law]:
        """What can be asked under this rounding."""
        laws = set(ALL_LAWS)
        if not self.rounding.is_nearest:
            # A quotient a rounding error below its level goes to the level below.
            laws -= {Law.NEAREST, Law.ODD} | (set() if self.is_exact else {Law.IDEMPOTENT})
        if self.rounding.is_random:
            laws.discard(Law.MONOTONE)
        return frozenset(laws)


class _Outcome(NamedTuple):
    """Of one tensor: what it becomes in simulation, as levels, as codes, and back from codes."""

    values: np.ndarray
    levels: np.ndarray
    decoded: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _run(arithmetic: Arithmetic, x: jax.Array, qparams: QParams, key: jax.Array) -> Any:
    format, rounding = arithmetic.format, arithmetic.rounding

    def one(x: jax.Array, key: jax.Array) -> Any:
        codes = encode(x, qparams, format, rounding=rounding, key=key)
        simulated = apply(x, qparams, arithmetic, key)
        return simulated, centered_codes(x, qparams, arithmetic, key), codes.dequantize()

    return jax.vmap(one)(x, jax.random.split(key, len(x)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _levels(format: Format, codes: tuple[int, int], bits: jax.Array, theta: Theta) -> Any:
    """Each code, its level, what that is rounded to, and the code of that level."""
    every = jnp.arange(*codes, dtype=jnp.int32).astype(format.storage_dtype)
    levels = format.decode(every, bits, theta)
    snapped = format.snap(levels, jnp.zeros((), jnp.float32), bits, HALF_EVEN, theta).level
    return every, levels, snapped, format.encode(levels, bits, theta)


def widths(format: Format, theta: Theta = ()) -> list[int]:
    """All widths of a format but 0, ascending.

    >>> from quantjax.formats import E4M3FN
    >>> widths(E4M3FN)
    [5, 6, 7, 8]
    """
    every = range(1, format.max_bits + 1)
    return [bits for bits in every if format.known_valid(bits, theta)]


def counterexamples(format: Format, bits: int, trial: Trial | None = None) -> dict[Law, str]:
    """The laws that do not hold at a width, each with a counterexample.

    The sample has levels, the middles between them, the next float32 to either side of both, reals
    beyond the range, and normal ones; of formats with many levels, some of these.

    Raises:
      FormatError: what no format may do: lose NaN, have levels outside its range or none, or
        simulate what its codes do not stand for.

    >>> from quantjax.formats import integer
    >>> sorted(law.name for law in counterexamples(integer(), 4))
    ['ODD']
    """
    trial = Trial() if trial is None else trial
    width, theta = jnp.float32(bits), trial.theta
    storage, held = format.storage_dtype, 1 << format.max_bits
    span = (0, held) if storage.kind == "u" else (-(held // 2), max(held // 2, 2))
    codes, decoded, snapped, again = map(np.asarray, _levels(format, span, width, theta))
    # Compared by NumPy: XLA on CPU takes subnormal numbers for 0.
    stays = np.isfinite(decoded) & (snapped == decoded)
    levels = np.unique(decoded[stays].astype(np.float64) + 0.0)
    label = format.label(bits)
    if not 2 <= levels.size <= 1 << bits:
        raise errors.FormatError(
            f"{label} has {levels.size} levels at {bits} bits",
            why="a level is what a code decodes to and what rounds to itself"
            + _seen_of(codes, decoded, snapped, is_crowded=levels.size > 1 << bits),
            fix="see that snap returns what decode does, and valid_bits only widths there are",
        )
    low, high = (float(end) for end in format.level_range(width, theta))
    if not (np.isfinite([low, high]).all() and low <= levels[0] and levels[-1] <= high):
        raise errors.FormatError(
            f"{label} has levels from {levels[0]:g} to {levels[-1]:g}",
            why=f"its range is said to be {low:g} to {high:g}",
            fix="level_range returns the lowest and the highest level",
        )
    apart = np.asarray(format.encode(jnp.asarray(decoded), width, theta))
    if (moved := stays & (apart != again)).any():
        at = int(np.argmax(moved))
        raise errors.FormatError(
            f"{label}: {decoded[at]:.9g} is encoded as {again[at]}, and as {apart[at]} eagerly",
            why="levels that two programs compute may differ in the last place",
            fix="encode to the nearest level, as LevelFormat does: compare with the middles",
        )
    found: dict[Law, str] = {}
    narrow = (0, 1 << bits) if span[0] == 0 else (-(1 << bits) // 2, max((1 << bits) // 2, 2))
    reached = ((codes >= narrow[0]) & (codes < narrow[1])) | np.isin(codes, again[stays])
    wrong = reached & stays & (again != codes)
    if wrong.any():
        at = int(np.argmax(wrong))
        found[Law.ROUND_TRIP] = f"{codes[at]} decodes to {decoded[at]:g}, encoded as {again[at]}"
    odd = levels[levels != np.rint(levels)]
    if odd.size:
        found[Law.INTEGER] = f"{odd[0]:g} is a level"
    for law, text in _of_values(format, width, trial, levels):
        found.setdefault(law, text)
    return {law: text for law, text in found.items() if law in trial.laws}


def _seen_of(
    codes: np.ndarray, decoded: np.ndarray, snapped: np.ndarray, *, is_crowded: bool
) -> str:
    """What tells most of why levels are too many or too few."""
    if is_crowded:
        return "; a width that has fewer codes has fewer of them"
    moved, lost = np.isfinite(decoded) & (snapped != decoded), np.isnan(decoded)
    if moved.any():
        at = int(np.argmax(moved))
        value = f"{codes[at]} decodes to {decoded[at]:g}, which rounds to {snapped[at]:g}"
        return f"; {value} (levels have to ascend)"
    return f"; {codes[np.argmax(lost)]} decodes to NaN" if lost.any() else ""


def _reals(levels: np.ndarray) -> np.ndarray:
    """The sample in units of the scale, ascending, ``SAMPLES`` numbers."""
    rng = np.random.default_rng(levels.size)
    some = SAMPLES // 8
    chosen = levels
    if levels.size > some:
        inner = rng.choice(levels[1:-1], some - 2, replace=False)
        chosen = np.sort([levels[0], *inner, levels[-1]])
    place = np.searchsorted(levels, chosen[:-1])
    special = np.concatenate([chosen, (levels[place] + levels[place + 1]) / 2]).astype(np.float32)
    top = np.float32(np.abs(levels).max())
    beside = [np.nextafter(special, np.float32(side * np.inf)) for side in (-1, 1)]
    ends = np.array([0.0, 0.25, 1.5, 4.0], np.float32) * np.minimum(top, np.float32(2.0**120))
    fixed = np.concatenate([special, *beside, ends, -ends])
    fixed = fixed[(fixed == 0.0) | (np.abs(fixed) * (_TOP / top) >= _SAFE)]
    rest = SAMPLES - fixed.size
    normal = rng.normal(size=rest) * ends[-2] * 2.0 ** rng.uniform(-8, 0, rest)
    return np.sort(np.concatenate([fixed, normal.astype(np.float32)]))


def _of_values(
    format: Format, width: jax.Array, trial: Trial, levels: np.ndarray
) -> Iterator[tuple[Law, str]]:
    """The laws of ``x -> fake_quant(x)``, every real of the sample at every entry of a tensor."""
    unit = np.float32(2.0) ** np.floor(np.log2(_TOP / np.abs(levels).max()))
    scale = (unit * trial.scales).astype(np.float32)
    spread = np.broadcast_to(np.asarray(expand(jnp.asarray(scale), trial.shape)), trial.shape)
    x = jnp.asarray(_reals(levels)[:, None, None] * spread).astype(trial.dtype)

    def run(x: jax.Array, factor: float = 1.0) -> _Outcome:
        theta = format.map_groups(trial.theta, lambda a: jnp.broadcast_to(a, scale.shape))
        scales = jnp.asarray(scale * np.float32(factor))
        qparams = QParams(scales, jnp.zeros_like(scales), width, theta)
        arithmetic = Arithmetic(format, trial.rounding)
        return _Outcome(*map(np.asarray, _run(arithmetic, x, qparams, jax.random.key(0))))

    reals, outcome = np.asarray(x, np.float64), run(x)
    values = outcome.values.astype(np.float64)
    label = format.label(int(width))

    def example(wrong: np.ndarray, *others: np.ndarray) -> str:
        at = np.unravel_index(np.argmax(wrong), wrong.shape)
        seen = " and ".join(f"{float(other[at]):.9g}" for other in (values, *others))
        return f"x = {reals[at]:.9g} at scale {float(spread[at[1:]]):g} gives {seen}"

    differ = ~np.equal(outcome.decoded, outcome.values) & ~np.isnan(values)
    if differ.any():
        raise errors.FormatError(
            f"{label}: codes do not stand for what is simulated",
            why=example(differ, outcome.decoded.astype(np.float64)),
            fix="see that decode(encode(level)) is the level",
        )
    if not np.isnan(run(jnp.full_like(x, jnp.nan)).values.astype(np.float64)).all():
        raise errors.FormatError(
            f"{label} makes a number of NaN",
            fix="snap keeps NaN: jnp.where(jnp.isnan(x), x, level)",
        )
    again = run(jnp.asarray(outcome.values)).values.astype(np.float64)
    if (changed := ~((again == values) | (np.isnan(again) & np.isnan(values)))).any():
        yield Law.IDEMPOTENT, example(changed, again)
    down = np.zeros(values.shape, bool)
    down[1:] = ~(np.diff(values, axis=0) >= 0.0)
    if down.any():
        yield Law.MONOTONE, example(down, np.roll(values, 1, axis=0)) + " for the real before"
    if (moved := (reals == 0.0) & (values != 0.0)).any():
        yield Law.ZERO, example(moved)
    if (uneven := ~(run(-x).values.astype(np.float64) == -values)).any():
        yield Law.ODD, example(uneven)
    scaled, chosen = reals / spread, outcome.levels.astype(np.float64)
    place = np.clip(np.searchsorted(levels, scaled), 1, levels.size - 1)
    best = np.minimum(np.abs(scaled - levels[place - 1]), np.abs(scaled - levels[place]))
    slack = 0.0 if trial.is_exact else 2.0**-23 * np.abs(scaled)
    if (farther := ~(np.abs(scaled - chosen) <= best + slack)).any():
        yield Law.NEAREST, example(farther)
    if trial.dtype in (jnp.float32, jnp.float64):  # half types would lose what is small
        for factor in (0.125, 8.0) if scale.min() > 2.0**-122 else (8.0,):
            other = run(x * jnp.asarray(factor, x.dtype), factor).values.astype(np.float64)
            same = (other == factor * values) | (np.isnan(other) & np.isnan(values))
            if (unlike := ~(same | (np.abs(values) < _SAFE))).any():
                yield Law.RESCALED, example(unlike, other)


def check_format(
    format: Format, *, theta: Theta = (), trials: Sequence[Trial] | None = None
) -> frozenset[Law]:
    """Check a format against what it declares; for the tests of a format of your own.

    All its widths are tried; laws are asked for at 2 bits and more (1 where there is no other).

    Args:
      format: any.
      theta: parameters, for formats that have some.
      trials: how; default: float32 with a scale that is a power of two and one that is not.

    Returns:
      The laws without a counterexample: those declared, and perhaps others.

    Raises:
      FormatError: a declared law does not hold, with a counterexample; or see
        :func:`counterexamples`. A format that is not hashable.

    Sharp edges: one program is compiled for each trial, a second or so.

    >>> from quantjax.formats import codebook
    >>> laws = check_format(codebook([-1, 0, 2]))
    >>> sorted(law.name for law in laws)
    ['IDEMPOTENT', 'INTEGER', 'MONOTONE', 'NEAREST', 'RESCALED', 'ZERO']
    """
    expect_declared(format, where="qj.contract.check_format")
    try:
        hash(format)
    except TypeError as error:
        raise errors.FormatError(
            "a format must be hashable",
            why=f"formats are static arguments of compiled programs ({error})",
            fix="@dataclasses.dataclass(frozen=True, kw_only=True), and tuples in place of lists",
        ) from error
    if trials is None:
        trials = [Trial(theta=theta), Trial(theta=theta, scales=np.full((1, 1), 1.3, np.float32))]
    every = widths(format, theta)
    if not every:
        raise errors.FormatError(f"{format.name} has no width", fix="valid_bits up to max_bits")
    check_levels(format, every[-1])
    held = set(ALL_LAWS)
    for trial in trials:
        for bits in every:
            broken = counterexamples(format, bits, trial)
            if bits == 1 < every[-1]:
                continue
            for law in sorted(format.laws & set(broken), key=lambda law: law.name):
                raise errors.FormatError(
                    f"{format.label(bits)} breaks its law {law.name}: {law.value}",
                    where=f"{trial.rounding.name}, {jnp.dtype(trial.dtype).name}",
                    why=broken[law],
                    fix="mend snap, or leave the law out of the property laws",
                )
            held -= set(broken)
    return frozenset(held)
