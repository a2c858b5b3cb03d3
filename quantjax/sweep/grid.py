"""Which cells a sweep consists of."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from quantjax import errors
from quantjax.ranges import FitRule, RangeRule


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
      weight_bits, activation_bits: widths; 0 is float.
      rules: range rules.
      seeds: one trained model each.
    """

    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    rules: tuple[RangeRule, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_rules(self.rules)
        axes: dict[str, tuple[object, ...]] = {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "seeds": self.seeds,
        }
        axes["rules"] = tuple(rule.name for rule in self.rules)
        for name, values in axes.items():
            if not values:
                raise errors.SweepError(f"the axis {name} is empty", fix=f"give {name} a value")
            if len(set(values)) < len(values):
                raise errors.SweepError(
                    f"the axis {name} repeats a value: {values}", fix="name each value once"
                )

    def cells(self) -> list[Cell]:
        """The float baseline, then all combinations, weight bits slowest."""
        combinations = itertools.product(self.weight_bits, self.activation_bits, self.rules)
        return [FLOAT_CELL, *(Cell(w, a, rule.name) for w, a, rule in combinations)]

    def __len__(self) -> int:
        return len(self.cells()) * len(self.seeds)


def _check_rules(rules: Sequence[object]) -> None:
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
