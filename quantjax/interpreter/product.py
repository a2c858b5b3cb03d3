"""One bilinear equation of a jaxpr: ``dot_general`` or ``conv_general_dilated``."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

from quantjax._compat import bind_in_context


class Op(enum.Enum):
    """The primitives that are sites."""

    DOT = "dot_general"
    CONV = "conv_general_dilated"


OPS = {op.value: op for op in Op}
CONVOLUTION_PARAMS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A view of the equation: its dimension numbers, shapes, and ways to bind it.

    Attributes:
      op: which primitive.
      eqn: the equation.
      is_summed: whether the result may flow into a sum that is no product; True where not known.
    """

    op: Op
    eqn: jex_core.JaxprEqn
    is_summed: bool = True

    @property
    def params(self) -> dict[str, Any]:
        """The equation's own parameters."""
        return self.eqn.params

    @property
    def lhs(self) -> jax.core.ShapedArray:
        """Abstract value of the left operand."""
        return cast(jax.core.ShapedArray, self.eqn.invars[0].aval)

    @property
    def rhs(self) -> jax.core.ShapedArray:
        """Abstract value of the right operand."""
        return cast(jax.core.ShapedArray, self.eqn.invars[1].aval)

    @property
    def out(self) -> jax.core.ShapedArray:
        """Abstract value of the result."""
        return cast(jax.core.ShapedArray, self.eqn.outvars[0].aval)

    def bind(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The equation as the model has it; for handlers, which run in its context."""
        return bind_in_context(self.eqn, lhs, rhs)[0]

    def in_float32(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The same product of float32 operands at the highest precision, in float32.

        Operands may be smaller than the equation's along contracted axes (blocks of them).
        """
        options: dict[str, Any] = {
            "precision": lax.Precision.HIGHEST,
            "preferred_element_type": jnp.float32,
        }
        if self.op is Op.DOT:
            return lax.dot_general(lhs, rhs, self.params["dimension_numbers"], **options)
        options |= {name: self.params[name] for name in CONVOLUTION_PARAMS}
        return lax.conv_general_dilated(lhs, rhs, **options)

    def multiply_adds(self) -> int:
        """Multiply-accumulates of one call; taps that fall on padding are counted."""
        return math.prod(self.out.shape) * self.contraction_size()

    def contraction_size(self) -> int:
        """How many products each output sums; does not depend on the batch, empty or not."""
        if self.op is Op.DOT:
            (contracted, _), _ = self.params["dimension_numbers"]
            return math.prod(self.lhs.shape[a] for a in contracted)
        out_channels = self.rhs.shape[self.params["dimension_numbers"].rhs_spec[0]]
        return math.prod(self.rhs.shape) // max(out_channels, 1)

    def axes(self, side: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """``(free, contracted, window)`` axes of operand ``side`` (0 left, 1 right).

        Free axes reach the output (batch axes of a dot included, in layout order); contracted axes
        come in the order of the dimension numbers. Where a convolution groups its batch, the batch
        axis is neither.
        """
        if self.op is Op.DOT:
            contracting, _ = self.params["dimension_numbers"]
            contracted = tuple(contracting[side])
            rank = (self.lhs, self.rhs)[side].ndim
            free = tuple(a for a in range(rank) if a not in contracted)
            return free, contracted, ()
        numbers = self.params["dimension_numbers"]
        spec = (numbers.lhs_spec, numbers.rhs_spec)[side]
        grouped_batch = side == 0 and self.params["batch_group_count"] > 1
        return () if grouped_batch else (spec[0],), (spec[1],), tuple(spec[2:])

    def taps(self) -> int:
        """Positions of a convolution's window; 1 for a dot."""
        return math.prod(self.rhs.shape[axis] for axis in self.axes(1)[2])


def product_of(eqn: jex_core.JaxprEqn) -> Product | None:
    """The product that the equation is, if it is one."""
    op = OPS.get(eqn.primitive.name)
    return None if op is None else Product(op, eqn)
