"""A calibration report on disk: one CSV file of all figures, one picture for each operand."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quantjax.calibration.plot import plot_ranges
from quantjax.calibration.results import CalibrationReport, OperandRanges

LONGEST_NAME = 180  # bytes, of the 255 that files may have


class RangeRow(NamedTuple):
    """One rule at one operand, a line of ``ranges.csv``.

    Attributes:
      site, operand, layer, quantizer, bits: what; indices of a layer are joined by ``/``.
      groups, values: how many.
      seen_low, seen_high: the smallest and the largest value.
      rule, low, high: the range; the median over groups.
      widest_low, widest_high: over groups.
      clip_low, clip_high: the outermost levels; the median over groups.
      saturated, sqnr_db: share of values without a level, and the ratio of signal to noise.
    """

    site: str
    operand: str
    layer: str
    quantizer: str
    bits: int
    groups: int
    values: int
    seen_low: float
    seen_high: float
    rule: str
    low: float
    high: float
    widest_low: float
    widest_high: float
    clip_low: float
    clip_high: float
    saturated: float
    sqnr_db: float


def rows(report: CalibrationReport) -> Iterator[RangeRow]:
    """All figures of a report, rule by rule."""
    for one in report:
        for found in one.rules:
            yield RangeRow(
                one.site,
                one.operand,
                "/".join(map(str, one.layer)),
                one.quantizer,
                one.bits,
                one.groups,
                one.number,
                one.low,
                one.high,
                found.rule,
                low=float(np.median(found.low)),
                high=float(np.median(found.high)),
                widest_low=float(np.min(found.low)),
                widest_high=float(np.max(found.high)),
                clip_low=float(np.median(found.clip_low)),
                clip_high=float(np.median(found.clip_high)),
                saturated=found.saturated,
                sqnr_db=found.sqnr,
            )


def write_ranges(report: CalibrationReport, path: Path) -> None:
    """Write ``rows(report)`` as CSV, every digit of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(RangeRow._fields)
        writer.writerows(rows(report))


def write_pictures(
    report: CalibrationReport, folder: Path, *, on_picture: Callable[[int], None] | None = None
) -> list[Path]:
    """Draw every operand into a PNG file of its own; needs matplotlib.

    Args:
      on_picture: called with 1 after each of them.

    Returns:
      The files, in the order of the report.
    """
    paths: list[Path] = []
    for one in report:
        name = picture_name(one)
        repeated = sum(path.stem == name or path.stem.startswith(f"{name}~") for path in paths)
        paths.append(folder / (f"{name}~{repeated}.png" if repeated else f"{name}.png"))
        plot_ranges(one, paths[-1])
        if on_picture is not None:
            on_picture(1)
    return paths


def picture_name(operand: OperandRanges) -> str:
    """The operand's name as that of a file, ``params.Dense_0.kernel_weight``; of a longer one
    the beginning, and a digest."""
    parts = [operand.site, *map(str, operand.layer), operand.operand]
    name = re.sub(r"[^\w.+-]", "-", "_".join(parts).replace("/", "."))
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
