"""What a calibration report holds, and how it prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quantjax.arguments import row_of
from quantjax.printing import columns, counted

Floats = npt.NDArray[np.float32]


class Bars(NamedTuple):
    """A histogram to look at, of all groups together.

    Attributes:
      edges: ascending, one more than bars.
      counts: how many values lie in each bar.
      bend: bars are equally wide up to about this magnitude, and beyond wider in proportion to it;
        infinite where all are equal.
    """

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    bend: float


class RuleRange(NamedTuple):
    """What one rule makes of one operand.

    Attributes:
      rule: its name.
      low, high: the range, at the shape of the scale; of a fit, the outermost levels.
      clip_low, clip_high: the outermost levels, which all beyond becomes. A symmetric quantizer
        covers the larger bound on both sides, an asymmetric one zero as well.
      saturated: share of the values for which the quantizer has no level, in 0..1.
      sqnr: ``10 log10(Σ x² / Σ (Q(x) - x)²)`` in dB; infinite where nothing is lost.
    """

    rule: str
    low: Floats
    high: Floats
    clip_low: Floats
    clip_high: Floats
    saturated: float
    sqnr: float


@dataclasses.dataclass(frozen=True, eq=False)  # of arrays, which have no truth
class OperandRanges:
    """One operand under every rule.

    Attributes:
      site, operand: its name, and ``weight`` or ``activation`` (``lhs``, ``rhs``).
      layer: of a stack in a scan, its indices; empty without one.
      quantizer: ``int4/channel``.
      bits: the width.
      groups: how many share out the values, each with a range of its own.
      number: how many values.
      low, high: the smallest and the largest of them.
      bars: their histogram, all groups together.
      rules: one entry a rule, in the order asked for.
    """

    site: str
    operand: str
    layer: tuple[int, ...]
    quantizer: str
    bits: int
    groups: int
    number: int
    low: float
    high: float
    bars: Bars
    rules: tuple[RuleRange, ...]

    def __getitem__(self, rule: str) -> RuleRange:
        return row_of({found.rule: found for found in self.rules}, rule, kind="rule")

    @property
    def title(self) -> str:
        """``params/Dense_0/kernel[3] weight``."""
        return f"{self.site}{''.join(f'[{index}]' for index in self.layer)} {self.operand}"

    @property
    def facts(self) -> str:
        """``int4/channel, 1,152 values in 32 groups, from -0.52 to 0.48``."""
        groups = f" in {self.groups:,} groups" if self.groups > 1 else ""
        span = f"from {self.low:.4g} to {self.high:.4g}"
        return f"{self.quantizer}, {counted(self.number, 'value')}{groups}, {span}"

    @property
    def best(self) -> RuleRange:
        """The rule with the best ratio of signal to noise; the first of equals."""
        return max(self.rules, key=lambda found: found.sqnr)

    def __str__(self) -> str:
        rows = [
            [
                found.rule,
                f"{np.median(found.low):.4g}",
                f"{np.median(found.high):.4g}",
                percent(found.saturated),
                f"{found.sqnr:.2f}" + (" *" if found is self.best else ""),
            ]
            for found in self.rules
        ]
        medians = ", median" if self.groups > 1 else ""
        head = ["rule", f"low{medians}", f"high{medians}", "saturated", "SQNR dB"]
        return f"{self.title}: {self.facts}\n{columns(head, rows)}"


@dataclasses.dataclass(frozen=True, eq=False)  # of arrays, which have no truth
class CalibrationReport:
    """Every operand that has a fixed range, in program order; prints, the best rule starred."""

    operands: tuple[OperandRanges, ...]

    def __iter__(self) -> Iterator[OperandRanges]:
        return iter(self.operands)

    def __len__(self) -> int:
        return len(self.operands)

    def __getitem__(self, key: tuple[str | int, ...]) -> OperandRanges:
        """By site and operand, and the indices of a layer that is one of a stack."""
        rows = {(found.site, found.operand, *found.layer): found for found in self.operands}
        return row_of(rows, key, kind="operand")

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.operands))


def percent(share: float) -> str:
    """A share in percent, to three digits.

    >>> percent(0.0), percent(0.5), percent(1.2345e-6)
    ('0 %', '50 %', '0.000123 %')
    """
    places = 2 - math.floor(math.log10(100.0 * share)) if share > 0.0 else 0
    text = f"{100.0 * share:.{max(places, 0)}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"
