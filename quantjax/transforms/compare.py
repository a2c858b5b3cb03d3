"""``qj.compare``: float against quantized, site by site."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax._compat import concrete
from quantjax.affine import QParams, is_bypassed
from quantjax.arguments import row_of
from quantjax.arithmetic import Arithmetic
from quantjax.interpreter import Addition, Carried, Outcome, ProgramCache, Role, Visit, evaluate
from quantjax.interpreter.trace import Function
from quantjax.planning import Plan
from quantjax.printing import columns
from quantjax.simulation import apply as apply_fake_quant
from quantjax.simulation import is_clipped
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.table import frame
from quantjax.transforms.after import added, additions_of, of_one_group
from quantjax.transforms.calibrate import QState
from quantjax.transforms.energy import Energy, added_up, decibels, energy, in_own_unit
from quantjax.transforms.fake_quantize import quantized_product, site_values
from quantjax.transforms.keys import Key, SiteKeys, next_keys, site_keys
from quantjax.transforms.live import live_qparams
from quantjax.transforms.qstate import checked_qstate
from quantjax.transforms.settle import settle_of
from quantjax.transforms.sites import check_arguments, check_given, check_program
from quantjax.transforms.steps import layers_first, over_steps


class OperandReport(NamedTuple):
    """One quantized operand, on the values that it has in the float model.

    Attributes:
      sqnr: ``10 log10(Σ x² / Σ (x - Q(x))²)`` in dB; infinite where nothing is lost.
      saturation: share of entries whose code was clipped, in 0..1.
    """

    sqnr: Float[Array, ""]
    saturation: Float[Array, ""]


class SiteReport(NamedTuple):
    """One site.

    Attributes:
      sqnr, cosine: of the site's output, quantized model against float model: errors of earlier
        sites are in it. An output of zeros has the cosine 1 with zeros, 0 with all else.
      operands: each quantized operand on its own.
    """

    sqnr: Float[Array, ""]
    cosine: Float[Array, ""]
    operands: dict[str, OperandReport]


@jax.tree_util.register_pytree_node_class
class Report:
    """``{site: SiteReport}`` in program order, a pytree; prints as a table where it is concrete."""

    def __init__(self, sites: dict[str, SiteReport]) -> None:
        self.sites = sites

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """Children in program order, which a plain dict would not keep."""
        return tuple(self.sites.values()), tuple(self.sites)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: tuple[Any, ...]) -> Report:
        """Inverse of :meth:`tree_flatten`."""
        return cls(dict(zip(names, children, strict=True)))

    def __getitem__(self, name: str) -> SiteReport:
        return row_of(self.sites, name, kind="site")

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``, one row a layer of a site, all operands; names as index.

        Raises:
          MissingPackageError: pandas is not installed.
        """
        rows: list[dict[str, Any]] = []
        for name, site in self.sites.items():
            for index, layer in _layers(site):
                row = {"sqnr": layer.sqnr, "cosine": layer.cosine}
                for key, operand in layer.operands.items():
                    row[f"{key}_sqnr"], row[f"{key}_saturation"] = operand
                rows.append({"site": name + index, **{k: float(v) for k, v in row.items()}})
        return frame(rows)

    def __str__(self) -> str:
        known = {key for site in self.sites.values() for key in site.operands}
        shown = {name: keys for name, keys in SHOWN.items() if name in ALWAYS or known & {*keys}}
        rows = [row for name, site in self.sites.items() for row in _rows(name, site, shown)]
        head = ["site", "SQNR dB", "cosine"]
        head += [text for name in shown for text in (f"{name} dB", "clipped")]
        return columns(head, rows)


SHOWN: Mapping[str, tuple[str, ...]] = {
    "weight": ("weight", "lhs"),
    "activation": ("activation", "gradient", "rhs"),
    "output": ("output",),
    "bias": ("bias",),
}
ALWAYS = ("weight", "activation")


