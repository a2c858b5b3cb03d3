"""A policy resolved against a site table: what happens at each site of one model."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from quantjax import errors
from quantjax.granularity import OperandAxes
from quantjax.interpreter import Op, Operand, Origin, Role, Site, SiteStatus, leaves_by_path
from quantjax.policy import Policy, Rule, Scheme
from quantjax.printing import columns, shape_text
from quantjax.products import Form, Sizing, execution_form, group_length, sizing, sum_length
from quantjax.quantizer import Quantizer, RangeMode


@dataclasses.dataclass(frozen=True)
class SiteTable:
    """The sites of a traced model, in program order; prints.

    Attributes:
      sites: one row a product.
      weights: how each weight is recomputed from the parameters.
      others: where a parameter goes besides the weights of sites: a primitive, by path.
      shapes: of all parameters, by path.
    """

    sites: tuple[Site, ...]
    weights: Mapping[str, Origin] = dataclasses.field(compare=False, repr=False)
    others: Mapping[str, str] = dataclasses.field(compare=False, repr=False)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(repr=False)

    def __iter__(self) -> Any:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def __str__(self) -> str:
        rows = [
            [
                site.name,
                site.op.value,
                *(f"{shape_text(o.shape)} {o.role.value}" for o in site.operands),
                shape_text(site.out_shape),
                f"{site.multiply_adds:,}",
                " ".join(site.loops),
                site.reason or site.status.value,
            ]
            for site in self.sites
        ]
        head = ["site", "op", "left", "right", "output", "multiply-adds", "inside", "status"]
        return columns(head, rows)


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
    """What happens at one site, and why; ``sizing`` and ``form`` are None in float."""

    site: Site
    operands: tuple[OperandPlan, ...]
    sizing: Sizing | None
    form: Form | None
    status: PlanStatus
    reason: str

    @property
    def quantized(self) -> tuple[OperandPlan, ...]:
        """The operands that have a quantizer."""
        return tuple(operand for operand in self.operands if operand.quantizer is not None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A policy resolved against a table; static, hashable; prints.

    It fits later calls by site name, operand role and weight shape, never by batch size.
    """

    policy: Policy
    sites: tuple[SitePlan, ...]
    weights: Mapping[str, Origin] = dataclasses.field(compare=False, repr=False)
    others: Mapping[str, str] = dataclasses.field(compare=False, repr=False)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(repr=False)

    @property
    def quantized(self) -> tuple[SitePlan, ...]:
        """The sites at which anything is quantized."""
        return tuple(site for site in self.sites if site.status is PlanStatus.QUANTIZED)

    def check_params(self, params: Any) -> None:
        """Raise ``PlanMismatchError`` unless every planned weight is there in its shape."""
        shapes = {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items()}
        planned = dict(self.shapes)
        for entry in self.quantized:
            weight = entry.site.weight
            for path in weight.paths if weight is not None else ():
                if shapes.get(path) == planned[path]:
                    continue
                found = (
                    f"it has {shape_text(shapes[path])}" if path in shapes else "it is not there"
                )
                close = difflib.get_close_matches(path, shapes, n=1, cutoff=0.5)
                hint = f"; closest path: {close[0]}" if close and path not in shapes else ""
                raise errors.PlanMismatchError(
                    "this is not the parameter tree that was planned for",
                    where=f"site {entry.site.name} ({entry.site.op.value}), parameter {path}",
                    why=f"planned with {shape_text(planned[path])}; {found}{hint}",
                    fix="plan again: qj.plan(policy, qj.sites(f, params, x))",
                )

    def __str__(self) -> str:
        rows = []
        for entry in self.sites:
            texts = {
                operand.key: str(operand.quantizer) if operand.quantizer else "float"
                for operand in entry.operands
            }
            first = texts.get("weight", texts.get("lhs", ""))
            second = next((texts[k] for k in ("activation", "gradient", "rhs") if k in texts), "")
            sums = entry.sizing.exactness.value if entry.sizing is not None else ""
            executed = entry.form.execution.value if entry.form is not None else ""
            status = entry.reason or entry.status.value
            rows.append([entry.site.name, first, second, sums, executed, status])
        head = ["site", "weight | left", "activation | right", "sums", "executed", "status"]
        return columns(head, rows)


def plan(policy: Policy, table: SiteTable) -> Plan:
    """Decide what happens at each site; the first rule that matches wins.

    Args:
      policy: ordered rules; ``Policy([])`` is the identity.
      table: from ``qj.sites(f, params, x)``.

    Raises:
      PolicyError: a rule that matches no site, or none that an earlier rule does not match, and is
        not optional.
      OpaqueSiteError: a rule that matches only sites that the interpreter does not rewrite.
      GranularityError: groups that do not divide, or a fixed range per token.
    """
    chosen = {site.name: policy.first_match(site) for site in table.sites}
    _check_rules(policy, table)
    entries = tuple(_plan_site(site, chosen[site.name]) for site in table.sites)
    return Plan(policy, entries, table.weights, table.others, table.shapes)


