"""The divergences of all clips of a histogram to four digits, but of those that cannot win."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax._compat import varying_like
from quantjax.formats import divide_by_scale
from quantjax.ranges.kl_sums import entropy, prefix_sums

CLIPS = 32  # looked at together on a CPU; where many are as fast as few, all of them
RUNS = 8  # summed before a look whether one of them can still win
_TOTAL = 2.0**17  # counts are scaled to this sum
_MASS, _ENTROPY = 2.0**13, 2.0**10  # and held as integers of these fractions
_RELATIVE, _ABSOLUTE = 1.00001, 1.2e-5  # by which the best has to be missed


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


class _Blocks(NamedTuple):
    """Blocks of clips, those of the lowest bounds first.

    Attributes:
      bounds: ``[blocks]``, what their divergences are at least; infinite once they were summed.
      best: the smallest divergence so far.
      found: ``[blocks, n]``, the divergences.
    """

    bounds: jax.Array
    best: jax.Array
    found: jax.Array


def looked_at(counts: jax.Array, levels: jax.Array, tried: jax.Array) -> jax.Array:
    """``KL(P ‖ Q)`` after every number of bins, ``[bins + 1]``; infinite where it is far from best.

    By the chain rule the divergence is that between the masses of runs, which differ in the last
    run only, and within each run, and no part is negative: ``KL = last + Σ_runs D / total``, with
    ``D = Σ c log c - S log(S / N)`` of the ``N`` bins of a run that are not empty and their sum
    ``S``. So a sum over some runs is a bound, and blocks of clips are left where it is above the
    smallest divergence found, by more than the digits that this look has. Prefix sums are of
    integers, which lose no digits to one another; where the kept bins hold less than 2^-28 of all
    counts they have none, and clips there may be taken for others.

    Args:
      counts: ``[bins]``, float32.
      levels: int32 scalar, a power of two.
      tried: ``[bins + 1]``, which of them are candidates.
    """
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
    least = jnp.maximum(least, 0.0)  # no divergence is below 0: where too little is kept for digits
    lost = (last_bin == 0.0) & (outliers > 0.0)
    least = jnp.where(tried & ~lost & (sums.both[:, 0] > 0), least, jnp.inf)
    # One histogram after another: each has its own number of passes.
    return jax.custom_batching.sequential_vmap(_all_clips)(sums, levels, least)


def _all_clips(sums: _Sums, levels: jax.Array, least: jax.Array) -> jax.Array:
    return lax.platform_dependent(sums, levels, least, cpu=_in_blocks, default=_at_once)


def _at_once(sums: _Sums, levels: jax.Array, least: jax.Array) -> jax.Array:
    clips = _Clips(jnp.arange(least.size, dtype=jnp.int32), least)
    return _summed(sums, levels, clips, jnp.inf)


def _in_blocks(sums: _Sums, levels: jax.Array, least: jax.Array) -> jax.Array:
    last = least.size - 1
    missing = -least.size % CLIPS
    # Ahead of all, some from everywhere say how good the best is at least.
    everywhere = jnp.arange(CLIPS, dtype=jnp.int32) * -(-least.size // CLIPS)
    kept = jnp.arange(-CLIPS, least.size + missing, dtype=jnp.int32)
    kept = jnp.minimum(kept.at[:CLIPS].set(everywhere), last)
    bounds = jnp.where(jnp.arange(kept.size) < CLIPS + least.size, least[kept], jnp.inf)
    blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, CLIPS), _Clips(kept, bounds))

    def goes_on(state: _Blocks) -> jax.Array:
        return jnp.min(state.bounds) < enough(state.best)

    def block(state: _Blocks) -> _Blocks:
        number = jnp.argmin(state.bounds)
        clips = jax.tree.map(lambda leaf: leaf[number], blocks)
        found = _summed(sums, levels, clips, enough(state.best))
        return _Blocks(
            state.bounds.at[number].set(jnp.inf),
            jnp.minimum(state.best, jnp.min(found)),
            state.found.at[number].set(found),
        )

    first_one_first = jnp.min(blocks.least, axis=1).at[0].set(-jnp.inf)
    start = _Blocks(first_one_first, jnp.float32(jnp.inf), jnp.full_like(blocks.least, jnp.inf))
    start = varying_like(start, (sums, levels, least))
    return lax.while_loop(goes_on, block, start).found[1:].reshape(-1)[: least.size]


def enough(best: jax.Array) -> jax.Array:
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
    # Where there are more levels than bins, each has a run of its own, and the last bin is one.
    start = jnp.minimum(_edges(levels, levels - 1, kept), jnp.maximum(kept - 1, 0))
    held, number = (sums.both - sums.both[start]).T
    mass = sums.both[:, 0].astype(jnp.float32) * (1.0 / _MASS)
    within = held.astype(jnp.float32) * (1.0 / _MASS)
    beyond = _TOTAL - mass
    own = (sums.entropies - sums.entropies[start]).astype(jnp.float32) * (1.0 / _ENTROPY)
    own += entropy(last_bin + beyond) - entropy(last_bin)
    share = divide_by_scale(mass, jnp.float32(_TOTAL))
    value = own - (within + beyond) * _logarithm(within, number)
    return value / _TOTAL + jnp.log(jnp.where(share > 0.0, share, 1.0))


def _summed(sums: _Sums, levels: jax.Array, clips: _Clips, most: jax.Array | float) -> jax.Array:
    """The divergences, or infinity for all where none of them can be below ``most``."""

    def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        first, value = state
        return (first < levels - 1) & (jnp.min(value) < most)

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

    start = varying_like((jnp.int32(0), clips.least), (sums, levels, most))
    first, value = lax.while_loop(goes_on, some_runs, start)
    return jnp.where(first >= levels - 1, value, jnp.inf)
