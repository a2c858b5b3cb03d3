"""Range rules, statistics in, range out, and fit rules, tensor in, QParams out; one rule a file."""

from quantjax.ranges.base import FitRule, Range, RangeRule
from quantjax.ranges.k_means import K_MEANS, k_means
from quantjax.ranges.min_max import MIN_MAX
from quantjax.ranges.moving_average import MOVING_AVERAGE
from quantjax.ranges.stack import IndexedRule, RuleStack, stack
from quantjax.ranges.ternary import TTQ, TWN, ttq
from quantjax.ranges.xnor import XNOR

__all__ = [
    "K_MEANS",
    "MIN_MAX",
    "MOVING_AVERAGE",
    "TTQ",
    "TWN",
    "XNOR",
    "FitRule",
    "IndexedRule",
    "Range",
    "RangeRule",
    "RuleStack",
    "k_means",
    "stack",
    "ttq",
]
