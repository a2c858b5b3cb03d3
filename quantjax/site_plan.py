"""What a plan does at one site: quantizers of its operands, how its sums are held, and why."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from quantjax import errors
from quantjax.biases import AccumulatorBias
from quantjax.granularity import OperandAxes, PerTensor
from quantjax.interpreter import Op, Operand, Role, Site, SiteStatus
from quantjax.policy import Rule, Scheme
from quantjax.printing import shape_text
from quantjax.products import (
    Execution,
    Form,
    Sizing,
    execution_form,
    group_length,
    sizing,
    sum_length,
)
from quantjax.quantizer import Quantizer, RangeMode
from quantjax.table import stored_bytes, weight_bytes


class PlanStatus(enum.Enum):
    """What a plan does at a site."""

    QUANTIZED = "quantized"
    FLOAT = "float"
    OPAQUE = "opaque"


@dataclasses.dataclass(frozen=True)
class OperandPlan:
    """One operand of a planned site; ``scale_shape`` is None for a live range."""

    operand: Operand
    quantizer: Quantizer | None
    scale_shape: tuple[int, ...] | None

    @property
    def key(self) -> str:
        """The operand's name in the site's state."""
        return self.operand.key

    @property
    def is_weight(self) -> bool:
        """By dataflow."""
        return self.operand.role is Role.WEIGHT

    @property
    def axes(self) -> OperandAxes:
        """Axes by role, for granularities."""
        return OperandAxes(self.operand.free, self.operand.contracted, self.operand.window)


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """What happens at one site, and why; ``sizing`` and ``form`` are None in float, and a lookup
    has no sums; ``after`` are its output and bias, where they have quantizers."""

    site: Site
    operands: tuple[OperandPlan, ...]
    sizing: Sizing | None
    form: Form | None
    status: PlanStatus
    reason: str
    after: tuple[OperandPlan, ...] = ()
    bias: AccumulatorBias | None = None

    @property
    def quantized(self) -> tuple[OperandPlan, ...]:
        """All that has a quantizer: operands, output and bias."""
        factors = tuple(operand for operand in self.operands if operand.quantizer is not None)
        return factors + self.after

    @property
    def bytes(self) -> int:
        """Of the weight, of all layers: codes with scales and zero points, or in float.

        Width 0 bypasses a quantizer, and a range that follows the weight keeps it in float.
        """
        for operand in self.operands:
            quantizer, shape = operand.quantizer, operand.scale_shape
            if operand.is_weight and quantizer is not None and quantizer.bits and shape:
                return stored_bytes(
                    self.site, quantizer.bits, shape, zero_points=not quantizer.symmetric
                )
        return weight_bytes(self.site)

    @property
    def stores_codes(self) -> bool:
        """Whether the weight has a quantizer, at any width."""
        return any(o.is_weight and o.quantizer is not None for o in self.operands)

    def planned(self, role: Role) -> OperandPlan | None:
        """The output or the bias, where it has a quantizer."""
        return next((o for o in self.after if o.operand.role is role), None)


def plan_site(site: Site, rule: Rule | None) -> SitePlan:
    if site.status is SiteStatus.OPAQUE:
        floats = tuple(OperandPlan(operand, None, None) for operand in site.operands)
        return SitePlan(site, floats, None, None, PlanStatus.OPAQUE, site.reason)
    if any(o.shape[axis] == 0 for o in site.operands for axis in o.contracted):
        floats = tuple(OperandPlan(operand, None, None) for operand in site.operands)
        return SitePlan(site, floats, None, None, PlanStatus.FLOAT, "float: a sum of no terms")
    scheme = rule.scheme if rule is not None else None
    operands = []
    for operand in site.operands:
        quantizer = None
        if scheme is not None:
            quantizer = scheme.quantizer(operand.role)
        operands.append(_plan_operand(site, operand, quantizer))
    after = _after(site, scheme)
    at_sums = scheme.biases if scheme is not None and site.bias is not None else None
    bias = at_sums if isinstance(at_sums, AccumulatorBias) else None
    if all(operand.quantizer is None for operand in operands) and not after and bias is None:
        reason = "no rule matches" if rule is None else "float by rule"
        return SitePlan(site, tuple(operands), None, None, PlanStatus.FLOAT, f"float: {reason}")
    size, form, notes = None, None, [site.reason]
    if all(operand.quantizer is None for operand in operands):
        notes = ["operands in float", site.reason]
    elif site.op.is_lookup:
        form = Form(Execution.ROWS)
    else:
        size, form = _sizing(site, operands)
        notes = [size.reason, form.reason if form.reason != size.reason else "", site.reason]
    status = "; ".join(note for note in notes if note)
    if bias is not None:
        _check_at_sums(site, operands)
    return SitePlan(site, tuple(operands), size, form, PlanStatus.QUANTIZED, status, after, bias)


def _after(site: Site, scheme: Scheme | None) -> tuple[OperandPlan, ...]:
    """Output and bias, where the scheme has quantizers for them and the site has them."""
    if scheme is None:
        return ()
    pairs = [(operand, scheme.quantizer(role)) for role, operand in site.results.items()]
    return tuple(_plan_operand(site, o, q) for o, q in pairs if o is not None and q is not None)


def _check_at_sums(site: Site, operands: Sequence[OperandPlan]) -> None:
    """Raise ``PolicyError`` where a site's sums have no scale that they share."""
    floats = [operand.key for operand in operands if operand.quantizer is None]
    if floats or _has_groups(operands):
        raise errors.PolicyError(
            "a bias at the scale of the sums, and they have none in common",
            where=f"site {site.name} ({site.op.value})",
            why=f"its {floats[0]} is in float" if floats else "scales vary along a sum",
            fix="biases=qj.bias_quantizer(bits=16), which has a scale of its own",
        )