def _rows(name: str, site: SiteReport, shown: Mapping[str, tuple[str, ...]]) -> list[list[str]]:
    """One row a layer; a batch of reports, the result of ``vmap``, prints like layers."""
    known = all(concrete(leaf) is not None for leaf in jax.tree.leaves(site))
    rows = []
    for index, layer in _layers(site) if known else [("", site)]:
        row = [name + index]
        row += [_number(layer.sqnr, ".1f"), _number(layer.cosine, ".6f")]
        for keys in shown.values():
            operand = next((layer.operands[k] for k in keys if k in layer.operands), None)
            row.append("" if operand is None else _number(operand.sqnr, ".1f"))
            row.append("" if operand is None else _number(operand.saturation, ".2%"))
        rows.append(row)
    return rows


def _layers(site: SiteReport) -> Iterator[tuple[str, SiteReport]]:
    """``[0]``, ``[1]`` ... and what is theirs, of a site that is stacked."""
    for index in np.ndindex(jnp.shape(site.sqnr)):
        layer = jax.tree.map(lambda leaf, at=index: np.asarray(leaf)[at], site)
        yield "".join(f"[{i}]" for i in index), layer


def _number(value: Any, spec: str) -> str:
    known = concrete(value)
    return "traced" if known is None else format(float(known), spec)


class _OperandSums(NamedTuple):
    """Sums over the entries of one operand; NaN where the site did not run."""

    signal: Energy
    noise: Energy
    clipped: jax.Array
    size: jax.Array


def compare(f: Function, plan: Plan) -> Callable[..., Report]:
    """``compare(f, plan)(qstate, params, *inputs) -> Report``: what quantization costs, by site.

    Runs the float and the quantized model on the same inputs. Works under ``jit`` and ``vmap``.
    Layers stacked in a scan are reported each; time steps together; of a ``while``, the last
    iteration; a branch that was not taken is NaN, and so is a site without entries. A plan with
    random roundings needs ``key=``.

    Raises (of the returned function): as ``qj.fake_quantize``.
    """
    check_arguments(f, plan, verb="compare")
    programs = ProgramCache(f)
    planned = {entry.site.name: entry for entry in plan.quantized}

    def comparing(qstate: QState, params: Any, *inputs: Any, key: Key | None = None) -> Report:
        check_given(f, inputs, verb="compare", key=key)
        form = "qj.compare(f, plan)(qstate, params, x)"
        plan.check_params(params, ahead=qstate, call=form)
        qstate = checked_qstate(plan, qstate)
        keys = site_keys(plan, key)
        program = programs(params, *inputs)
        check_program(plan, program)

        def in_float(visit: Visit) -> Outcome:
            entry, raw = planned[visit.site.name], (visit.lhs, visit.rhs)
            out = visit.product.bind(*raw)
            keys, qparams = next_keys(visit.state), visit.value.qparams
            sums = {
                o.key: _operand_sums(
                    o, raw[o.operand.side], qparams[o.key], keys.sides[o.operand.side]
                )
                for o in entry.operands
                if o.quantizer is not None
            }
            if visit.site.bias is None:
                sums |= _after_sums(entry, {Role.OUTPUT: out}, qparams, keys)
            return Outcome(out, state=keys.after, record=(out, sums), kept=sums)

        def with_bias_in_float(met: Addition) -> Outcome:
            entry, keys = planned[met.site.name], next_keys(met.state)
            out = met.add(met.out, met.bias)
            results = {Role.OUTPUT: out, Role.BIAS: met.bias}
            sums = met.kept | _after_sums(entry, results, met.value.qparams, keys)
            return Outcome(out, state=keys.after, record=(out, sums))

        def in_codes(visit: Visit) -> Outcome:
            outcome = quantized_product(planned[visit.site.name], visit)
            return outcome._replace(record=outcome.out)

        def with_bias_in_codes(met: Addition) -> Outcome:
            outcome = added(planned[met.site.name], met, met.value.qparams, met.state)
            return outcome._replace(record=outcome.out)

        handled = frozenset(planned)
        pairs = ((in_float, with_bias_in_float), (in_codes, with_bias_in_codes))
        carried = Carried(site_values(plan, program, qstate, params, keys), keys)
        records = [
            evaluate(
                program,
                handler,
                handled,
                carried,
                params,
                *inputs,
                collect=True,
                additions=additions_of(planned, addition),
                settle=settle_of(program),
            ).records
            for handler, addition in pairs
        ]
        reports = {}
        for name, entry in planned.items():
            pair = (records[0][name], records[1][name])
            reports[name] = _report(entry, *layers_first(program, name, pair))
        return Report(reports)

    return comparing


