"""``qj.init`` and ``qj.observe``: run in float and collect statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from quantjax import errors, statistics
from quantjax._compat import concrete
from quantjax.arguments import expect
from quantjax.interpreter import (
    Addition,
    Additions,
    Carried,
    Op,
    Outcome,
    Product,
    ProgramCache,
    Role,
    Visit,
    evaluate,
)
from quantjax.interpreter.trace import Function
from quantjax.planning import Plan
from quantjax.printing import shape_text
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.statistics import BINS, TORCH_AVERAGING_CONSTANT, AxisName, Statistics
from quantjax.statistics.collection import expect_mask
from quantjax.transforms.sites import check_arguments, check_given, check_plan, check_program
from quantjax.transforms.steps import repeat_steps

State = dict[str, dict[str, Statistics]]


def observed_operands(plan: Plan, entry: SitePlan) -> tuple[OperandPlan, ...]:
    """Operands whose statistics come from running the model, not from its parameters."""

    def derivable(operand: OperandPlan) -> bool:
        if operand.operand.role is Role.BIAS:
            return True
        return operand.is_weight and plan.weights[entry.site.name].derivable

    return tuple(o for o in entry.quantized if o.scale_shape is not None and not derivable(o))


def init(
    plan: Plan,
    *,
    averaging_constant: float | jax.Array = TORCH_AVERAGING_CONSTANT,
    histogram_bins: int | None = BINS,
) -> State:
    """Empty statistics, ``{site: {operand: Statistics}}``, for all that has to be observed.

    Weights are not among them: ``qj.calibrate`` reads them from the parameters. Nor are live
    ranges. Layers stacked in a scan have statistics each, a leading axis; time steps share theirs.

    Args:
      averaging_constant: of the moving average; an array may be traced.
      histogram_bins: of each group, a power of two. None keeps no histogram: observing then takes
        about half as long, and what is left are the rules that read none (``MIN_MAX``,
        ``MOVING_AVERAGE``, ``constant``, ``sigma``, ``ACIQ_GAUSSIAN``, ``SAWB``, ``LSQ``).
    """
    check_plan(plan, verb="init")
    state: State = {}
    for entry in plan.quantized:
        operands = observed_operands(plan, entry)
        if operands:
            fresh = {
                o.key: statistics.init(
                    o.scale_shape or (),
                    averaging_constant=averaging_constant,
                    histogram_bins=histogram_bins,
                )
                for o in operands
            }
            state[entry.site.name] = repeat_steps(fresh, entry.site.steps)
    return state


def observe(
    f: Function, plan: Plan, *, axis_name: AxisName = None
) -> Callable[..., tuple[Any, State]]:
    """``observe(f, plan)(state, params, *inputs, where=None) -> (f(params, *inputs), state)``.

    Runs the model in float, bit for bit as it is, and updates the statistics of every operand whose
    range is fixed. Works under ``jit``, ``scan`` and ``vmap``. Compiled with some thousand rows,
    XLA may compute a residual sum once that it computes twice in the model alone: last places
    differ.

    A batch that is spread over devices: under ``jit`` with sharded inputs, nothing has to be done.
    Inside ``shard_map``, give ``axis_name``, and each device has the statistics of the whole batch.
    Shards that were observed apart are merged by ``qj.merge_states``, without moving averages.

    Args:
      axis_name: the mesh axes that the batch is spread over.

    Args (of the returned function):
      state: from ``qj.init`` or an earlier call.
      where: True for entries that count; its shape is a prefix of every observed activation's
        (usually the batch axis alone).

    Raises:
      PlanMismatchError: other sites, or weights of other shapes, than those planned.
      DataError: NaN, infinity or nothing at all in concrete inputs, or in what they lead to; -inf,
        of a mask that is added to logits, may be in inputs alone. Under a trace the QParams become
        NaN, and ``qj.check`` says why.
    """
    check_arguments(f, plan, verb="observe")
    programs = ProgramCache(f)
    planned = {e.site.name: e for e in plan.quantized if observed_operands(plan, e)}
    handled = frozenset(planned)

    def observing(
        state: State, params: Any, *inputs: Any, where: Bool[Array, "..."] | None = None
    ) -> tuple[Any, State]:
        check_given(f, inputs, verb="observe", where=where)
        form = "qj.observe(f, plan)(state, params, x)"
        plan.check_params(params, ahead=state, call=form)
        where = expect_mask(where)
        check_inputs(inputs, where)
        program = programs(params, *inputs)
        check_program(plan, program)

        def handler(visit: Visit) -> Outcome:
            entry = planned[visit.site.name]
            out = visit.product.bind(visit.lhs, visit.rhs)
            after = updated(visit, entry, plan, axis_name)
            if visit.site.bias is None:
                after = with_output(entry, out, after, visit.shared, axis_name)
            return Outcome(out, after)

        def addition(met: Addition) -> Outcome:
            out = met.add(met.out, met.bias)
            after = with_output(planned[met.site.name], out, met.state, met.shared, axis_name)
            return Outcome(out, after)

        names = frozenset(name for name, entry in planned.items() if entry.planned(Role.OUTPUT))
        result, after, _ = evaluate(
            program,
            handler,
            handled,
            Carried({}, planned_statistics(plan, state), where),
            params,
            *inputs,
            additions=Additions(addition, names),
        )
        check_statistics(after)
        return result, after

    return observing


def statistics_of(entry: SitePlan, operand: OperandPlan, state: State) -> Statistics:
    """The statistics of one operand; raises ``CalibrationError`` where they are another plan's."""
    name = entry.site.name
    expected = (*entry.site.steps, *(operand.scale_shape or ()))
    fix = "state = qj.init(plan); y, state = qj.observe(f, plan)(state, params, x)"
    expect(state, Mapping, argument="state", where=f"site {name}", fix=fix)
    operands = state.get(name, {})
    expect(operands, Mapping, argument="an entry of the state", where=f"site {name}", fix=fix)
    stats = operands.get(operand.key)
    if stats is None:
        raise errors.CalibrationError(
            "the state has no statistics for a planned operand",
            where=f"site {name}, {operand.key}",
            fix="start from state = qj.init(plan), with the same plan",
        )
    expect(
        stats,
        Statistics,
        argument="an entry of the state",
        where=f"site {name}, {operand.key}",
        fix=fix,
    )
    if stats.scale_shape != expected:
        raise errors.CalibrationError(
            f"statistics of shape {stats.scale_shape} do not fit scales of {expected}",
            where=f"site {name}, {operand.key}",
            why="the granularity is fixed when the state is made",
            fix="observe again from state = qj.init(plan)",
        )
    return stats


