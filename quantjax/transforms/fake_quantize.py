"""``qj.fake_quantize``: the model with quantized operands, in simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from quantjax import errors, statistics
from quantjax.affine import QParams
from quantjax.granularity import check_scale_shape
from quantjax.interpreter import Product, ProgramCache, Site, evaluate
from quantjax.interpreter.trace import Function
from quantjax.planning import OperandPlan, Plan, SitePlan
from quantjax.policy import RangeMode
from quantjax.printing import shape_text
from quantjax.products import Coded, coded, in_float, multiply
from quantjax.transforms.calibrate import QState, range_qparams
from quantjax.transforms.sites import check_program


def fake_quantize(f: Function, plan: Plan) -> Callable[..., Any]:
    """``fake_quantize(f, plan)(qstate, params, *inputs)``: ``f`` with quantized products.

    Each planned product is ``Σ (q_x - z_x)(q_w - z_w) · (s_x · s_w)``, its sum exact, so that an
    integer program returns the same values. All else is computed as the model has it.
    Differentiable in ``params`` and ``qstate`` by each quantizer's estimator; works under ``jit``,
    ``vmap``, ``grad``. Every number in ``qstate`` may be traced.

    Raises (of the returned function):
      PlanMismatchError: other parameters or another program than those planned.
      CalibrationError: QParams are missing or of another granularity.

    >>> import jax.numpy as jnp, quantjax as qj
    >>> f = lambda p, x: x @ p["w"]
    >>> params, x = {"w": jnp.array([[0.5], [1.0]])}, jnp.array([[1.0, 3.0]])
    >>> plan = qj.plan(qj.uniform_policy(weight_bits=2), qj.sites(f, params, x))
    >>> y, state = qj.observe(f, plan)(qj.init(plan), params, x)
    >>> qstate = qj.calibrate(plan, state, params)
    >>> float(f(params, x)[0, 0]), float(qj.fake_quantize(f, plan)(qstate, params, x)[0, 0])
    (3.5, 2.0)
    """
    programs = ProgramCache(f)
    planned = {entry.site.name: entry for entry in plan.quantized}

    def quantized(qstate: QState, params: Any, *inputs: Any) -> Any:
        plan.check_params(params)
        check_qstate(plan, qstate)
        program = programs(params, *inputs)
        check_program(plan, program)

        def handler(
            site: Site, product: Product, lhs: jax.Array, rhs: jax.Array, value: Any
        ) -> tuple[jax.Array, None]:
            return quantized_product(planned[site.name], product, lhs, rhs, value), None

        handled = frozenset(planned)
        values = {name: dict(qstate[name]) for name in planned}
        result, _ = evaluate(program, handler, handled, values, params, *inputs)
        return result

    return quantized


def quantized_product(
    entry: SitePlan,
    product: Product,
    lhs: jax.Array,
    rhs: jax.Array,
    qparams: Mapping[str, QParams],
) -> jax.Array:
    """One planned product on codes."""
    sides = {o.operand.side: coded_operand(o, (lhs, rhs), qparams) for o in entry.operands}
    assert entry.sizing is not None
    return multiply(product, (lhs, rhs), sides[0], sides[1], entry.sizing)


def coded_operand(
    operand: OperandPlan, operands: tuple[jax.Array, jax.Array], qparams: Mapping[str, QParams]
) -> Coded:
    """Codes and factor of one operand of a planned product."""
    x = operands[operand.operand.side]
    if operand.quantizer is None:
        return in_float(x)
    return coded(x, live_qparams(operand, x, qparams[operand.key]), operand.quantizer.arithmetic)


def live_qparams(operand: OperandPlan, x: jax.Array, qparams: QParams) -> QParams:
    """The QParams to use: those given, or for a live range those of ``x`` itself."""
    quantizer = operand.quantizer
    if quantizer is None or quantizer.range is not RangeMode.LIVE:
        return qparams
    shape = quantizer.granularity.scale_shape(x.shape, operand.axes, is_weight=operand.is_weight)
    stats = statistics.update(statistics.init(shape), jax.lax.stop_gradient(x))
    return range_qparams(operand, stats, qparams.bits, quantizer.rule)


def check_qstate(plan: Plan, qstate: Mapping[str, Mapping[str, QParams]]) -> None:
    """Raise ``CalibrationError`` unless every planned operand has QParams of its granularity."""
    for entry in plan.quantized:
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
            if jnp.ndim(qparams.bits) != 0:
                raise errors.CalibrationError(
                    f"a width of shape {jnp.shape(qparams.bits)} where a scalar is needed",
                    where=where,
                    why="a leading axis is a batch of cells",
                    fix="map over the cells with jax.vmap or jax.lax.map",
                )
            if operand.scale_shape is None:
                continue
            try:
                check_scale_shape(operand.scale_shape, qparams.scale.shape)
                check_scale_shape(operand.scale_shape, qparams.zero_point.shape)
            except errors.GranularityError:
                raise errors.CalibrationError(
                    f"a scale of shape {tuple(qparams.scale.shape)} does not fit",
                    where=where,
                    why=f"the plan has scales of shape {operand.scale_shape}; a leading axis is a "
                    "batch of cells",
                    fix="map over the cells with jax.vmap or jax.lax.map",
                ) from None