def _report(
    entry: SitePlan, in_float: tuple[jax.Array, Mapping[str, _OperandSums]], quantized: jax.Array
) -> SiteReport:
    """One report of all layers; what remains of leading axes are time steps."""
    return over_steps(_site_report, entry.site.steps)(in_float, quantized)


@functools.partial(jax.jit, inline=True)
def _site_report(
    in_float: tuple[jax.Array, Mapping[str, _OperandSums]], quantized: jax.Array
) -> SiteReport:
    reference, operands = in_float
    ran = ~jnp.isnan(reference)
    reference = jnp.where(ran, reference, 0).astype(jnp.float32)
    quantized = jnp.where(ran, quantized, 0).astype(jnp.float32)
    sqnr = decibels(energy(reference), energy(reference - quantized))
    pair = in_own_unit(reference)[0], in_own_unit(quantized)[0]
    norms = jnp.sqrt(jnp.sum(pair[0] ** 2)) * jnp.sqrt(jnp.sum(pair[1] ** 2))
    cosine = jnp.sum(pair[0] * pair[1]) / jnp.where(norms == 0, 1.0, norms)  # NaN is no zero
    cosine = jnp.where(jnp.all((pair[0] == 0.0) & (pair[1] == 0.0)), 1.0, cosine)
    never = ~jnp.any(ran)
    sqnr, cosine = (jnp.where(never, jnp.nan, number) for number in (sqnr, cosine))
    return SiteReport(sqnr, cosine, {key: _operand_report(s) for key, s in operands.items()})


def _operand_report(sums: _OperandSums) -> OperandReport:
    ran = ~jnp.isnan(sums.size)  # what is NaN beside it is NaN in the quantized tensor
    sums = jax.tree.map(lambda each: jnp.where(ran, each, 0.0), sums)
    clipped, size = jnp.sum(sums.clipped), jnp.sum(sums.size)
    sqnr = decibels(added_up(sums.signal), added_up(sums.noise))
    return OperandReport(
        jnp.where(size > 0, sqnr, jnp.nan),
        jnp.where(size > 0, clipped / jnp.maximum(size, 1.0), jnp.nan),
    )


def _after_sums(
    entry: SitePlan,
    results: Mapping[Role, jax.Array],
    qparams: Mapping[str, QParams],
    keys: SiteKeys,
) -> dict[str, _OperandSums]:
    """Of output and bias, where they have quantizers."""
    found = {}
    for role, x in results.items():
        operand = entry.planned(role)
        if operand is None:
            continue
        is_bias = role is Role.BIAS
        own = of_one_group(operand, qparams[operand.key]) if is_bias else qparams[operand.key]
        key = keys.bias if is_bias else keys.output
        found[operand.key] = _operand_sums(operand, x, own, key)
    return found


def _operand_sums(
    operand: OperandPlan, x: jax.Array, qparams: QParams, key: Key | None
) -> _OperandSums:
    quantizer = operand.quantizer
    assert quantizer is not None
    x = x.astype(jnp.float32)
    return _sums(quantizer.arithmetic, x, live_qparams(operand, x, qparams), key)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # one program where it is called eagerly
def _sums(arithmetic: Arithmetic, x: jax.Array, qparams: QParams, key: Key | None) -> _OperandSums:
    quantized = apply_fake_quant(x, qparams, arithmetic, key)
    clipped = jnp.sum(is_clipped(x, qparams, arithmetic, key).astype(jnp.float32))
    return _OperandSums(
        energy(x),
        energy(x - quantized),
        jnp.where(is_bypassed(qparams.bits), 0.0, clipped),
        jnp.float32(x.size),
    )