def planned_statistics(plan: Plan, state: State) -> State:
    """The statistics of all observed operands; raises where one is another plan's."""
    found = {
        entry.site.name: {o.key: statistics_of(entry, o, state) for o in operands}
        for entry in plan.quantized
        if (operands := observed_operands(plan, entry))
    }
    return found


def updated(
    visit: Visit, entry: SitePlan, plan: Plan, axis_name: AxisName
) -> dict[str, Statistics]:
    """The statistics of one site after one visit of its product; its state are those before it."""
    after = dict(visit.state)
    for operand in observed_operands(plan, entry):
        if operand.operand.role is not Role.OUTPUT:
            side = operand.operand.side
            x = _aside(visit.product, side, lax.stop_gradient((visit.lhs, visit.rhs)[side]))
            mask = None if operand.is_weight else visit.shared
            after[operand.key] = _update(entry, operand, x, after[operand.key], mask, axis_name)
    return after


def with_output(
    entry: SitePlan,
    out: jax.Array,
    seen: dict[str, Statistics],
    mask: jax.Array | None,
    axis_name: AxisName,
) -> dict[str, Statistics]:
    """The statistics of one site, those of its output after it was seen."""
    operand = entry.planned(Role.OUTPUT)
    if operand is None or operand.scale_shape is None:
        return seen
    x = lax.optimization_barrier(lax.stop_gradient(out))
    return {**seen, operand.key: _update(entry, operand, x, seen[operand.key], mask, axis_name)}


