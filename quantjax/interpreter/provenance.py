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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex_core

from quantjax import errors
from quantjax._compat import bind_equation
from quantjax.interpreter.draws import brings_numbers
from quantjax.meshes import mesh_of, placed

NEUTRAL_MOVES = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "name",
        "pcast",
        "pvary",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)
"""Primitives that leave every entry in its place."""
REARRANGING = NEUTRAL_MOVES | {"expand_dims", "reshape", "rev", "squeeze", "transpose"}
"""Primitives that lose no entry, so that what is stored in a parameter is all that there is."""
PARTING = frozenset({"split", "unstack"})
"""Primitives whose several results are each a part of their operand."""
STRUCTURAL = REARRANGING | PARTING | {"dynamic_slice", "slice"}
"""Primitives that move or cast entries of their first operand and compute nothing with them."""

PASSING = STRUCTURAL | {"optimization_barrier"}
"""Primitives after which a parameter is still that parameter."""

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Loop(NamedTuple):
    """A loop of a program: its location, and its number of steps, None for a ``while``."""

    location: tuple[int, ...]
    length: int | None


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
      made: whether single numbers and counting are all that it comes from, and no draw.
      loops: the scans around it of which each step has a value of its own, outermost first.
    """

    kind: OriginKind
    paths: tuple[str, ...] = ()
    signature: str = ""
    eqn: jex_core.JaxprEqn | None = None
    operands: tuple[Origin, ...] = ()
    output: int = 0
    value: Any = None
    derivable: bool = True
    made: bool = False
    loops: tuple[Loop, ...] = ()

    def __deepcopy__(self, memo: Any) -> Origin:
        """Itself: nothing of it changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which cannot write equations."""
        if self.eqn is not None:
            raise errors.StorageError(
                "what is computed from parameters cannot be pickled",
                where=f"{', '.join(self.paths) or 'a constant'}, {self.eqn.primitive.name}",
                why="a plan, or a table, holds the equations that compute it",
                fix="quantjax.storage.save_quantization(path, plan=plan), or qj.plan(policy, "
                "qj.sites(f, params, x)) where it is needed",
            )
        return dict(self.__dict__)

    @property
    def is_step(self) -> bool:
        """Whether it is one step's slice of what a scan iterates over, its only operand."""
        return self.eqn is None and bool(self.operands)


DATA = Origin(OriginKind.DATA, signature="data", derivable=False)
"""What depends on the inputs."""

COTANGENT = Origin(OriginKind.DATA, signature="cotangent", derivable=False)
"""What depends on the inputs by way of a backward pass."""


def data(operands: Sequence[Origin]) -> Origin:
    """:data:`DATA`, or :data:`COTANGENT` where one of them is."""
    return COTANGENT if any(operand is COTANGENT for operand in operands) else DATA


def is_backward(scope: str) -> bool:
    """Whether an equation belongs to a backward pass, and not to what it computes again."""
    return "transpose(" in scope and "rematted_computation" not in scope


def at_product(scope: str, origins: Sequence[Origin], weight: int | None) -> Sequence[Origin]:
    """Of both operands: what a weight meets in a backward pass is a cotangent, wherever it is from.

    Behind that pass a gradient is a value like any other: forces that the next layer reads.

    Args:
      weight: the side of the weight; None where there is none.
    """
    if not is_backward(scope):
        return _forward(origins)
    if weight is None:
        return origins
    return [origin if side == weight else COTANGENT for side, origin in enumerate(origins)]


def in_scope(
    scope: str, primitive: str, operands: Sequence[Origin], origins: list[Origin]
) -> list[Origin]:
    """What a backward pass computes are cotangents, and nothing else is.

    Constants as well, which it starts from; weights stay what they are, and what is only moved,
    such as a saved activation that is transposed.
    """
    if not is_backward(scope):
        return _forward(origins)
    if primitive in PASSING and all(operand is DATA for operand in operands):
        return origins
    known = (OriginKind.LEAF, OriginKind.FUNCTION)
    return [origin if origin.kind in known else COTANGENT for origin in origins]


def _forward(origins: Sequence[Origin]) -> list[Origin]:
    return [DATA if origin is COTANGENT else origin for origin in origins]


def constant(value: Any) -> Origin:
    """The origin of a literal or of an array that the function closed over."""
    if isinstance(value, jax.core.Tracer):
        return Origin(OriginKind.CONSTANT, signature="tracer", derivable=False)
    is_key = jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key)
    with jax.ensure_compile_time_eval():  # a key's data are known, even inside a trace
        array = np.asarray(jax.random.key_data(value) if is_key else value)
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    signature = f"{array.dtype}{array.shape}{digest}"
    few = array.ndim == 0 or array.shape in [(1,), (2,), (3,), (4,)]  # one for each axis of images
    return Origin(OriginKind.CONSTANT, signature=signature, value=value, made=few and not is_key)


