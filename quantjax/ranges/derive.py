"""From rules to ranges: group by group, many groups at once."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.ranges.base import Range, RangeRule, Target
from quantjax.ranges.stack import IndexedRule, checked_rule, range_of
from quantjax.statistics import Held, Histogram, Statistics

ENTRIES_AT_ONCE = 1 << 20  # of all groups together; a search has some forty arrays of them


def derive(rule: RangeRule | IndexedRule, statistics: Statistics, target: Target) -> Range:
    """The range of each group by a rule, at the shape of the scale.

    Where statistics hold NaN or infinity, the range is NaN whatever the rule: none that it could
    give holds all that was seen.
    """
    (found,) = derive_many(rule, [(statistics, target)])
    return found


def derive_many(
    rule: RangeRule | IndexedRule, jobs: Sequence[tuple[Statistics, Target]]
) -> list[Range]:
    """:func:`derive` for many operands in one program, so that a rule is compiled once.

    Operands whose formats or distributions differ in shape are taken one after another.
    """
    checked_rule(rule, "qj.ranges.derive")
    if not rule.reads_distribution:
        return [_finite(_at_once(rule, s, t), s) for s, t in jobs]
    if isinstance(rule, IndexedRule) and not all(reads(one) for one in rule.rules):
        return _mixed(rule, jobs)
    together: dict[Any, list[int]] = {}
    for index, (statistics, target) in enumerate(jobs):
        together.setdefault(_key(statistics, target), []).append(index)
    found: dict[int, Range] = {}
    for indices in together.values():
        mine = [jobs[index] for index in indices]
        length = max(_entries(statistics) for statistics, _ in mine)
        at_once = max(ENTRIES_AT_ONCE // max(length, rule.entries), 1)
        parts = [(statistics, target.bits, target.theta) for statistics, target in mine]
        groups = _in_groups(parts, length=length)
        ranges = _finite(_each_group(rule, mine[0][1], groups, at_once), groups[0])
        found |= zip(indices, _apart(ranges, [statistics for statistics, _ in mine]), strict=True)
    return [found[index] for index in range(len(jobs))]


def reads(rule: Any) -> bool:
    """Whether a rule is for one group at a time."""
    return isinstance(rule, RangeRule) and rule.reads_distribution


def _mixed(rule: IndexedRule, jobs: Sequence[tuple[Statistics, Target]]) -> list[Range]:
    """Rules for all groups and rules for one at a time: each kind as if it were alone."""
    readers = jnp.asarray([reads(one) for one in rule.rules])[jnp.clip(rule.chosen, 0)]
    kinds = []
    for kind in (True, False):
        rules = tuple(one if reads(one) is kind else _NOTHING[kind] for one in rule.rules)
        kinds.append(derive_many(rule._replace(rules=rules), jobs))
    return [
        jax.tree.map(lambda a, b: jnp.where(readers, a, b), one, other)
        for one, other in zip(*kinds, strict=True)
    ]


def _nothing(statistics: Statistics, target: Target) -> Range:
    """The place of a rule that another pass runs."""
    del target
    zero = jnp.zeros(statistics.scale_shape, jnp.float32)
    return Range(zero, zero, jnp.asarray(False))


_NOTHING = {kind: RangeRule("nothing", _nothing, reads_distribution=kind) for kind in (True, False)}


@functools.partial(jax.jit, inline=True)  # one program where it is called eagerly
def _finite(found: Range, statistics: Statistics) -> Range:
    """NaN where statistics are not finite, or where a rule has its bounds in the wrong order."""
    seen = statistics.extremes
    crossed = (found.low > found.high) & (seen.low <= seen.high)
    broken = jnp.isnan(seen.low) | jnp.isnan(seen.high)
    broken |= (seen.low <= seen.high) & (jnp.isinf(seen.low) | jnp.isinf(seen.high))
    broken |= crossed
    return Range(
        jnp.where(broken, jnp.nan, found.low),
        jnp.where(broken, jnp.nan, found.high),
        found.calibrated,
    )


def _key(statistics: Statistics, target: Target) -> Any:
    """Operands that share it go through a rule together."""
    distribution = statistics.distribution
    size = 0
    if isinstance(distribution, Histogram):
        size = distribution.bins
    elif isinstance(distribution, Held):
        # Filled up to the longest of them, which is at most four times as long.
        size = (_entries(statistics) - 1).bit_length() // 2
    theta = jax.tree.structure(target.theta)
    return type(distribution), size, target.format, target.symmetric, theta


def _entries(statistics: Statistics) -> int:
    distribution = statistics.distribution
    if isinstance(distribution, Histogram):
        return distribution.bins
    return distribution.values.shape[-1] if isinstance(distribution, Held) else 1


@functools.partial(jax.jit, static_argnames="length", inline=True)
def _in_groups(parts: Sequence[tuple[Statistics, Any, Any]], *, length: int) -> Any:
    """Statistics, widths and theta of all operands, with one leading axis of all their groups."""
    every = [_groups(*part) for part in parts]
    held = [statistics.distribution for statistics, _, _ in every]
    kinds = {one.values.dtype for one in held if isinstance(one, Held)}
    dtype = kinds.pop() if len(kinds) == 1 else jnp.dtype(jnp.float32)
    every = [(_padded(statistics, length, dtype), *rest) for statistics, *rest in every]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *every)


@functools.partial(jax.jit, inline=True)
def _apart(ranges: Range, statistics: Sequence[Statistics]) -> list[Range]:
    """The ranges of the groups of each operand, at the shape of its scale.

    What operands have in common XLA compiles once where it is the same kernel. So the end of the
    rule is no part of it, a place is a number that is read, and what becomes of a part begins anew.
    """
    ranges = lax.optimization_barrier(ranges)
    found, start = [], 0
    for one in statistics:
        shape, size = one.scale_shape, math.prod(one.scale_shape)
        place = lax.optimization_barrier(jnp.int32(start))
        part = jax.tree.map(lambda a, i=place, n=size: lax.dynamic_slice_in_dim(a, i, n), ranges)
        part = jax.tree.map(lambda a, s=shape: a.reshape(s), part)
        found.append(lax.optimization_barrier(part))
        start += size
    return found


def _groups(statistics: Statistics, bits: Any, theta: Any) -> tuple[Statistics, jax.Array, Any]:
    """All leaves with one leading axis, of groups; scalars are repeated."""
    shape = statistics.scale_shape

    def flat(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if leaf.ndim >= len(shape) and leaf.shape[: len(shape)] == shape:
            return leaf.reshape(-1, *leaf.shape[len(shape) :])
        spread = leaf.reshape(leaf.shape + (1,) * (len(shape) - leaf.ndim))
        return jnp.broadcast_to(spread, shape).reshape(-1)

    bits, theta = jax.tree.map(lambda leaf: flat(jnp.asarray(leaf, jnp.float32)), (bits, theta))
    return jax.tree.map(flat, statistics), bits, theta


def _padded(statistics: Statistics, length: int, dtype: jnp.dtype) -> Statistics:
    """Values of a tensor, if they are held, filled up with what does not count."""
    held = statistics.distribution
    if not isinstance(held, Held):
        return statistics
    values, missing = held.values.astype(dtype), length - held.values.shape[-1]
    if missing:
        values, counted = (jnp.pad(a, [(0, 0), (0, missing)]) for a in (values, held.counted))
        held = held._replace(counted=counted)
    return statistics._replace(distribution=held._replace(values=values))


def _at_once(rule: RangeRule | IndexedRule, statistics: Statistics, target: Target) -> Range:
    """All groups in one call of the rule; leading axes of the widths are layers."""

    def found(statistics: Statistics, bits: jax.Array, theta: Any) -> Range:
        layer = target._replace(bits=bits, theta=theta)
        return range_of(rule, statistics, layer)

    statistics = statistics._replace(distribution=None)  # of which a rule would see all groups
    for _ in range(jnp.ndim(target.bits)):
        found = jax.vmap(found)
    return found(statistics, jnp.asarray(target.bits, jnp.float32), target.theta)


def _each_group(rule: RangeRule | IndexedRule, target: Target, groups: Any, at_once: int) -> Range:
    """One group after another, ``at_once`` of them together; eager calls compile this once."""
    rules = rule.rules if isinstance(rule, IndexedRule) else (rule,)
    ranges = [rule for rule in rules if isinstance(rule, RangeRule)]
    # Names hold the numbers: percentile(0.9) and percentile(0.99) are one program.
    fixed = tuple(rule._replace(name="", parameters=()) for rule in ranges)
    names, numbers = zip(*((rule.name, rule.parameters) for rule in ranges), strict=True)
    chosen = rule.chosen if isinstance(rule, IndexedRule) else None
    static = fixed, target.format, target.symmetric, at_once, _Names(names)
    return _run(static, numbers, chosen, groups)


@dataclasses.dataclass(frozen=True)
class _Names:
    """For errors, which a first trace raises; programs are the same whatever the names."""

    names: tuple[str, ...] = dataclasses.field(compare=False)


@functools.partial(jax.jit, static_argnums=0)
def _run(static: Any, numbers: Any, chosen: jax.Array | None, groups: Any) -> Range:
    fixed, format, symmetric, at_once, labels = static
    rules = tuple(
        rule._replace(name=name, parameters=own)
        for rule, name, own in zip(fixed, labels.names, numbers, strict=True)
    )
    rule = rules[0] if chosen is None else IndexedRule(rules, chosen)

    def one(group: Any) -> Range:
        statistics, bits, theta = group
        return range_of(rule, statistics, Target(format, symmetric, bits, theta))

    if groups[1].shape[0] <= at_once:
        return jax.vmap(one)(groups)
    return lax.map(one, groups, batch_size=at_once)
