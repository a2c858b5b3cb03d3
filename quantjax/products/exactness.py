"""How long a sum of code products may be before float32 rounds it."""

from __future__ import annotations

import dataclasses
import enum

from quantjax.symbolic import at_most

FLOAT32_EXACT = 1 << 24
BFLOAT16_EXACT = 1 << 8
INT32_LIMIT = 1 << 31
SHORTEST_BLOCK = 16
"""Below this many products a block, splitting costs more than it is worth."""


class Exactness(enum.Enum):
    """What simulating a site's sums on float32 codes amounts to."""

    EXACT = "exact"
    CHUNKED = "exact, in chunks"
    ROUNDED = "float32 sums"
    FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class Sizing:
    """The block length of a site's sums.

    Attributes:
      exactness: its name in the plan.
      block: products per block; the whole contraction where it is not split.
      bounds: largest ``|code - zero_point|`` of the left and right operand; 0 for a float one.
      reason: why sums are rounded, for the table.
    """

    exactness: Exactness
    block: int
    bounds: tuple[int, int] = (0, 0)
    reason: str = ""


def sizing(
    contraction: int,
    lhs_bound: int | None,
    rhs_bound: int | None,
    *,
    taps: int = 1,
    grouped: bool = False,
) -> Sizing:
    """The sizing for sums of ``contraction`` products of codes within the two bounds.

    Sums of integers below ``2^24`` in magnitude are exact in float32 in any order; longer ones are
    split into blocks that are, and the blocks added in int32, while the total stays below ``2^31``.
    Where the codes at hand cannot reach ``2^24`` whatever the other operand holds, the product is
    not split after all; that is decided when it runs.

    Args:
      contraction: may be symbolic; without a bound of it that float32 holds, sums are rounded.
      lhs_bound, rhs_bound: largest ``|code - zero_point|``; None for a float operand.
      taps: products that cannot be separated (the window of a convolution).
      grouped: whether the sum is one group's; groups are not split further.

    >>> sizing(512, 255, 128).exactness, sizing(4096, 255, 128).block
    (<Exactness.EXACT: 'exact'>, 514)
    """
    if lhs_bound is None or rhs_bound is None:
        return Sizing(Exactness.FLOAT, contraction)
    largest, bounds = lhs_bound * rhs_bound, (lhs_bound, rhs_bound)
    if at_most(largest * contraction, FLOAT32_EXACT):
        return Sizing(Exactness.EXACT, contraction, bounds)
    block = FLOAT32_EXACT // largest
    if not isinstance(contraction, int):
        why = f"sums of {contraction} products cannot be split before the number is known"
    elif largest * contraction >= INT32_LIMIT:
        why = f"sums of {contraction} products up to {largest} exceed int32"
    elif block < max(SHORTEST_BLOCK, taps):
        why = f"float32 sums {block} products up to {largest} exactly, too few to split by"
    elif grouped:
        why = f"float32 sums {block} products up to {largest} exactly, groups have {contraction}"
    else:
        return Sizing(Exactness.CHUNKED, block, bounds)
    reason = f"{why}: simulated sums are rounded to float32"
    return Sizing(Exactness.ROUNDED, contraction, bounds, reason)
