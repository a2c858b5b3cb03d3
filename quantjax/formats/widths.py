"""Widths and containers that are asked for: refused by the name of the argument."""

from __future__ import annotations

import math
import numbers

from quantjax import errors
from quantjax.arguments import expect
from quantjax.formats.base import Format
from quantjax.formats.integer import MAX_CONTAINER_BITS


def check_bits(
    format: Format, bits: float, *, argument: str, where: str, is_fixed: bool = False
) -> None:
    """Raise unless ``bits`` is a width of the format, or 0 for bypass.

    Args:
      argument: what the caller names the width, for the error's fix.
      is_fixed: whether the caller cannot ask for another format.

    Raises:
      ArgumentError: no number.
      BitsError: more than the container holds, or no width of the format.

    >>> from quantjax.formats import integer
    >>> check_bits(integer(max_bits=8), 4, argument="weight_bits", where="a preset")
    """
    most = format.max_bits
    usual = min(8, most)
    expect(bits, numbers.Real, argument=argument, where=where, fix=f"{argument}={usual}")
    if format.known_valid(bits):
        return
    whole = math.ceil(bits) if 1 <= bits <= most else most if bits > most else usual
    # Not every format has each whole width, but the container's own is always one.
    near = next(width for width in (whole, usual, most) if format.known_valid(width))
    fix = f"{argument}={near}"
    if bits <= most or bits != bits:
        raise errors.BitsError(
            f"{bits} bits are no width of {format.label(most)}",
            where=where,
            why="widths are whole numbers, and 0 for bypass",
            fix=fix,
        )
    if not is_fixed and bits <= MAX_CONTAINER_BITS and bits == int(bits):
        unsigned = "" if format.signed else ", signed=False"
        fix += f", or format=qj.integer(max_bits={int(bits)}{unsigned})"
    raise errors.BitsError(f"{bits} bits do not fit a container of {most}", where=where, fix=fix)
