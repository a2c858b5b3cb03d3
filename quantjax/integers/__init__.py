"""Integer products: int8 times int8, summed in int32, zero points folded by sums."""

from quantjax.integers.operands import IntegerOperand, int8_codes, shift_of
from quantjax.integers.products import accumulate, integer_product

__all__ = ["IntegerOperand", "accumulate", "int8_codes", "integer_product", "shift_of"]
