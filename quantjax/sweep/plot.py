"""Accuracy against bits, as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from quantjax import errors
from quantjax.sweep.grid import FLOAT_CELL, Cell
from quantjax.sweep.store import Row
from quantjax.sweep.summary import Summary, summarize

LETTERS_PER_INCH = 11.0  # of a title, at the size that it has


def plot_accuracy(rows: Sequence[Row], path: Path | str, *, title: str) -> None:
    """Draw mean accuracy against weight bits, one line for each activation width, one panel a rule.

    Error bars are one standard deviation over seeds; the dashed line is the float model. Operands
    that stay float, at 0 bits, stand behind the widest. Needs
    matplotlib (``pip install "quantjax[experiments]"``).

    Args:
      rows: results of one study.
      path: where to write; the ending names the format.
      title: above the panels.

    Raises:
      SweepError: rows without a cell of the grid.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = {summary.cell: summary for summary in summarize(rows)}
    grid = [cell for cell in cells if cell != FLOAT_CELL]
    if not grid:
        raise errors.SweepError(
            f"{len(cells)} rows of the float model, and none of a cell to draw",
            where="plot_accuracy",
            fix="plot_accuracy(run_sweep(study, grid, folder).rows, path, title=study.name)",
        )
    rules = list(dict.fromkeys(cell.rule for cell in grid))
    weights = sorted({cell.weight_bits for cell in grid}, key=_finest_last)
    activations = sorted({cell.activation_bits for cell in grid}, key=_finest_last)
    places = {bits: bits or max(weights) + 1 for bits in weights}
    colors = colormaps["viridis"]
    figure = Figure(figsize=(4.8 * len(rules) + 1.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for panel, rule in zip(panels, rules, strict=True):
        for index, bits in enumerate(activations):
            line = [cells[c] for w in weights if (c := Cell(w, bits, rule)) in cells]
            panel.errorbar(
                [places[s.cell.weight_bits] + _offset(index, len(activations)) for s in line],
                [100 * summary.mean for summary in line],
                yerr=_bars(line),
                color=colors(0.9 * index / max(len(activations) - 1, 1)),
                label=f"A{bits}" if bits else "A float",
                marker="o",
                markersize=3.5,
                linewidth=1.4,
                capsize=2.5,
            )
        if FLOAT_CELL in cells:
            level = 100 * cells[FLOAT_CELL].mean
            panel.axhline(level, color="0.35", linestyle="--", linewidth=1, label="float")
        panel.set_title(rule.replace("_", " "), fontsize=10)
        panel.set_xlabel("weight bits")
        panel.set_xticks(list(places.values()), [str(bits or "float") for bits in weights])
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right center", title="activations", frameon=False, fontsize=9
    )
    width = int(LETTERS_PER_INCH * figure.get_size_inches()[0])
    figure.suptitle("\n".join(textwrap.wrap(title, width)), fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _finest_last(bits: int) -> float:
    return bits or math.inf


def _offset(index: int, count: int) -> float:
    """Lines stand a little beside one another, so that their error bars can be told apart."""
    return 0.0 if count < 2 else 0.3 * (index / (count - 1) - 0.5)


def _bars(line: Sequence[Summary]) -> list[float] | None:
    spreads = [100 * summary.spread for summary in line]
    return None if any(spread != spread for spread in spreads) else spreads
