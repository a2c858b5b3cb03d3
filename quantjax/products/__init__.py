"""Products of codes: what simulation and integer execution agree on."""

from quantjax.products.codes import Coded, coded, group_length, in_float, multiply, sum_length
from quantjax.products.exactness import Exactness, Sizing, sizing

__all__ = [
    "Coded",
    "Exactness",
    "Sizing",
    "coded",
    "group_length",
    "in_float",
    "multiply",
    "sizing",
    "sum_length",
]
