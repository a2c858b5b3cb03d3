"""Several rules under one traced index, so that the rule is an axis of a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from quantjax import errors
from quantjax._compat import concrete
from quantjax.formats import Format
from quantjax.ranges.base import Range, RangeRule
from quantjax.statistics import Statistics


class IndexedRule(NamedTuple):
    """One rule of a stack, chosen by an array; stands wherever a :class:`RangeRule` does."""

    rules: tuple[RangeRule, ...]
    chosen: Int[Array, ""]

    def range(self, statistics: Statistics, format: Format, bits: jax.Array) -> Range:
        """The range by the rule that ``chosen`` points at."""

        def branch(rule: RangeRule) -> Callable[[Statistics, jax.Array], Range]:
            return lambda statistics, bits: rule.range(statistics, format, bits)

        return lax.switch(self.chosen, [branch(rule) for rule in self.rules], statistics, bits)


@dataclasses.dataclass(frozen=True)
class RuleStack:
    """An ordered set of rules; ``stack[i]`` takes an array as well as a number."""

    rules: tuple[RangeRule, ...]

    def __getitem__(self, index: int | jax.Array) -> IndexedRule:
        known = concrete(index)
        if known is not None and not 0 <= int(known) < len(self.rules):
            raise errors.PolicyError(
                f"rule {int(known)} does not exist",
                where=f"stack of {', '.join(rule.name for rule in self.rules)}",
                fix=f"an index from 0 to {len(self.rules) - 1}",
            )
        return IndexedRule(self.rules, jnp.asarray(index, jnp.int32))

    @property
    def names(self) -> tuple[str, ...]:
        """The rules' names, in order."""
        return tuple(rule.name for rule in self.rules)


def stack(rules: Sequence[RangeRule]) -> RuleStack:
    """Rules under one index.

    >>> from quantjax.ranges import MIN_MAX, MOVING_AVERAGE
    >>> stack([MIN_MAX, MOVING_AVERAGE]).names
    ('min_max', 'moving_average')
    """
    if not rules:
        raise errors.PolicyError("a stack of no rules", fix="qj.ranges.stack([qj.ranges.MIN_MAX])")
    for rule in rules:
        if not isinstance(rule, RangeRule):
            raise errors.PolicyError(
                f"{getattr(rule, 'name', rule)} is no range rule, and cannot be stacked",
                why="rules under one index all go from statistics to a range",
                fix="qj.ranges.stack([qj.ranges.MIN_MAX, qj.ranges.MOVING_AVERAGE])",
            )
    return RuleStack(tuple(rules))
