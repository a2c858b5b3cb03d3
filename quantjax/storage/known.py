"""The words that files are written in: every class and named value that can be read back."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quantjax import errors
from quantjax.affine import DIVIDED, RECIPROCAL, RECIPROCAL_ADDED, Scaling
from quantjax.biases import AccumulatorBias
from quantjax.estimators import ESTIMATORS, Estimator
from quantjax.formats import (
    INQ_SCALE,
    MX_CEIL,
    MX_EVEN,
    MX_FLOOR,
    NVFP4_SCALE,
    POWER_OF_TWO,
    POWER_OF_TWO_NEAREST,
    REAL,
    UNIT,
    ApotFormat,
    CodebookFormat,
    IntegerFormat,
    LogFormat,
    Magnitudes,
    MidriseFormat,
    MinifloatFormat,
    Nearest,
    NormalFloatFormat,
    Overflow,
    ScaleRule,
    Specials,
    TernaryFormat,
)
from quantjax.granularity import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Remainder,
)
from quantjax.interpreter import Op, Operand, Role, Site, SiteStatus
from quantjax.packing import Packing
from quantjax.policy import Policy, Rule, Scheme
from quantjax.quantizer import Quantizer, RangeMode
from quantjax.ranges import (
    ACIQ_GAUSSIAN,
    ACIQ_LAPLACIAN,
    ADMM,
    COSINE,
    HQO_SCALE,
    HQO_ZERO_POINT,
    K_MEANS,
    KL_MODELOPT,
    KL_ONNXRUNTIME,
    KL_TENSORRT,
    LEAST_SQUARES,
    LSQ,
    MIN_MAX,
    MOVING_AVERAGE,
    MSE,
    SAWB,
    TTQ,
    TWN,
    XNOR,
    FitRule,
    RangeRule,
    Solved,
)
from quantjax.relative_selectors import Costliest, EveryUse, First, FirstUse, Last
from quantjax.rounding import ROUNDINGS, Rounding
from quantjax.selectors import (
    AtLeast,
    Backward,
    Combined,
    Everything,
    InScope,
    Named,
    Not,
    OfOp,
    Path,
    Weighted,
    WithRole,
)
from quantjax.storage.rules import family_of, settings_of

DATACLASSES: tuple[type, ...] = (
    AccumulatorBias,
    ApotFormat,
    AtLeast,
    Backward,
    CodebookFormat,
    Combined,
    Costliest,
    EveryUse,
    Everything,
    First,
    FirstUse,
    InScope,
    IntegerFormat,
    Last,
    LogFormat,
    MidriseFormat,
    MinifloatFormat,
    Named,
    NormalFloatFormat,
    Not,
    OfOp,
    Operand,
    Packing,
    Path,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Policy,
    Quantizer,
    Rule,
    Scheme,
    Site,
    TernaryFormat,
    Weighted,
    WithRole,
)
"""Written as ``{"type": "PerGroup", "size": 64, "axis": null}``."""

ENUMS: tuple[type[enum.Enum], ...] = (
    Magnitudes,
    Nearest,
    Op,
    Overflow,
    RangeMode,
    Remainder,
    Role,
    SiteStatus,
    Solved,
    Specials,
)
"""Written as ``{"enum": "RangeMode.FIXED"}``."""

NAMED: tuple[Any, ...] = (
    ACIQ_GAUSSIAN,
    ACIQ_LAPLACIAN,
    ADMM,
    COSINE,
    DIVIDED,
    HQO_SCALE,
    HQO_ZERO_POINT,
    INQ_SCALE,
    KL_MODELOPT,
    KL_ONNXRUNTIME,
    KL_TENSORRT,
    K_MEANS,
    LEAST_SQUARES,
    LSQ,
    MIN_MAX,
    MOVING_AVERAGE,
    MSE,
    MX_CEIL,
    MX_EVEN,
    MX_FLOOR,
    NVFP4_SCALE,
    POWER_OF_TWO,
    POWER_OF_TWO_NEAREST,
    REAL,
    RECIPROCAL,
    RECIPROCAL_ADDED,
    SAWB,
    TTQ,
    TWN,
    UNIT,
    XNOR,
    *ESTIMATORS,
    *ROUNDINGS,
)
"""NamedTuples of functions, written as ``{"rounding": "half_even"}``."""

KINDS: Mapping[str, type] = {
    "estimator": Estimator,
    "fit_rule": FitRule,
    "range_rule": RangeRule,
    "rounding": Rounding,
    "scale_rule": ScaleRule,
    "scaling": Scaling,
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
    """``rounding``, ``estimator``, ``range_rule`` and so on; None for anything else."""
    return next((kind for kind, cls in KINDS.items() if isinstance(value, cls)), None)


def is_ours(rule: RangeRule | FitRule) -> bool:
    """Whether the library has this rule, by its name or as one of a family.

    >>> is_ours(MSE), is_ours(RangeRule("mse", print))
    (True, False)
    """
    if BUILT_IN.named.get((kind_of(rule) or "", rule.name)) == rule:
        return True
    numbered = isinstance(rule, RangeRule) and family_of(rule) is not None
    return numbered or settings_of(rule) is not None


def with_extra(extra: Sequence[Any]) -> Known:
    """The library's words and a user's own.

    Args:
      extra: dataclasses and enumerations, or values of them; roundings, estimators, rules.

    Raises:
      StorageError: a value of another kind, or a name that stands for something else already.

    >>> own = Rounding("down", lambda x: x, is_nearest=False)
    >>> [("rounding", "down") in with_extra(extra).named for extra in ([own], [])]
    [True, False]
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
