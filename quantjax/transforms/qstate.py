"""The QParams that a verb is given: of this plan, and with whole widths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from quantjax import errors
from quantjax.affine import QParams
from quantjax.arguments import expect
from quantjax.formats import IntegerFormat
from quantjax.formats.minifloat import WIDTHS_IN_THETA
from quantjax.granularity import check_scale_shape
from quantjax.planning import Plan
from quantjax.printing import shape_text
from quantjax.transforms.calibrate import QState


def whole_widths(
    qstate: Mapping[str, Mapping[str, QParams]], *, but: Collection[tuple[str, str]] = ()
) -> QState:
    """Each width as the nearest whole number, and 0 only where it is 0.

    Weight decay and averages over ``(params, qstate)`` move widths that have no gradient, by parts
    of a millionth to begin with; most formats would take 3.9999995 bits for 3. ``qj.check``
    reports what has moved further.

    Args:
      but: sites and operands whose widths stay as they are.
    """
    return {
        site: {
            key: qparams if (site, key) in but else _whole(qparams)
            for key, qparams in operands.items()
        }
        if isinstance(operands, Mapping)
        else operands
        for site, operands in qstate.items()
    }


def _whole(qparams: Any) -> Any:
    if not isinstance(qparams, QParams) or qparams.bits is None:
        return qparams
    theta = qparams.theta
    if isinstance(theta, Mapping) and not WIDTHS_IN_THETA.isdisjoint(theta):
        theta = {
            name: _nearest(array) if name in WIDTHS_IN_THETA else array
            for name, array in theta.items()
        }
    return qparams._replace(bits=_nearest(qparams.bits), theta=theta)


def _nearest(bits: Any) -> Any:
    bits = jnp.asarray(bits, jnp.float32)
    whole = lax.round(bits, lax.RoundingMethod.TO_NEAREST_EVEN)
    return lax.max(whole, lax.sign(bits))


def checked_qstate(
    plan: Plan, qstate: Mapping[str, Mapping[str, QParams]], *, leave_integers: bool = False
) -> QState:
    """The qstate with whole widths.

    Args:
      leave_integers: widths of integers as they are, since the format takes the nearest itself: an
        operation less for each operand of a program that is compiled.

    Raises:
      CalibrationError: not every planned operand has QParams of its granularity.
    """
    for entry in plan.quantized:
        steps = entry.site.steps
        for operand in entry.quantized:
            name, key = entry.site.name, operand.key
            where = f"site {name} ({entry.site.op.value}), {key}"
            where += f" {shape_text(operand.operand.shape)}"
            qparams = qstate.get(name, {}).get(key)
            if qparams is None:
                raise errors.CalibrationError(
                    "the qstate has no QParams for a planned operand",
                    where=where,
                    why="it was not derived with this plan",
                    fix="qstate = qj.calibrate(plan, state, params)",
                )
            expect(
                qparams,
                QParams,
                argument="an entry of the qstate",
                where=where,
                fix="restore it with qj.calibrate(plan, state, params) as the template"
                if isinstance(qparams, Mapping | list)
                else "qstate = qj.calibrate(plan, state, params)",
            )
            if jnp.shape(qparams.bits) != steps:
                needed = f"one for each of {steps} layers" if steps else "a scalar"
                raise errors.CalibrationError(
                    f"a width of shape {jnp.shape(qparams.bits)} where {needed} is needed",
                    where=where,
                    why="a leading axis is a batch of cells",
                    fix="map over the cells with jax.vmap or jax.lax.map",
                )
            if operand.scale_shape is None:
                continue
            expected = (*steps, *operand.scale_shape)
            try:
                for shape in (qparams.scale.shape, qparams.zero_point.shape):
                    _check_fits(operand.scale_shape, shape, steps)
            except errors.GranularityError:
                raise errors.CalibrationError(
                    f"a scale of shape {tuple(qparams.scale.shape)} does not fit",
                    where=where,
                    why=f"the plan has scales of shape {expected}; one more leading axis is a "
                    "batch of cells",
                    fix="map over the cells with jax.vmap or jax.lax.map",
                ) from None
    if not leave_integers:
        return whole_widths(qstate)
    left = {
        (entry.site.name, operand.key)
        for entry in plan.quantized
        for operand in entry.quantized
        if operand.quantizer is not None and isinstance(operand.quantizer.format, IntegerFormat)
    }
    return whole_widths(qstate, but=left)


def _check_fits(scale_shape: Sequence[int], shape: Sequence[int], steps: tuple[int, ...]) -> None:
    if tuple(shape[: len(steps)]) != steps:
        raise errors.GranularityError("layers are missing", fix="calibrate with this plan")
    check_scale_shape(scale_shape, shape[len(steps) :])
