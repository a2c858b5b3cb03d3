"""Whether a quantizer is what its estimator asks for."""

from __future__ import annotations

from collections.abc import Mapping

from quantjax import errors
from quantjax.estimators.base import Estimator, Need
from quantjax.formats import REAL, Format, IntegerFormat

EDITS: Mapping[Need, str] = {
    Need.FIXED_RANGE: "range=qj.RangeMode.FIXED",
    Need.INTEGERS: "format=qj.integer()",
    Need.NO_ZERO_POINT: "symmetric=True; behind a ReLU with format=qj.integer(signed=False)",
    Need.REAL_SCALES: "estimator=qj.estimators.TQT, whose scales are powers of two",
    Need.ONE_BIT: "bits=1, or another estimator",
    Need.MORE_THAN_ONE_BIT: "bits=2: levels -1, 0, 1 need as many",
}


def check_needs(
    estimator: Estimator,
    format: Format,
    bits: int,
    *,
    symmetric: bool,
    is_fixed: bool,
    where: str = "",
) -> None:
    """Raise ``EstimatorError`` where an estimator asks for another quantizer.

    Args:
      where: the site, where there is one.

    >>> from quantjax.estimators import PACT
    >>> from quantjax.formats import integer
    >>> check_needs(PACT, integer(signed=False), 4, symmetric=True, is_fixed=True)
    """
    _check_fields(estimator)
    mode = "fixed range" if is_fixed else "live range"
    met = {
        Need.FIXED_RANGE: is_fixed,
        Need.INTEGERS: isinstance(format, IntegerFormat),
        Need.NO_ZERO_POINT: symmetric,
        Need.REAL_SCALES: format.scale_rule == REAL,
        Need.ONE_BIT: bits <= 1,
        Need.MORE_THAN_ONE_BIT: not (bits == 1 and format.signed),
    }
    for need in Need:
        if need in estimator.needs and not met[need]:
            raise errors.EstimatorError(
                f"{estimator.name} needs {need.value}",
                where=", ".join(filter(None, (where, format.label(bits), mode))),
                fix=EDITS[need],
            )


def _check_fields(estimator: Estimator) -> None:
    names = estimator.parameters
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        problem, fix = f"parameters {names!r}, which is no tuple of names", 'parameters=("clip",)'
    elif not callable(estimator.slope):
        problem, fix = "a slope that is no function", "slope=lambda point: point.is_inside * 1.0"
    else:
        return
    raise errors.EstimatorError(f"the estimator {estimator.name} has {problem}", fix=fix)
