"""What every number format offers to the arithmetic of one tensor.

A format is static and hashable. The width in use is **not** part of it: ``bits`` is an array
argument of each method, at most ``max_bits``, so that one trace serves every width. Codes travel
as float32 arrays inside arithmetic and in ``storage_dtype`` inside a ``QTensor``.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from quantjax.rounding import Rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(abc.ABC):
    """A family of codes.

    Attributes:
      max_bits: the storage container, the limit of the traced width.
      signed: whether codes go below zero.
    """

    max_bits: int = 8
    signed: bool = True

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name, without the width: ``int``, ``uint``, ``int-narrow``."""

    @property
    @abc.abstractmethod
    def storage_dtype(self) -> jnp.dtype:
        """The dtype that holds one code of ``max_bits`` bits."""

    @abc.abstractmethod
    def code_range(self, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest code at width ``bits`` (float32, the shape of ``bits``)."""

    @abc.abstractmethod
    def steps(self, bits: jax.Array, *, symmetric: bool) -> jax.Array:
        """How many scales a range spans: ``scale = span / steps``.

        The span is the largest magnitude for a symmetric range, ``max - min`` for an asymmetric
        one.
        """

    @abc.abstractmethod
    def snap(
        self, scaled: jax.Array, zero_point: jax.Array, bits: jax.Array, rounding: Rounding
    ) -> jax.Array:
        """The code (a float32 integer) nearest to ``scaled + zero_point``, inside the range."""

    @abc.abstractmethod
    def largest_centered_code(self, *, symmetric: bool) -> int:
        """Bound of ``|code - zero_point|`` at ``max_bits``; integer products are sized by it."""

    @abc.abstractmethod
    def valid_bits(self, bits: jax.Array) -> jax.Array:
        """Where ``bits`` is a width that the container holds, or 0 for bypass (bool)."""
