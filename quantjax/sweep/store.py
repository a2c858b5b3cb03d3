"""Results on disk: a CSV file that is also the memory of what has been computed."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from quantjax import errors
from quantjax.sweep.grid import Cell


class Row(NamedTuple):
    """One evaluated cell.

    Attributes:
      fingerprint: of everything that the number depends on beside the cell and the seed, as far
        as :class:`Study` names it.
      study: the study's name.
      seed: of the trained model.
      weight_bits, activation_bits, rule: the cell.
      accuracy: share of correct predictions, in 0..1.
      correct, total: the counts behind it.
    """

    fingerprint: str
    study: str
    seed: int
    weight_bits: int
    activation_bits: int
    rule: str
    accuracy: float
    correct: int
    total: int

    @property
    def cell(self) -> Cell:
        """The point of the grid."""
        return Cell(self.weight_bits, self.activation_bits, self.rule)


class ResultStore:
    """Rows in ``results.csv``; adding appends and flushes, so that an interrupt loses no cell."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All rows; a last line that an interrupt cut short is left out.

        Raises:
          SweepError: a file that is not a result file of this version.
        """
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        try:
            # Cut ahead of decoding: an interrupt may leave a part of a letter.
            complete = data[: data.rfind(b"\n") + 1].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise errors.SweepError(
                "this is no text file",
                where=self.path.name,
                why=str(error),
                fix="move the file away, or choose another output folder",
            ) from None
        lines = [line for line in csv.reader(io.StringIO(complete, newline="")) if line]
        if lines and tuple(lines[0]) != Row._fields:
            raise errors.SweepError(
                "this is not a result file of this version",
                where=f"{self.path.name}, columns {lines[0][:4]}...",
                fix="move the file away, or choose another output folder",
            )
        return [self._parse(number, line) for number, line in enumerate(lines[1:], start=2)]

    def known(self, fingerprint: str, seed: int) -> dict[Cell, Row]:
        """What has been computed for one trained model."""
        return {
            row.cell: row
            for row in self.rows()
            if row.fingerprint == fingerprint and row.seed == seed
        }

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, after removing a line that an interrupt cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        if not is_new and not self.path.read_bytes().endswith(b"\n"):
            self.rewrite(self.rows())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow(Row._fields)
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())

    def rewrite(self, rows: Sequence[Row]) -> None:
        """Replace the file by these rows, atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w",
            dir=self.path.parent,
            prefix=".results-",
            delete=False,
            newline="",
            encoding="utf-8",
        ) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Row._fields)
            writer.writerows(rows)
        os.replace(file.name, self.path)

    def _parse(self, number: int, line: list[str]) -> Row:
        try:
            fingerprint, study, seed, weight, activation, rule, accuracy, correct, total = line
            return Row(
                fingerprint,
                study,
                int(seed),
                int(weight),
                int(activation),
                rule,
                float(accuracy),
                int(correct),
                int(total),
            )
        except ValueError as error:
            raise errors.SweepError(
                "a line cannot be read",
                where=f"{self.path.name}, line {number}: {','.join(line)[:80]}",
                why=str(error),
                fix="correct or delete the line; the sweep computes what is missing",
            ) from None
