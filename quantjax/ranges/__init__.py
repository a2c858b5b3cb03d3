"""Range rules: statistics in, range out; one rule a file."""

from quantjax.ranges.base import Range, RangeRule
from quantjax.ranges.min_max import MIN_MAX
from quantjax.ranges.moving_average import MOVING_AVERAGE
from quantjax.ranges.stack import IndexedRule, RuleStack, stack

__all__ = [
    "MIN_MAX",
    "MOVING_AVERAGE",
    "IndexedRule",
    "Range",
    "RangeRule",
    "RuleStack",
    "stack",
]
