"""What is known of the values of a program: where they come from, and what flows in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex_core

from quantjax.folding.chains import Chain, Root
from quantjax.interpreter import Origin, provenance

MOVES = provenance.PASSING | {"broadcast_in_dim"}
"""Primitives that compute nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """What is known of a value that depends on the inputs.

    Attributes:
      chain: what it is of a product, or of another value, channel by channel.
      like: a product, and the channel of each entry, where it is an elementwise function of it.
      statistic: the product of which it is a statistic, one number a channel.
      tags: chains that flow in since the last product.
      behind: the one product that flows in, by elementwise functions.
      made_by: the primitive that made it.
      shared: whether something outside of this program reads it too.
    """

    chain: Chain | None = None
    like: tuple[Root, np.ndarray] | None = None
    statistic: Root | None = None
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
    numbers, shape = alike[0][1], shape_of(eqn.outvars[0])
    axes = _summed(eqn)
    if axes:
        if any(numbers.shape[axis] > 1 and numbers.strides[axis] for axis in axes):
            return None, None
        numbers = numbers[tuple(0 if a in axes else slice(None) for a in range(numbers.ndim))]
        spread = any(n > 1 and not s for n, s in zip(numbers.shape, numbers.strides, strict=True))
        return ((root, numbers), None) if spread else (None, root)
    if shape == numbers.shape:
        return (root, numbers), None
    if eqn.primitive.name in MOVES and len(flows) == 1:
        chain = Chain(root, numbers).moved(eqn)
        return None if chain is None else (root, chain.numbers), None
    return None, None


def _summed(eqn: jex_core.JaxprEqn) -> tuple[int, ...]:
    """Over which axes an equation adds up; a mean over the axis of a ``vmap`` is one of these."""
    if eqn.primitive.name not in ("reduce_sum", "psum") or len(eqn.invars) != 1:
        return ()
    return tuple(int(a) for a in eqn.params["axes"] if isinstance(a, int | np.integer))


def shape_of(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))
