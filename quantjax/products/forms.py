"""How a planned product is executed in integers: the one place that decides."""

from __future__ import annotations

import dataclasses
import enum

from quantjax.products.exactness import Exactness, Sizing

WIDEST = 8
"""Bits of the widest container that an integer product takes; unsigned codes are moved into it."""


class Execution(enum.Enum):
    """What ``qj.execute`` computes at a site."""

    INTEGER = "int8"
    GROUPED = "int8 by group"
    CODES = "codes in float"
    SIMULATED = "as simulated"
    ROWS = "rows of codes"


@dataclasses.dataclass(frozen=True)
class Form:
    """The execution of one site, and why it is not an integer product where it is not."""

    execution: Execution
    reason: str = ""


def execution_form(
    sizing: Sizing,
    containers: tuple[int | None, int | None],
    *,
    grouped: bool,
    batch_groups: bool = False,
    reals: str = "",
) -> Form:
    """The form of a product of operands in containers of so many bits, None for a float operand.

    Args:
      sizing: how the simulation holds its sums.
      grouped: whether a scale varies along the sum.
      batch_groups: whether a convolution groups its batch, as gradients of kernels do.
      reals: the format of an operand whose levels are no integers.

    >>> from quantjax.products.exactness import sizing
    >>> execution_form(sizing(64, 255, 128), (8, 8), grouped=False).execution
    <Execution.INTEGER: 'int8'>
    >>> execution_form(sizing(64, None, 128), (None, 8), grouped=False).execution
    <Execution.CODES: 'codes in float'>
    """
    known = [bits for bits in containers if bits is not None]
    if len(known) < 2:
        return Form(Execution.CODES)
    if reals:
        return Form(Execution.SIMULATED, f"the levels of {reals} are no integers")
    if sizing.exactness is Exactness.FLOAT:
        return Form(Execution.SIMULATED, "a scale varies from one product of a sum to the next")
    if max(known) > WIDEST:
        return Form(Execution.SIMULATED, f"containers of {max(known)} bits have no integer product")
    if sizing.exactness is Exactness.ROUNDED:
        return Form(Execution.SIMULATED, sizing.reason)
    if batch_groups:
        return Form(Execution.SIMULATED, "a convolution that groups its batch")
    return Form(Execution.GROUPED if grouped else Execution.INTEGER)
