"""Static configuration as plain JSON data, and back, by an explicit table of what is known.

Nothing is evaluated, unpickled or imported: a file can name only what stands in
:mod:`quantjax.storage.known` and what the reader passes as ``extra``.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax._compat import concrete
from quantjax.arguments import undeclared
from quantjax.ranges import FitRule, RangeRule
from quantjax.storage.known import BUILT_IN, KINDS, Known, kind_of, with_extra
from quantjax.storage.rules import CONFIGURED, FAMILIES, family_of, settings_of

Json = Any
"""None, a boolean, a number, text, a list or a dictionary with text for keys."""

TYPE, ENUM, FLOAT, DTYPE = "type", "enum", "float", "dtype"
RANGE_RULE, PARAMETERS, SETTINGS = "range_rule", "parameters", "settings"


def encode(value: Any, *, at: str = "value") -> Json:
    """JSON data for a static value: policies, formats, selectors, sites and what they hold.

    Dataclasses become ``{"type": name, field: ...}``, members of enumerations
    ``{"enum": "RangeMode.FIXED"}``, named functions ``{"rounding": "half_even"}``, a rule with
    numbers ``{"range_rule": "percentile", "parameters": [0.999]}``, one with settings
    ``{"fit_rule": "admm", "settings": {"rho": 3.0}}``, tuples lists.
    A user's own class or named value is written by its name; :func:`decode` has to be told of it.

    Args:
      value: frozen dataclasses, enumerations, named values, tuples, numbers, text, dtypes, None.
      at: what messages call the place.

    Raises:
      StorageError: a value of another kind, or one of the user's that has a name of the library's.

    >>> from quantjax.granularity import PerChannel
    >>> encode(PerChannel(1))
    {'type': 'PerChannel', 'axis': 1}
    """
    kind = kind_of(value)
    if isinstance(value, RangeRule):
        numbers = _numbers(value, at)
        if numbers and (family := family_of(value)) is not None:
            return {RANGE_RULE: family, PARAMETERS: numbers}
    if kind is not None:
        is_rule = isinstance(value, RangeRule | FitRule)
        is_named = BUILT_IN.named.get((kind, value.name)) == value
        if is_rule and not is_named and (settings := settings_of(value)) is not None:
            family, values = settings
            stated = {name: encode(one, at=f"{at}.{name}") for name, one in values.items()}
            return {kind: family, SETTINGS: stated}
        _check_own(BUILT_IN.named.get((kind, value.name), value), value, f"{kind} {value.name}", at)
        return {kind: value.name}
    if isinstance(value, enum.Enum):
        cls = type(value)
        _check_own(BUILT_IN.enums.get(cls.__name__, cls), cls, cls.__name__, at)
        return {ENUM: f"{cls.__name__}.{value.name}"}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else {FLOAT: repr(float(value))}
    if isinstance(value, np.dtype):
        return {DTYPE: value.name}
    if type(value) is tuple:
        return [encode(item, at=f"{at}[{index}]") for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encode_dataclass(value, at)
    raise errors.StorageError(
        f"a {type(value).__name__} cannot be written to a file",
        where=at,
        why="files hold static configuration: dataclasses, enumerations, tuples, numbers and text",
        fix="make the class a frozen dataclass, and its lists tuples",
    )


def decode(data: Json, *, extra: Sequence[Any] = (), at: str = "value") -> Any:
    """The value that :func:`encode` made ``data`` from.

    A field that ``data`` lacks takes the default of its class, if there is one: files that are
    older than the field stay readable.

    Args:
      data: what a JSON parser returned.
      extra: the user's own dataclasses, enumerations, roundings, estimators and range rules.
      at: what messages call the place.

    Raises:
      StorageError: an unknown type or name, an unknown field, a missing one, a value that its
        field cannot hold.

    >>> decode({"type": "PerChannel", "axis": 1})
    PerChannel(axis=1)
    """
    return decode_known(data, with_extra(extra), at)


def decode_known(data: Json, known: Known, at: str) -> Any:
    """:func:`decode` with the table of names made already."""
    if isinstance(data, list):
        return tuple(decode_known(item, known, f"{at}[{i}]") for i, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    if TYPE in data:
        return _decode_dataclass(data, known, at)
    if data.keys() == {RANGE_RULE, PARAMETERS}:
        return _decode_rule(data, at)
    if len(data) == 2 and SETTINGS in data:
        return _decode_configured(data, known, at)
    if len(data) == 1:
        ((word, name),) = data.items()
        if isinstance(name, str):
            if word in KINDS:
                table = {n: value for (kind, n), value in known.named.items() if kind == word}
                return _look_up(table, name, word.replace("_", " "), at)
            if word == ENUM:
                cls, _, member = name.rpartition(".")
                members = _look_up(known.enums, cls, "enumeration", at).__members__
                return _look_up(members, member, f"member of {cls}", at)
            if word == FLOAT and name in ("nan", "inf", "-inf"):
                return float(name)
            if word == DTYPE:
                return decode_dtype(name, at)
    raise errors.StorageError(
        f"an object that says of no known type what it is: {', '.join(data)[:80] or 'empty'}",
        where=at,
        fix=f'{{"{TYPE}": ...}}, or one of {", ".join([ENUM, FLOAT, DTYPE, *KINDS])}',
    )


def decode_dtype(name: Any, at: str) -> np.dtype[Any]:
    """The dtype of this name, those of ``ml_dtypes`` included."""
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        dtype = None
    if dtype is not None and (dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)):
        return dtype
    raise errors.StorageError(
        f"no dtype is called {name!r}", where=at, fix='a name such as "bfloat16" or "int8"'
    )


def _check_own(library: Any, own: Any, name: str, at: str) -> None:
    if library != own:
        raise errors.StorageError(
            f"{name} is not the library's, but has its name",
            where=at,
            why="the file would be read back as another value",
            fix="rename your own",
        )


def _numbers(rule: RangeRule, at: str) -> list[float]:
    known = [concrete(number) for number in rule.parameters]
    if any(number is None or np.ndim(number) for number in known):
        raise errors.StorageError(
            f"the rule {rule.name} cannot be written to a file",
            where=at,
            why="its parameters are traced, or arrays",
            fix="a rule whose parameters are numbers",
        )
    return [float(number) for number in known if number is not None]


def _decode_rule(data: dict[str, Json], at: str) -> Any:
    family = _look_up(FAMILIES, data[RANGE_RULE], "family of range rules", at)
    numbers = data[PARAMETERS]
    if not isinstance(numbers, list) or any(type(n) not in (int, float) for n in numbers):
        raise errors.StorageError(
            f"{numbers!r:.80} are no parameters of a rule",
            where=f"{at}.{PARAMETERS}",
            fix="a list of numbers",
        )
    try:
        return family(*map(float, numbers))
    except errors.QuantizerError as error:
        raise errors.StorageError(
            f"this rule cannot exist: {error.what}", where=at, why=error.why, fix=error.fix
        ) from None
    except TypeError as error:
        raise errors.StorageError(
            f"{len(numbers)} numbers do not make a rule {data[RANGE_RULE]}",
            where=at,
            why=str(error),
            fix="as many as the function of that name takes",
        ) from None


def _decode_configured(data: dict[str, Json], known: Known, at: str) -> Any:
    kind = next(key for key in data if key != SETTINGS)
    family, settings = _look_up(CONFIGURED, data[kind], "rule with settings", at), data[SETTINGS]
    try:
        stated = {name: decode_known(v, known, f"{at}.{name}") for name, v in settings.items()}
        rule = family(**stated)
    except (AttributeError, TypeError, errors.QuantizerError) as error:
        raise errors.StorageError(
            f"{settings!r:.80} are no settings of {data[kind]}",
            where=f"{at}.{SETTINGS}",
            why=getattr(error, "what", str(error)),
            fix=getattr(error, "fix", "those that the function of that name takes"),
        ) from None
    if kind_of(rule) != kind:
        raise errors.StorageError(
            f"{data[kind]} is no {kind.replace('_', ' ')}", where=at, fix=f'"{kind_of(rule)}"'
        )
    return rule


def _encode_dataclass(value: Any, at: str) -> Json:
    cls = type(value)
    _check_own(BUILT_IN.classes.get(cls.__name__, cls), cls, cls.__name__, at)
    fields = dataclasses.fields(value)
    names, hidden = {field.name for field in fields}, undeclared(value)
    if hidden or TYPE in names:
        raise errors.StorageError(
            f"{cls.__name__} holds '{(hidden or [TYPE])[0]}', which cannot be written",
            where=at,
            why="only the fields of a dataclass are written" if hidden else f"'{TYPE}' is taken",
            fix="@dataclasses.dataclass(frozen=True) with that field" if hidden else "rename it",
        )
    inside = [f for f in fields if f.init]
    return {
        TYPE: cls.__name__,
        **{f.name: encode(getattr(value, f.name), at=f"{at}.{f.name}") for f in inside},
    }


def _decode_dataclass(data: dict[str, Json], known: Known, at: str) -> Any:
    cls = _look_up(known.classes, data[TYPE], "class", at)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in data:
        if name != TYPE and name not in fields:
            raise errors.StorageError(
                f"{cls.__name__} has no field '{name}'",
                where=at,
                why=f"its fields: {', '.join(fields) or 'none'}",
                fix=_closest(name, fields) or "remove it, or use the version that wrote it",
            )
    values, hints = {}, _hints(cls)
    for name, field in fields.items():
        if name in data:
            values[name] = decode_known(data[name], known, f"{at}.{name}")
            _check_fits(values[name], hints.get(name, Any), f"{at}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise errors.StorageError(
                f"{cls.__name__} needs the field '{name}', which is missing",
                where=at,
                fix=f'add "{name}": {getattr(hints.get(name), "__name__", hints.get(name))}',
            )
    try:
        return cls(**values)
    except errors.QuantjaxError as error:
        raise errors.StorageError(
            f"this {cls.__name__} cannot exist: {error.what}",
            where=at,
            why=error.why,
            fix=error.fix,
        ) from None
    except (TypeError, ValueError) as error:
        raise errors.StorageError(
            f"this {cls.__name__} cannot be made",
            where=at,
            why=str(error),
            fix="correct its fields",
        ) from None


def _look_up(table: Mapping[str, Any], name: Any, what: str, at: str) -> Any:
    if isinstance(name, str) and name in table:
        return table[name]
    close = _closest(name, table)
    raise errors.StorageError(
        f"the {what} {name!r:.80} is not known",
        where=at,
        why=f"known: {', '.join(sorted(table)) or 'none'}",
        fix=(f"{close}, or " if close else "") + "extra=(...,) with your own",
    )


def _closest(name: Any, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.75)
    return f"'{close[0]}'" if close else ""


@functools.lru_cache(maxsize=256)
def _hints(cls: type) -> Mapping[str, Any]:
    """The fields' types; none where a class of the user's names types that it cannot see."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {}


def _check_fits(value: Any, hint: Any, at: str) -> None:
    if not _fits(value, hint):
        raise errors.StorageError(
            f"{value!r:.80} is no {getattr(hint, '__name__', hint)}",
            where=at,
            fix="correct the value in the file",
        )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a decoded value has the type that its field states; generous to exotic types."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple and isinstance(value, tuple) and parts:
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    cls = origin or hint
    if not isinstance(cls, type):
        return True
    if cls in (int, float):
        allowed = (int, float) if cls is float else int
        return isinstance(value, allowed) and not isinstance(value, bool)
    return isinstance(value, cls)
