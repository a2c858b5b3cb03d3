"""Plain-text tables of at most 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 120


def shape_text(shape: Sequence[int]) -> str:
    """``3x3x16x32``; ``scalar`` for rank 0.

    >>> shape_text((3, 3, 16, 32)), shape_text(())
    ('3x3x16x32', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"


def counted(number: int, what: str, *, plural: str = "") -> str:
    """``1 rule``, ``2 rules``; thousands have commas.

    >>> counted(1, "batch", plural="batches"), counted(1200, "value")
    ('1 batch', '1,200 values')
    """
    return f"{number:,} {what if number == 1 else plural or what + 's'}"


def amount(number: int) -> str:
    """A count of at most five letters: three digits, ``k`` for 1000, ``M``, ``G``, ``T``.

    >>> [amount(n) for n in (0, 999, 1000, 12_345, 999_999, 41_000_000, 5 * 10**12)]
    ['0', '999', '1k', '12.3k', '1M', '41M', '5T']
    """
    if not isinstance(number, int | float):  # of an exported program, where it may be symbolic
        return str(number)
    for unit, letter in ((1, ""), (10**3, "k"), (10**6, "M"), (10**9, "G"), (10**12, "T")):
        shown = float(f"{number / unit:.3g}")
        if shown < 1000 or letter == "T":
            return f"{shown:g}{letter}"
    raise AssertionError(number)


def wrapped(text: str) -> list[str]:
    """Lines of at most 120 columns."""
    return textwrap.wrap(text, WIDTH)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a head; the last column wraps, and a name that leaves it no room has a
    line of its own.

    >>> print(columns(["site", "bits"], [["a/kernel", "4"], ["b", "16"]]))
    site      bits
    a/kernel  4
    b         16
    """
    table = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = WIDTH - sum(widths[1:-1]) - 2 * (len(widths) - 1) - min(widths[-1], 24)
    if len(widths) > 1 and widths[0] > room:
        widths[0] = max(len(row[0]) for row in table if len(row[0]) <= max(room, len(head[0])))
    left = sum(widths[:-1]) + 2 * (len(widths) - 1)
    lines = []
    for row in table:
        cells = list(row)
        if len(widths) > 1 and len(row[0]) > widths[0]:
            lines += textwrap.wrap(row[0], WIDTH)
            cells[0] = ""
        tail = textwrap.wrap(cells[-1], max(WIDTH - left, 16)) or [""]
        body = "  ".join(c.ljust(w) for c, w in zip(cells[:-1], widths[:-1], strict=True))
        lines.append(f"{body}  {tail[0]}".rstrip() if len(cells) > 1 else tail[0])
        lines += [" " * left + part for part in tail[1:]]
    return "\n".join(lines)
