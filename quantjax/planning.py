"""A policy resolved against a site table: what happens at each site of one model."""

from __future__ import annotations

import collections
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from quantjax import errors
from quantjax.arguments import expect, row_of
from quantjax.interpreter import Origin, Role, Site, SiteStatus, leaves_by_path
from quantjax.interpreter.provenance import is_backward
from quantjax.policy import Policy, Rule, Scheme
from quantjax.printing import amount, columns, counted, shape_text, wrapped
from quantjax.qtensor import frozen_error, is_quantized
from quantjax.site_plan import PlanStatus, SitePlan, plan_site
from quantjax.table import SiteTable, distinct, frame, site_row, weight_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A policy resolved against a table; static, hashable; prints.

    It fits later calls by site name, operand role and weight shape, never by batch size.
    """

    policy: Policy
    sites: tuple[SitePlan, ...]
    weights: Mapping[str, Origin] = dataclasses.field(compare=False)
    others: Mapping[str, str] = dataclasses.field(compare=False)
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    biases: Mapping[str, Origin] = dataclasses.field(compare=False)

    def __getitem__(self, name: str) -> SitePlan:
        return row_of({entry.site.name: entry for entry in self.sites}, name, kind="site")

    @property
    def quantized(self) -> tuple[SitePlan, ...]:
        """The sites at which anything is quantized."""
        return tuple(site for site in self.sites if site.status is PlanStatus.QUANTIZED)

    def check_params(self, params: Any, *, ahead: Any = None, call: str = "") -> None:
        """Raise ``PlanMismatchError`` unless every planned weight is there in its shape.

        Args:
          ahead: the argument ahead of the parameters; ``ArgumentError`` where it is the parameters.
          call: how the function is called, for that error.
        """
        misfit = self._misfit(params)
        if misfit is None:
            return
        entry, path = misfit
        where = f"site {entry.site.name} ({entry.site.op.value}), parameter {path}"
        if ahead is not None and self._misfit(ahead) is None:
            raise errors.ArgumentError(
                "the parameters come one place too early",
                where=where,
                why="it is in the argument ahead of them",
                fix=call,
            )
        if is_quantized(leaves_by_path(params, is_leaf=is_quantized).get(path)):
            raise frozen_error(errors.PlanMismatchError, where)
        shapes = _shapes(params)
        found = f"it has {shape_text(shapes[path])}" if path in shapes else "it is not there"
        close = difflib.get_close_matches(path, shapes, n=1, cutoff=0.5)
        hint = f"; closest path: {close[0]}" if close and path not in shapes else ""
        raise errors.PlanMismatchError(
            "this is not the parameter tree that was planned for",
            where=where,
            why=f"planned with {shape_text(dict(self.shapes)[path])}; {found}{hint}",
            fix="plan again: qj.plan(policy, qj.sites(f, params, x))",
        )

    def _misfit(self, params: Any) -> tuple[SitePlan, str] | None:
        """The first planned weight that is not there in its shape; None where all are."""
        shapes, planned = _shapes(params), dict(self.shapes)
        pairs = ((entry, path) for entry in self.quantized for path in entry.site.weight_paths)
        return next((pair for pair in pairs if shapes.get(pair[1]) != planned[pair[1]]), None)

    def __repr__(self) -> str:
        """Its size alone: fields of a deep network are a megabyte of text."""
        operands = sum(len(entry.quantized) for entry in self.quantized)
        return f"Plan({counted(len(self.sites), 'site')}, {counted(operands, 'operand')} quantized)"

    def __str__(self) -> str:
        """At most 120 columns; ``bytes`` are those of the weight with its scales."""
        rows = []
        shared = self._shared_reasons()
        for entry in self.sites:
            texts = {o.key: str(o.quantizer) if o.quantizer else "float" for o in entry.operands}
            first = texts.get("weight", texts.get("lhs", ""))
            second = next((texts[k] for k in ("activation", "gradient", "rhs") if k in texts), "")
            sums = entry.sizing.exactness.value if entry.sizing is not None else ""
            executed = entry.form.execution.value if entry.form is not None else ""
            size = amount(entry.bytes) if entry.site.weight is not None else ""
            notes = [*(f"{o.key} {o.quantizer}" for o in entry.after)]
            notes += [f"bias {entry.bias}"] if entry.bias is not None else []
            reason = entry.reason or entry.status.value
            if entry.reason in shared:
                reason = f"{entry.status.value} ({1 + shared.index(entry.reason)})"
            status = "; ".join([*notes, reason])
            rows.append([entry.site.name, first, second, size, sums, executed, status])
        head = [
            "site",
            "weight | left",
            "activation | right",
            "bytes",
            "sums",
            "executed",
            "status",
        ]
        table = columns(head, rows)
        reasons = (f"({number}) {reason}" for number, reason in enumerate(shared, 1))
        notes = [line for text in reasons for line in wrapped(text)]
        return "\n".join([table, *notes, self._total()]) if len(rows) > 1 else table

    def _shared_reasons(self) -> list[str]:
        """Of two or more quantized sites: the text says each once, under a number."""
        counts = collections.Counter(entry.reason for entry in self.quantized if entry.reason)
        return [reason for reason, count in counts.items() if count > 1]

    @property
    def bytes(self) -> int:
        """Of all weights of the table, as codes and scales where they are; shared ones once.

        In float where another use of the model needs it so: ``qj.freeze`` refuses those.
        """
        chosen = {site.name for site in self._distinct()}
        floats: set[str] = set()
        for entry in self.sites:
            later = entry.site.name not in chosen and not is_backward(entry.site.scope)
            if later and not entry.stores_codes:
                floats.update(entry.site.weight_paths)
        first = (entry for entry in self.sites if entry.site.name in chosen)
        return sum(
            entry.bytes if floats.isdisjoint(entry.site.weight_paths) else weight_bytes(entry.site)
            for entry in first
        )

    def _distinct(self) -> list[Site]:
        return distinct((entry.site for entry in self.sites), self.shapes)

    def _total(self) -> str:
        weights = self._distinct()
        parameters = sum(site.parameters for site in weights)
        whole = sum(weight_bytes(site) for site in weights)
        ratio = whole / self.bytes if self.bytes else 1.0
        macs = sum(entry.site.multiply_adds for entry in self.sites)
        quantized = sum(entry.site.multiply_adds for entry in self.quantized)
        known = isinstance(macs, int) and macs > 0
        share = f", {quantized / macs:.0%} of them in quantized sites" if known else ""
        return (
            f"total: {amount(parameters)} weights, {amount(self.bytes)} bytes, {amount(whole)} in "
            f"float ({ratio:.3g}x); {amount(macs)} MACs{share}"
        )

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``, one row a site: all of the table, and what is planned.

        Raises:
          MissingPackageError: pandas is not installed.
        """
        return frame([self._row(entry) for entry in self.sites])

    def _row(self, entry: SitePlan) -> dict[str, Any]:
        operands = {o.key: o for o in (*entry.operands, *entry.after)}
        roles = ("weight", "activation", "gradient", "lhs", "rhs", "output", "bias")
        quantizers = {
            f"{key}_quantizer": str(operands[key].quantizer)
            if key in operands and operands[key].quantizer is not None
            else None
            for key in roles
        }
        if entry.bias is not None:
            quantizers["bias_quantizer"] = str(entry.bias)
        return site_row(entry.site) | {
            "plan": entry.status.value,
            "plan_reason": entry.reason,
            **quantizers,
            "sums": None if entry.sizing is None else entry.sizing.exactness.value,
            "executed": None if entry.form is None else entry.form.execution.value,
            "planned_bytes": entry.bytes,
        }


