"""What a value made of parameters is at made-up parameters, in float64, without JAX.

Nothing is compiled: a table of batch norms asks for thousands of such values of a few channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax import numpy as jnp
from jax.extend import core as jex_core

from quantjax.interpreter import NEUTRAL_MOVES, Origin, OriginKind

Array = np.ndarray
Params = Mapping[str, Any]


class UnreadableError(Exception):
    """A value that is computed in a way that is not known here; its text names the primitive."""


def _integer_pow(x: Array, params: Params) -> Array:
    return np.asarray(x, np.float64) ** int(params["y"])


def _broadcast(x: Array, params: Params) -> Array:
    """A view; axes that it adds have stride 0."""
    shape = tuple(params["shape"])
    own = [1] * len(shape)
    for axis, n in zip(params["broadcast_dimensions"], x.shape, strict=True):
        own[axis] = n
    return np.broadcast_to(x.reshape(own), shape)


def _slice(x: Array, params: Params) -> Array:
    strides = params["strides"] or (1,) * x.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(*bound) for bound in bounds)]


def _reshape(x: Array, params: Params) -> Array:
    order = params["dimensions"]
    return (x if order is None else x.transpose(order)).reshape(params["new_sizes"])


UNARY: Mapping[str, Callable[[Array, Params], Array]] = {
    "abs": lambda x, _: np.abs(x),
    "broadcast_in_dim": _broadcast,
    "exp": lambda x, _: np.exp(x),
    "integer_pow": _integer_pow,
    "log": lambda x, _: np.log(x),
    "neg": lambda x, _: -x,
    "reshape": _reshape,
    "rev": lambda x, params: np.flip(x, params["dimensions"]),
    "rsqrt": lambda x, _: 1.0 / np.sqrt(x),
    "slice": _slice,
    "sqrt": lambda x, _: np.sqrt(x),
    "square": lambda x, _: x * x,
    "squeeze": lambda x, params: np.squeeze(x, tuple(params["dimensions"])),
    "expand_dims": lambda x, params: np.expand_dims(x, tuple(params["dimensions"])),
    "transpose": lambda x, params: x.transpose(params["permutation"]),
}

BINARY: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "div": np.divide,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "pow": np.power,
    "sub": np.subtract,
}


def recompute(
    origin: Origin, leaves: Mapping[str, Array], step: Mapping[tuple[int, ...], int]
) -> Array:
    """The value of an origin at ``leaves``; inside scans at the steps given, by location.

    Casts to floats do not round: what is asked is which function of the parameters it is.

    Raises:
      UnreadableError: it does not come from parameters and constants by the operations above.
    """
    known: dict[int, Array] = {}

    def value(node: Origin) -> Array:
        if id(node) not in known:
            known[id(node)] = _value(node, [value(operand) for operand in node.operands])
        return known[id(node)]

    def _value(node: Origin, operands: list[Array]) -> Array:
        if node.is_step:
            return operands[0][step[node.loops[-1].location]]
        if node.eqn is None and node.kind is OriginKind.LEAF:
            return leaves[node.paths[0]]
        if node.eqn is None:
            return _constant(node)
        return _computed(node.eqn, operands, node.output)

    with np.errstate(all="ignore"):
        return value(origin)


def _constant(node: Origin) -> Array:
    if node.value is None:
        raise UnreadableError(node.signature.split("(")[0] or "a loop")
    array = np.asarray(node.value)
    return array if array.dtype == np.bool_ else array.astype(np.float64)


def _drops_fractions(eqn: jex_core.JaxprEqn) -> bool:
    if eqn.primitive.name != "convert_element_type":
        return False
    before: Any = eqn.invars[0].aval
    is_whole = not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return is_whole and jnp.issubdtype(before.dtype, jnp.floating)


def _computed(eqn: jex_core.JaxprEqn, operands: list[Array], output: int) -> Array:
    name = eqn.primitive.name
    if name in NEUTRAL_MOVES:
        if _drops_fractions(eqn):
            raise UnreadableError(f"a cast to {eqn.params['new_dtype']}")
        return operands[0]
    if name == "select_n":
        which = operands[0].astype(np.int64)
        return np.choose(which, operands[1:])
    if name == "unstack":
        return np.moveaxis(operands[0], eqn.params["axis"], 0)[output]
    if name == "split":
        ends = np.cumsum(eqn.params["sizes"])[:-1]
        return np.split(operands[0], ends, eqn.params["axis"])[output]
    if name == "stack":
        return np.stack(operands, eqn.params["axis"])
    if name in UNARY and len(operands) == 1:
        return UNARY[name](operands[0], eqn.params)
    if name in BINARY:
        return BINARY[name](*operands)
    raise UnreadableError(name)