def first_difference(
    planned: Iterable[Site], found: Iterable[Site]
) -> tuple[Site | None, Site | None] | None:
    """The first row in which a program is not the one that was planned, and what stands there.

    Rows are compared in what a plan relies on: all but the sizes of activations.

    Returns:
      ``(planned, found)``, the second None where there is no such site, the first where it was not
      planned; None where nothing differs.
    """
    others = {site.name: site for site in found}
    for row in planned:
        site = others.pop(row.name, None)
        if site is None or _outline(site) != _outline(row):
            return row, site
    return next(((None, site) for site in others.values()), None)


def _outline(site: Site) -> tuple[Any, ...]:
    operands = [
        (o.key, o.side, o.free, o.contracted, o.window, o.shape if o.role is Role.WEIGHT else None)
        for o in site.operands
    ]
    return site.op, site.status, site.steps, *operands


def site_text(site: Site) -> str:
    """All that a plan relies on; axes stand behind shapes as ``free|contracted|window``."""
    operands = [
        f"{o.key} {shape_text(o.shape)} "
        f"[{'|'.join(','.join(map(str, axes)) for axes in (o.free, o.contracted, o.window))}]"
        for o in sorted(site.operands, key=lambda operand: operand.side)
    ]
    steps = f" in {shape_text(site.steps)} layers" if site.steps else ""
    return f"{site.op.value} of {', '.join(operands)}{steps} ({site.status.value})"


def _check_rules(policy: Policy, table: SiteTable) -> None:
    names = [site.name for site in table.sites]
    for rule in policy.rules:
        matched = [site for site in table.sites if rule.selector.matches(site)]
        if rule.optional:
            continue
        if not matched:
            close = difflib.get_close_matches(str(rule.selector), names, n=1, cutoff=0.4)
            hint = f"qj.path({close[0]!r})" if close else "a selector that fits a name above"
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise errors.PolicyError(
                f"the rule '{rule}' matches no site",
                where=f"sites: {shown or 'none: the function has no product'}",
                fix=f"{hint}, or qj.rule(..., optional=True)",
            )
        if all(policy.first_match(site) is not rule for site in matched):
            earlier = policy.first_match(matched[0])
            raise errors.PolicyError(
                f"the rule '{rule}' decides on no site",
                where=", ".join(site.name for site in matched[:4]),
                why=f"the earlier rule '{earlier}' matches all that it matches",
                fix="move it ahead of that rule, or qj.rule(..., optional=True)",
            )
        if rule.scheme.gradients is not None and not rule.optional:
            _check_has_gradients(rule, matched)
        wants = rule.scheme != Scheme()
        if wants and all(site.status is SiteStatus.OPAQUE for site in matched):
            raise errors.OpaqueSiteError(
                f"the rule '{rule}' matches only sites that cannot be rewritten",
                where=", ".join(f"{s.name} ({s.op.value})" for s in matched[:4]),
                why=matched[0].reason,
                fix="qj.rule(..., optional=True), or move the product out of that container",
            )


def _check_has_gradients(rule: Rule, matched: list[Site]) -> None:
    roles = {operand.role for site in matched for operand in site.operands}
    if Role.GRADIENT not in roles:
        raise errors.PolicyError(
            f"the rule '{rule}' quantizes gradients, and there are none",
            where=", ".join(site.name for site in matched[:4]),
            why="the products of a backward pass are in the program of jax.grad",
            fix="table = qj.sites(jax.grad(loss), params, ...), and "
            "qj.fake_quantize(jax.grad(loss), plan); or qj.rule(..., optional=True)",
        )


def _plan_site(site: Site, rule: Rule | None) -> SitePlan:
    if site.status is SiteStatus.OPAQUE:
        floats = tuple(OperandPlan(operand, None, None) for operand in site.operands)
        return SitePlan(site, floats, None, None, PlanStatus.OPAQUE, site.reason)
    scheme = rule.scheme if rule is not None else None
    operands = []
    for operand in site.operands:
        quantizer = None
        if scheme is not None:
            quantizer = scheme.quantizer(operand.role)
        operands.append(_plan_operand(site, operand, quantizer))
    if all(operand.quantizer is None for operand in operands):
        reason = "no rule matches" if rule is None else "float by rule"
        return SitePlan(site, tuple(operands), None, None, PlanStatus.FLOAT, f"float: {reason}")
    size, form = _sizing(site, operands)
    notes = [size.reason, form.reason if form.reason != size.reason else "", site.reason]
    status = "; ".join(note for note in notes if note)
    return SitePlan(site, tuple(operands), size, form, PlanStatus.QUANTIZED, status)


def _plan_operand(site: Site, operand: Operand, quantizer: Quantizer | None) -> OperandPlan:
    planned = OperandPlan(operand, quantizer, None)
    if quantizer is None:
        return planned
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
