"""Standard output as it comes: without some letters, closed at the other end, on a full disk."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
from typing import TextIO

PLAIN = {"±": "+-", "×": "x", "•": "*", "…": "...", "─": "-", "│": "|", "╰": "'"}
"""What stands for letters that a stream may not have; ``?`` for all others."""

_HANDLER = "quantjax.plain"


def write_what_fits(stream: TextIO | None) -> None:
    """Have the stream write something else for what its encoding lacks, rather than raise.

    Every letter is written as it is where the encoding has it. A stream that has an answer of its
    own keeps it.
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        codecs.register_error(_HANDLER, _plain)
        stream.reconfigure(errors=_HANDLER)


def is_closed(stream: TextIO | None) -> bool:
    """Whether nobody reads what is written any more."""
    if stream is None:
        return False
    try:
        poll = select.poll()
        poll.register(stream, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # a system without poll, or no descriptor
        return True


def let_go(stream: TextIO | None) -> None:
    """What could not be written goes nowhere, and nor does what follows.

    The interpreter flushes once more as it ends, and would say there that it could not.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):  # no descriptor of its own
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter, "?") for letter in letters), error.end
