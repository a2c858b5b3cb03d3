"""Which weights compete with one another, and how many of them go."""

from __future__ import annotations

import dataclasses
import enum
import functools
import numbers
from abc import ABC, abstractmethod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax import errors
from quantjax._compat import concrete
from quantjax.arguments import expect
from quantjax.printing import shape_text


class Scope(enum.Enum):
    """Among which weights the lowest are sought: those of each kernel, or of all kernels."""

    LOCAL = "local"
    GLOBAL = "global"


EXACT = 1 << 24
"""Counts up to here are float32 numbers."""

COMPARED = 16
"""Neighbours of which all pairs are compared, where more are sorted."""


def kept(scores: Float[Array, "... n"], sparsity: float | jax.Array) -> Bool[Array, "... n"]:
    """True for all but the ``round(sparsity · n)`` lowest along the last axis, by rank.

    Of equal scores the first ones go: a rank has no ties, so that the number is exact.
    """
    return _above(scores, _gone(sparsity, scores.shape[-1]))


@functools.partial(jax.jit, inline=True)  # one program where it is called eagerly
def _above(scores: jax.Array, number: int | jax.Array) -> jax.Array:
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    order = jnp.argsort(scores, axis=-1, stable=True)
    ranks = jnp.argsort(order, axis=-1)
    return ranks >= jnp.asarray(number, ranks.dtype)


@functools.partial(jax.jit, inline=True, static_argnames="axis")
def _above_neighbours(scores: jax.Array, number: int | jax.Array, *, axis: int) -> jax.Array:
    """The same along a short axis, by comparing all pairs where they lie: sorts are slow."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    place = lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    below = jnp.zeros(scores.shape, jnp.int32)
    for n in range(scores.shape[axis]):
        one = lax.slice_in_dim(scores, n, n + 1, axis=axis)
        below += ((one < scores) | ((one == scores) & (n < place))).astype(jnp.int32)
    return below >= jnp.asarray(number, jnp.int32)


def _gone(sparsity: float | jax.Array, number: int) -> int | jax.Array:
    """``round(sparsity · number)`` in float32, the same eagerly and under ``jit``; of more weights
    than float32 counts, in float64 where the sparsity is known."""
    known = concrete(sparsity)
    if known is not None and number > EXACT:
        return round(min(max(float(known), 0.0), 1.0) * number)
    if known is not None:  # by NumPy: a program for each operation would have to be compiled
        part = np.clip(np.float32(known), np.float32(0.0), np.float32(1.0))
        return number if part == 1.0 else int(np.round(part * np.float32(number)))
    share = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)
    away = jnp.round(share * number).astype(jnp.int32)
    return jnp.where(share == 1.0, number, away)


@dataclasses.dataclass(frozen=True)
class Structure(ABC):
    """A pattern that masks have."""

    @abstractmethod
    def mask(
        self, scores: Float[Array, "..."], sparsity: float | jax.Array, where: str
    ) -> Bool[Array, ""]:
        """True for the weights that stay, from the scores of one kernel."""

    @property
    def has_scope(self) -> bool:
        """Whether all kernels together can share one ranking."""
        return False

    @abstractmethod
    def check(self, sparsity: jax.Array | float) -> None:
        """Raise ``PruningError`` for a concrete sparsity that the pattern cannot have."""


@dataclasses.dataclass(frozen=True)
class Elements(Structure):
    """Single weights, wherever they are: ``round(sparsity · n)`` of them go."""

    def mask(
        self, scores: Float[Array, "..."], sparsity: float | jax.Array, where: str
    ) -> Bool[Array, ""]:
        """See the class."""
        del where
        return kept(scores.reshape(-1), sparsity).reshape(scores.shape)

    @property
    def has_scope(self) -> bool:
        """They do."""
        return True

    def check(self, sparsity: jax.Array | float) -> None:
        """Single weights take any."""


ELEMENTS = Elements()
"""Single weights, wherever they are."""


@dataclasses.dataclass(frozen=True)
class NOfM(Structure):
    """``N`` of every ``M`` neighbours along an axis stay, ``N = (1 - sparsity) · M``.

    A sparsity of 0.5 with ``M = 4`` is 2:4, which sparse tensor cores multiply. ``N`` follows from
    the sparsity, so that it may be traced; it is rounded then, where a known one is refused.

    Attributes:
      m: ``M``.
      axis: along which neighbours are, which hardware wants to be the summed one. -2 is the input
        axis of Flax's dense and convolution kernels; Equinox's ``Linear`` has it at -1, kernels of
        attention in Flax (``features x heads x width``) at 0: select those by name, one mask each.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021, section 3.
    """

    m: int = 4
    axis: int = -2

    def __post_init__(self) -> None:
        for name, value in {"m": self.m, "axis": self.axis}.items():
            where, fix = "qj.pruning.NOfM", "qj.pruning.NOfM(m=4, axis=-2)"
            expect(value, numbers.Integral, argument=name, where=where, fix=fix)
        if self.m < 2:
            raise errors.PruningError(
                f"groups of {self.m}", why="one weight has no neighbour", fix="qj.pruning.NOfM(4)"
            )

    def mask(
        self, scores: Float[Array, "..."], sparsity: float | jax.Array, where: str
    ) -> Bool[Array, ""]:
        """See the class; raises ``PruningError`` where ``M`` does not divide the axis."""
        if not -scores.ndim <= self.axis < scores.ndim or scores.shape[self.axis] % self.m:
            raise errors.PruningError(
                f"groups of {self.m} along axis {self.axis} of {shape_text(scores.shape)}",
                where=where,
                why="the axis is no multiple of the groups, or not there",
                fix="select= without this kernel, another axis or another M",
            )
        axis, shape = self.axis % scores.ndim, scores.shape
        if self.m <= COMPARED:
            apart = shape[axis] // self.m, self.m
            groups = scores.reshape(*shape[:axis], *apart, *shape[axis + 1 :])
            stays = _above_neighbours(groups, _gone(sparsity, self.m), axis=axis + 1)
            return stays.reshape(shape)
        last = jnp.moveaxis(scores, axis, -1)
        groups = last.reshape(*last.shape[:-1], last.shape[-1] // self.m, self.m)
        stays = kept(groups, sparsity).reshape(last.shape)
        return jnp.moveaxis(stays, -1, axis)

    def check(self, sparsity: jax.Array | float) -> None:
        """Of ``M`` weights a whole number goes."""
        known = concrete(sparsity)
        if known is not None and abs(float(known) * self.m - round(float(known) * self.m)) > 1e-6:
            raise errors.PruningError(
                f"a sparsity of {float(known):g}, which of {self.m} weights leaves no whole number",
                where=f"qj.prune_mask with {self}",
                fix=f"sparsity={min(max(round(float(known) * self.m), 1), self.m - 1) / self.m:g}",
            )
