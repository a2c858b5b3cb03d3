"""Find the products of a program and say what each is."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex_core

from quantjax._compat import is_jit, jit_call, name_stack
from quantjax.interpreter import provenance
from quantjax.interpreter.product import Op, Product, product_of
from quantjax.interpreter.provenance import Origin, OriginKind

Location = tuple[int, ...]
"""Index of an equation, preceded by those of the containers around it; programs of a container that
is not rewritten have a number of their own in between."""


class Role(enum.Enum):
    """What an operand is to the model."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


class SiteStatus(enum.Enum):
    """Whether the interpreter can rewrite a site."""

    REWRITABLE = "rewritable"
    OPAQUE = "opaque"


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a site.

    Attributes:
      key: its name in the site's state: ``weight``, ``activation``, or ``lhs`` and ``rhs`` where
        neither operand is a weight.
      role: weight or activation, by dataflow.
      side: 0 left, 1 right.
      shape, dtype: of the operand as it enters the product.
      free, contracted, window: its axes by role.
      paths: parameters that it is made of.
      recipe: identity of its derivation from them; empty for activations.
      storable: whether it is one parameter, moved or cast but not computed with.
    """

    key: str
    role: Role
    side: int
    shape: tuple[int, ...]
    dtype: str
    free: tuple[int, ...]
    contracted: tuple[int, ...]
    window: tuple[int, ...]
    paths: tuple[str, ...] = ()
    recipe: str = ""
    storable: bool = False


@dataclasses.dataclass(frozen=True)
class Site:
    """One row of the model's table: a product, named by the parameter that flows in."""

    name: str
    op: Op
    scope: str
    operands: tuple[Operand, ...]
    out_shape: tuple[int, ...]
    contraction_size: int
    taps: int
    multiply_adds: int
    loops: tuple[str, ...] = ()
    status: SiteStatus = SiteStatus.REWRITABLE
    reason: str = ""

    @property
    def weight(self) -> Operand | None:
        """The weight operand, if there is just one."""
        return next((o for o in self.operands if o.role is Role.WEIGHT), None)


@dataclasses.dataclass
class _Found:
    site: Site
    location: Location
    weight: Origin | None


def discover(
    jaxpr: jex_core.ClosedJaxpr, param_paths: Sequence[str]
) -> tuple[dict[Location, Site], dict[str, Origin]]:
    """All sites by location, in program order, and the derivation of their weights by name.

    Args:
      jaxpr: a program whose first inputs are the parameters.
      param_paths: their paths, in order.
    """
    inputs = [provenance.leaf(path) for path in param_paths]
    inputs += [provenance.DATA] * (len(jaxpr.jaxpr.invars) - len(inputs))
    found: list[_Found] = []
    _walk(jaxpr, inputs, (), "", (), "", found)
    seen: collections.Counter[str] = collections.Counter()
    sites: dict[Location, Site] = {}
    weights: dict[str, Origin] = {}
    for item in found:
        count = seen[item.site.name]
        seen[item.site.name] += 1
        positional = item.site.weight is None
        name = f"{item.site.name}#{count}" if count or positional else item.site.name
        sites[item.location] = dataclasses.replace(item.site, name=name)
        if item.weight is not None:
            weights[name] = item.weight
    return sites, weights