def plan(policy: Policy, table: SiteTable) -> Plan:
    """Decide what happens at each site; the first rule that matches wins.

    Args:
      policy: ordered rules; ``Policy([])`` is the identity.
      table: from ``qj.sites(f, params, x)``.

    Raises:
      ArgumentError: a scheme for the policy, a model for the table, and the like.
      PolicyError: a rule that matches no site, or none that an earlier rule does not match, and is
        not optional.
      OpaqueSiteError: a rule that matches only sites that the interpreter does not rewrite.
      GranularityError: groups that do not divide, or a fixed range per token.
    """
    example = "qj.plan(policy, qj.sites(f, params, x))"
    of_scheme = "qj.Policy([qj.rule(qj.weighted(), scheme)])"
    expect(
        policy,
        Policy,
        argument="policy",
        where="qj.plan",
        fix=of_scheme if isinstance(policy, Scheme) else example,
    )
    expect(table, SiteTable, argument="table", where="qj.plan", fix=example)
    chosen = policy.choices(table.sites)
    _check_rules(policy, table, chosen)
    entries = tuple(plan_site(site, chosen[site.name]) for site in table.sites)
    return Plan(policy, entries, table.weights, table.others, table.shapes, table.biases)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items()}


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


def _check_rules(policy: Policy, table: SiteTable, chosen: Mapping[str, Rule | None]) -> None:
    names = [site.name for site in table.sites]
    for rule, selector in zip(policy.rules, policy.resolved(table.sites), strict=True):
        matched = [site for site in table.sites if selector.matches(site)]
        if rule.optional:
            continue
        if not matched:
            close = difflib.get_close_matches(str(rule.selector), names, n=1, cutoff=0.4)
            hint = f"qj.path({close[0]!r})" if close else "a selector that fits a name above"
            if not names:
                hint = "a function that multiplies: x @ w, lax.dot_general or a convolution"
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise errors.PolicyError(
                f"the rule '{rule}' matches no site",
                where=f"sites: {shown or 'none: the function has no product'}",
                fix=f"{hint}, or qj.rule(..., optional=True)",
            )
        if all(chosen[site.name] is not rule for site in matched):
            earlier = chosen[matched[0].name]
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
