"""Where a value comes from: a lattice ``constant < leaf < function of leaves < data``.

An :class:`Origin` remembers the equations that lead from parameters to a value, so that a weight
can be recomputed from the parameter tree alone, without the model.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core

from quantjax._compat import bind_equation

STRUCTURAL = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "dynamic_slice",
        "expand_dims",
        "reshape",
        "rev",
        "sharding_constraint",
        "slice",
        "squeeze",
        "transpose",
    }
)
"""Primitives that move or cast entries of their first operand and compute nothing with them."""


class OriginKind(enum.IntEnum):
    """Ordered by how much is known; the kind of a result is the largest among its operands."""

    CONSTANT = 0
    LEAF = 1
    FUNCTION = 2
    DATA = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """What is known of one value.

    Attributes:
      kind: its place in the lattice.
      paths: the parameters that flow in, sorted, without repetition.
      signature: text that is equal for equal derivations (the identity of the recipe).
      eqn, operands, output: the equation it comes from and which of its outputs it is.
      value: the constant itself; None for all others and for a constant that is a tracer.
      derivable: whether the value can be recomputed from the parameters.
    """

    kind: OriginKind
    paths: tuple[str, ...] = ()
    signature: str = ""
    eqn: jex_core.JaxprEqn | None = None
    operands: tuple[Origin, ...] = ()
    output: int = 0
    value: Any = None
    derivable: bool = True


DATA = Origin(OriginKind.DATA, signature="data", derivable=False)


def constant(value: Any) -> Origin:
    """The origin of a literal or of an array that the function closed over."""
    if isinstance(value, jax.core.Tracer):
        return Origin(OriginKind.CONSTANT, signature="tracer", derivable=False)
    is_key = jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(value) if is_key else value)
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return Origin(OriginKind.CONSTANT, signature=f"{array.dtype}{array.shape}{digest}", value=value)


def leaf(path: str) -> Origin:
    """The origin of a parameter."""
    return Origin(OriginKind.LEAF, (path,), path)


def results(eqn: jex_core.JaxprEqn, operands: Sequence[Origin]) -> list[Origin]:
    """The origins of an equation's outputs."""
    if eqn.primitive.name == "optimization_barrier":
        return list(operands)
    kind = max((operand.kind for operand in operands), default=OriginKind.CONSTANT)
    if eqn.primitive.name in STRUCTURAL and operands:
        kind = operands[0].kind
        if any(operand.kind is OriginKind.DATA for operand in operands[1:]):
            kind = OriginKind.DATA
    elif kind is OriginKind.LEAF:
        kind = OriginKind.FUNCTION
    if kind is OriginKind.DATA or eqn.effects:
        return [DATA] * len(eqn.outvars)
    paths = tuple(sorted({path for operand in operands for path in operand.paths}))
    inner = ",".join(operand.signature for operand in operands)
    stated = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(eqn.params.items(), key=str)))
    params = hashlib.sha256(stated.encode()).hexdigest()[:12]
    recipe = f"{eqn.primitive.name}[{params}]({inner})"
    if len(recipe) > 256:
        recipe = f"{eqn.primitive.name}[{hashlib.sha256(recipe.encode()).hexdigest()[:24]}]"
    derivable = all(operand.derivable for operand in operands)
    return [
        Origin(kind, paths, f"{recipe}.{index}", eqn, tuple(operands), index, derivable=derivable)
        for index in range(len(eqn.outvars))
    ]


def evaluate_origin(origin: Origin, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """Recompute a value from the parameters; shared steps run once."""
    memo: dict[Any, list[Any]] = {}

    def value_of(node: Origin) -> Any:
        if node.eqn is None:
            return leaves[node.paths[0]] if node.kind is OriginKind.LEAF else node.value
        key = id(node.eqn), *map(id, node.operands)
        if key not in memo:
            memo[key] = bind_equation(node.eqn, *(value_of(operand) for operand in node.operands))
        return memo[key][node.output]

    return value_of(origin)
