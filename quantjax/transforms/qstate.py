"""The QParams that a verb is given: of this plan, and with whole widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import QParams
from quantjax.arguments import expect
from quantjax.formats import IntegerFormat
from quantjax.lean import select
from quantjax.planning import Plan
from quantjax.printing import shape_text
from quantjax.quantizer import Quantizer, RangeMode
from quantjax.site_plan import OperandPlan
from quantjax.transforms.calibrate import QState
from quantjax.transforms.check import OTHER_DTYPE, other_dtypes
from quantjax.transforms.whole import known_nearest, whole_qparams


def _at_held_width(
    quantizer: Quantizer, stated: QParams, where: str, *, codes_stay_real: bool
) -> QParams:
    """At the nearest whole width; a scale of NaN where the container does not hold that one.

    Codes beyond the container would be others in what is frozen.

    Raises:
      BitsError: where the width is known.
    """
    format, rest = quantizer.format, quantizer.estimator.rest
    known = whole_qparams(stated, known_nearest)
    held = format.known_valid(known.bits, rest(known.theta))
    if held is False:
        raise errors.BitsError(
            f"a width of {concrete(stated.bits)} bits in the qstate",
            where=where,
            why=f"{format.name} in a container of {format.max_bits} bits has no such width",
            fix=f"qj.calibrate with a width that it has, for instance {format.max_bits}",
        )
    if codes_stay_real and isinstance(format, IntegerFormat):
        return stated
    qparams = whole_qparams(stated)
    if held or quantizer.range is RangeMode.LIVE:  # which has no scale yet, and checks its own
        return qparams
    valid = format.holds_nearest(jnp.asarray(qparams.bits, jnp.float32), rest(qparams.theta))
    if valid.ndim:  # layers
        valid = jnp.expand_dims(valid, tuple(range(valid.ndim, jnp.ndim(qparams.scale))))
    return qparams._replace(scale=select(valid, qparams.scale, jnp.nan))


def checked_qstate(
    plan: Plan, qstate: Mapping[str, Mapping[str, QParams]], *, codes_stay_real: bool = False
) -> QState:
    """The qstate with whole widths, and scales of NaN where a format has no such width.

    Args:
      codes_stay_real: codes are held as floats. Integers are then left as they are: they take the
        nearest width themselves, and where there is none their codes are NaN, which is some
        operations less for each operand of a program that is compiled.

    Raises:
      ArgumentError: no plan, or no qstate.
      CalibrationError: not every planned operand has QParams of its granularity, in float32.
      BitsError: a concrete width that the format does not have.
    """
    expect(
        plan,
        Plan,
        argument="the plan of a qstate",
        where="calibrated QParams",
        fix="plan = qj.plan(policy, qj.sites(f, params, x))",
    )
    expect(
        qstate,
        Mapping,
        argument="qstate",
        where="a plan's QParams",
        fix="qstate = qj.calibrate(plan, state, params)",
    )
    checked = {
        site: dict(operands) if isinstance(operands, Mapping) else operands
        for site, operands in qstate.items()
    }
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
            qparams = jax.tree.map(_in_float32, qparams)
            if jnp.shape(qparams.bits) != steps:
                needed = f"one for each of {steps} layers" if steps else "a scalar"
                raise errors.CalibrationError(
                    f"a width of shape {jnp.shape(qparams.bits)} where {needed} is needed",
                    where=where,
                    why="a leading axis is a batch of cells",
                    fix="map over the cells with jax.vmap or jax.lax.map",
                )
            _check_shapes(operand, qparams, steps, where)
            _check_dtypes(qparams, where)
            assert operand.quantizer is not None
            checked[name][key] = _at_held_width(
                operand.quantizer, qparams, where, codes_stay_real=codes_stay_real
            )
    return checked


def _check_shapes(
    operand: OperandPlan, qparams: QParams, steps: tuple[int, ...], where: str
) -> None:
    if operand.scale_shape is None:
        return
    expected = (*steps, *operand.scale_shape)
    for name, array in (("scale", qparams.scale), ("zero point", qparams.zero_point)):
        if not _fits(expected, jnp.shape(array), len(steps)):
            raise errors.CalibrationError(
                f"a {name} of shape {jnp.shape(array)} does not fit",
                where=where,
                why=f"the plan has scales of shape {expected}; one more leading axis is a "
                "batch of cells",
                fix="map over the cells with jax.vmap or jax.lax.map"
                if jnp.ndim(array) > len(expected)
                else "qstate = qj.calibrate(plan, state, params)",
            )


def _in_float32(leaf: Any) -> Any:
    """NumPy's floats as JAX's; all else as it is."""
    is_numpy = isinstance(leaf, np.ndarray | np.generic) and np.issubdtype(leaf.dtype, np.floating)
    return jnp.asarray(leaf, jnp.float32) if is_numpy else leaf


def _check_dtypes(qparams: QParams, where: str) -> None:
    for found in other_dtypes(qparams):
        what, fix = OTHER_DTYPE
        raise errors.CalibrationError(what, where=f"{where}, {found}", fix=fix)


def _fits(expected: Sequence[int], shape: Sequence[int], steps: int) -> bool:
    """Whether every layer has its own, and each axis its own entries or one for all of them."""
    if len(shape) != len(expected) or tuple(shape[:steps]) != tuple(expected[:steps]):
        return False
    return all(size in (1, whole) for size, whole in zip(shape, expected, strict=True))