def leaf(path: str) -> Origin:
    """The origin of a parameter."""
    return Origin(OriginKind.LEAF, (path,), path)


def eqn_shapes(eqn: jex_core.JaxprEqn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the first operand and of the first result."""
    before, after = (getattr(var.aval, "shape", ()) for var in (eqn.invars[0], eqn.outvars[0]))
    return tuple(before), tuple(after)


def is_rearranged_leaf(origin: Origin) -> bool:
    """Whether all of one parameter enters, moved or cast but not computed with."""
    if origin.kind is not OriginKind.LEAF or not origin.derivable:
        return False
    while origin.operands:
        if origin.eqn is not None:
            before, after = eqn_shapes(origin.eqn)
            whole = origin.eqn.primitive.name == "slice" and before == after
            if origin.eqn.primitive.name not in REARRANGING and not whole:
                return False
            dtype = getattr(origin.eqn.invars[0].aval, "dtype", jnp.float32)
            if not jnp.issubdtype(dtype, jnp.floating):
                return False
        origin = origin.operands[0]
    return True


def recipe(origin: Origin) -> tuple[str, tuple[str, ...]]:
    """How a value is derived, as text that is equal from trace to trace, and its constants.

    What a parameter of an equation does inside (a function, a program) is left out.
    """
    digests: dict[int, str] = {}
    constants: set[str] = set()
    for node in _in_order(origin, {}):
        name = "step" if node.is_step else ",".join(node.paths)
        params: Mapping[str, Any] = {}
        if node.eqn is not None:
            name, params = node.eqn.primitive.name, node.eqn.params
        elif node.kind is OriginKind.CONSTANT:
            constants.add(node.signature)
        plain = {
            key: value
            for key, value in params.items()
            if isinstance(value, int | str | tuple | np.dtype) and key != "weak_type"
        }
        inside = jex_core.jaxprs_in_params(plain)
        stated = "" if any(True for _ in inside) else ADDRESS.sub("", repr(sorted(plain.items())))
        below = [digests[id(operand)] for operand in node.operands]
        if name in NEUTRAL_MOVES and not _is_cast(node.eqn):
            digests[id(node)] = below[0]
            continue
        text = f"{name}{stated}{below}{node.output}"
        digests[id(node)] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return digests[id(origin)], tuple(sorted(constants))


def _is_cast(eqn: jex_core.JaxprEqn | None) -> bool:
    """Whether it makes another dtype; that a number is no longer weakly typed changes nothing."""
    if eqn is None or eqn.primitive.name != "convert_element_type":
        return False
    before, after = (getattr(var.aval, "dtype", None) for var in (eqn.invars[0], eqn.outvars[0]))
    return before != after


def step(source: Origin, loop: Loop) -> Origin:
    """The origin of one step's slice of ``source``, inside a scan over it."""
    if source.kind is OriginKind.DATA:
        return source
    signature = f"step{loop.location}({source.signature})"
    return Origin(
        source.kind,
        source.paths,
        signature,
        operands=(source,),
        derivable=source.derivable,
        made=source.made,
        loops=(*source.loops, loop),
    )


def changing(first: Origin, later: Origin, name: str) -> Origin:
    """The origin of a loop's carry that starts as ``first`` and becomes ``later``."""
    kind = max(first.kind, later.kind)
    if kind is OriginKind.DATA:
        return data((first, later))
    kind = OriginKind.FUNCTION if kind is OriginKind.LEAF else kind
    paths = tuple(sorted({*first.paths, *later.paths}))
    return Origin(kind, paths, name, derivable=False, made=first.made and later.made)


def results(eqn: jex_core.JaxprEqn, operands: Sequence[Origin]) -> list[Origin]:
    """The origins of an equation's outputs."""
    if eqn.primitive.name == "optimization_barrier":
        return list(operands)
    if eqn.primitive.name == "stop_gradient" and operands[0].kind is not OriginKind.DATA:
        return [dataclasses.replace(operands[0], eqn=eqn, operands=tuple(operands), output=0)]
    if eqn.primitive.name == "select_n" and _are_same(operands[1:]):
        return [operands[-1]]  # whatever is chosen; jax.vmap of a cond hands operands on like this
    kind = max((operand.kind for operand in operands), default=OriginKind.CONSTANT)
    if eqn.primitive.name in STRUCTURAL and operands:
        kind = operands[0].kind
        if any(operand.kind is OriginKind.DATA for operand in operands[1:]):
            kind = OriginKind.DATA
    elif kind is OriginKind.LEAF:
        kind = OriginKind.FUNCTION
    if kind is OriginKind.DATA or eqn.effects:
        return [data(operands)] * len(eqn.outvars)
    # A leaf is that parameter, whichever others say which of its entries are taken.
    sources = operands[:1] if kind is OriginKind.LEAF else operands
    paths = tuple(sorted({path for operand in sources for path in operand.paths}))
    inner = ",".join(operand.signature for operand in operands)
    stated = ADDRESS.sub("", repr(sorted(eqn.params.items(), key=str)))
    params = hashlib.sha256(stated.encode()).hexdigest()[:12]
    recipe = f"{eqn.primitive.name}[{params}]({inner})"
    if len(recipe) > 256:
        recipe = f"{eqn.primitive.name}[{hashlib.sha256(recipe.encode()).hexdigest()[:24]}]"
    derivable = all(operand.derivable for operand in operands)
    made = all(operand.made for operand in operands) and not brings_numbers(eqn)
    loops = {loop for operand in operands for loop in operand.loops}
    ordered = tuple(sorted(loops, key=lambda loop: len(loop.location)))
    return [
        Origin(
            kind,
            paths,
            f"{recipe}.{index}",
            eqn,
            tuple(operands),
            index,
            derivable=derivable,
            made=made,
            loops=ordered,
        )
        for index in range(len(eqn.outvars))
    ]


def _are_same(cases: Sequence[Origin]) -> bool:
    """Whether all are one value; tracers, which have no signatures, only where they are one."""
    first = cases[0]
    if first.derivable or first.kind is OriginKind.DATA:
        return len({case.signature for case in cases}) == 1
    return all(case is first for case in cases)


def evaluate_origin(origin: Origin, leaves: Mapping[str, Any]) -> jax.Array:
    """Recompute a value from the parameters; shared steps of the recipe run once.

    It has a leading axis for each of ``origin.loops``, and lies on the parameters' mesh.
    """
    return placed(_over_loops(origin, origin.loops, leaves, {}), mesh_of(leaves))


def _over_loops(
    origin: Origin, loops: Sequence[Loop], leaves: Mapping[str, Any], bound: Mapping[int, Any]
) -> jax.Array:
    if not loops:
        return _recompute(origin, leaves, bound)
    loop, *inner = loops
    slices = {id(node): node for node in _nodes(origin) if node.is_step and node.loops[-1] == loop}
    stacked = {key: _recompute(node.operands[0], leaves, bound) for key, node in slices.items()}

    def one(at: Mapping[int, Any]) -> jax.Array:
        return _over_loops(origin, inner, leaves, {**bound, **at})

    if origin.kind is OriginKind.FUNCTION:
        return lax.map(one, stacked)  # step by step, as the model computes it
    return jax.vmap(one)(stacked)  # entries are only moved: the same bit for bit


def _nodes(origin: Origin) -> list[Origin]:
    """All origins that this one is made of, each once."""
    seen: dict[int, Origin] = {}
    waiting = [origin]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            waiting += node.operands
    return list(seen.values())


def _recompute(origin: Origin, leaves: Mapping[str, Any], bound: Mapping[int, Any]) -> Any:
    """The value of a recipe whose steps of scans are ``bound``."""
    results: dict[Any, list[Any]] = {}
    values: dict[int, Any] = {}
    for node in _in_order(origin, bound):
        if node.is_step:
            values[id(node)] = bound[id(node)]
        elif node.eqn is None:
            leaf = node.kind is OriginKind.LEAF
            values[id(node)] = leaves[node.paths[0]] if leaf else node.value
        else:
            key = id(node.eqn), *map(id, node.operands)
            if key not in results:
                operands = (values[id(operand)] for operand in node.operands)
                results[key] = bind_equation(node.eqn, *operands)
            values[id(node)] = results[key][node.output]
    return values[id(origin)]


def _in_order(origin: Origin, bound: Mapping[int, Any]) -> list[Origin]:
    """What the value is made of, operands first; nothing beyond what is bound."""
    order: list[Origin] = []
    done: set[int] = set()
    waiting = [(origin, False)]
    while waiting:
        node, expanded = waiting.pop()
        if id(node) in done:
            continue
        if expanded or id(node) in bound or not node.operands:
            done.add(id(node))
            order.append(node)
        else:
            waiting.append((node, True))
            waiting += [(operand, False) for operand in node.operands]
    return order
