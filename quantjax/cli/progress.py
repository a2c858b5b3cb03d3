"""Progress on the terminal, by rich."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType

from quantjax.sweep.progress import Progress


class RichProgress(Progress):
    """Bars with the time left, on the terminal."""

    def __init__(self) -> None:
        from rich import progress

        self._bars = progress.Progress(
            progress.TextColumn("{task.description:<20}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop redrawing; finished bars stay."""
        self._bars.stop()

    @contextlib.contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """One bar."""
        task = self._bars.add_task(label, total=total)
        yield lambda steps: self._bars.update(task, advance=steps)

    def note(self, text: str) -> None:
        """One line above the bars."""
        self._bars.console.print(text, style="dim")
