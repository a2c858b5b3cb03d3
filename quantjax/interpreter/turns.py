"""Which products read or feed a transposed matrix: XLA makes the transposition part of them.

``x (Wᵀ)`` becomes a product that reads ``W`` along its other axis, and ``(W xᵀ)ᵀ`` becomes
``x Wᵀ``; either may add up its sums in another order than the product alone. Whoever computes such
a product otherwise leaves the transposition next to it, so that XLA does the same again.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

from jax.extend import core as jex_core


class Turns(NamedTuple):
    """Which sides of a product have a transposition next to them.

    Attributes:
      lhs, rhs: whether the operand is a matrix that was transposed just before.
      out: whether all that becomes of the result, a matrix, is to be transposed.
    """

    lhs: bool = False
    rhs: bool = False
    out: bool = False


NO_TURNS = Turns()


class Turned(NamedTuple):
    """Variables of one program.

    Attributes:
      made: transposed matrices.
      read: matrices whose one reader transposes them.
    """

    made: frozenset[Any]
    read: frozenset[Any]

    def around(self, eqn: jex_core.JaxprEqn) -> Turns:
        """What stands next to a product of two operands."""
        lhs, rhs = (
            not isinstance(atom, jex_core.Literal) and atom in self.made for atom in eqn.invars[:2]
        )
        return Turns(lhs, rhs, eqn.outvars[0] in self.read)


def turned(jaxpr: jex_core.Jaxpr) -> Turned:
    """The matrices that ``jaxpr`` transposes, and those that it has transposed."""
    readers: collections.Counter[Any] = collections.Counter()
    for atom in (*jaxpr.outvars, *(atom for eqn in jaxpr.eqns for atom in eqn.invars)):
        if not isinstance(atom, jex_core.Literal):
            readers[atom] += 1
    turning = [
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "transpose" and eqn.params["permutation"] == (1, 0)
    ]
    read = (eqn.invars[0] for eqn in turning)
    return Turned(
        frozenset(eqn.outvars[0] for eqn in turning),
        frozenset(atom for atom in read if readers[atom] == 1),
    )
