"""Tables of a study as Markdown: means over seeds, and intervals of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.qat.results import Row
from experiments.qat.study import (
    FLOAT,
    LEARNED,
    PRUNED,
    PRUNED_KD,
    PTQ,
    PTQ_WHOLE,
    QAT,
    QAT_WHOLE,
    SIGNS,
    STUDENT,
    STUDENT_KD,
    TAUGHT,
)


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval, by Student's t; in points."""

    mean: float
    half: float

    def __str__(self) -> str:
        sign = "+" if self.mean > 0 else "−" if self.mean < 0 else ""
        return f"{sign}{abs(self.mean):.2f} ± {self.half:.2f}"

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Of a sample; infinitely wide for one value.

    >>> str(interval([1.0, 2.0, 3.0]))
    '+2.00 ± 2.48'
    """
    from scipy import stats

    n = len(values)
    if n < 2:
        return Interval(float(np.mean(values)), math.inf)
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1)) * spread)


def accuracies(rows: Sequence[Row], table: str, method: str, bits: int) -> dict[int, float]:
    """Percent by seed."""
    return {
        row.seed: 100 * row.accuracy
        for row in rows
        if (row.table, row.method, row.bits) == (table, method, bits)
    }


def paired(first: dict[int, float], second: dict[int, float]) -> Interval:
    """Of ``first - second`` over the seeds that both have."""
    return interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def best_calibrated(
    rows: Sequence[Row], bits: int, table: str = PTQ
) -> tuple[str, dict[int, float]]:
    """The range rule with the highest mean, chosen on the test images: in its own favour."""
    names = sorted({row.method for row in rows if row.table == table and row.bits == bits})
    found = {name: accuracies(rows, table, name, bits) for name in names}
    best = max(names, key=lambda name: float(np.mean(list(found[name].values()))))
    return best, found[best]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values: dict[int, float]) -> str:
    return f"{np.mean(list(values.values())):.2f}" if values else ""


def estimators_table(rows: Sequence[Row], widths: Sequence[int]) -> str:
    """Every method: accuracy, and its paired difference from float, by width."""
    floats = accuracies(rows, FLOAT, "float", 32)
    header = ["method", *(text for b in widths for text in (f"W{b}A{b}", "minus float"))]
    body = []
    best = ["best range rule, not trained"]
    for bits in widths:
        name, found = best_calibrated(rows, bits)
        best += [f"{_mean(found)} ({name})", str(paired(found, floats))]
    body.append(best)
    methods = list(dict.fromkeys(row.method for row in rows if row.table == QAT))
    for method in methods:
        line = [method]
        for bits in widths:
            found = accuracies(rows, QAT, method, bits)
            line += [_mean(found), str(paired(found, floats)) if found else ""]
        body.append(line)
    return _table(header, body)


def over_calibration(rows: Sequence[Row], widths: Sequence[int]) -> str:
    """What training with LSQ gains over the best range rule, by width."""
    lines = []
    for bits in widths:
        found = accuracies(rows, QAT, "LSQ", bits)
        if found:
            gain = paired(found, best_calibrated(rows, bits)[1])
            lines.append(f"W{bits}A{bits} {gain}")
    return f"LSQ minus the best range rule without training: {', '.join(lines)}."


def against_rules(rows: Sequence[Row], widths: Sequence[int], tables: tuple[str, str]) -> str:
    """LSQ, the best range rule without training, float: a pair of tables, by width."""
    calibrated_table, trained_table = tables
    floats = accuracies(rows, FLOAT, "float", 32)
    body = []
    for bits in widths:
        found = accuracies(rows, trained_table, "LSQ", bits)
        if found:
            name, calibrated = best_calibrated(rows, bits, calibrated_table)
            differences = paired(found, floats), paired(found, calibrated)
            best = f"{_mean(calibrated)} ({name})"
            body.append([f"W{bits}A{bits}", best, _mean(found), *map(str, differences)])
    header = ["", "best range rule", "LSQ", "LSQ minus float", "LSQ minus the rule"]
    return _table(header, body)


def other_table(rows: Sequence[Row], table: str, bits: int) -> str:
    """Accuracy, mean bits of a weight, and the paired difference from float."""
    floats = accuracies(rows, FLOAT, "float", 32)
    body = []
    for method in dict.fromkeys(row.method for row in rows if row.table == table):
        found = accuracies(rows, table, method, bits)
        mean = [r.mean_bits for r in rows if r.table == table and r.method == method]
        body.append([method, f"{np.mean(mean):.2f}", _mean(found), str(paired(found, floats))])
    return _table(["method", "bits of a weight", "accuracy", "minus float"], body)


def unmoved(rows: Sequence[Row], table: str, start: float | None) -> str:
    """What the mean was at the start, and the methods that have it at the end too."""
    if start is None:
        return ""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.table == table:
            found.setdefault(row.method, []).append(row.mean_bits)
    same = [name for name, all_ in found.items() if all(abs(b - start) < 1e-3 for b in all_)]
    stayed = f", where the widths of {', '.join(same)} stayed at this rate" if same else ""
    return f" At the start it is {start:.2f}{stayed}."


def taught_table(rows: Sequence[Row]) -> str:
    """With and without a teacher."""
    body = []
    for plain, taught, bits in ((STUDENT, STUDENT_KD, 32), (PRUNED, PRUNED_KD, 4)):
        without, with_kd = (accuracies(rows, TAUGHT, name, bits) for name in (plain, taught))
        body.append([plain, _mean(without), _mean(with_kd), str(paired(with_kd, without))])
    return _table(["network", "alone", "with a teacher", "difference"], body)


def more_seeds(rows: Sequence[Row], widths: Sequence[int], seeds: Sequence[int]) -> list[str]:
    """LSQ against the range rules over all seeds there are; nothing where ``seeds`` are all."""
    more = sorted({row.seed for row in rows if row.table == QAT} - set(seeds))
    if not more:
        return []
    apart = [row for row in rows if row.seed in more]
    parts = [
        f"## LSQ against the range rules from {len(seeds) + len(more)} seeds\n\n"
        f"With {len(more)} seeds more (of LSQ and the range rules alone): at 2 bits it is the "
        "spread of the rule over seeds that decides the width of the interval."
    ]
    for title, tables in (
        ("First and last layer at 8 bits", (PTQ, QAT)),
        ("Every layer at the same width", (PTQ_WHOLE, QAT_WHOLE)),
    ):
        parts.append(f"{title}, all seeds:\n\n" + against_rules(rows, widths, tables))
        parts.append(
            f"{title}, the further seeds alone:\n\n" + against_rules(apart, widths, tables)
        )
    return parts


def page(
    rows: Sequence[Row],
    widths: Sequence[int],
    seeds: Sequence[int],
    head: str,
    start: float | None = None,
) -> str:
    """The whole page; the tables are of ``seeds``, further ones have a part of their own.

    Args:
      start: the mean bits of a weight that learned widths begin with.
    """
    every, rows = rows, [row for row in rows if row.seed in seeds]
    floats = accuracies(rows, FLOAT, "float", 32)
    parts = [
        head,
        f"Float: {_mean(floats)} % over {len(seeds)} seeds. Differences are paired by seed, in "
        "points, with 95 % intervals by Student's t.",
        "## Every method\n\n" + estimators_table(rows, widths),
        over_calibration(rows, widths),
        "## Every layer at the same width\n\n"
        + against_rules(rows, widths, (PTQ_WHOLE, QAT_WHOLE)),
        *more_seeds(every, widths, seeds),
        "## Learned widths\n\nStarted at 4 bits, under a penalty on the bits of the weights; the "
        "mean is over all of them, with those of the first and last layer, which stay at 8."
        + unmoved(rows, LEARNED, start)
        + "\n\n"
        + other_table(rows, LEARNED, 4),
        "## Weights of one bit\n\nThe scale is the mean magnitude of a channel, in every step; "
        "activations have 4 bits and learned scales.\n\n" + other_table(rows, SIGNS, 1),
        "## A teacher\n\n" + taught_table(rows),
    ]
    return "\n\n".join(parts) + "\n"
