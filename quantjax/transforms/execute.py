"""``qj.execute``: the model with integer products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax._compat import concrete, varying_like
from quantjax.affine import QParams
from quantjax.data_free import dequantize_params
from quantjax.integers import integer_product, shift_of
from quantjax.interpreter import (
    Addition,
    Carried,
    Outcome,
    Product,
    Program,
    ProgramCache,
    Visit,
    evaluate,
    evaluate_origin,
    leaves_by_path,
)
from quantjax.interpreter.trace import Function
from quantjax.meshes import automatic, first_as, together
from quantjax.planning import Plan
from quantjax.products import (
    Execution,
    decoded_rows,
    in_float,
    multiply,
    quantized_rows,
)
from quantjax.qtensor import QTensor
from quantjax.site_plan import OperandPlan, SitePlan, resized
from quantjax.transforms.after import Sums, added, additions_of, bits_of, finish, sums_of
from quantjax.transforms.calibrate import QState
from quantjax.transforms.executed_codes import (
    Codes,
    encoded,
    in_float_codes,
    integer_operand,
    not_differentiable,
    stored_codes,
)
from quantjax.transforms.keys import Key, SiteKeys, next_keys, site_keys
from quantjax.transforms.live import live_qparams
from quantjax.transforms.qstate import checked_qstate
from quantjax.transforms.settle import settle_of
from quantjax.transforms.sites import check_arguments, check_given, check_program
from quantjax.transforms.steps import over_steps
from quantjax.transforms.stored import (
    StoredWeight,
    check_uses,
    for_every_entry,
    frozen_leaves,
    not_frozen,
    stored_weights,
    with_frozen,
)
from quantjax.transforms.whole import whole_widths

INTEGER_FORMS = (Execution.INTEGER, Execution.GROUPED)


def execute(f: Function, plan: Plan) -> Callable[..., Any]:
    """``execute(f, plan)(qstate, qparams, *inputs)``: ``f`` with integer products.

    A site whose operands are both quantized multiplies int8 by int8 into int32, folds zero points
    by sums, and scales once in float32; group by group where scales vary along the sum. What is
    fixed beforehand (weights, static ranges) comes from ``qparams`` and ``qstate``; live ranges are
    those of each tensor. A weight that is quantized alone is multiplied as codes in float. The
    plan's column ``executed`` says which, and why a site is executed as it is simulated. All else
    is computed as the model has it. Codes and sums equal those of ``qj.fake_quantize``.

    Args (of the returned function):
      qstate: from ``qj.calibrate``. Of a frozen weight, the QParams in ``qparams`` are used; those
        that it holds are compared with them, under ``jit`` in every call, all scales of a table for
        one token (int4 in groups of 32, 32000 x 512: 1.0 ms, 0.13 without). They may be left out:
        ``{site: {"activation": operands["activation"]} for site, operands in qstate.items()}``.
      qparams: from ``qj.freeze``; leaves that are still floats are encoded when it runs.

    Raises (of the returned function):
      FreezeError: QParams of a frozen weight that are not those of ``qstate``; an operand at
        width 0, or a zero point that int8 does not hold.
      PlanMismatchError, CalibrationError: as ``qj.fake_quantize``.

    Activations that are rounded at random need ``key=``; with the key of ``qj.fake_quantize`` they
    are rounded alike.

    Sharp edges: integers cannot carry NaN. A NaN in an activation has the code of 0; under a trace,
    QParams that cannot be executed make the site's output NaN. Integer products have no derivative:
    a gradient through one raises ``FreezeError``. Products have the forms of the platform that the
    program is lowered for, so one may be exported for a GPU on a CPU; codes of activations divide
    as the backend in use does when it is traced (a GPU moves 2 % of exact ties then). Call it under
    ``jax.jit``: eagerly, the floats of frozen weights are computed as well, and not used.

    >>> import jax.numpy as jnp, quantjax as qj
    >>> f = lambda p, x: x @ p["w"]
    >>> params, x = {"w": jnp.array([[0.5], [1.0]])}, jnp.array([[1.0, 3.0]])
    >>> plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    >>> y, state = qj.observe(f, plan)(qj.init(plan), params, x)
    >>> qstate = qj.calibrate(plan, state, params)
    >>> qparams = qj.freeze(plan, qstate, params)
    >>> y = qj.execute(f, plan)(qstate, qparams, x)
    >>> bool(y == qj.fake_quantize(f, plan)(qstate, params, x))
    True

    Source: Jacob et al., Quantization and training of neural networks for efficient
    integer-arithmetic-only inference, 2018, section 2.3.
    """
    check_arguments(f, plan, verb="execute")
    programs = ProgramCache(f)
    planned = {entry.site.name: entry for entry in plan.quantized}
    stored = {weight.entry.site.name: weight for weight in stored_weights(plan)}

    def executing(qstate: QState, qparams: Any, *inputs: Any, key: Key | None = None) -> Any:
        check_given(f, inputs, verb="execute", key=key)
        params = dequantize_params(qparams)
        form = "qj.execute(f, plan)(qstate, qparams, x)"
        plan.check_params(params, ahead=qstate, call=form)
        frozen = frozen_leaves(qparams)
        qstate = with_frozen(plan, stored, whole_widths(qstate), frozen)
        qstate = checked_qstate(plan, qstate)
        _check_widths(plan, qstate)
        qstate, params, inputs = together(qstate, params, inputs)
        program = programs(params, *inputs)
        check_program(plan, program)
        check_uses(plan, program, stored, frozen)

        def handler(visit: Visit) -> Outcome:
            entry = planned[visit.site.name]
            executed = executed_product(entry, visit)
            outcome = Outcome(
                executed.out, state=executed.state, kept=_sums(entry, visit, executed)
            )
            if visit.site.bias is not None:
                return outcome
            return finish(entry, outcome, visit.value.qparams, visit.state)

        def addition(met: Addition) -> Outcome:
            return added(planned[met.site.name], met, met.value.qparams, met.state)

        keys = site_keys(not_frozen(plan, stored, frozen), key)
        values = _values(plan, program, stored, qstate, frozen, params, keys)
        carried, additions = Carried(values, keys), additions_of(planned, addition)
        run = partial(evaluate, additions=additions, settle=settle_of(program))
        return run(program, handler, frozenset(planned), carried, params, *inputs).result

    return executing


def _sums(entry: SitePlan, visit: Visit, executed: Executed) -> Sums | None:
    """For a bias in the units of the sums."""
    left, right = executed.operands
    if left is None or right is None:
        return None
    bits = bits_of(entry, visit.value.qparams)
    return sums_of(entry, visit.product, (left.scale, right.scale), bits)


class ExecutionValue(NamedTuple):
    """What a planned site needs: QParams by operand, and its weight where that is coded already."""

    qparams: Mapping[str, QParams]
    weight: Codes | None


class Executed(NamedTuple):
    """One product: its result, its operands by side, None for one in float, and the next key."""

    out: jax.Array
    operands: tuple[Codes | None, Codes | None]
    state: Key | None


def executed_product(planned: SitePlan, visit: Visit) -> Executed:
    """One planned product in the form that the plan chose."""
    keys = next_keys(visit.state)
    entry = resized(planned, visit.site)
    raw, value = (visit.lhs, visit.rhs), visit.value
    if not any(operand.quantizer for operand in entry.operands):
        return Executed(visit.product.bind(*raw), (None, None), keys.after)
    if visit.product.op.is_lookup:
        return _looked_up(entry, visit, keys)
    found: dict[int, Codes | None] = {}
    for operand in entry.operands:
        side = operand.operand.side
        if operand.quantizer is None:
            found[side] = None
        elif operand.is_weight and value.weight is not None:
            found[side] = varying_like(value.weight, raw[side]).read()
        else:
            qparams = live_qparams(operand, raw[side], value.qparams[operand.key])
            found[side] = encoded(raw[side], qparams, operand.quantizer, keys.sides[side])
    pair = found[0], found[1]
    return Executed(_multiplied(entry, visit.product, raw, pair), pair, keys.after)


def _looked_up(entry: SitePlan, visit: Visit, keys: SiteKeys) -> Executed:
    (operand,) = entry.operands
    codes = visit.value.weight
    if codes is None:  # still a float
        assert operand.quantizer is not None
        qparams = live_qparams(operand, visit.lhs, visit.value.qparams[operand.key])
        arithmetic = for_every_entry(operand.quantizer).arithmetic
        rows = quantized_rows(visit.product, visit.lhs, qparams, arithmetic, keys.sides[0])
    else:
        table = varying_like(codes, visit.lhs)
        read = table.reading.of
        rows = decoded_rows(visit.product, table.codes, table.zero_point, table.scale, read=read)
    return Executed(rows, (codes, None), keys.after)


def _multiplied(
    entry: SitePlan,
    product: Product,
    raw: tuple[jax.Array, jax.Array],
    operands: tuple[Codes | None, Codes | None],
) -> jax.Array:
    assert entry.form is not None
    assert entry.sizing is not None
    quantizers = {operand.operand.side: operand.quantizer for operand in entry.operands}
    if entry.form.execution in INTEGER_FORMS:
        integers = []
        for side, codes in enumerate(operands):
            quantizer = quantizers[side]
            assert codes is not None
            assert quantizer is not None
            if jnp.issubdtype(codes.codes.dtype, jnp.floating):
                codes = codes._replace(codes=not_differentiable(entry.site.name, codes.codes))
            integers.append(integer_operand(codes, quantizer))
        return integer_product(product, *integers)
    sides = [
        in_float(x) if codes is None else in_float_codes(codes)
        for x, codes in zip(raw, operands, strict=True)
    ]
    return multiply(product, raw, sides[0], sides[1], entry.sizing)


def _values(
    plan: Plan,
    program: Program,
    stored: Mapping[str, StoredWeight],
    qstate: QState,
    frozen: Mapping[str, QTensor],
    params: Any,
    keys: Mapping[str, Key],
) -> dict[str, ExecutionValue]:
    """Values of all sites; frozen weights, and those that the steps of a loop share, are codes."""
    leaves = leaves_by_path(params)
    values: dict[str, ExecutionValue] = {}
    for entry in plan.quantized:
        name, ready = entry.site.name, None
        is_shared = name in program.repeated and not entry.site.op.is_lookup  # by steps of a loop
        for operand in entry.quantized:
            if not operand.is_weight:
                continue
            qparams = qstate[name][operand.key]
            if name in stored and stored[name].path in frozen:
                tensor = frozen[stored[name].path]
                codes, reading = stored_codes(stored[name], tensor, is_shared=is_shared)
                ready = Codes(codes, jnp.round(qparams.zero_point), qparams.scale, reading)
            elif is_shared:
                weight = evaluate_origin(program.weights[name], leaves)
                code = over_steps(partial(_encoded_weight, operand), entry.site.steps)
                given = weight, qparams, keys.get(name)
                ready = automatic(code, *given, specs=first_as(weight))
        values[name] = ExecutionValue(dict(qstate[name]), ready)
    return values


def _encoded_weight(
    operand: OperandPlan, weight: jax.Array, qparams: QParams, key: Key | None
) -> Codes:
    assert operand.quantizer is not None
    format = operand.quantizer.format
    codes = encoded(weight, live_qparams(operand, weight, qparams), operand.quantizer, key)
    if format.largest_centered_code(symmetric=operand.quantizer.symmetric) is None:
        return codes
    return codes._replace(codes=codes.codes.astype(format.storage_dtype))


def _check_widths(plan: Plan, qstate: QState) -> None:
    for entry in plan.quantized:
        for operand in entry.operands:
            if operand.quantizer is None:
                continue
            qparams = qstate[entry.site.name][operand.key]
            widths, zeros = concrete(qparams.bits), concrete(qparams.zero_point)
            where = f"site {entry.site.name} ({entry.site.op.value}), {operand.key}"
            if widths is not None and not widths.all():
                raise errors.FreezeError(
                    "an operand at 0 bits (bypass) cannot be executed",
                    where=where,
                    why="there are no codes to multiply",
                    fix="plan the site without this quantizer, or run qj.fake_quantize",
                )
            scales = concrete(qparams.scale)
            if zeros is None or scales is None or np.isnan(scales).any():
                continue
            _check_zero_points(operand, qparams, where, entry)


def _check_zero_points(operand: OperandPlan, qparams: QParams, where: str, entry: SitePlan) -> None:
    quantizer, zeros = operand.quantizer, np.asarray(qparams.zero_point)
    assert quantizer is not None
    if quantizer.symmetric and zeros.any():
        raise errors.FreezeError(
            "a symmetric quantizer with a zero point",
            where=where,
            fix="plan with symmetric=False, or leave the zero point at 0",
        )
    shift = shift_of(quantizer.format)
    integer = entry.form is not None and entry.form.execution in INTEGER_FORMS
    if not integer or _fit_int8(zeros, shift):
        return
    in_use = over_steps(lambda q: quantizer.arithmetic.resolved(q, ()), entry.site.steps)(qparams)
    if not _fit_int8(np.asarray(in_use.zero_point), shift):
        raise errors.FreezeError(
            f"a zero point outside {shift - 128}..{shift + 127}",
            where=where,
            why="int8 does not hold it",
            fix="calibrate, which keeps zero points among the codes, as LSQ_PLUS does in training",
        )


def _fit_int8(zeros: np.ndarray, shift: int) -> bool:
    return bool(np.all(np.abs(np.round(zeros) - shift + 0.5) < 128))
