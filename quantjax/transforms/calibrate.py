"""``qj.calibrate``: statistics to quantization parameters, at any width, by any rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax import errors, statistics
from quantjax._compat import concrete
from quantjax.affine import QParams
from quantjax.formats import FloatBits, MinifloatFormat, Theta
from quantjax.interpreter import Role, evaluate_origin, leaves_by_path
from quantjax.planning import OperandPlan, Plan, SitePlan
from quantjax.quantizer import RangeMode, known_overflow
from quantjax.ranges import FitRule, IndexedRule, RangeRule, Target, derive_many
from quantjax.statistics import Statistics
from quantjax.transforms.check import check
from quantjax.transforms.observe import State, statistics_of
from quantjax.transforms.steps import over_steps

QState = dict[str, dict[str, QParams]]
AnyRule = RangeRule | IndexedRule | FitRule
Bits = Float[Array, ""] | int | float | FloatBits | Mapping[str, Any]


def calibrate(
    plan: Plan,
    state: State,
    params: Any,
    *,
    weight_bits: Bits | None = None,
    activation_bits: Bits | None = None,
    rule: AnyRule | None = None,
    weight_rule: AnyRule | None = None,
    activation_rule: AnyRule | None = None,
) -> QState:
    """Derive ``{site: {operand: QParams}}`` from what was observed; runs no model.

    The cost does not depend on the data set: statistics were collected once. Weights are taken from
    ``params``.

    Args:
      plan: what to derive for.
      state: from ``qj.observe``.
      params: the tree that was planned for.
      weight_bits, activation_bits: one width for all, or ``{site: width}`` for some; arrays may be
        traced, and are under ``vmap`` or ``lax.map`` of a sweep. A site of layers stacked in a scan
        also takes a width for each layer. Minifloats take ``qj.FloatBits(exponent, mantissa)`` too.
        Default: the quantizer's own. 0 passes the operand through.
      rule: one range rule for all, in place of each quantizer's own; ``qj.ranges.stack(...)[i]``
        makes the rule itself a traced axis. Live ranges keep their own. A fit (``qj.ranges.TWN``)
        needs the tensor, so it serves weights.
      weight_rule, activation_rule: the same for one kind of operand; they go before ``rule``.

    Raises:
      CalibrationError: a site was never observed, or its histogram was left out and the rule reads
        one.
      BitsError: a width that the container cannot hold.
      PolicyError: a width for operands that are not quantized.
      PlanMismatchError: a parameter tree that is not the one planned for.
      DataError: a concrete weight that holds NaN or infinity.

    Sharp edges: under a trace nothing can be raised for values; the scale is NaN instead, and
    ``qj.check(qstate)`` says why.
    """
    plan.check_params(params)
    leaves = leaves_by_path(params)
    _check_used(plan, weight_bits, Role.WEIGHT)
    _check_used(plan, activation_bits, Role.ACTIVATION)
    weight_rule, activation_rule = weight_rule or rule, activation_rule or rule
    found: dict[tuple[str, str], QParams] = {}
    jobs: list[_Job] = []
    for entry in plan.quantized:
        name = entry.site.name
        for operand in entry.quantized:
            quantizer, is_weight = operand.quantizer, operand.is_weight
            assert quantizer is not None
            bits, theta = _width(entry, operand, weight_bits if is_weight else activation_bits)
            if quantizer.range is RangeMode.LIVE:
                found[name, operand.key] = quantizer.width(bits, theta)
                continue
            given = weight_rule if is_weight else activation_rule
            chosen = quantizer.rule if given is None else given
            weight = None
            if is_weight and plan.weights[name].derivable:
                weight = evaluate_origin(plan.weights[name], leaves)
            if weight is not None and _fits(chosen):
                shape = operand.scale_shape or ()
                fit = partial(quantizer.qparams_of, scale_shape=shape, rule=chosen)
                found[name, operand.key] = over_steps(fit, entry.site.steps)(weight, bits, theta)
            else:
                ranged = _ranged(entry, operand, chosen)
                stats = _statistics(entry, operand, state, weight, ranged, bits)
                jobs.append(_Job(entry, operand, ranged, stats, quantizer.target(bits, theta)))
    for job, qparams in _by_rule(jobs):
        found[job.entry.site.name, job.operand.key] = qparams
    qstate = {
        entry.site.name: {o.key: found[entry.site.name, o.key] for o in entry.quantized}
        for entry in plan.quantized
    }
    _raise_problems(qstate)
    return qstate


def _ranged(entry: SitePlan, operand: OperandPlan, rule: AnyRule) -> RangeRule | IndexedRule:
    """A rule that goes by statistics."""
    if isinstance(rule, FitRule) or (isinstance(rule, IndexedRule) and rule.fits):
        raise errors.CalibrationError(
            f"the rule {rule.name} needs the tensor itself",
            where=f"site {entry.site.name}, {operand.key}",
            why="calibration keeps statistics of activations, not their values",
            fix="a range rule such as qj.ranges.MIN_MAX, or range=qj.RangeMode.LIVE",
        )
    return rule


class _Job(NamedTuple):
    """One operand whose range comes from statistics."""

    entry: SitePlan
    operand: OperandPlan
    rule: RangeRule | IndexedRule
    statistics: Statistics
    target: Target


def _fits(rule: AnyRule) -> bool:
    return isinstance(rule, FitRule) or bool(isinstance(rule, IndexedRule) and rule.fits)


def _by_rule(jobs: list[_Job]) -> Iterator[tuple[_Job, QParams]]:
    """QParams of all operands, those of one rule in one program."""
    while jobs:
        first = jobs[0].rule
        same = [job for job in jobs if job.rule is first]
        jobs = [job for job in jobs if job.rule is not first]
        found = derive_many(first, [(job.statistics, job.target) for job in same])
        for job, range_found in zip(same, found, strict=True):
            quantizer, steps = job.operand.quantizer, job.entry.site.steps
            assert quantizer is not None
            calibrated = jnp.broadcast_to(
                _trailing(range_found.calibrated, range_found.low.ndim), range_found.low.shape
            )
            qparams = over_steps(quantizer.qparams_from, steps)(
                range_found._replace(calibrated=calibrated), job.target.bits, job.target.theta
            )
            yield job, qparams


def _trailing(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _statistics(
    entry: SitePlan,
    operand: OperandPlan,
    state: State,
    weight: jax.Array | None,
    rule: RangeRule | IndexedRule,
    bits: jax.Array,
) -> Statistics:
    """Of the weight itself, or of what was observed."""
    if weight is not None:
        shape, values = operand.scale_shape or (), rule.reads_distribution
        seen = partial(statistics.of_tensor, scale_shape=shape, with_values=values)
        return cast(Statistics, over_steps(seen, entry.site.steps)(weight))
    stats = _observed(entry, operand, state, bits)
    if rule.reads_distribution and stats.distribution is None:
        raise errors.CalibrationError(
            f"the rule {rule.name} reads a histogram, and none was kept",
            where=f"site {entry.site.name}, {operand.key}",
            why="qj.init(plan, histogram_bins=None) leaves it out",
            fix="qj.init(plan), and observe again",
        )
    return stats


def _observed(entry: SitePlan, operand: OperandPlan, state: State, bits: jax.Array) -> Statistics:
    stats = statistics_of(entry, operand, state)
    batches, width = concrete(stats.batches), concrete(bits)
    if batches is not None and not batches.all() and not (width is not None and (width == 0).all()):
        raise errors.CalibrationError(
            "calibration was never run",
            where=f"site {entry.site.name}, {operand.key}",
            why=""
            if not {"cond", "while"} & {*entry.site.loops}
            else "the site lies in "
            f"{' in '.join(entry.site.loops)}, and no calibration batch came there",
            fix="run y, state = qj.observe(f, plan)(state, params, x) on calibration data first",
        )
    return stats


def _check_used(plan: Plan, bits: Bits | None, role: Role) -> None:
    """Widths for operands that no quantizer touches would be ignored."""
    if bits is None:
        return
    known = {
        entry.site.name: None
        for entry in plan.quantized
        if any(operand.operand.role is role for operand in entry.quantized)
    }
    asked = list(bits) if isinstance(bits, Mapping) else ["all"] * (not known)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise errors.PolicyError(
            f"a width is given where no {role.value} is quantized",
            where=f"{role.value}_bits, site {unknown[0]}",
            why=f"sites with a quantized {role.value}: {', '.join(list(known)[:6]) or 'none'}",
            fix=f"leave {role.value}_bits out, or plan with a quantizer for it",
        )


def _width(entry: SitePlan, operand: OperandPlan, chosen: Bits | None) -> tuple[jax.Array, Theta]:
    """The width of one operand and the format's parameters, of the shape of the site's steps."""
    assert operand.quantizer is not None
    name, steps = entry.site.name, entry.site.steps
    if isinstance(chosen, Mapping):
        chosen = chosen.get(name)
    value: Any = operand.quantizer.bits if chosen is None else chosen
    format, where = operand.quantizer.format, f"site {name}, {operand.key}"
    theta: Theta = ()
    if isinstance(value, FloatBits):
        if not isinstance(format, MinifloatFormat):
            raise errors.BitsError(
                f"exponent and mantissa bits for {format.name}, which is no minifloat",
                where=where,
                fix="a single width, or plan with qj.formats.E4M3FN",
            )
        value, theta = value.bits, value.theta
    if any(np.shape(array) not in ((), steps) for array in (value, *jax.tree.leaves(theta))):
        needed = f"one of {steps}, a width for each layer, or a scalar" if steps else "a scalar"
        raise errors.BitsError(
            f"a width of shape {np.shape(value)} where {needed} is needed",
            where=where,
            fix="jax.vmap or jax.lax.map over the widths of a sweep",
        )
    # Copies: sites that share an array could not donate it, nor could the caller keep it.
    arrays = jax.tree.map(lambda array: jnp.array(array, jnp.float32), (value, theta))
    bits, theta = jax.tree.map(lambda array: jnp.broadcast_to(array, steps), arrays)
    known = concrete(value)
    if known is not None and format.known_valid(value, theta) is False:
        shown = ", ".join(f"{width:g}" for width in np.unique(known))
        every = [b for b in range(1, format.max_bits + 1) if format.known_valid(b, theta)]
        held = f"whole widths from {every[0]} up to {every[-1]}" if every else "no width"
        if theta:
            held += f" with {np.unique(np.asarray(theta['exponent_bits']))} exponent bits"
        raise errors.BitsError(
            f"{shown} bits are outside the format {format.name}",
            where=where,
            why=f"its container holds {held}, and 0 for bypass",
            fix=f"{every[-1] if every else 0} bits, or plan with qj.integer(max_bits=16)",
        )
    if known_overflow(format, value, theta):
        raise errors.BitsError(
            "so many exponent bits have levels that are too large for sums of products",
            where=where,
            why="products multiply levels, in float32, and scale what they give",
            fix="6 exponent bits at most, or a format with scale_rule=qj.formats.UNIT",
        )
    return bits, theta


def _raise_problems(qstate: QState) -> None:
    known = all(concrete(leaf) is not None for leaf in jax.tree.leaves(qstate))
    problems = check(qstate) if known else []
    if problems:
        first = problems[0]
        raise errors.DataError(
            first.what,
            where=f"site {first.site}, {first.operand}"
            + (f", and {len(problems) - 1} more" if len(problems) > 1 else ""),
            fix=first.fix,
        )
