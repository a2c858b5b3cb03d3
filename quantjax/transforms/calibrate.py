"""``qj.calibrate``: statistics to quantization parameters, at any width, by any rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import Fault, QParams
from quantjax.interpreter import Role, leaves_by_path
from quantjax.meshes import automatic
from quantjax.planning import Plan
from quantjax.quantizer import RangeMode
from quantjax.ranges import FitRule, IndexedRule, RangeRule, Target, checked_rule, derive_many
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.statistics import Statistics
from quantjax.transforms.check import REASONS, check
from quantjax.transforms.observe import State
from quantjax.transforms.operands import (
    Bits,
    by_role,
    check_used,
    covering,
    holding_what_was_seen,
    is_a_choice,
    statistics_for,
    weight_at_hand,
    width_of,
)
from quantjax.transforms.sites import check_plan
from quantjax.transforms.steps import over_steps

QState = dict[str, dict[str, QParams]]
AnyRule = RangeRule | IndexedRule | FitRule


def calibrate(
    plan: Plan,
    state: State,
    params: Any,
    *,
    weight_bits: Bits | None = None,
    activation_bits: Bits | None = None,
    gradient_bits: Bits | None = None,
    output_bits: Bits | None = None,
    bias_bits: Bits | None = None,
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
      weight_bits, activation_bits, gradient_bits, output_bits, bias_bits: one width for all, or
        ``{site: width}`` for some; arrays may be traced, and are under ``vmap`` or ``lax.map`` of
        a sweep. A site of layers stacked in a scan also takes a width for each layer. Minifloats
        take ``qj.FloatBits(exponent, mantissa)`` too. Default: the quantizer's own. 0 passes the
        operand through.
      rule: one range rule for all, in place of each quantizer's own; ``qj.ranges.stack(...)[i]``
        makes the rule itself a traced axis. Live ranges keep their own. A fit (``qj.ranges.TWN``)
        needs the tensor, so it serves weights.
      weight_rule, activation_rule: the same for weights, and for activations, gradients and
        outputs; they go before ``rule``. Biases keep their quantizer's own.

    Raises:
      CalibrationError: a site was never observed, or its histogram was left out and the rule reads
        one.
      BitsError: a width that the container cannot hold.
      PolicyError: a width for operands that are not quantized.
      PlanMismatchError: a parameter tree without the weights that were planned for.
      DataError: a concrete weight that holds NaN or infinity; negative activations for unsigned
        codes without a zero point.

    Sharp edges: under a trace nothing can be raised for values; the scale is NaN instead, and
    ``qj.check(qstate)`` says why. Widths have no gradient, though the scale depends on them:
    estimators that learn a width have (``qj.estimators.ROUNDED_WIDTH``).
    """
    asked = by_role(weight_bits, activation_bits, gradient_bits, output_bits, bias_bits)
    check_plan(plan, verb="calibrate")
    for given in (rule, weight_rule, activation_rule):
        if given is not None:
            checked_rule(given, "qj.calibrate")

    def rule_of(operand: OperandPlan) -> AnyRule | None:
        if operand.operand.role is Role.BIAS:
            return None
        return (weight_rule if operand.is_weight else activation_rule) or rule

    return calibrate_by(plan, state, params, asked, rule_of)


