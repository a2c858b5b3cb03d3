"""How a long run says where it is; the library itself prints nothing."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType

Task = contextlib.AbstractContextManager[Callable[[int], None]]
"""Entered around a task; yields what tells it of finished steps."""


class Progress(abc.ABC):
    """Something that shows tasks; entered once around a whole run."""

    def __enter__(self) -> Progress:
        return self

    @abc.abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the screen as it is to stay."""

    @abc.abstractmethod
    def task(self, label: str, total: int) -> Task:
        """A task of ``total`` steps; yields a function that is told how many were done."""

    @abc.abstractmethod
    def note(self, text: str) -> None:
        """One line of what happens now."""


class Silent(Progress):
    """Shows nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to leave."""

    @contextlib.contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Counts nothing."""
        del label, total
        yield lambda steps: None

    def note(self, text: str) -> None:
        """Says nothing."""
