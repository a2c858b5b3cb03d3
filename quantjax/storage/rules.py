"""The library's rules that have numbers, and how a file says which one it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantjax import errors
from quantjax.ranges import (
    FitRule,
    RangeRule,
    Variant,
    admm,
    constant,
    hqo,
    k_means,
    kl_onnxruntime,
    kl_tensorrt,
    l_p,
    least_squares,
    percentile,
    sigma,
    sqnr,
    ttq,
)
from quantjax.ranges.base import Configured


def kl_variant(**settings: Any) -> RangeRule:
    """``kl_tensorrt`` of a variant with these fields."""
    return kl_tensorrt(Variant(**settings))


FAMILIES: Mapping[str, Callable[..., RangeRule]] = {
    "constant": constant,
    "l_p": l_p,
    "percentile": percentile,
    "sigma": sigma,
    "sqnr": sqnr,
}
"""Rules with numbers, written as ``{"range_rule": "percentile", "parameters": [0.999]}``."""

CONFIGURED: Mapping[str, Callable[..., RangeRule | FitRule]] = {
    "admm": admm,
    "hqo": hqo,
    "k_means": k_means,
    "kl_onnxruntime": kl_onnxruntime,
    "kl_tensorrt": kl_variant,
    "least_squares": least_squares,
    "ttq": ttq,
}
"""Rules with settings, written as ``{"fit_rule": "admm", "settings": {"rho": 3.0, ...}}``."""


def family_of(rule: RangeRule) -> str | None:
    """The name of the library's family that makes this rule; None for all others.

    >>> family_of(percentile(0.9)), family_of(percentile(0.9)._replace(range=print))
    ('percentile', None)
    """
    family = rule.name.partition("(")[0]
    try:
        own = FAMILIES[family](*rule.parameters)
    except (KeyError, TypeError, errors.QuantjaxError):
        return None
    return family if (own.name, own.range) == (rule.name, rule.range) else None


def settings_of(rule: RangeRule | FitRule) -> tuple[str, dict[str, Any]] | None:
    """The function and the settings that make this rule, where it is one of the library's.

    >>> from quantjax.ranges import MSE
    >>> settings_of(kl_onnxruntime(bins=513)), settings_of(MSE)
    (('kl_onnxruntime', {'bins': 513}), None)
    """
    settings = _stated(rule)
    if settings is None:
        return None
    for family, make in CONFIGURED.items():
        try:
            own = make(**settings)
        except (TypeError, errors.QuantjaxError):
            continue
        if own == rule:
            return family, settings
    return None


def _stated(rule: RangeRule | FitRule) -> dict[str, Any] | None:
    """What the rule's function was configured with, by the names that a call gives it."""
    function = rule.range if isinstance(rule, RangeRule) else rule.fit
    if not isinstance(function, Configured):
        return None
    settings = dict(function.settings)
    if "constants" in settings:
        return dict(settings["constants"]._asdict())
    numbers = rule.parameters if isinstance(rule, RangeRule) else ()
    if not numbers:
        return settings
    names = [name for name in Variant.__dataclass_fields__ if name not in ("name", *settings)]
    if len(names) != len(numbers):
        return None
    named = dict(zip(names, numbers, strict=True))
    return {"name": rule.name.removeprefix("kl_"), **settings, **named}