def calibrate_by(
    plan: Plan,
    state: State,
    params: Any,
    asked: Mapping[Role, Bits | None],
    rule_of: Callable[[OperandPlan], AnyRule | None],
) -> QState:
    """:func:`calibrate`, with widths by role and a rule for each operand; None is its own."""
    if not isinstance(state, Mapping):
        raise errors.CalibrationError(
            f"the state is a {type(state).__name__}",
            where="qj.calibrate",
            why="qj.observe returns what the model does, and the state",
            fix="y, state = qj.observe(f, plan)(state, params, x)",
        )
    plan.check_params(params, ahead=state, call="qj.calibrate(plan, state, params)")
    leaves = leaves_by_path(params)
    check_used(plan, asked)
    found: dict[tuple[str, str], QParams] = {}
    jobs: list[_Job] = []
    for entry in plan.quantized:
        name = entry.site.name
        for operand in entry.quantized:
            quantizer = operand.quantizer
            assert quantizer is not None
            bits, theta = width_of(entry, operand, asked.get(operand.operand.role))
            if quantizer.range is RangeMode.LIVE:
                found[name, operand.key] = quantizer.width(bits, theta)
                continue
            chosen = rule_of(operand) or quantizer.rule
            weight = weight_at_hand(plan, entry, operand, leaves)
            if weight is not None and _fits(chosen):
                fit = partial(_fitted, entry, operand)
                found[name, operand.key] = automatic(fit, chosen, weight, bits, theta)
            else:
                ranged = _ranged(entry, operand, chosen)
                reader = f"the rule {ranged.name}" if ranged.reads_distribution else None
                stats = statistics_for(entry, operand, state, weight, bits, histogram_for=reader)
                jobs.append(_Job(entry, operand, ranged, stats, quantizer.target(bits, theta)))
    for job, qparams in _by_rule(jobs):
        found[job.entry.site.name, job.operand.key] = qparams
    qstate = {
        entry.site.name: {o.key: _started(entry, o, found) for o in entry.quantized}
        for entry in plan.quantized
    }
    _raise_problems(plan, qstate)
    return qstate


def _started(
    entry: SitePlan, operand: OperandPlan, found: Mapping[tuple[str, str], QParams]
) -> QParams:
    assert operand.quantizer is not None
    started = over_steps(operand.quantizer.started, entry.site.steps)
    return cast(QParams, started(found[entry.site.name, operand.key]))


def _ranged(entry: SitePlan, operand: OperandPlan, rule: AnyRule) -> RangeRule | IndexedRule:
    """A rule that goes by statistics."""
    if isinstance(rule, FitRule) or (isinstance(rule, IndexedRule) and rule.fits):
        raise errors.CalibrationError(
            f"the rule {rule.name} needs the tensor itself",
            where=f"site {entry.site.name}, {operand.key}",
            why="calibration keeps statistics of activations, not their values",
            fix="weight_rule= for the weights alone; qj.ranges.MIN_MAX, or another range rule",
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


def _fitted(
    entry: SitePlan, operand: OperandPlan, rule: AnyRule, weight: jax.Array, *width: Any
) -> QParams:
    assert operand.quantizer is not None
    shape = operand.scale_shape or ()
    fit = partial(operand.quantizer.qparams_of, scale_shape=shape, rule=rule)
    return cast(QParams, over_steps(fit, entry.site.steps)(weight, *width))


def _by_rule(jobs: list[_Job]) -> Iterator[tuple[_Job, QParams]]:
    """QParams of all operands, those of one rule in one program."""
    while jobs:
        first = jobs[0].rule
        same = [job for job in jobs if job.rule is first]
        jobs = [job for job in jobs if job.rule is not first]
        found = derive_many(first, [(job.statistics, job.target) for job in same])
        for job, range_found in zip(same, found, strict=True):
            qparams = covering(job.entry, job.operand, range_found, job.target)
            yield job, holding_what_was_seen(job.entry, job.operand, qparams, job.statistics)


def _raise_problems(plan: Plan, qstate: QState) -> None:
    known = all(concrete(leaf) is not None for leaf in jax.tree.leaves(qstate))
    problems = check(qstate) if known else []
    # What no layer saw has raised before; one that never takes a branch is not computed either.
    never, _ = REASONS[Fault.NEVER_CALIBRATED]
    choices = {entry.site.name for entry in plan.quantized if is_a_choice(entry)}
    problems = [one for one in problems if one.what != never or one.site not in choices]
    if problems:
        first = problems[0]
        raise errors.DataError(
            first.what,
            where=f"site {first.site}, {first.operand}"
            + (f", and {len(problems) - 1} more" if len(problems) > 1 else ""),
            fix=first.fix,
        )
