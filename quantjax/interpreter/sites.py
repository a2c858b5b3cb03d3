"""What a site is: one row of a model's table of products."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import NamedTuple

from quantjax.interpreter.moves import Moves
from quantjax.interpreter.product import Op

Location = tuple[int, ...]
"""Index of an equation, preceded by ``(index, number of the program)`` of each container around
it."""


class Role(enum.Enum):
    """What an operand is to the model.

    A gradient is what a backward pass hands on, in the program of ``jax.grad``. Outputs and biases
    are operands of what comes after a product.
    """

    WEIGHT = "weight"
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    OUTPUT = "output"
    BIAS = "bias"


class SiteStatus(enum.Enum):
    """Whether the interpreter can rewrite a site."""

    REWRITABLE = "rewritable"
    OPAQUE = "opaque"


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a site.

    Attributes:
      key: its name in the site's state: ``weight``, ``activation``, ``gradient``, or ``lhs`` and
        ``rhs`` where neither operand is a weight; ``output``, ``bias``.
      role: weight, activation or gradient, by dataflow.
      side: 0 left, 1 right, 2 output, 3 bias.
      shape, dtype: of the operand as it enters the product.
      free, contracted, window: its axes by role; of an output, free are those of tokens, and
        contracted those of channels, which the next product sums.
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
      operands: left and right; of a lookup, the table alone.
      out_shape, contraction_size, taps: of one step.
      multiply_adds: of one call of the model; a ``while`` counts for one iteration.
      loops: the containers around it, outermost first: ``scan×12``, ``remat``, ``cond``.
      steps: lengths of the scans of which each step has QParams of its own (stacked layers).
      status, reason: whether it can be rewritten, and what to know about it.
      output: what it returns, behind the bias where there is one.
      bias: a parameter with an entry for each output channel that is added to the product and to
        nothing else.
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
    output: Operand | None = None
    bias: Operand | None = None

    @property
    def parameters(self) -> int:
        """Entries of the weight, of all layers together; 0 without one."""
        weight = self.weight
        return 0 if weight is None else math.prod(self.steps) * math.prod(weight.shape)

    @property
    def weight_paths(self) -> tuple[str, ...]:
        """The parameters that the weight is made of; none without one."""
        return () if self.weight is None else self.weight.paths

    @property
    def results(self) -> dict[Role, Operand | None]:
        """Output and bias, by role."""
        return {Role.OUTPUT: self.output, Role.BIAS: self.bias}

    @property
    def weight(self) -> Operand | None:
        """The weight operand, if there is just one."""
        return next((o for o in self.operands if o.role is Role.WEIGHT), None)


class Added(NamedTuple):
    """What an equation adds: the bias of a site, its operand ``side``.

    Attributes:
      moves: what the site's result went through on its way to the sum.
    """

    site: Site
    side: int
    moves: Moves = ()
