"""Products of codes: what simulation and integer execution agree on."""

from quantjax.products.codes import coded, in_float, multiply
from quantjax.products.exactness import Exactness, Sizing, sizing
from quantjax.products.forms import Execution, Form, execution_form
from quantjax.products.groups import Coded, group_length, sum_length, sums_scale
from quantjax.products.lookups import decoded_rows, quantized_rows
from quantjax.products.rounded import bias_at_sums, rounded

__all__ = [
    "Coded",
    "Exactness",
    "Execution",
    "Form",
    "Sizing",
    "bias_at_sums",
    "coded",
    "decoded_rows",
    "execution_form",
    "group_length",
    "in_float",
    "multiply",
    "quantized_rows",
    "rounded",
    "sizing",
    "sum_length",
    "sums_scale",
]