def _aside(product: Product, side: int, x: jax.Array) -> jax.Array:
    """The operand for statistics, such that XLA computes the product's as in the model alone.

    It would compute an operand once for the product and once more in the loop that reduces it, and
    vectorize the first otherwise if it is also read in another shape than the product's own, which
    for a dot is the matrix of free by contracted axes.
    """
    shape = x.shape
    if product.op is Op.DOT:
        _, contracted, _ = product.axes(side)
        (_, batching) = product.params["dimension_numbers"]
        roles = [(a in contracted, a in batching[side]) for a in range(x.ndim)]
        runs = [list(run) for _, run in itertools.groupby(range(x.ndim), key=roles.__getitem__)]
        x = x.reshape([math.prod(shape[a] for a in run) for run in runs])
    return lax.optimization_barrier(x).reshape(shape)


def _update(
    entry: SitePlan,
    operand: OperandPlan,
    x: jax.Array,
    seen: Statistics,
    mask: jax.Array | None,
    axis_name: AxisName,
) -> Statistics:
    site = entry.site
    where = f"site {site.name} ({site.op.value}), {operand.key} {shape_text(x.shape)}"
    if x.size == 0:
        raise errors.DataError(
            "an empty tensor has no range", where=where, fix="observe a batch of one or more"
        )
    if mask is not None:
        if x.shape[: mask.ndim] != mask.shape:
            raise errors.DataError(
                f"the mask of shape {shape_text(mask.shape)} does not fit",
                where=where,
                why="a mask has the leading axes of every observed activation",
                fix="pass where= of shape (batch,), and keep the batch axis first in the model",
            )
        else:
            mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return statistics.update(seen, x, where=mask, axis_name=axis_name)


def check_inputs(inputs: Any, where: Any) -> None:
    """Concrete inputs only; ahead of any work."""
    mask = None if where is None else concrete(where)
    if mask is not None and not mask.any():
        raise errors.DataError(
            "the mask leaves no sample",
            where=f"where= of shape {shape_text(mask.shape)}",
            fix="skip this batch",
        )
    floats = {
        f"input leaf {index} of shape {shape_text(values.shape)}": values
        for index, leaf in enumerate(jax.tree.leaves(inputs))
        if jnp.issubdtype(jax.typeof(leaf).dtype, jnp.floating)
        if (values := concrete(leaf)) is not None
    }
    if floats and not any(values.size for values in floats.values()):  # one may be an empty cache
        raise errors.DataError(
            "an empty calibration batch", where=next(iter(floats)), fix="observe one sample or more"
        )
    for where_text, values in floats.items():
        kept = values
        if mask is not None and values.shape[: mask.ndim] == mask.shape:
            kept = values[mask.astype(bool)]
        kept = kept.astype(np.float32)
        bad = ~np.isfinite(kept) & ~np.isneginf(kept)  # which is in masks that are added to logits
        if bad.any():
            raise errors.DataError(
                f"{int(bad.sum())} values of the calibration batch are NaN or infinite",
                where=where_text,
                why="a range that has to hold them does not exist",
                fix="drop those samples, or mask them with where=",
            )


def check_statistics(state: State) -> None:
    """Concrete statistics only: a NaN that arose inside the model."""
    for name, operands in state.items():
        for key, stats in operands.items():
            low = concrete(stats.extremes.low)
            high = concrete(stats.extremes.high)
            if low is None or high is None:
                continue
            bounds = np.stack([low, -high])  # nothing seen is +inf in both
            if np.any(np.isnan(bounds) | np.isneginf(bounds)):
                raise errors.DataError(
                    "an observed activation is NaN or infinite",
                    where=f"site {name}, {key}",
                    why="no input is NaN: one of -inf made it, or the model itself",
                    fix="drop samples with -inf, or mask them with where=; of others find the "
                    "operation with jax.config.update('jax_debug_nans', True)",
                )
