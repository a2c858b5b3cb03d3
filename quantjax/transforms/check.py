"""``qj.check``: why QParams are not usable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import Fault, QParams, is_positive
from quantjax.arguments import expect
from quantjax.formats.minifloat import WIDTHS_IN_THETA
from quantjax.interpreter import leaves_by_path
from quantjax.planning import Plan
from quantjax.quantizer import Quantizer
from quantjax.transforms.sites import check_plan
from quantjax.transforms.whole import whole_qparams

REASONS: Mapping[Fault, tuple[str, str]] = {
    Fault.NEVER_CALIBRATED: (
        "calibration was never run",
        "run qj.observe on calibration data before qj.calibrate; a moving average does not outlive "
        "qj.merge_states",
    ),
    Fault.NOT_FINITE: (
        "the range holds NaN or infinity, or nothing was seen of some channel",
        "look for NaN in the calibration data and in the weights; a rule's lower bound may also "
        "lie above its upper one, or a scale rule of yours make no positive number",
    ),
    Fault.ZERO_POINT: (
        "a rule found a zero point for a symmetric quantizer",
        "symmetric=False, or a rule that fits the scale alone",
    ),
    Fault.NEGATIVE: (
        "negative values, for which unsigned codes about zero have none",
        "symmetric=False with a range rule or HQO_ZERO_POINT, or signed codes, qj.integer(); of "
        "the presets, lsq_plus, or first_last_8bit(...) where the model's input has them",
    ),
    Fault.BITS_OUTSIDE_FORMAT: (
        "the width is outside the format",
        "a width that the format has (quantjax.contract.widths), or qj.integer(max_bits=16)",
    ),
}
UNUSABLE = (
    "a scale is not a positive finite number",
    "keep learned scales positive, for instance by optimizing their logarithm",
)


ZERO_NOT_FINITE = (
    "a zero point is NaN or infinite",
    "a lower learning rate for zero points, or quantjax.training.by_part without them",
)


MOVED_ZERO = (
    "a symmetric quantizer has a zero point that is not 0",
    "leave zero points out of updates and averages: quantjax.training.by_part",
)
"""Codes about zero have none, so that what is computed with it is NaN."""


LEARNED = (
    "a parameter of the estimator is NaN or infinite, or means nothing, as a clip below zero",
    "a lower learning rate for theta, and quantjax.training.keep_positive(names=...)",
)


MOVED_WIDTH = (
    "a width was moved off the whole number that is used in its place",
    "leave widths out of weight decay and averages: quantjax.training.by_part",
)
"""By more than a hundredth: a step of weight decay moves it by millionths."""


OTHER_DTYPE = (
    "a float of another dtype than float32, in which scales are computed",
    "leave the qstate out of what is cast: cast(params), qstate",
)


class Problem(NamedTuple):
    """One operand whose parameters cannot be used.

    Attributes:
      site, operand: where.
      lanes: indices of the leading batch axis (cells of a sweep) that are affected; empty where
        there is none.
      what, fix: the reason, and one edit to try.
    """

    site: str
    operand: str
    lanes: tuple[int, ...]
    what: str
    fix: str

    def __str__(self) -> str:
        lanes = f", lanes {list(self.lanes)}" if self.lanes else ""
        return f"site {self.site}, {self.operand}{lanes}: {self.what}; try: {self.fix}"


def check(qstate: Mapping[str, Mapping[str, QParams]], plan: Plan | None = None) -> list[Problem]:
    """Problems of concrete QParams; empty where all is well.

    Under a trace, bad values cannot raise: the scale becomes NaN, and so does what is computed with
    it. Call this on the QParams that the traced function returns. A batch of them, the result of
    ``vmap``, is checked lane by lane.

    Args:
      plan: with it, widths are held against the formats, and zero points against symmetry, too.

    Raises:
      CalibrationError: the QParams are tracers.

    >>> import jax.numpy as jnp
    >>> never = jnp.full((1, 1), float(Fault.NEVER_CALIBRATED))
    >>> broken = QParams(jnp.full((1, 1), jnp.nan), never, jnp.float32(8))
    >>> print(check({"dense/kernel": {"activation": broken}})[0].what)
    calibration was never run
    """
    fix = "qj.check(qj.calibrate(plan, state, params))"
    expect(qstate, Mapping, argument="qstate", where="qj.check", fix=fix)
    if plan is not None:
        check_plan(plan, verb="check")
    quantizers = {
        (entry.site.name, operand.key): operand.quantizer
        for entry in (plan.quantized if plan is not None else ())
        for operand in entry.quantized
    }
    problems: list[Problem] = []
    for site, operands in qstate.items():
        for name, qparams in operands.items():
            problems += _problems(site, name, qparams, quantizers.get((site, name)))
    return problems


def _problems(
    site: str, operand: str, qparams: QParams, quantizer: Quantizer | None
) -> list[Problem]:
    scale, zero_point = concrete(qparams.scale), concrete(qparams.zero_point)
    bits = concrete(qparams.bits)
    if scale is None or zero_point is None or bits is None:
        raise errors.CalibrationError(
            "qj.check needs values, and these are tracers",
            where=f"site {site}, {operand}",
            fix="return the qstate from the jitted function and check it outside",
        )
    batch = bits.ndim
    axes = tuple(range(batch, scale.ndim))
    faults = np.where(np.isnan(scale), zero_point, 0.0)
    stated = np.isin(faults, [float(fault) for fault in REASONS])
    explained = np.any(stated, axis=axes)
    is_symmetric = quantizer is not None and quantizer.symmetric
    zero_axes = tuple(range(batch, zero_point.ndim))
    reasons = [
        *((np.any(faults == float(fault), axis=axes), *text) for fault, text in REASONS.items()),
        (np.any(~is_positive(scale) & ~stated, axis=axes), *UNUSABLE),
        (np.any(~np.isfinite(zero_point), axis=zero_axes), *ZERO_NOT_FINITE),
        (_no_width(qparams, quantizer) & ~explained, *REASONS[Fault.BITS_OUTSIDE_FORMAT]),
        (np.any(is_symmetric & (zero_point != 0.0), axis=zero_axes) & ~explained, *MOVED_ZERO),
        (_learned_faults(qparams, batch, quantizer) & ~explained, *LEARNED),
        (_moved(qparams, batch) & ~explained, *MOVED_WIDTH),
        (np.full(bits.shape, bool(other_dtypes(qparams))), *OTHER_DTYPE),
    ]
    return [
        Problem(site, operand, _lanes(hit, batch), what, fix)
        for hit, what, fix in reasons
        if hit.any()
    ]


def other_dtypes(qparams: QParams) -> list[str]:
    """Floats that are not float32, as a cast of a whole tree for training makes them.

    NumPy's are not among them: they are numbers yet, and become float32.
    """
    found = []
    for path, array in leaves_by_path(qparams).items():
        is_float = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.floating)
        if is_float and array.dtype != jnp.float32:
            found.append(f"{path.replace('_', ' ')}, {array.dtype}")
    return found


def _no_width(qparams: QParams, quantizer: Quantizer | None) -> np.ndarray:
    """By lane: widths that no format has, or not that of the quantizer."""
    bits = np.asarray(qparams.bits, np.float32)
    if quantizer is None:
        return ~(np.isfinite(bits) & (bits >= 0))
    format, rest = quantizer.format, quantizer.estimator.rest

    def valid(qparams: QParams) -> jax.Array:
        return format.valid_bits(qparams.bits, rest(qparams.theta))

    for _ in range(bits.ndim):
        valid = jax.vmap(valid)
    return ~np.asarray(valid(whole_qparams(qparams)))


def _moved(qparams: QParams, batch: int) -> np.ndarray:
    """By lane: widths that are no whole numbers, those in ``theta`` too."""
    theta = qparams.theta if isinstance(qparams.theta, Mapping) else {}
    widths = [qparams.bits, *(theta[name] for name in sorted(WIDTHS_IN_THETA & set(theta)))]
    hit = np.zeros(np.shape(qparams.bits), bool)
    for values in map(concrete, widths):
        if values is None or not np.issubdtype(values.dtype, np.number):
            continue
        known = np.where(np.isfinite(values), values, 0.0)
        off = np.abs(known - np.rint(known)) > 0.01
        hit = hit | np.any(off, axis=tuple(range(batch, off.ndim)))
    return hit


def _learned_faults(qparams: QParams, batch: int, quantizer: Quantizer | None) -> np.ndarray:
    """By lane: entries of ``theta`` that no estimator can use, or that the quantizer's cannot."""
    hit = np.zeros(np.shape(qparams.bits), bool)
    theta = qparams.theta if isinstance(qparams.theta, Mapping) else {}
    for name, array in theta.items():
        values = concrete(array)
        if values is None or not np.issubdtype(values.dtype, np.floating):
            continue
        bad = ~np.isfinite(values)
        if name == "clip":
            bad |= ~(values > 0)
        hit = hit | np.any(bad, axis=tuple(range(batch, bad.ndim)))
    estimator = None if quantizer is None else quantizer.estimator
    if estimator is not None and estimator.valid and set(estimator.parameters) <= set(theta):
        bad = ~np.asarray(estimator.valid(estimator.own(theta)))
        hit = hit | np.any(bad, axis=tuple(range(batch, bad.ndim)))
    return hit


def _lanes(hit: np.ndarray, batch: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(hit)) if batch else ()
