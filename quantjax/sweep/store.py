"""Results on disk: a CSV file that is also the memory of what has been computed."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

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


HEADER = (",".join(Row._fields) + "\n").encode()


class ResultStore:
    """Rows in ``results.csv``; adding appends and flushes, so that an interrupt loses no cell.

    Any number of sweeps may add to one file: each write holds an advisory lock on it. Where there
    are no locks, a header that two of them wrote is read once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All rows; a last line that an interrupt cut short is left out.

        Raises:
          SweepError: a file that is not a result file of this version.
        """
        try:
            with self.path.open("rb") as file:
                _lock(file, shared=True)
                data = file.read()
        except FileNotFoundError:
            return []
        return self._parsed(data)

    def _parsed(self, data: bytes) -> list[Row]:
        try:
            # Cut ahead of decoding: an interrupt may leave a part of a letter.
            complete = data[: self._end(data)].decode("utf-8-sig")
            lines = [line for line in csv.reader(io.StringIO(complete, newline="")) if line]
        except (UnicodeDecodeError, csv.Error) as error:
            raise errors.SweepError(
                "this is no text file of results",
                where=self.path.name,
                why=str(error),
                fix="move the file away, or choose another output folder",
            ) from None
        if lines and tuple(lines[0]) != Row._fields:
            raise self._foreign(f"columns {lines[0][:4]}...")
        return [
            self._parse(number, line)
            for number, line in enumerate(lines, start=1)
            if tuple(line) != Row._fields
        ]

    def known(self, fingerprint: str, seed: int) -> dict[Cell, Row]:
        """What has been computed for one trained model."""
        return {
            row.cell: row
            for row in self.rows()
            if row.fingerprint == fingerprint and row.seed == seed
        }

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, after removing a line that an interrupt cut short.

        What another sweep has filed in the meantime is not filed twice.
        """
        with self._held() as file:
            data = file.read()
            there = {(row.fingerprint, row.seed, row.cell) for row in self._parsed(data)}
            lines = _text(r for r in rows if (r.fingerprint, r.seed, r.cell) not in there)
            end = self._end(data)
            if end < len(data):
                file.truncate(end)
            file.write(lines if data[:end].strip() else HEADER + lines)
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _held(self) -> Iterator[IO[bytes]]:
        """The file, made if there is none, read from its start and written at its end; locked."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with self.path.open("a+b") as file:
                _lock(file, shared=False)
                if self._is_at_path(file):
                    file.seek(0)
                    yield file
                    return

    def _is_at_path(self, file: IO[bytes]) -> bool:
        """Whether it has not been replaced while the lock was waited for: rows would be lost."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _end(self, data: bytes) -> int:
        """Where the last complete line ends; raises for one cut line that is no header's start."""
        end = data.rfind(b"\n") + 1
        if not end and not HEADER.startswith(data.removeprefix(codecs.BOM_UTF8)):
            raise self._foreign(f"{data[:40]!r}")
        return end

    def _foreign(self, found: str) -> errors.SweepError:
        return errors.SweepError(
            "this is not a result file of this version",
            where=f"{self.path.name}, {found}",
            fix="move the file away, or choose another output folder",
        )

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


def _text(rows: Iterable[Sequence[object]]) -> bytes:
    """Lines of a file, encoded."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _lock(file: IO[bytes], *, shared: bool) -> None:
    """Wait for the file's lock, which closing it gives back; nothing where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return
    with contextlib.suppress(OSError):  # file systems without locks
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
