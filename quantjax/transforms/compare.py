"""``qj.compare``: float against quantized, site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax._compat import concrete
from quantjax.affine import QParams, divide_by_scale, is_bypassed
from quantjax.fake_quant import apply as apply_fake_quant
from quantjax.granularity import expand
from quantjax.interpreter import Product, ProgramCache, Site, evaluate
from quantjax.interpreter.trace import Function
from quantjax.planning import OperandPlan, Plan
from quantjax.printing import columns
from quantjax.transforms.calibrate import QState
from quantjax.transforms.fake_quantize import check_qstate, live_qparams, quantized_product
from quantjax.transforms.sites import check_program


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
        sites are in it.
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
        return self.sites[name]

    def __str__(self) -> str:
        rows = []
        for name, site in self.sites.items():
            row = [name, _number(site.sqnr, ".1f"), _number(site.cosine, ".6f")]
            for keys in (("weight", "lhs"), ("activation", "rhs")):
                operand = next((site.operands[k] for k in keys if k in site.operands), None)
                row.append("" if operand is None else _number(operand.sqnr, ".1f"))
                row.append("" if operand is None else _number(operand.saturation, ".2%"))
            rows.append(row)
        head = ["site", "SQNR dB", "cosine", "weight dB", "clipped", "activation dB", "clipped"]
        return columns(head, rows)


def _number(value: Any, spec: str) -> str:
    known = concrete(value)
    if known is None:
        return "traced"
    return format(float(known), spec) if known.ndim == 0 else f"[{known.size} lanes]"


def compare(f: Function, plan: Plan) -> Callable[..., Report]:
    """``compare(f, plan)(qstate, params, *inputs) -> Report``: what quantization costs, by site.

    Runs the float and the quantized model on the same inputs. Works under ``jit`` and ``vmap``.

    Raises (of the returned function): as ``qj.fake_quantize``.
    """
    programs = ProgramCache(f)
    planned = {entry.site.name: entry for entry in plan.quantized}

    def comparing(qstate: QState, params: Any, *inputs: Any) -> Report:
        plan.check_params(params)
        check_qstate(plan, qstate)
        program = programs(params, *inputs)
        check_program(plan, program)

        def in_float(
            site: Site, product: Product, lhs: jax.Array, rhs: jax.Array, value: Any
        ) -> tuple[jax.Array, Any]:
            out = product.bind(lhs, rhs)
            operands = {
                operand.key: _operand_report(operand, (lhs, rhs), value[operand.key])
                for operand in planned[site.name].quantized
            }
            return out, (out, operands)

        def in_codes(
            site: Site, product: Product, lhs: jax.Array, rhs: jax.Array, value: Any
        ) -> tuple[jax.Array, Any]:
            out = quantized_product(planned[site.name], product, lhs, rhs, value)
            return out, out

        handled = frozenset(planned)
        values = {name: dict(qstate[name]) for name in planned}
        _, floats = evaluate(program, in_float, handled, values, params, *inputs)
        _, codes = evaluate(program, in_codes, handled, values, params, *inputs)
        return Report({name: _site_report(floats[name], codes[name]) for name in planned})

    return comparing


def _site_report(
    in_float: tuple[jax.Array, Mapping[str, OperandReport]], quantized: jax.Array
) -> SiteReport:
    reference, operands = in_float
    reference, quantized = reference.astype(jnp.float32), quantized.astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(reference**2)) * jnp.sqrt(jnp.sum(quantized**2))
    cosine = jnp.where(norms > 0, jnp.sum(reference * quantized) / norms, 1.0)
    return SiteReport(_sqnr(reference, quantized), cosine, dict(operands))


def _sqnr(reference: jax.Array, quantized: jax.Array) -> jax.Array:
    signal, noise = jnp.sum(reference**2), jnp.sum((reference - quantized) ** 2)
    return jnp.where(noise > 0, 10.0 * jnp.log10(signal / noise), jnp.inf)


def _operand_report(
    operand: OperandPlan, operands: tuple[jax.Array, jax.Array], qparams: QParams
) -> OperandReport:
    quantizer = operand.quantizer
    assert quantizer is not None
    x = operands[operand.operand.side].astype(jnp.float32)
    qparams = live_qparams(operand, x, qparams)
    quantized = apply_fake_quant(x, qparams, quantizer.arithmetic)
    low, high = quantizer.format.code_range(qparams.bits)
    scaled = divide_by_scale(x, expand(qparams.scale, x.shape))
    codes = quantizer.rounding.apply(scaled) + jnp.round(expand(qparams.zero_point, x.shape))
    clipped = jnp.mean(((codes < low) | (codes > high)).astype(jnp.float32))
    return OperandReport(_sqnr(x, quantized), jnp.where(is_bypassed(qparams.bits), 0.0, clipped))
