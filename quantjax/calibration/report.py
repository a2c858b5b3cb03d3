"""``calibration_report``: what each range rule makes of what was observed, site by site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import QParams
from quantjax.calibration.measure import bars, measure, outermost, points
from quantjax.calibration.results import CalibrationReport, OperandRanges, RuleRange
from quantjax.calibration.rules import RULES
from quantjax.interpreter import Role, leaves_by_path
from quantjax.planning import Plan
from quantjax.printing import shape_text
from quantjax.quantizer import Quantizer, RangeMode
from quantjax.ranges import FitRule, RangeRule, Target, derive_many, several
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.statistics import Statistics, as_integer
from quantjax.transforms.check import check
from quantjax.transforms.observe import State
from quantjax.transforms.operands import (
    Bits,
    by_role,
    check_used,
    covering,
    statistics_for,
    weight_at_hand,
    width_of,
)
from quantjax.transforms.steps import over_steps

Rule = RangeRule | FitRule


def calibration_report(
    plan: Plan,
    state: State,
    params: Any,
    *,
    rules: Sequence[Rule] | None = None,
    weight_bits: Bits | None = None,
    activation_bits: Bits | None = None,
    gradient_bits: Bits | None = None,
    output_bits: Bits | None = None,
    on_rule: Callable[[int], None] | None = None,
) -> CalibrationReport:
    """Every rule's range for every operand, the share of values that it clips, and its SQNR.

    Runs no model: all of it comes from statistics that were observed once, and from the weights.
    Weights are measured on their values. Activations are measured on one value for each bin of
    their histogram, so that a share is known up to what lies in one bin.

    Args:
      plan, state, params: as for ``qj.calibrate``.
      rules: range rules, and fits, which serve the weights; default: all of
        ``quantjax.calibration.RULES``.
      weight_bits, activation_bits, gradient_bits, output_bits: as for ``qj.calibrate``, with known
        values; operands of width 0 are left out.
      on_rule: called with 1 after each rule; compiling them takes a second or more each.

    Raises:
      CalibrationError: nothing was observed, without a histogram, or nothing has a fixed range;
        values that are tracers.
      PolicyError: no rules, the same twice, or something else than a rule.
      DataError: weights or observed activations that are not finite, or have no entries; a rule
        that finds no range.
      As ``qj.calibrate`` for widths and parameters.

    Sharp edges: live ranges are left out, because they are no result of calibration, and so are
    biases, whose rule is their quantizer's own. Of activations a histogram is known, no values:
    they are measured as if spread evenly within its bins. That says little of steps narrower than a
    bin, above some 10 bits, and of values that are few or lie on a grid: pixels ``k/255`` without
    any error at 8 bits have 75 dB here, and of a saturated ``tanh`` a bin is inside or outside.
    """
    chosen = check_rules(RULES.values() if rules is None else rules)
    widths = by_role(weight_bits, activation_bits, gradient_bits, output_bits, None)
    del widths[Role.BIAS]  # which has no range to choose
    seen = list(_seen(plan, state, params, widths))
    if not seen:
        raise errors.CalibrationError(
            "no operand has a fixed range to report on",
            where=f"plan with {len(plan.quantized)} quantized sites",
            why="live ranges, and operands of width 0, have none",
            fix="a policy with fixed ranges, such as qj.uniform_policy()",
        )
    for each in seen:
        _check_entries(each)
    found: list[list[_Applied]] = [[] for _ in seen]
    for rule in chosen:
        for index, applied in _applied(rule, seen):
            found[index].append(applied)
        if on_rule is not None:
            on_rule(1)
    if not any(found):
        raise errors.CalibrationError(
            "none of the rules serves an operand of the plan",
            where=", ".join(rule.name for rule in chosen)[:200],
            why="fits need the tensor itself, so they serve weights",
            fix="a range rule such as qj.ranges.MIN_MAX",
        )
    return CalibrationReport(
        tuple(
            _operand(operand, applied, layer)
            for operand, applied in zip(seen, found, strict=True)
            for layer in np.ndindex(operand.entry.site.steps)
            if applied and np.asarray(operand.target.bits)[layer] > 0
        )
    )


class _Seen(NamedTuple):
    """One operand, and what there is to go by; ``weight`` is None where it was observed."""

    entry: SitePlan
    operand: OperandPlan
    weight: jax.Array | None
    statistics: Statistics
    target: Target

    @property
    def quantizer(self) -> Quantizer:
        assert self.operand.quantizer is not None
        return self.operand.quantizer


def _check_entries(seen: _Seen) -> None:
    """Raise for a layer of no inputs, or of no outputs."""
    if 0 in seen.operand.operand.shape:
        raise errors.DataError(
            f"{seen.operand.key} without entries has no range",
            where=f"site {seen.entry.site.name}, {shape_text(seen.operand.operand.shape)}",
            fix="leave the site out: a rule with qj.Scheme() ahead of the others",
        )


class _Applied(NamedTuple):
    """What one rule gives: low, high, and the outermost levels; an axis ahead for layers."""

    rule: str
    bounds: tuple[jax.Array, ...]
    qparams: QParams


def check_rules(rules: Any) -> tuple[Rule, ...]:
    """Raise ``PolicyError`` for no rules, the same twice, or something else than a rule."""
    chosen = several(rules)
    names = [getattr(rule, "name", repr(rule)) for rule in chosen]
    wrong = [
        name
        for rule, name in zip(chosen, names, strict=True)
        if not isinstance(rule, RangeRule | FitRule)
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if wrong or twice or not chosen:
        what = f"{', '.join(wrong)} is no rule" if wrong else "a report of no rules"
        raise errors.PolicyError(
            f"the rule {', '.join(twice)} is asked for twice" if twice and not wrong else what,
            where="rules of a calibration report",
            fix="rules=[qj.ranges.MIN_MAX, qj.ranges.MSE], each once",
        )
    return chosen


def _seen(
    plan: Plan, state: State, params: Any, widths: Mapping[Role, Bits | None]
) -> Iterator[_Seen]:
    """All operands with a fixed range and a width."""
    plan.check_params(params, ahead=state, call="calibration_report(plan, state, params)")
    check_used(plan, widths)
    leaves = leaves_by_path(params)
    for entry in plan.quantized:
        for operand in entry.quantized:
            quantizer = operand.quantizer
            assert quantizer is not None
            role = operand.operand.role
            if quantizer.range is RangeMode.LIVE or role not in widths:
                continue
            bits, theta = width_of(entry, operand, widths[role])
            known = concrete(bits)
            if known is not None and not known.any():
                continue
            weight = weight_at_hand(plan, entry, operand, leaves)
            stats = statistics_for(
                entry, operand, state, weight, bits, histogram_for="a calibration report"
            )
            _check_values(entry, operand, bits, stats)
            yield _Seen(entry, operand, weight, stats, quantizer.target(bits, theta))


def _check_values(
    entry: SitePlan, operand: OperandPlan, bits: jax.Array, stats: Statistics
) -> None:
    where = f"site {entry.site.name}, {operand.key}"
    low, high = concrete(stats.extremes.low), concrete(stats.extremes.high)
    if low is None or high is None or concrete(bits) is None:
        raise errors.CalibrationError(
            "a calibration report needs values, and these are tracers",
            where=where,
            fix="return the state from the jitted function and report outside",
        )
    bounds = np.stack([low, -high])  # nothing seen is +inf in both
    if np.any(np.isnan(bounds) | np.isneginf(bounds)):
        raise errors.DataError(
            f"{'a weight' if operand.is_weight else 'an observed activation'} is NaN or infinite",
            where=where,
            why="a range that has to hold it does not exist",
            fix="look for NaN in the weights, then in the data, then run the float model under "
            "jax.config.update('jax_debug_nans', True)",
        )


def _applied(rule: Rule, seen: Sequence[_Seen]) -> Iterator[tuple[int, _Applied]]:
    """The rule's ranges by position in ``seen``; those of a range rule come from one program."""
    if isinstance(rule, FitRule):
        for index, one in enumerate(seen):
            if one.weight is None:
                continue
            fit = partial(
                one.quantizer.qparams_of, scale_shape=one.operand.scale_shape or (), rule=rule
            )
            fitted = jax.jit(over_steps(fit, one.entry.site.steps))
            qparams = fitted(one.weight, one.target.bits, one.target.theta)
            levels = _levels(one, rule, qparams)
            yield index, _Applied(rule.name, (*levels, *levels), qparams)
        return
    ranges = derive_many(rule, [(one.statistics, one.target) for one in seen])
    for index, (one, found) in enumerate(zip(seen, ranges, strict=True)):
        qparams = covering(one.entry, one.operand, found, one.target)
        bounds = (found.low, found.high, *_levels(one, rule, qparams))
        yield index, _Applied(rule.name, bounds, qparams)


