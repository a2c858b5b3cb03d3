"""What is known of the values of a program: where they come from, and what flows in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex_core

from quantjax.folding.chains import Chain, Root
from quantjax.interpreter import Origin, provenance

MOVES = provenance.PASSING - provenance.PARTING | {"broadcast_in_dim"}
"""Primitives with one result that compute nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """What is known of a value that depends on the inputs.

    Attributes:
      chain: what it is of a product, or of another value, channel by channel.
      like: a product, and the channel of each entry, where it is an elementwise function of it.
      statistic: the product of which it is a statistic, one number a channel.
      summed: whether a sum was taken on the way.
      tags: chains that flow in since the last product.
      behind: the one product that flows in, by elementwise functions.
      made_by: the primitive that made it.
      shared: whether something outside of this program reads it too.
    """

    chain: Chain | None = None
    like: tuple[Root, np.ndarray] | None = None
    statistic: Root | None = None
    summed: bool = False
    tags: frozenset[Root] = frozenset()
    behind: str = ""
    made_by: str = "an input"
    shared: bool = False

    @property
    def all_tags(self) -> frozenset[Root]:
        """With its own chain's."""
        return self.tags if self.chain is None else self.tags | {self.chain.root}


Value = Origin | Flow


def origin_of(value: Value) -> Origin:
    return value if isinstance(value, Origin) else provenance.DATA


def plain(value: Value) -> Value:
    """What a loop or a branch sees of it: no chain goes in."""
    if not isinstance(value, Flow):
        return value
    return Flow(tags=value.all_tags, behind=value.behind, made_by=value.made_by)


def joined(eqn: jex_core.JaxprEqn, options: Sequence[Value]) -> Value:
    """One of several values, or data made of them."""
    first, *others = options
    if isinstance(first, Origin) and all(
        isinstance(other, Origin) and other.signature == first.signature for other in others
    ):
        return first
    return dataclasses.replace(dissolved(eqn, options), like=None, statistic=None)


def dissolved(eqn: jex_core.JaxprEqn, values: Sequence[Value]) -> Flow:
    """Data made of these values by an equation."""
    flows = [value for value in values if isinstance(value, Flow)]
    tags = frozenset().union(*(flow.all_tags for flow in flows))
    behind = {flow.behind for flow in flows}
    like, statistic = _kept(eqn, flows)
    return Flow(
        like=like,
        statistic=statistic,
        summed=any(flow.summed for flow in flows) or bool(_summed(eqn)),
        tags=tags,
        behind=behind.pop() if len(behind) == 1 else "",
        made_by=eqn.primitive.name,
    )


def _kept(
    eqn: jex_core.JaxprEqn, flows: Sequence[Flow]
) -> tuple[tuple[Root, np.ndarray] | None, Root | None]:
    """Whether it is an elementwise function, or a statistic, of just one product."""
    roots = {flow.like[0] for flow in flows if flow.like is not None}
    roots |= {flow.statistic for flow in flows if flow.statistic is not None}
    known = all(flow.like is not None or flow.statistic is not None for flow in flows)
    if len(roots) != 1 or not known:
        return None, None
    (root,) = roots
    alike = [flow.like for flow in flows if flow.like is not None]
    if not alike:
        return None, root
    if eqn.primitive.name in ("concatenate", "stack"):
        numbers = _side_by_side(eqn, [numbers for _, numbers in alike])
        return None if numbers is None or len(alike) < len(flows) else (root, numbers), None
    numbers, shape = alike[0][1], shape_of(eqn.outvars[0])
    axes = _summed(eqn)
    if axes:
        if any(numbers.shape[axis] > 1 and numbers.strides[axis] for axis in axes):
            return None, None
        numbers = numbers[tuple(0 if a in axes else slice(None) for a in range(numbers.ndim))]
        return ((root, numbers), None) if _is_spread(numbers) else (None, root)
    part = _part(eqn, numbers)
    if part is not None:
        summed = any(flow.summed for flow in flows)
        return (None, root) if summed and not _is_spread(part) else ((root, part), None)
    if shape == numbers.shape:
        return (root, numbers), None
    if eqn.primitive.name in MOVES and len(flows) == 1:
        chain = Chain(root, numbers).moved(eqn)
        return None if chain is None else (root, chain.numbers), None
    return None, None


def _side_by_side(eqn: jex_core.JaxprEqn, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """The numbers of a stack of values that have the same ones, by a stride of 0 along its axis."""
    if eqn.primitive.name == "stack":
        axis = int(eqn.params["axis"])
        arrays = [np.expand_dims(array, axis) for array in arrays]
    else:
        axis = int(eqn.params["dimension"])
    rows = [array[(*[slice(None)] * axis, slice(0, 1))] for array in arrays]
    along = any(n.shape[axis] > 1 and n.strides[axis] for n in arrays)
    if along or not all(np.array_equal(row, rows[0]) for row in rows):
        return None
    return np.broadcast_to(rows[0], shape_of(eqn.outvars[0]))


def _part(eqn: jex_core.JaxprEqn, numbers: np.ndarray) -> np.ndarray | None:
    """The numbers of one of a stack of values that have the same ones."""
    shape = shape_of(eqn.outvars[0])
    if eqn.primitive.name == "unstack":
        axis = int(eqn.params["axis"])
        axes, kept = [axis], np.moveaxis(numbers, axis, 0)[0]
    elif eqn.primitive.name == "slice":
        axes = [axis for axis, n in enumerate(shape) if n != numbers.shape[axis]]
        kept = numbers[tuple(slice(0, n) for n in shape)]
    else:
        return None
    return None if any(numbers.strides[axis] for axis in axes) else kept


def _is_spread(numbers: np.ndarray) -> bool:
    """Whether entries of one channel lie along some axis."""
    return any(n > 1 and not s for n, s in zip(numbers.shape, numbers.strides, strict=True))


def _summed(eqn: jex_core.JaxprEqn) -> tuple[int, ...]:
    """Over which axes an equation adds up; a mean over the axis of a ``vmap`` is one of these."""
    if eqn.primitive.name not in ("reduce_sum", "psum") or len(eqn.invars) != 1:
        return ()
    return tuple(int(a) for a in eqn.params["axes"] if isinstance(a, int | np.integer))


def shape_of(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))
