"""The words that files are written in: every class and named value that can be read back."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quantjax import errors
from quantjax.estimators import CLIPPED, STRAIGHT_THROUGH, Estimator
from quantjax.formats import IntegerFormat
from quantjax.granularity import PerChannel, PerGroup, PerTensor, PerToken
from quantjax.interpreter import Op, Operand, Role, Site, SiteStatus
from quantjax.policy import Policy, Quantizer, RangeMode, Rule, Scheme
from quantjax.ranges import MIN_MAX, MOVING_AVERAGE, RangeRule
from quantjax.rounding import HALF_AWAY, HALF_EVEN, Rounding
from quantjax.selectors import Everything, Path, Weighted

DATACLASSES: tuple[type, ...] = (
    Everything,
    IntegerFormat,
    Operand,
    Path,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Policy,
    Quantizer,
    Rule,
    Scheme,
    Site,
    Weighted,
)
"""Written as ``{"type": "PerGroup", "size": 64, "axis": null}``."""

ENUMS: tuple[type[enum.Enum], ...] = (Op, RangeMode, Role, SiteStatus)
"""Written as ``{"enum": "RangeMode.FIXED"}``."""

NAMED: tuple[Any, ...] = (
    CLIPPED,
    HALF_AWAY,
    HALF_EVEN,
    MIN_MAX,
    MOVING_AVERAGE,
    STRAIGHT_THROUGH,
)
"""NamedTuples of functions, written as ``{"rounding": "half_even"}``."""

KINDS: Mapping[str, type] = {
    "estimator": Estimator,
    "range_rule": RangeRule,
    "rounding": Rounding,
}
"""The word before the name of a named value."""


class Known(NamedTuple):
    """What can be read back.

    Attributes:
      classes: dataclasses by name.
      enums: enumerations by name.
      named: named values by kind and name.
    """

    classes: Mapping[str, type]
    enums: Mapping[str, type[enum.Enum]]
    named: Mapping[tuple[str, str], Any]


def kind_of(value: Any) -> str | None:
    """``rounding``, ``estimator`` or ``range_rule``; None for anything else."""
    return next((kind for kind, cls in KINDS.items() if isinstance(value, cls)), None)


def with_extra(extra: Sequence[Any]) -> Known:
    """The library's words and a user's own.

    Args:
      extra: dataclasses and enumerations, or values of them; roundings, estimators, range rules.

    Raises:
      StorageError: a value of another kind, or a name that stands for something else already.

    >>> sorted(with_extra([Rounding("down", lambda x: x, is_nearest=False)]).named)[-1]
    ('rounding', 'half_even')
    >>> ("rounding", "down") in with_extra([]).named
    False
    """
    known = Known(dict(BUILT_IN.classes), dict(BUILT_IN.enums), dict(BUILT_IN.named))
    tables: tuple[Any, ...] = known
    for value in extra:
        slot, key = _place(value)
        entry = value if slot == 2 or isinstance(value, type) else type(value)
        if tables[slot].setdefault(key, entry) != entry:
            raise errors.StorageError(
                f"two things are called {_text(key)}",
                where="extra",
                why="a file holds names alone, so each must stand for one thing",
                fix="rename your own",
            )
    return known


def _place(value: Any) -> tuple[int, Any]:
    """The table of :class:`Known` that a value belongs to, and its key there."""
    kind = kind_of(value)
    if kind is not None:
        return 2, (kind, value.name)
    cls = value if isinstance(value, type) else type(value)
    if issubclass(cls, enum.Enum):
        return 1, cls.__name__
    if dataclasses.is_dataclass(cls):
        return 0, cls.__name__
    raise errors.StorageError(
        f"{value!r:.80} cannot be named in a file",
        where="extra",
        fix="a frozen dataclass, an enumeration, a Rounding, an Estimator or a RangeRule",
    )


def _text(key: Any) -> str:
    return " ".join(key) if isinstance(key, tuple) else str(key)


BUILT_IN = Known(
    {cls.__name__: cls for cls in DATACLASSES},
    {cls.__name__: cls for cls in ENUMS},
    {(str(kind_of(value)), value.name): value for value in NAMED},
)
"""The library's own words."""
