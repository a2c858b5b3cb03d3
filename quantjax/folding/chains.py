"""A value that is an affine function, channel by channel, of what a product returns."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.extend import core as jex_core

from quantjax.folding.channels import compressed
from quantjax.folding.recompute import recompute
from quantjax.interpreter import Origin, Product
from quantjax.interpreter.sites import Location, Site


@dataclasses.dataclass(frozen=True, eq=False)
class Root:
    """What a chain starts from: a product, or any other value that parameters are added to.

    Attributes:
      location: of the equation.
      channels: how many entries operands may have.
      site, product, side: of a product: its row, its equation, and which operand is its kernel.
      weight: of a product: where its kernel comes from.
      behind: of another value: the product that it comes from by elementwise functions.
      made_by: of another value: the primitive that made it.
    """

    location: Location
    channels: int
    site: Site | None = None
    product: Product | None = None
    side: int = 1
    weight: Origin | None = None
    behind: str = ""
    made_by: str = ""


class StepOp(enum.Enum):
    """What a chain does with its value ``x`` and an operand ``p``."""

    ADD = "x + p"
    SUBTRACT = "x - p"
    SUBTRACT_FROM = "p - x"
    MULTIPLY = "x * p"
    DIVIDE = "x / p"
    NEGATE = "-x"


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One equation of a chain.

    Attributes:
      op: what it does.
      operand: where ``p`` comes from; None where there is none.
      numbers: the channel of each entry of ``x``.
      shared: whether something else reads ``x`` too.
      location: of the equation.
    """

    op: StepOp
    operand: Origin | None
    numbers: np.ndarray
    shared: bool
    location: Location


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The equations between a root and a value, casts and moves left out.

    Attributes:
      numbers: the channel of each entry of the value.
      parent: the chain without the last step.
    """

    root: Root
    numbers: np.ndarray
    steps: tuple[Step, ...] = ()
    parent: Chain | None = None

    def extended(self, step: Step) -> Chain:
        """With one more step."""
        return Chain(self.root, self.numbers, (*self.steps, step), self)

    def moved(self, eqn: jex_core.JaxprEqn) -> Chain | None:
        """The chain of a value whose entries the equation moves; None where it does not keep all.

        A move is no step: the result stands for the same chain.
        """
        numbers = _moved(self.numbers, eqn)
        return None if numbers is None else dataclasses.replace(self, numbers=numbers)


def _moved(numbers: np.ndarray, eqn: jex_core.JaxprEqn) -> np.ndarray | None:
    name, shape = eqn.primitive.name, tuple(getattr(eqn.outvars[0].aval, "shape", ()))
    if name == "transpose":
        return numbers.transpose(eqn.params["permutation"])
    if name == "rev":
        return np.flip(numbers, eqn.params["dimensions"])
    if int(np.prod(shape)) != numbers.size:
        return None  # broadcast, or a part of it
    if name == "reshape" and eqn.params["dimensions"] is not None:
        numbers = numbers.transpose(eqn.params["dimensions"])
    return numbers.reshape(shape)


class NotPerChannelError(Exception):
    """An operand that changes along other axes than those of the channels."""


@dataclasses.dataclass(frozen=True)
class Affine:
    """``y = multiplier * z + shift``, an entry for each channel."""

    multiplier: np.ndarray
    shift: np.ndarray


def affine(
    chain: Chain,
    length: int,
    leaves: Mapping[str, np.ndarray],
    at: Mapping[Location, int],
) -> Affine:
    """What the first ``length`` steps of a chain compute at made-up parameters, in float64.

    Args:
      at: which step of each scan around it.

    Raises:
      NotPerChannelError, UnreadableError: it is nothing of the kind.
    """
    m, c = np.ones(chain.root.channels), np.zeros(chain.root.channels)
    with np.errstate(all="ignore"):
        for step in chain.steps[:length]:
            p: Any = 0.0
            if step.operand is not None:
                value = recompute(step.operand, leaves, at)
                p = per_channel(value, step.numbers, chain.root.channels)
            match step.op:
                case StepOp.ADD:
                    c = c + p
                case StepOp.SUBTRACT:
                    c = c - p
                case StepOp.SUBTRACT_FROM:
                    m, c = -m, p - c
                case StepOp.MULTIPLY:
                    m, c = m * p, c * p
                case StepOp.DIVIDE:
                    m, c = m / p, c / p
                case StepOp.NEGATE:
                    m, c = -m, -c
    return Affine(m, c)


def per_channel(value: np.ndarray, numbers: np.ndarray, channels: int) -> np.ndarray:
    """The entry of each channel of an operand whose entries belong to channels ``numbers``.

    Raises:
      NotPerChannelError: two entries of one channel differ.
    """
    if value.ndim and value.ndim != numbers.ndim:
        raise NotPerChannelError
    wide = np.broadcast_to(value, numbers.shape)
    same = [stride == 0 or n == 1 for stride, n in zip(numbers.strides, numbers.shape, strict=True)]
    for axis, alike in enumerate(same):
        if not alike:
            continue
        first = wide[(slice(None),) * axis + (slice(0, 1),)]
        if wide.strides[axis] != 0 and not np.array_equal(wide, np.broadcast_to(first, wide.shape)):
            raise NotPerChannelError
        wide = first
    own = compressed(numbers)
    wide = np.broadcast_to(wide, own.shape)
    vector = np.zeros(channels)
    vector[own.ravel()] = wide.ravel()
    if not np.array_equal(vector[own], wide, equal_nan=True):
        raise NotPerChannelError
    return vector
