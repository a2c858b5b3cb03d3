"""Products of codes: what simulation and integer execution agree on."""

from quantjax.products.codes import coded, in_float, multiply
from quantjax.products.exactness import Exactness, Sizing, sizing
from quantjax.products.forms import Execution, Form, execution_form
from quantjax.products.groups import Coded, group_length, sum_length

__all__ = [
    "Coded",
    "Exactness",
    "Execution",
    "Form",
    "Sizing",
    "coded",
    "execution_form",
    "group_length",
    "in_float",
    "multiply",
    "sizing",
    "sum_length",
]
