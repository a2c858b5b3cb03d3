"""Several rules under one traced index, so that the rule is an axis of a sweep."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import Fault, QParams
from quantjax.ranges.base import FitRule, Range, RangeRule, Target, holds_for
from quantjax.ranges.lanes import choose
from quantjax.statistics import Statistics


class IndexedRule(NamedTuple):
    """One rule of a stack, chosen by an array; stands wherever one of its rules does."""

    rules: tuple[RangeRule | FitRule, ...]
    chosen: Int[Array, ""]

    @property
    def name(self) -> str:
        """``one of min_max, percentile``."""
        return f"one of {', '.join(rule.name for rule in self.rules)}"

    @property
    def fits(self) -> tuple[FitRule, ...]:
        """The rules that need the tensor itself."""
        return tuple(rule for rule in self.rules if isinstance(rule, FitRule))

    @property
    def reads_distribution(self) -> bool:
        """Whether one of the rules does."""
        return any(isinstance(r, RangeRule) and r.reads_distribution for r in self.rules)

    @property
    def entries(self) -> int:
        """The most that one of the rules makes of a group."""
        return max(r.entries for r in self.rules if isinstance(r, RangeRule))

    @property
    def parameters(self) -> tuple[Any, ...]:
        """Those of all rules are in :meth:`range`."""
        return ()

    def range(self, statistics: Statistics, target: Target) -> Range:
        """The range by the rule that ``chosen`` points at."""
        shape = statistics.scale_shape
        rules = tuple(rule for rule in self.rules if isinstance(rule, RangeRule))
        assert len(rules) == len(self.rules), "fits have no range"
        families = _families(rules)
        places = sorted((i, a, b) for a, f in enumerate(families) for b, i in enumerate(f))
        table = jnp.asarray([place[1:] for place in places], jnp.int32)
        family, member = table[jnp.clip(self.chosen, 0, len(self.rules) - 1)]

        def branch(indices: Sequence[int]) -> Callable[[], Range]:
            def found() -> Range:
                first, *others = (rules[index] for index in indices)
                if others:
                    each = zip(*(rules[index].parameters for index in indices), strict=True)
                    numbers = tuple(lax.select_n(member, *some) for some in each)
                    first = first._replace(parameters=numbers)
                low, high, calibrated = range_of(first, statistics, target)
                low, high = (end.astype(jnp.float32) for end in (low, high))
                return Range(low, high, jnp.broadcast_to(calibrated, shape))

            return found

        found = choose(
            family,
            [branch(indices) for indices in families],
            apart=len(self.rules),
            entries=self.entries,
        )
        low, high = (jnp.where(self._exists, end, jnp.nan) for end in (found.low, found.high))
        return Range(low, high, found.calibrated)

    @property
    def _exists(self) -> jax.Array:
        """A traced index may be beyond the rules, where a switch would take the nearest one."""
        return (self.chosen >= 0) & (self.chosen < len(self.rules))

    def qparams(self, of_rule: Callable[[RangeRule | FitRule], QParams]) -> QParams:
        """The QParams by the rule that ``chosen`` points at, all of one shape."""
        branches = [lambda rule=rule: of_rule(rule) for rule in self.rules]
        try:
            index = jnp.clip(self.chosen, 0, len(branches) - 1)
            found = choose(index, branches, apart=len(branches))
        except TypeError:
            kinds: list[Any] = [jax.tree.structure(jax.eval_shape(branch)) for branch in branches]
            if len(set(kinds)) == 1:
                raise
            other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
            raise errors.PolicyError(
                f"{self.rules[0].name} and {self.rules[other].name} give theta of other structure",
                where=f"stack of {', '.join(rule.name for rule in self.rules)}",
                why="what one index chooses among has to be alike",
                fix="a stack for each structure",
            ) from None
        fault = float(Fault.NOT_FINITE)
        return found._replace(
            scale=jnp.where(self._exists, found.scale, jnp.nan),
            zero_point=jnp.where(self._exists, found.zero_point, fault),
        )


def range_of(rule: RangeRule | IndexedRule, statistics: Statistics, target: Target) -> Range:
    """What a rule returns, checked, its bounds at the shape of the scale.

    Raises:
      PolicyError: no range, or bounds of another shape.
    """
    try:
        found = rule.range(statistics, target, *rule.parameters)
    except Exception as error:
        error.add_note(f"In the range rule {rule.name or getattr(rule.range, '__name__', '')}")
        raise
    if not isinstance(found, tuple) or len(found) != 3:
        raise errors.PolicyError(
            f"the rule {rule.name} returned no range",
            why=f"it returned {type(found).__name__}",
            fix="qj.ranges.Range(low, high, statistics.batches > 0)",
        )
    found = Range(*map(jnp.asarray, found))
    needed = statistics.scale_shape
    for bound in found[:2]:
        if not holds_for(bound.shape, needed):
            raise errors.PolicyError(
                f"the rule {rule.name} returned a bound of shape {bound.shape}",
                why=f"it was asked for one range each of {needed}"
                + (": it is called for one group at a time" if not needed else ""),
                fix="bounds of the shape of statistics.extremes.low",
            )
    low, high = (jnp.broadcast_to(bound, needed) for bound in found[:2])
    return Range(low, high, found.calibrated)


def _families(rules: Sequence[RangeRule]) -> list[list[int]]:
    """The places of rules of one function with numbers traced alike: one branch, compiled once.

    Numbers that are still Python's may decide how the function is traced, and stay as they are.
    """
    found: dict[Any, list[int]] = {}
    for index, rule in enumerate(rules):
        key: Any = index
        if rule.reads_distribution and all(isinstance(n, jax.Array) for n in rule.parameters):
            key = rule.range, tuple(map(jax.typeof, rule.parameters))
        found.setdefault(key, []).append(index)
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class RuleStack:
    """An ordered set of rules; ``stack[i]`` takes an array as well as a number."""

    rules: tuple[RangeRule | FitRule, ...]

    def __len__(self) -> int:
        return len(self.rules)

    def __iter__(self) -> Iterator[IndexedRule]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | jax.Array) -> IndexedRule:
        is_array = isinstance(index, numbers.Integral | jax.Array | np.ndarray)
        is_whole = is_array and jnp.issubdtype(jnp.result_type(index), jnp.integer)
        if not is_whole or jnp.ndim(index):
            raise errors.PolicyError(
                "an index of a rule is one whole number",
                where=f"stack of {', '.join(rule.name for rule in self.rules)}",
                fix="jnp.arange(n) for an axis of a sweep, and jax.vmap or jax.lax.map over it",
            )
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


def several(rules: Any) -> tuple[Any, ...]:
    """The rules of a sequence or a stack, unchecked; one rule, a tuple itself, is one of them.

    >>> from quantjax.ranges import MIN_MAX, MSE
    >>> several(MIN_MAX) == (MIN_MAX,), several(stack([MIN_MAX, MSE])) == several([MIN_MAX, MSE])
    (True, True)
    """
    if isinstance(rules, RangeRule | FitRule | IndexedRule):
        return (rules,)
    return rules.rules if isinstance(rules, RuleStack) else tuple(rules)


def checked_rule(rule: Any, where: str) -> RangeRule | FitRule | IndexedRule:
    """The rule itself; ``PolicyError`` for a name, a stack or a function in its place."""
    if isinstance(rule, RangeRule | FitRule | IndexedRule):
        for one in rule.rules if isinstance(rule, IndexedRule) else (rule,):
            _check_hashable(one, where)
            if isinstance(one, RangeRule) and not isinstance(one.parameters, tuple):
                raise errors.PolicyError(
                    f"the parameters of the rule {one.name} are no tuple",
                    where=where,
                    why="its function is called with each of them",
                    fix="parameters=(3.0,), with a comma",
                )
        return rule
    fix = "qj.ranges.MSE, or another of qj.ranges"
    name = getattr(rule, "__name__", "own")
    if isinstance(rule, RuleStack):
        fix = "stack[i], one of its rules; i may be an array"
    elif callable(rule):
        is_ours = getattr(rule, "__module__", "").startswith("quantjax.")
        fix = f"call it: qj.ranges.{name}(...)" if is_ours else f'qj.RangeRule("{name}", {name})'
    shown = f"{rule!r:.80}" if callable(rule) or isinstance(rule, str) else f"{type(rule).__name__}"
    raise errors.PolicyError(f"{shown} is no range rule", where=where, fix=fix)


def _check_hashable(rule: RangeRule | FitRule, where: str) -> None:
    function = rule.range if isinstance(rule, RangeRule) else rule.fit
    try:
        hash(function)
    except TypeError as error:
        raise errors.PolicyError(
            f"the function of the rule {rule.name} cannot be hashed",
            where=where,
            why=f"programs are found again by it: {error}",
            fix="a function, or a class with @dataclasses.dataclass(frozen=True)",
        ) from None


def stack(rules: Sequence[RangeRule | FitRule]) -> RuleStack:
    """Rules under one index.

    A stack with fit rules among them serves weights, whose tensor is at hand; all of its rules have
    to give ``theta`` of one structure.

    Raises:
      PolicyError: no rules, or something else than a rule.

    >>> from quantjax.ranges import MIN_MAX, MOVING_AVERAGE
    >>> stack([MIN_MAX, MOVING_AVERAGE]).names
    ('min_max', 'moving_average')
    """
    if not rules:
        raise errors.PolicyError("a stack of no rules", fix="qj.ranges.stack([qj.ranges.MIN_MAX])")
    for rule in rules:
        if not isinstance(rule, RangeRule | FitRule):
            raise errors.PolicyError(
                f"{getattr(rule, 'name', rule)} is no rule, and cannot be stacked",
                why="rules go from statistics to a range, or from a tensor to QParams",
                fix="qj.ranges.stack([qj.ranges.MIN_MAX, qj.ranges.MOVING_AVERAGE])",
            )
    return RuleStack(tuple(rules))
