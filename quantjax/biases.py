"""Biases: in the units of the sums that they are added to, or with a scale of their own."""

from __future__ import annotations

import dataclasses

from quantjax.formats import Format, integer
from quantjax.granularity import PerTensor
from quantjax.quantizer import Quantizer, weight_quantizer
from quantjax.ranges import MIN_MAX, FitRule, RangeRule


@dataclasses.dataclass(frozen=True)
class AccumulatorBias:
    """A bias in int32 at the scale of the sums that it is added to, ``s_lhs · s_rhs``.

    ``b' = round(b / (s_lhs s_rhs)) · s_lhs s_rhs``: what an integer program adds to its
    accumulators. Nothing is calibrated; where an operand is at width 0, the bias stays as it is.

    Sharp edges: a code saturates at the ends of int32, which those of a channel with a scale of
    next to nothing reach; :func:`quantjax.compare` shows what is lost. Of a channel of zeros the
    scale is 1, and its bias is a multiple of the activation's.

    >>> str(AccumulatorBias())
    'int32/sums'

    Source: Jacob et al., Quantization and training of neural networks for efficient
    integer-arithmetic-only inference, 2018, section 2.4, equation 11.
    """

    def __str__(self) -> str:
        return "int32/sums"


def bias_quantizer(
    *, bits: int = 16, format: Format | None = None, rule: RangeRule | FitRule = MIN_MAX
) -> Quantizer:
    """Signed symmetric codes with one scale of their own for all entries of a bias.

    >>> str(bias_quantizer())
    'int16/tensor'
    """
    format = format or integer(max_bits=max(bits, 8))
    return weight_quantizer(bits=bits, format=format, granularity=PerTensor(), rule=rule)
