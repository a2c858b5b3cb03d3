"""What command lines of experiments ask of their options."""

from __future__ import annotations

from typing import Any

from quantjax.errors import QuantjaxError


class OptionError(QuantjaxError, ValueError):
    """Options of which nothing can be made.

    ``python -m experiments.qat --steps 0`` fails: nothing would be trained. Use ``--steps 600``.
    """


def check_counts(options: Any, *names: str) -> None:
    """Raise ``OptionError`` where one of these options is less than 1.

    >>> import types
    >>> check_counts(types.SimpleNamespace(steps=3), "steps")
    """
    for name in names:
        if getattr(options, name) < 1:
            raise OptionError(
                f"{name} is {getattr(options, name)}",
                why="nothing is computed of none",
                fix=f"--{name.replace('_', '-')} 600",
            )
