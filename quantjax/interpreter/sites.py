"""What a site is: one row of a model's table of products."""

from __future__ import annotations

import dataclasses
import enum

from quantjax.interpreter.product import Op

Location = tuple[int, ...]
"""Index of an equation, preceded by ``(index, number of the program)`` of each container around
it."""


class Role(enum.Enum):
    """What an operand is to the model.

    A gradient is what a backward pass hands on, in the program of ``jax.grad``.
    """

    WEIGHT = "weight"
    ACTIVATION = "activation"
    GRADIENT = "gradient"


class SiteStatus(enum.Enum):
    """Whether the interpreter can rewrite a site."""

    REWRITABLE = "rewritable"
    OPAQUE = "opaque"


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a site.

    Attributes:
      key: its name in the site's state: ``weight``, ``activation``, ``gradient``, or ``lhs`` and
        ``rhs`` where neither operand is a weight.
      role: weight, activation or gradient, by dataflow.
      side: 0 left, 1 right.
      shape, dtype: of the operand as it enters the product.
      free, contracted, window: its axes by role.
      paths: parameters that it is made of.
      recipe, constants: identity of its derivation from them, and of the constants in it; empty for
        activations.
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
    constants: tuple[str, ...] = ()
    storable: bool = False


@dataclasses.dataclass(frozen=True)
class Site:
    """One row of the model's table: a product, named by the parameter that flows in.

    Attributes:
      name: path of the weight, ``#1``, ``#2`` for later uses; scope and position without a weight.
      op, scope: the primitive, and the module path that it was traced under.
      operands: left and right.
      out_shape, contraction_size, taps: of one step.
      multiply_adds: of one call of the model; a ``while`` counts for one iteration.
      loops: the containers around it, outermost first: ``scan×12``, ``remat``, ``cond``.
      steps: lengths of the scans of which each step has QParams of its own (stacked layers).
      status, reason: whether it can be rewritten, and what to know about it.
    """

    name: str
    op: Op
    scope: str
    operands: tuple[Operand, ...]
    out_shape: tuple[int, ...]
    contraction_size: int
    taps: int
    multiply_adds: int
    loops: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    status: SiteStatus = SiteStatus.REWRITABLE
    reason: str = ""

    @property
    def weight(self) -> Operand | None:
        """The weight operand, if there is just one."""
        return next((o for o in self.operands if o.role is Role.WEIGHT), None)
