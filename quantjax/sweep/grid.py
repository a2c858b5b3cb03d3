"""Which cells a sweep consists of."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from quantjax import errors
from quantjax._compat import concrete
from quantjax.interpreter.provenance import ADDRESS
from quantjax.ranges import FitRule, RangeRule, several
from quantjax.storage.known import is_ours


class Cell(NamedTuple):
    """One point of the grid; a width of 0 is float."""

    weight_bits: int
    activation_bits: int
    rule: str


FLOAT_CELL = Cell(0, 0, "float")
"""The float baseline: every operand at bypass width, in the same program as all other cells."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """All combinations of widths and range rules, evaluated for each seed.

    Attributes:
      weight_bits, activation_bits: widths; 0 is float. Any whole numbers, also those of an array.
      rules: range rules, or a stack of them; in place of the default, MIN_MAX. An operand to which
        the policy gives another rule, or a fit, keeps it, and so do live ranges and biases.
      seeds: one trained model each.

    Raises:
      SweepError: an axis that is empty, repeats a value, or holds something else.
    """

    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    rules: tuple[RangeRule, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "seeds"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        object.__setattr__(self, "rules", _checked(several(self.rules)))
        axes: dict[str, tuple[object, ...]] = {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "seeds": self.seeds,
        }
        axes["rules"] = self.names
        for name, values in axes.items():
            if not values:
                raise errors.SweepError(f"the axis {name} is empty", fix=f"give {name} a value")
            if len(set(values)) < len(values):
                raise errors.SweepError(
                    f"the axis {name} repeats a value: {values}", fix="name each value once"
                )

    def cells(self) -> list[Cell]:
        """The float baseline, then all combinations, weight bits slowest."""
        combinations = itertools.product(self.weight_bits, self.activation_bits, self.names)
        return [FLOAT_CELL, *(Cell(w, a, name) for w, a, name in combinations)]

    @property
    def names(self) -> tuple[str, ...]:
        """What results of each rule are filed by."""
        return tuple(map(filed_name, self.rules))

    def __len__(self) -> int:
        return len(self.cells()) * len(self.seeds)


def filed_name(rule: RangeRule) -> str:
    """The name of a rule, and numbers of a rule of one's own that the name does not have.

    >>> from quantjax.ranges import MSE, percentile
    >>> filed_name(MSE), filed_name(percentile(0.999))
    ('mse', 'percentile(0.999)')
    >>> filed_name(RangeRule("reach", print, parameters=(4.0,)))
    'reach(4)'
    """
    if is_ours(rule):
        return rule.name
    settings = []
    if dataclasses.is_dataclass(rule.range):
        fields = dataclasses.fields(rule.range)
        settings = [f"{getattr(rule.range, field.name)!r}" for field in fields]
    if isinstance(rule.range, functools.partial):
        bound = rule.range.args, rule.range.keywords.values()
        settings = [f"{value!r}" for values in bound for value in values]
    known = [concrete(number) for number in rule.parameters]
    if any(number is None or np.ndim(number) for number in known):
        raise errors.SweepError(
            f"the rule {rule.name} has an array for a parameter",
            where="rules of a grid",
            why="results are filed by names and numbers",
            fix="a rule for each of its numbers",
        )
    settings += [_digits(float(np.float32(number))) for number in known]
    shown = ADDRESS.sub("", f"({', '.join(settings)})")
    return rule.name if not settings or rule.name.endswith(shown) else rule.name + shown


def _digits(number: float) -> str:
    """Seven, as names of rules have them, or as many as tell it from its neighbours."""
    short = f"{number:.7g}"
    return short if np.float32(short) == np.float32(number) else f"{number:.9g}"


def _whole(axis: str, values: Any) -> tuple[int, ...]:
    """The values of an axis as Python's integers, which results are filed by."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        array = np.asarray(None)
    are_numbers = array.ndim == 1 and array.dtype.kind in "iuf"
    if not (are_numbers and all(float(value).is_integer() for value in array)):
        raise errors.SweepError(
            f"{axis} {values!r:.80}",
            where="a grid",
            why="results are filed by whole numbers of 64 bits",
            fix=f"{axis}=(2, 4, 8), or a range",
        )
    return tuple(int(value) for value in array)


def _checked(rules: tuple[Any, ...]) -> tuple[RangeRule, ...]:
    for rule in rules:
        if not isinstance(rule, RangeRule):
            shown = rule.name if isinstance(rule, FitRule) else f"{rule!r:.80}"
            raise errors.SweepError(
                f"{shown} is no range rule",
                where="rules of a grid",
                why="it is a fit to the values of a tensor, which activations do not keep"
                if isinstance(rule, FitRule)
                else "",
                fix="rules=(qj.ranges.MIN_MAX, qj.ranges.MSE)",
            )
    return rules
