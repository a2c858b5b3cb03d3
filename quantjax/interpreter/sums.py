"""Which values of a program may flow into a sum outside of its products.

XLA fuses what produces a value into the sum that reads it, and picks the order of the sum by what
it fused. A value that goes only through elementwise functions into further products, whose
operands lie in memory, can be computed in another way without moving a last place.
"""

from __future__ import annotations

from typing import Any

from jax.extend import core as jex_core

from quantjax.interpreter.containers import ContainerKind, container_of
from quantjax.interpreter.product import Op

PRODUCTS = frozenset({Op.DOT.value, Op.CONV.value})
"""Whose operands lie in memory."""

ADDING = frozenset({"add", "add_any", "sub"})
"""Whose derivatives do not read their operands."""

MOVING = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "dynamic_slice",
        "expand_dims",
        "gather",
        "neg",
        "pad",
        "reduce_max",
        "reduce_min",
        "reduce_window_max",
        "reduce_window_min",
        "reshape",
        "rev",
        "slice",
        "split",
        "squeeze",
        "stack",
        "stop_gradient",
        "transpose",
        "unstack",
    }
)
"""Which add nothing up, and whose derivatives read no operand but to compare."""

ELEMENTWISE = frozenset(
    {
        "abs",
        "and",
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "cos",
        "cosh",
        "div",
        "eq",
        "erf_inv",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "not",
        "or",
        "pow",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "tan",
        "tanh",
        "xor",
    }
)
"""Whose derivatives read their operands."""

_CALLS = (ContainerKind.JIT, ContainerKind.INLINED, ContainerKind.REMAT)


def summed(jaxpr: jex_core.Jaxpr) -> frozenset[Any]:
    """Variables of ``jaxpr`` that may reach a sum, or that leave it, in or out of sight.

    Where an elementwise function has an operand that was broadcast, a sum over the other operand
    is part of its derivative. What is not known is taken to sum.
    """
    found = {atom for atom in jaxpr.outvars if not isinstance(atom, jex_core.Literal)}
    return frozenset(_spread(jaxpr, found))


def _spread(jaxpr: jex_core.Jaxpr, found: set[Any]) -> set[Any]:
    """``found`` and all that flows into it or into a sum."""
    broadcast = _broadcast(jaxpr)
    for eqn in reversed(jaxpr.eqns):
        operands = {atom for atom in eqn.invars if not isinstance(atom, jex_core.Literal)}
        if eqn.primitive.name in PRODUCTS:
            continue
        if not found.isdisjoint(eqn.outvars) or _sums(eqn, operands, broadcast):
            found |= operands
    return found


def _sums(eqn: jex_core.JaxprEqn, operands: set[Any], broadcast: set[Any]) -> bool:
    name = eqn.primitive.name
    if name in ADDING or name in MOVING:
        return False
    if name in ELEMENTWISE:
        shape = _shape(eqn.outvars[0])
        widened = any(_shape(atom) not in (shape, ()) for atom in operands)
        return widened or (len(operands) > 1 and not broadcast.isdisjoint(operands))
    container = container_of(eqn)
    if container is None or container.kind not in _CALLS or not broadcast.isdisjoint(operands):
        return True
    inner = container.programs[0].jaxpr
    holds_product = any(inner_eqn.primitive.name in PRODUCTS for inner_eqn in inner.eqns)
    return holds_product or not _spread(inner, set()).isdisjoint(inner.invars)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _broadcast(jaxpr: jex_core.Jaxpr) -> set[Any]:
    """Variables all of whose entries come from smaller ones."""
    found: set[Any] = set()
    for eqn in jaxpr.eqns:
        operands = [atom for atom in eqn.invars if not isinstance(atom, jex_core.Literal)]
        name = eqn.primitive.name
        widened = name == "broadcast_in_dim" and bool(operands)
        followed = name in ADDING | MOVING | ELEMENTWISE and operands and found.issuperset(operands)
        if widened or followed:
            found.update(eqn.outvars)
    return found
