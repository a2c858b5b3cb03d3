"""Mean and spread over seeds, as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from quantjax import errors
from quantjax.printing import columns, counted
from quantjax.sweep.grid import FLOAT_CELL, Cell
from quantjax.sweep.store import Row


class Summary(NamedTuple):
    """One cell over its seeds.

    Attributes:
      cell: the point of the grid.
      mean: accuracy in 0..1.
      spread: standard deviation over seeds (n - 1); NaN for a single seed.
      seeds: how many.
    """

    cell: Cell
    mean: float
    spread: float
    seeds: int


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """One summary a cell, in the order of the rows; a row that is there twice counts once.

    Raises:
      SweepError: rows of two studies, or of two identities of one: they are no seeds of one cell.

    >>> rows = [Row("f", "s", seed, 8, 8, "min_max", a, 0, 0) for seed, a in ((0, 0.9), (1, 0.8))]
    >>> summary = summarize(rows)[0]
    >>> round(summary.mean, 2), round(summary.spread, 3), summary.seeds
    (0.85, 0.071, 2)
    """
    of = sorted({row.fingerprint for row in rows})
    if len(of) > 1:
        raise errors.SweepError(
            f"rows of {len(of)} studies, or identities of one, in one summary",
            where=f"fingerprints {', '.join(of[:6])}",
            why="their numbers are of other data, models or versions",
            fix="[row for row in rows if row.fingerprint == study.fingerprint()]",
        )
    by_seed: dict[Cell, dict[int, float]] = {}
    for row in rows:
        by_seed.setdefault(row.cell, {})[row.seed] = row.accuracy
    accuracies = {cell: list(seeds.values()) for cell, seeds in by_seed.items()}
    return [
        Summary(
            cell,
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else math.nan,
            len(values),
        )
        for cell, values in accuracies.items()
    ]


def percent(summary: Summary) -> str:
    """``98.22 ±0.13``, in percent."""
    spread = "" if math.isnan(summary.spread) else f" ±{100 * summary.spread:.2f}"
    return f"{100 * summary.mean:.2f}{spread}"


def table(rows: Sequence[Row]) -> str:
    """Accuracy in percent, mean ± standard deviation over seeds: one block a rule."""
    cells = {summary.cell: summary for summary in summarize(rows)}
    lines = []
    if FLOAT_CELL in cells:
        lines.append(
            f"float  {percent(cells[FLOAT_CELL])}  ({counted(cells[FLOAT_CELL].seeds, 'seed')})"
        )
    grid = [cell for cell in cells if cell != FLOAT_CELL]
    weights = sorted({cell.weight_bits for cell in grid})
    activations = sorted({cell.activation_bits for cell in grid})
    for rule in dict.fromkeys(cell.rule for cell in grid):
        head = [rule, *(_width("A", bits) for bits in activations)]
        body = [
            [
                _width("W", weight),
                *(
                    percent(cells[cell]) if (cell := Cell(weight, bits, rule)) in cells else ""
                    for bits in activations
                ),
            ]
            for weight in weights
        ]
        lines += ["", columns(head, body)]
    return "\n".join(lines)


def _width(kind: str, bits: int) -> str:
    return f"{kind}{bits}" if bits else f"{kind} float"
