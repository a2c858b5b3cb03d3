"""A histogram with every rule's clips drawn into it, as a picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantjax.calibration.results import OperandRanges, RuleRange, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, COUNTS, ROW, ABOVE, BELOW = 11.0, 3.2, 0.21, 0.62, 0.42  # inches
LEFT, RIGHT = 0.165, 0.72  # of the width: names stand to the left, figures to the right
COLUMNS = (("lowest", 0.12), ("highest", 0.245), ("saturated", 0.385), ("SQNR dB", 0.485))
HEAD = 1.3  # rows above the first one
DPI = 120
BEYOND = 0.2  # of the span that was seen: clips further out are not drawn


class _Clip(NamedTuple):
    """The outermost levels under one rule: the median over groups, and the widest of them."""

    rule: RuleRange
    low: float
    high: float
    lowest: float
    highest: float


def plot_ranges(operand: OperandRanges, path: Path) -> None:
    """Draw the histogram of one operand above a row for each rule, the narrowest range first.

    Lines lead from both ends of a row, the outermost levels under that rule, up into the histogram,
    whose counts have a logarithmic axis. Where groups have ranges of their own, a row shows their
    median, and a thin line how far the widest reach. The rule with the best SQNR is bold. Needs
    matplotlib (``pip install "quantjax[experiments]"``).

    Args:
      path: where to write; the ending names the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Of a name in letters that the font lacks: they are boxes, and ranges.csv has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure(operand).savefig(path, dpi=DPI)


def figure(operand: OperandRanges) -> Figure:
    """The picture of :func:`plot_ranges`, not written yet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clips = sorted(map(_clip, operand.rules), key=lambda clip: _reach(operand, clip))
    rows = ROW * (len(clips) - 0.4 + HEAD)
    height = BELOW + rows + COUNTS + ABOVE
    page = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(page)
    ranges = page.add_axes((LEFT, BELOW / height, RIGHT - LEFT, rows / height))
    counts = page.add_axes(
        (LEFT, (BELOW + rows) / height, RIGHT - LEFT, COUNTS / height), sharex=ranges
    )
    left, right = _limits(operand, clips)
    if math.isfinite(operand.bars.bend):
        _bend(ranges, operand.bars.bend, max(-left, right))
    ranges.set_xlim(left, right)
    _draw_bars(counts, operand)
    for row, clip in enumerate(clips):
        _draw_row(ranges, counts, operand, clip, row)
    _label(ranges, operand, len(clips))
    size = min(11.0, 900.0 / len(operand.title))  # a long name stays on the page
    page.text(LEFT, 1.0 - 0.2 / height, operand.title, fontsize=size, fontweight="bold")
    page.text(LEFT, 1.0 - 0.45 / height, operand.facts, fontsize=9)
    return page


def _clip(rule: RuleRange) -> _Clip:
    return _Clip(
        rule,
        low=float(np.median(rule.clip_low)),
        high=float(np.median(rule.clip_high)),
        lowest=float(np.min(rule.clip_low)),
        highest=float(np.max(rule.clip_high)),
    )


def _reach(operand: OperandRanges, clip: _Clip) -> float:
    """How much of what was seen lies between the clips: in this order, lines do not cross rows."""
    return min(clip.high, operand.high) - max(clip.low, operand.low)


def _limits(operand: OperandRanges, clips: Sequence[_Clip]) -> tuple[float, float]:
    """All that was seen, and the clips that lie not too far beyond."""
    low, high = float(operand.bars.edges[0]), float(operand.bars.edges[-1])
    reach = BEYOND * (high - low)
    low = max(min([low, *(clip.lowest for clip in clips)]), low - reach)
    high = min(max([high, *(clip.highest for clip in clips)]), high + reach)
    margin = 0.02 * (high - low)
    return low - margin, high + margin


def _bend(panel: Any, bend: float, largest: float) -> None:
    """An axis that is linear about 0 and logarithmic far from it, with powers of ten on it."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    panel.set_xscale("asinh", linear_width=bend)
    powers = range(math.ceil(math.log10(2.0 * bend)), math.floor(math.log10(largest)) + 1)
    places = [10.0**power for power in powers[:: math.ceil(len(powers) / 4) or 1]]
    panel.xaxis.set_major_locator(FixedLocator([*(-place for place in places), 0.0, *places]))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_locator(NullLocator())


def _draw_bars(panel: Any, operand: OperandRanges) -> None:
    edges, counts, _ = operand.bars
    panel.bar(edges[:-1], counts, np.diff(edges), align="edge", color="0.45", alpha=0.5, zorder=3)
    panel.set_yscale("log")
    panel.set_ylim(0.5, 3.0 * max(float(counts.max()), 1.0))
    panel.set_ylabel("values in a bar", fontsize=9)
    panel.tick_params(axis="x", which="both", labelbottom=False, bottom=False)
    panel.tick_params(axis="y", labelsize=8)


def _draw_row(ranges: Any, counts: Any, operand: OperandRanges, clip: _Clip, row: int) -> None:
    """One rule: its name, its range, the lines up from both ends, its figures."""
    from matplotlib import colormaps

    color = colormaps["tab10"](row % 10)
    style = {"fontsize": 8, "va": "center", "transform": ranges.get_yaxis_transform()}
    style["fontweight"] = "bold" if clip.rule is operand.best else "normal"
    if clip.rule is operand.best:
        ranges.axhspan(row - 0.5, row + 0.5, color="0.93", zorder=0)
    ranges.hlines(row, clip.low, clip.high, color=color, linewidth=3.5)
    if operand.groups > 1:
        ranges.hlines(row, clip.lowest, clip.highest, color=color, linewidth=0.8)
    for end in (clip.low, clip.high):
        ranges.vlines(end, -HEAD, row, color=color, linewidth=0.9)
        counts.axvline(end, color=color, linewidth=0.9)
    ranges.text(-0.012, row, clip.rule.rule, ha="right", **style)
    figures = (
        f"{clip.low:.3g}",
        f"{clip.high:.3g}",
        percent(clip.rule.saturated),
        f"{clip.rule.sqnr:.2f}",
    )
    for text, (_, place) in zip(figures, COLUMNS, strict=True):
        ranges.text(1.0 + place, row, text, ha="right", **style)


def _label(ranges: Any, operand: OperandRanges, rows: int) -> None:
    """Axes, and the heads of the columns."""
    ranges.set_ylim(rows - 0.4, -HEAD)
    ranges.set_yticks([])
    ranges.tick_params(labelsize=8)
    ranges.grid(axis="x", alpha=0.25)
    style = {"fontsize": 8, "va": "center", "ha": "right", "color": "0.35"}
    for text, place in (("rule", -1.012), *COLUMNS):
        ranges.text(1.0 + place, 0.25 - HEAD, text, transform=ranges.get_yaxis_transform(), **style)
    notes = []
    if operand.groups > 1:
        notes.append(f"thick: the median over {operand.groups:,} groups, thin: the widest")
    if math.isfinite(operand.bars.bend):
        notes.append(f"axis: about linear to ±{operand.bars.bend:.3g}, logarithmic beyond")
    ranges.set_xlabel("; ".join(notes), fontsize=8)