def _walk(
    closed: jex_core.ClosedJaxpr,
    inputs: Sequence[Origin],
    location: Location,
    scope: str,
    loops: tuple[str, ...],
    opaque: str,
    found: list[_Found],
) -> list[Origin]:
    """Follow origins through one program; append the sites found; return the outputs' origins."""
    jaxpr = closed.jaxpr
    origins: dict[Any, Origin] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
        origins[var] = provenance.constant(value)

    def read(atom: Any) -> Origin:
        if isinstance(atom, jex_core.Literal):
            return provenance.constant(atom.val)
        return origins[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        here = (*location, index)
        operands = [read(atom) for atom in eqn.invars]
        product = product_of(eqn)
        where = "/".join(part for part in (scope, name_stack(eqn)) if part)
        outputs = provenance.results(eqn, operands)
        if product is not None:
            found.append(_describe(product, operands, here, where, loops, opaque))
        elif is_jit(eqn):
            outputs = _walk(jit_call(eqn)[0], operands, here, where, loops, opaque, found)
        else:
            # A branch of cond does not see the first operand, which chooses it.
            passed = operands[1:] if eqn.primitive.name == "cond" else operands
            for number, inner in enumerate(jex_core.jaxprs_in_params(eqn.params)):
                unknown = [provenance.DATA] * len(inner.invars)
                closed_inner = jex_core.ClosedJaxpr(inner, ())
                if inner.constvars:
                    closed_inner = _without_constants(inner)
                    unknown = [provenance.DATA] * len(closed_inner.jaxpr.invars)
                known = passed if len(passed) == len(unknown) else unknown
                reason = opaque or f"inside {eqn.primitive.name}, which is not rewritten"
                nested = (*loops, eqn.primitive.name)
                _walk(closed_inner, known, (*here, number), where, nested, reason, found)
        origins.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _without_constants(jaxpr: jex_core.Jaxpr) -> jex_core.ClosedJaxpr:
    opened = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    return jex_core.ClosedJaxpr(opened, ())


def _describe(
    product: Product,
    origins: Sequence[Origin],
    location: Location,
    scope: str,
    loops: tuple[str, ...],
    opaque: str,
) -> _Found:
    weights = [side for side in (0, 1) if origins[side].kind is not OriginKind.DATA]
    reason = opaque
    if len(weights) == 2:
        reason = reason or "both operands come from parameters: computed in float, once"
    if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (product.lhs, product.rhs)):
        reason = reason or "not a product of real floating-point numbers"
    weight = weights[0] if len(weights) == 1 else None
    operands = tuple(_operand(product, side, weight, origins[side]) for side in (0, 1))
    origin = origins[weight] if weight is not None else None
    name = _name(product, origin, scope)
    site = Site(
        name=name,
        op=product.op,
        scope=scope,
        operands=operands,
        out_shape=tuple(product.out.shape),
        contraction_size=product.contraction_size(),
        taps=product.taps(),
        multiply_adds=product.multiply_adds(),
        loops=loops,
        status=SiteStatus.OPAQUE if reason else SiteStatus.REWRITABLE,
        reason=reason or ("" if origin is None else _weight_note(origin)),
    )
    return _Found(site, location, origin)


def _operand(product: Product, side: int, weight: int | None, origin: Origin) -> Operand:
    aval = (product.lhs, product.rhs)[side]
    free, contracted, window = product.axes(side)
    is_weight = side == weight
    keys = ("activation", "weight") if weight is not None else ("lhs", "rhs")
    return Operand(
        key=keys[is_weight if weight is not None else side],
        role=Role.WEIGHT if is_weight else Role.ACTIVATION,
        side=side,
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        free=free,
        contracted=contracted,
        window=window,
        paths=origin.paths if is_weight else (),
        recipe=origin.signature if is_weight else "",
        storable=is_weight and origin.kind is OriginKind.LEAF,
    )


def _name(product: Product, weight: Origin | None, scope: str) -> str:
    if weight is None or weight.kind is OriginKind.CONSTANT:
        return f"{scope}/{product.op.value}" if scope else product.op.value
    if weight.kind is OriginKind.LEAF:
        return weight.paths[0]
    shown = ",".join(weight.paths[:3]) + (",..." if len(weight.paths) > 3 else "")
    return f"f({shown})"


def _weight_note(origin: Origin) -> str:
    if origin.kind is OriginKind.FUNCTION:
        return "the weight is computed from parameters: quantized in simulation, not storable"
    if origin.kind is OriginKind.CONSTANT:
        return "the weight is a constant of the function: pass it in params to name and store it"
    return ""