def _levels(one: _Seen, rule: Rule, qparams: QParams) -> tuple[jax.Array, jax.Array]:
    """The outermost levels, layer by layer; raises where a rule found no range."""
    site, key = one.entry.site, one.operand.key
    problems = check({site.name: {key: qparams}})
    if problems:
        raise errors.DataError(
            f"the rule {rule.name}: {problems[0].what}",
            where=f"site {site.name}, {key}",
            fix=problems[0].fix,
        )
    low, high = over_steps(partial(outermost, one.quantizer), site.steps)(qparams)
    return low, high


def _operand(one: _Seen, applied: Sequence[_Applied], layer: tuple[int, ...]) -> OperandRanges:
    """One operand, or one layer of a stack of them."""
    stats, bits = _of_layer((one.statistics, one.target.bits), layer)
    sample = points(stats)
    ranges = []
    for rule, *arrays in applied:
        bounds, qparams = _of_layer(arrays, layer)
        low, high, lowest, highest = map(np.asarray, bounds)
        found = measure(one.quantizer, sample, qparams)
        ranges.append(RuleRange(rule, low, high, lowest, highest, found.saturated, found.sqnr))
    width = int(bits)
    label = f"{one.quantizer.format.label(width)}/{one.quantizer.granularity.name}"
    return OperandRanges(
        one.entry.site.name,
        one.operand.key,
        layer,
        label,
        width,
        groups=math.prod(stats.scale_shape),
        number=int(as_integer(stats.number).sum()),
        low=float(np.min(stats.extremes.low)),
        high=float(np.max(stats.extremes.high)),
        bars=bars(stats, sample),
        rules=tuple(ranges),
    )


def _of_layer(tree: Any, layer: tuple[int, ...]) -> Any:
    """One layer's part of all arrays; as they are, where there are no layers."""
    return jax.tree.map(lambda leaf: leaf[layer], tree) if layer else tree
