"""One equation of a jaxpr that is a site: a product, or a lookup of rows of a parameter."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

from quantjax._compat import bind_altered, bind_in_context
from quantjax.interpreter.turns import NO_TURNS, Turns


class Op(enum.Enum):
    """The primitives that are sites."""

    DOT = "dot_general"
    CONV = "conv_general_dilated"
    RAGGED = "ragged_dot_general"
    GATHER = "gather"
    SLICE = "dynamic_slice"

    @property
    def is_lookup(self) -> bool:
        """Whether it takes rows of a table, and multiplies nothing."""
        return self in (Op.GATHER, Op.SLICE)


OPS = {op.value: op for op in Op}
Precision = tuple[lax.Precision, lax.Precision] | None
"""Of the two operands, as equations have it; None is the backend's own."""

HIGHEST: Precision = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A view of the equation: its dimension numbers, shapes, and ways to bind it.

    Attributes:
      op: which primitive.
      eqn: the equation.
      is_summed: whether the result may flow into a sum that is no product; True where not known.
      turns: which of its operands and results are transposed next to it.
      rest: values of the operands that are no factors, while it is evaluated: sizes of the groups
        of a ragged product, indices of a lookup.
    """

    op: Op
    eqn: jex_core.JaxprEqn
    is_summed: bool = True
    turns: Turns = NO_TURNS
    rest: tuple[Any, ...] = ()

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
        """Abstract value of the right operand; a lookup has none."""
        return cast(jax.core.ShapedArray, self.eqn.invars[1].aval)

    @property
    def out(self) -> jax.core.ShapedArray:
        """Abstract value of the result."""
        return cast(jax.core.ShapedArray, self.eqn.outvars[0].aval)

    @property
    def factors(self) -> int:
        """How many operands are quantized: the first one or two."""
        return 1 if self.op.is_lookup else 2

    def bind(self, *factors: jax.Array) -> jax.Array:
        """The equation as the model has it; for handlers, which run in its context.

        Args:
          factors: the left and the right operand, or the table alone.
        """
        return bind_in_context(self.eqn, *factors[: self.factors], *self.rest)[0]

    def in_float32(
        self, lhs: jax.Array, rhs: jax.Array, precision: Precision = HIGHEST
    ) -> jax.Array:
        """The same product summed in float32, of operands in float32 unless they are narrower.

        Operands may be smaller than the equation's along contracted axes (blocks of them).
        """
        options: dict[str, Any] = {"precision": precision, "preferred_element_type": jnp.float32}
        if self.op is Op.RAGGED:
            numbers = self.params["ragged_dot_dimension_numbers"]
            return lax.ragged_dot_general(lhs, rhs, self.rest[0], numbers, **options)
        # Bound, and not called anew: a window that is placed by a symbolic size would be refused.
        return bind_altered(self.eqn, options, lhs, rhs)[0]

    def multiply_adds(self) -> int:
        """Multiply-accumulates of one call; taps that fall on padding are counted."""
        if self.op.is_lookup:
            return 0
        return math.prod(self.out.shape) * self.contraction_size()

    def contraction_size(self) -> int:
        """How many products each output sums; does not depend on the batch, empty or not."""
        if self.op.is_lookup:
            return 1
        if self.op is not Op.CONV:
            return math.prod(self.lhs.shape[a] for a in self.axes(0)[1])
        out_channels = self.rhs.shape[self.params["dimension_numbers"].rhs_spec[0]]
        return math.prod(self.rhs.shape) // max(out_channels, 1)

    def axes(self, side: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """``(free, contracted, window)`` axes of operand ``side`` (0 left, 1 right).

        Free axes reach the output (batch axes of a dot included, in layout order); contracted axes
        come in the order of the dimension numbers. Where a convolution groups its batch, the batch
        axis is neither. Free axes of a table are those that indices choose from; a row is what
        lies along the others.
        """
        if self.op is not Op.CONV:
            contracted = self._contracted(side)
            rank = (self.lhs, self.rhs)[side].ndim
            free = tuple(a for a in range(rank) if a not in contracted)
            return free, contracted, ()
        numbers = self.params["dimension_numbers"]
        spec = (numbers.lhs_spec, numbers.rhs_spec)[side]
        grouped_batch = side == 0 and self.params["batch_group_count"] > 1
        return () if grouped_batch else (spec[0],), (spec[1],), tuple(spec[2:])

    def _contracted(self, side: int) -> tuple[int, ...]:
        if self.op is Op.DOT:
            contracting, _ = self.params["dimension_numbers"]
            return tuple(contracting[side])
        if self.op is Op.RAGGED:
            numbers = self.params["ragged_dot_dimension_numbers"]
            contracting, _ = numbers.dot_dimension_numbers
            return tuple(contracting[side])
        shape, sizes = self.lhs.shape, self.params["slice_sizes"]
        chosen = self.chosen
        return tuple(a for a in range(len(shape)) if a not in chosen and sizes[a] == shape[a])

    @property
    def chosen(self) -> tuple[int, ...]:
        """Axes of a table that indices choose from.

        Not those that they take whole, as the slice of a batched ``dynamic_slice`` does: where an
        index is clamped, it is 0 there.
        """
        if self.op is Op.SLICE:
            return ()
        numbers, sizes = self.params["dimension_numbers"], self.params["slice_sizes"]
        indexed = numbers.start_index_map
        if not self.fills:
            shape = self.lhs.shape
            indexed = [a for a in indexed if sizes[a] < shape[a] or shape[a] == 1]
        return (*indexed, *numbers.operand_batching_dims)

    @property
    def fills(self) -> bool:
        """Whether a lookup has values of its own for indices out of bounds."""
        fill = lax.GatherScatterMode.FILL_OR_DROP
        return self.op is Op.GATHER and self.params["mode"] == fill

    def out_channels(self, weight: int | None) -> tuple[int, ...]:
        """Axes of the result that are channels: those that the weight brings, or the last one.

        Args:
          weight: the side of the weight.
        """
        if self.op is Op.CONV and weight == 1:
            return (self.params["dimension_numbers"].out_spec[1],)
        if self.op is Op.DOT and weight is not None:
            _, batch = self.params["dimension_numbers"]
            first = len(batch[0])
            left = first + len(self.axes(0)[0]) - first
            return tuple(range(left, self.out.ndim) if weight else range(first, left))
        return tuple(range(self.out.ndim))[-1:]

    @property
    def out_batch(self) -> tuple[int, ...]:
        """Axes of the result along which a product of each entry is taken alone, as of experts."""
        if self.op is not Op.DOT:
            return ()
        _, (batch, _) = self.params["dimension_numbers"]
        return tuple(range(len(batch)))

    def taps(self) -> int:
        """Positions of a convolution's window; 1 for all others."""
        if self.op is not Op.CONV:
            return 1
        return math.prod(self.rhs.shape[axis] for axis in self.axes(1)[2])


def product_of(eqn: jex_core.JaxprEqn) -> Product | None:
    """The product that the equation is, if it is one."""
    op = OPS.get(eqn.primitive.name)
    return None if op is None else Product(op, eqn)


def unsupported(product: Product) -> str:
    """Why an equation is a site that cannot be rewritten; empty where it can."""
    if product.op is Op.RAGGED:
        numbers = product.params["ragged_dot_dimension_numbers"]
        _, batching = numbers.dot_dimension_numbers
        plain = not any(batching) and len(numbers.rhs_group_dimensions) == 1
        plain &= product.lhs.ndim == 2 and product.rhs.ndim == 3
        plain &= product.params.get("group_offset") is None
        return "" if plain else "a ragged product that is not of rows with one matrix a group"
    if product.op is Op.GATHER:
        sizes, shape, chosen = product.params["slice_sizes"], product.lhs.shape, product.chosen
        whole = all(a in chosen or sizes[a] == n for a, n in enumerate(shape))
        alone = len(chosen) == 1 and not product.fills
        whole &= alone or all(sizes[a] == 1 for a in chosen)
        return "" if whole else "a lookup of parts of rows"
    return ""
