"""Who shares a scale: the tensor, a token, a channel, a group or a block."""

from quantjax.granularity.groups import (
    check_scale_shape,
    expand,
    group_counts,
    group_size,
    groups_last,
    reduce_to,
    refine,
    repeat_groups,
)
from quantjax.granularity.roles import (
    Granularity,
    OperandAxes,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Remainder,
)

__all__ = [
    "Granularity",
    "OperandAxes",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Remainder",
    "check_scale_shape",
    "expand",
    "group_counts",
    "group_size",
    "groups_last",
    "reduce_to",
    "refine",
    "repeat_groups",
]