def _has_groups(operands: Sequence[OperandPlan]) -> bool:
    """Whether a scale varies along a contracted or window axis."""
    for planned in operands:
        assert planned.quantizer is not None
        operand = planned.operand
        shape = planned.quantizer.granularity.scale_shape(
            operand.shape, planned.axes, is_weight=planned.is_weight
        )
        if any(shape[axis] != 1 for axis in operand.contracted + operand.window):
            return True
    return False


def _plan_operand(site: Site, operand: Operand, quantizer: Quantizer | None) -> OperandPlan:
    planned = OperandPlan(operand, quantizer, None)
    if quantizer is None:
        return planned
    if operand.role is Role.BIAS and quantizer.granularity != PerTensor():
        raise errors.GranularityError(
            f"a bias with scales {quantizer.granularity.name}",
            where=f"site {site.name} ({site.op.value}), {operand.paths[0]}",
            why="each of its entries belongs to another channel: one code would hold any of them",
            fix="qj.bias_quantizer(...), which has one scale, or qj.AccumulatorBias()",
        )
    try:
        shape = quantizer.granularity.scale_shape(
            operand.shape, planned.axes, is_weight=planned.is_weight
        )
    except errors.GranularityError as error:
        raise errors.GranularityError(
            error.what,
            where=f"site {site.name} ({site.op.value}), {operand.key} {shape_text(operand.shape)}",
            why=error.why,
            fix=error.fix,
        ) from None
    if quantizer.range is RangeMode.LIVE:
        return planned
    if not planned.is_weight and any(shape[axis] != 1 for axis in operand.free):
        raise errors.GranularityError(
            f"a fixed range cannot have a scale for each row ({quantizer.granularity.name})",
            where=f"site {site.name} ({site.op.value}), {operand.key} {shape_text(operand.shape)}",
            why="the number of rows is that of the batch, which changes from call to call",
            fix="qj.activation_quantizer(..., range=qj.RangeMode.LIVE)",
        )
    return dataclasses.replace(planned, scale_shape=shape)


def resized(entry: SitePlan, site: Site) -> SitePlan:
    """The plan of a site for a program in which its sums have another length.

    Products without a weight sum over tokens or the batch; how their sums are held follows them.
    """
    if site.contraction_size == entry.site.contraction_size or site.weight is not None:
        return entry
    found = {operand.key: operand for operand in site.operands}
    operands = tuple(dataclasses.replace(p, operand=found[p.key]) for p in entry.operands)
    size, form = _sizing(site, operands)
    return dataclasses.replace(entry, operands=operands, sizing=size, form=form)


def _sizing(site: Site, operands: Sequence[OperandPlan]) -> tuple[Sizing, Form]:
    bounds: list[int | None] = []
    lengths: list[int | None] = []
    reals = ""  # the format of levels that are no integers
    for planned in operands:
        quantizer, operand = planned.quantizer, planned.operand
        if quantizer is None:
            bounds.append(None)
            lengths.append(None)
            continue
        shape = quantizer.granularity.scale_shape(
            operand.shape, planned.axes, is_weight=planned.is_weight
        )
        length = group_length(
            operand.shape, shape, operand.contracted, site.contraction_size // site.taps
        )
        folded = length == 1 or any(shape[axis] != 1 for axis in operand.window)
        bound = quantizer.format.largest_centered_code(symmetric=quantizer.symmetric)
        reals = reals or (quantizer.format.name if bound is None else "")
        bounds.append(None if folded else bound)
        lengths.append(None if folded else length)
    length = sum_length(site.contraction_size, site.taps, lengths)
    grouped = any(n is not None for n in lengths)
    size = sizing(length, bounds[0], bounds[1], taps=site.taps, grouped=grouped)
    containers = [p.quantizer.format.max_bits if p.quantizer else None for p in operands]
    batch_groups = site.op is Op.CONV and not site.operands[0].free
    form = execution_form(
        size,
        (containers[0], containers[1]),
        grouped=grouped,
        batch_groups=batch_groups,
        reals=reals,
    )
    return size, form
