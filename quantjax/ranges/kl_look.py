"""The divergences of all clips of a histogram to four digits, but of those that cannot win."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.formats import divide_by_scale
from quantjax.ranges.kl_sums import entropy, prefix_sums

CLIPS = 128  # looked at together on a CPU; where many are as fast as few, all of them
RUNS = 8  # summed before a look whether one of them can still win
FIRST = 32  # clips that say how good the best is at least
_TOTAL = 2.0**17  # counts are scaled to this sum
_MASS, _ENTROPY = 2.0**13, 2.0**10  # and held as integers of these fractions
_RELATIVE, _ABSOLUTE = 1.001, 1e-5  # by which the best has to be missed


class _Sums(NamedTuple):
    """Sums over the bins below each edge, ``[bins + 1]``, and of all.

    Attributes:
      both: ``[bins + 1, 2]``, counts and bins that are not empty, side by side for one gather.
      entropies: ``Σ c log c``.
    """

    both: jax.Array
    entropies: jax.Array


class _Clips(NamedTuple):
    """Some clips, and what their divergences are at least, ``[n]``."""

    kept: jax.Array
    least: jax.Array


def looked_at(counts: jax.Array, levels: jax.Array, tried: jax.Array) -> jax.Array:
    """``KL(P ‖ Q)`` after every number of bins, ``[bins + 1]``; infinite where it is far from best.

    By the chain rule the divergence is that between the masses of runs, which differ in the last
    run only, and within each run, and no part is negative: ``KL = last + Σ_runs D / total``, with
    ``D = Σ c log c - S log(S / N)`` of the ``N`` bins of a run that are not empty and their sum
    ``S``. So a sum over some runs is a bound, and blocks of clips are left where it is above the
    smallest divergence found, by more than the digits that this look has. Prefix sums are of
    integers, which lose no digits to one another.

    Args:
      counts: ``[bins]``, float32.
      levels: int32 scalar, a power of two.
      tried: ``[bins + 1]``, which of them are candidates.
    """
    together = functools.partial(_looked_at, counts.size + 1)
    return lax.platform_dependent(
        counts, levels, tried, cpu=functools.partial(_looked_at, CLIPS), default=together
    )


def _looked_at(at_once: int, counts: jax.Array, levels: jax.Array, tried: jax.Array) -> jax.Array:
    bins = counts.shape[0]
    total = jnp.maximum(jnp.sum(counts), 1.0)
    scaled = divide_by_scale(counts, total) * _TOTAL
    sums = _Sums(
        jnp.stack(
            [prefix_sums(scaled * _MASS), prefix_sums((counts > 0.0).astype(jnp.float32))], axis=1
        ),
        prefix_sums(entropy(scaled) * _ENTROPY),
    )
    kept = jnp.arange(bins + 1, dtype=jnp.int32)
    outliers = jnp.sum(counts) - jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(counts)])
    last_bin = jnp.concatenate([jnp.zeros(1, jnp.float32), scaled])
    least = _of_last_run(sums, levels, kept, last_bin)
    lost = (last_bin == 0.0) & (outliers > 0.0)
    least = jnp.where(tried & ~lost & (sums.both[:, 0] > 0), least, jnp.inf)

    stride = max(bins // FIRST, 1)
    best = jnp.min(_summed(sums, levels, _Clips(kept[::stride], least[::stride]), jnp.inf))
    missing = -(bins + 1) % at_once
    blocks = _Clips(
        jnp.pad(kept, (0, missing)).reshape(-1, at_once),
        jnp.pad(least, (0, missing), constant_values=jnp.inf).reshape(-1, at_once),
    )

    def block(best: jax.Array, clips: _Clips) -> tuple[jax.Array, jax.Array]:
        found = _summed(sums, levels, clips, _enough(best))
        return jnp.minimum(best, jnp.min(found)), found

    _, found = lax.scan(block, best, blocks)
    return found.reshape(-1)[: bins + 1]


def _enough(best: jax.Array) -> jax.Array:
    """What a clip has to be below to be the best one, with the digits that this look has."""
    return _RELATIVE * best + _ABSOLUTE


def _edges(levels: jax.Array, run: jax.Array, kept: jax.Array) -> jax.Array:
    """``⌈run · kept / levels⌉``, where a run starts."""
    return jnp.right_shift(run * kept + levels - 1, 31 - lax.clz(levels))


def _logarithm(held: jax.Array, number: jax.Array) -> jax.Array:
    """``log(S / N)``."""
    mean = divide_by_scale(held, jnp.maximum(number.astype(jnp.float32), 1.0))
    return jnp.log(jnp.where(mean > 0.0, mean, 1.0))


def _of_last_run(sums: _Sums, levels: jax.Array, kept: jax.Array, last_bin: jax.Array) -> jax.Array:
    """What masses and the last run, with all that lies beyond in its last bin, contribute."""
    start = _edges(levels, levels - 1, kept)
    held, number = (sums.both - sums.both[start]).T
    mass = sums.both[:, 0].astype(jnp.float32) * (1.0 / _MASS)
    within = held.astype(jnp.float32) * (1.0 / _MASS)
    beyond = _TOTAL - mass
    own = (sums.entropies - sums.entropies[start]).astype(jnp.float32) * (1.0 / _ENTROPY)
    own += entropy(last_bin + beyond) - entropy(last_bin)
    share = divide_by_scale(mass, jnp.float32(_TOTAL))
    value = own - (within + beyond) * _logarithm(within, number)
    return value / _TOTAL + jnp.log(jnp.where(share > 0.0, share, 1.0))


def _summed(sums: _Sums, levels: jax.Array, clips: _Clips, enough: jax.Array | float) -> jax.Array:
    """The divergences, or infinity for all where none of them can be below ``enough``."""

    def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        first, value = state
        return (first < levels - 1) & (jnp.min(value) < enough)

    def some_runs(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, value = state
        run = jnp.minimum(first + jnp.arange(RUNS + 1, dtype=jnp.int32), levels - 1)
        edges = _edges(levels, run[:, None], clips.kept[None, :])
        both = sums.both[edges]
        held, number = jnp.moveaxis(both[1:] - both[:-1], -1, 0)
        held = held.astype(jnp.float32) * (1.0 / _MASS)
        lost = sums.entropies[edges[-1]] - sums.entropies[edges[0]]
        within = lost.astype(jnp.float32) * (1.0 / _ENTROPY)
        within -= jnp.sum(held * _logarithm(held, number), axis=0)
        return first + RUNS, value + jnp.maximum(within, 0.0) / _TOTAL

    start = (jnp.int32(0), clips.least)
    first, value = lax.while_loop(goes_on, some_runs, start)
    return jnp.where(first >= levels - 1, value, jnp.inf)
