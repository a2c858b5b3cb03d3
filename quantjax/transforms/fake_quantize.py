"""``qj.fake_quantize``: the model with quantized operands, in simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool

from quantjax import errors
from quantjax.affine import QParams
from quantjax.interpreter import (
    Addition,
    Carried,
    Outcome,
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
from quantjax.products import Coded, coded, in_float, multiply, quantized_rows
from quantjax.site_plan import OperandPlan, SitePlan, resized
from quantjax.statistics import AxisName, Statistics
from quantjax.statistics.collection import expect_mask
from quantjax.transforms.after import (
    added,
    additions_of,
    bits_of,
    finish,
    sum_with_bias,
    sums_of,
)
from quantjax.transforms.calibrate import QState
from quantjax.transforms.keys import Key, next_keys, site_keys
from quantjax.transforms.live import live_qparams
from quantjax.transforms.observe import (
    State,
    check_inputs,
    check_statistics,
    init,
    planned_statistics,
    updated,
    with_output,
)
from quantjax.transforms.qstate import checked_qstate
from quantjax.transforms.settle import settle_of
from quantjax.transforms.sites import check_arguments, check_given, check_program
from quantjax.transforms.steps import over_steps


def fake_quantize(
    f: Function, plan: Plan, *, observe: bool = False, axis_name: AxisName = None
) -> Callable[..., Any]:
    """``fake_quantize(f, plan)(qstate, params, *inputs)``: ``f`` with quantized products.

    Each planned product is ``Σ (q_x - z_x)(q_w - z_w) · (s_x · s_w)``, its sum exact, so that an
    integer program returns the same values. All else is computed as the model has it.
    Differentiable in ``params`` and ``qstate`` by each quantizer's estimator; works under ``jit``,
    ``vmap``, ``grad``. Every number in ``qstate`` may be traced. A weight that the steps of a loop
    share is quantized once, ahead of the loop.

    A plan with random roundings needs ``key=``: each site and each visit of it draws from a key of
    its own.

    Args:
      observe: return ``(y, state)``, and take ``state=`` and ``where=`` as ``qj.observe`` does: the
        statistics of what the operands are in the quantized model, for ranges that move during
        training. Without ``state=`` they start anew. No gradient flows through them.
      axis_name: of ``observe``: the mesh axes that the batch is spread over. Live ranges are those
        of each shard whatever it is.

    Raises:
      ArgumentError: an axis name without ``observe``.

    Raises (of the returned function):
      PlanMismatchError: other sites, or weights of other shapes, than those planned.
      CalibrationError: QParams are missing or of another granularity.
      KeyMissingError: a random rounding and no key.

    >>> import jax.numpy as jnp, quantjax as qj
    >>> f = lambda p, x: x @ p["w"]
    >>> params, x = {"w": jnp.array([[0.5], [1.0]])}, jnp.array([[1.0, 3.0]])
    >>> plan = qj.plan(qj.uniform_policy(weight_bits=2), qj.sites(f, params, x))
    >>> y, state = qj.observe(f, plan)(qj.init(plan), params, x)
    >>> qstate = qj.calibrate(plan, state, params)
    >>> float(f(params, x)[0, 0]), float(qj.fake_quantize(f, plan)(qstate, params, x)[0, 0])
    (3.5, 2.0)
    """
    check_arguments(f, plan, verb="fake_quantize")
    if axis_name is not None and not observe:
        raise errors.ArgumentError(
            f"an axis name, {axis_name!r}, and nothing that is observed",
            where="qj.fake_quantize",
            why="statistics alone are taken across devices; a live range is that of its shard",
            fix="observe=True, or axis_name=None",
        )
    programs = ProgramCache(f)
    planned = {entry.site.name: entry for entry in plan.quantized}

    def prepared(qstate: QState, params: Any, inputs: Any, key: Key | None) -> _Prepared:
        form = "qj.fake_quantize(f, plan)(qstate, params, x)"
        plan.check_params(params, ahead=qstate, call=form)
        qstate = checked_qstate(plan, qstate, codes_stay_real=True)
        keys = site_keys(plan, key)
        qstate, params, inputs = together(qstate, params, inputs)
        program = programs(params, *inputs)
        check_program(plan, program)
        values = site_values(plan, program, qstate, params, keys)
        return _Prepared(program, keys, values, (params, *inputs))

    def quantized(qstate: QState, params: Any, *inputs: Any, key: Key | None = None) -> Any:
        check_given(f, inputs, verb="fake_quantize", key=key)
        program, keys, values, given = prepared(qstate, params, inputs, key)

        def handler(visit: Visit) -> Outcome:
            return quantized_product(planned[visit.site.name], visit)

        def addition(met: Addition) -> Outcome:
            return added(planned[met.site.name], met, met.value.qparams, met.state)

        carried, additions = Carried(values, keys), additions_of(planned, addition)
        run = partial(evaluate, additions=additions, settle=settle_of(program))
        return run(program, handler, frozenset(planned), carried, *given).result

    def observing(
        qstate: QState,
        params: Any,
        *inputs: Any,
        key: Key | None = None,
        state: State | None = None,
        where: Bool[Array, "..."] | None = None,
    ) -> tuple[Any, State]:
        check_given(f, inputs, verb="fake_quantize", key=key, state=state, where=where)
        mask = expect_mask(where)
        check_inputs(inputs, mask)
        program, keys, values, given = prepared(qstate, params, inputs, key)

        def handler(visit: Visit) -> Outcome:
            entry, (drawn, before) = planned[visit.site.name], visit.state
            seen = updated(visit._replace(state=before), entry, plan, axis_name)
            outcome = bare_product(entry, visit._replace(state=drawn))
            if visit.site.bias is None:
                seen = with_output(entry, outcome.out, seen, visit.shared, axis_name)
                outcome = finish(entry, outcome, visit.value.qparams, drawn)
            return outcome._replace(state=_Watched(outcome.state, seen))

        def addition(met: Addition) -> Outcome:
            entry, (drawn, before) = planned[met.site.name], met.state
            outcome = sum_with_bias(entry, met, met.value.qparams, drawn)
            seen = with_output(entry, outcome.out, before, met.shared, axis_name)
            outcome = finish(entry, outcome, met.value.qparams, drawn)
            return outcome._replace(state=_Watched(outcome.state, seen))

        seen = planned_statistics(plan, init(plan) if state is None else state)
        watched = {name: _Watched(keys.get(name), seen.get(name, {})) for name in planned}
        carried, additions = Carried(values, watched, mask), additions_of(planned, addition)
        run = partial(evaluate, additions=additions, settle=settle_of(program))
        result, after, _ = run(program, handler, frozenset(planned), carried, *given)
        found = {name: after[name].statistics for name in seen}
        check_statistics(found)
        return result, found

    return observing if observe else quantized


class _Prepared(NamedTuple):
    program: Program
    keys: Mapping[str, Key]
    values: dict[str, SiteValue]
    arguments: tuple[Any, ...]


class _Watched(NamedTuple):
    """The state of a site that is quantized and observed."""

    key: Key | None
    statistics: dict[str, Statistics]


class SiteValue(NamedTuple):
    """What a planned site needs: QParams by operand, and its weight where that is coded already."""

    qparams: Mapping[str, QParams]
    weight: Coded | None = None


def site_values(
    plan: Plan, program: Program, qstate: QState, params: Any, keys: Mapping[str, Key]
) -> dict[str, SiteValue]:
    """The values of all planned sites; weights that the steps of a loop share are coded here."""
    values: dict[str, SiteValue] = {}
    leaves = leaves_by_path(params)
    for entry in plan.quantized:
        name, shared = entry.site.name, None
        for operand in entry.quantized:
            if operand.is_weight and name in program.repeated and not entry.site.op.is_lookup:
                code = over_steps(partial(_coded, operand), entry.site.steps)
                weight = evaluate_origin(program.weights[name], leaves)
                given = weight, qstate[name][operand.key], keys.get(name)
                shared = automatic(code, *given, specs=first_as(weight))
        values[name] = SiteValue(dict(qstate[name]), shared)
    return values


def quantized_product(planned: SitePlan, visit: Visit) -> Outcome:
    """One planned product on codes; the state is the site's key, if it has one.

    Its output is quantized here where no bias follows.
    """
    outcome = bare_product(planned, visit)
    if visit.site.bias is not None:
        return outcome
    return finish(planned, outcome, visit.value.qparams, visit.state)


def bare_product(planned: SitePlan, visit: Visit) -> Outcome:
    """The product alone, whatever becomes of it."""
    entry, value = resized(planned, visit.site), visit.value
    raw, keys = (visit.lhs, visit.rhs), next_keys(visit.state)
    if visit.product.op.is_lookup:
        return Outcome(_looked_up(entry, visit, keys.sides[0]), state=keys.after)
    if not any(operand.quantizer for operand in entry.operands):
        return Outcome(visit.product.bind(*raw), state=keys.after)
    sides: dict[int, Coded] = {}
    for operand in entry.operands:
        x = raw[operand.operand.side]
        if operand.quantizer is None:
            side = in_float(x)
        elif operand.is_weight and value.weight is not None:
            side = value.weight
        else:
            qparams, key = value.qparams[operand.key], keys.sides[operand.operand.side]
            side = _coded(operand, x, qparams, key)
        sides[operand.operand.side] = side
    assert entry.sizing is not None
    out = multiply(visit.product, raw, sides[0], sides[1], entry.sizing)
    factors, bits = (sides[0].factor, sides[1].factor), bits_of(entry, value.qparams)
    return Outcome(out, state=keys.after, kept=sums_of(entry, visit.product, factors, bits))


def _looked_up(entry: SitePlan, visit: Visit, key: Key | None) -> jax.Array:
    (operand,) = entry.operands
    if operand.quantizer is None:
        return visit.product.bind(visit.lhs)
    qparams = live_qparams(operand, visit.lhs, visit.value.qparams[operand.key])
    return quantized_rows(visit.product, visit.lhs, qparams, operand.quantizer.arithmetic, key)


def _coded(operand: OperandPlan, x: jax.Array, qparams: QParams, key: Key | None) -> Coded:
    assert operand.quantizer is not None
    return coded(x, live_qparams(operand, x, qparams), operand.quantizer.arithmetic, key)
