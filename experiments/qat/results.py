"""Rows of a study on disk: a CSV file that is also the memory of what has been computed."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from experiments.training.errors import RunMismatchError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One trained or calibrated network.

    Attributes:
      study: fingerprint of the recipe, the model and the data.
      table: which table it belongs to.
      method, bits, seed: the cell; pairs are formed by seed.
      before, accuracy: on the test images, before and after training.
      mean_bits: of a weight, where widths are learned; else ``bits``.
      seconds: of the training, compilation included.
    """

    study: str
    table: str
    method: str
    bits: int
    seed: int
    before: float
    accuracy: float
    mean_bits: float
    seconds: float

    @property
    def cell(self) -> tuple[str, str, int, int]:
        """What identifies it within a study."""
        return self.table, self.method, self.bits, self.seed


FIELDS = tuple(field.name for field in dataclasses.fields(Row))
NUMBERS: dict[str, type] = {"int": int, "float": float}
KINDS = {field.name: NUMBERS.get(str(field.type), str) for field in dataclasses.fields(Row)}


class Results:
    """Rows in a CSV file; adding appends, and a line that an interrupt cut short is dropped."""

    def __init__(self, path: Path, study: str) -> None:
        self.path, self.study = path, study
        self.rows = self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(FIELDS)
            writer.writerows(dataclasses.astuple(row) for row in self.rows)

    def _read(self) -> list[Row]:
        text = self.path.read_text() if self.path.exists() else ""
        lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
        if not lines:
            return []
        if tuple(lines[0]) != FIELDS:
            raise RunMismatchError(
                "this is not a result file of this version",
                where=f"{self.path.name}, columns {', '.join(lines[0][:4])}...",
                fix="choose another output folder",
            )
        whole = [line for line in lines[1:] if len(line) == len(FIELDS)]
        rows = [
            Row(**{name: KINDS[name](text) for name, text in zip(FIELDS, line, strict=True)})
            for line in whole
        ]
        others = {row.study for row in rows} - {self.study}
        if others:
            raise RunMismatchError(
                "the folder holds results of another recipe, model or data",
                where=f"{self.path.name}: study {min(others)}, now {self.study}",
                fix="choose another output folder",
            )
        return rows

    def has(self, table: str, method: str, bits: int, seed: int) -> bool:
        """Whether a cell has been computed."""
        return any(row.cell == (table, method, bits, seed) for row in self.rows)

    def add(self, row: Row) -> None:
        """Append one row and flush it."""
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(dataclasses.astuple(row))
