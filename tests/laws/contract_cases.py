"""Which trials the contract test makes of every format: granularities, roundings, dtypes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from quantjax.contract import Trial, widths
from quantjax.formats import BUILT_IN, Format, example_theta
from quantjax.granularity import (
    Granularity,
    OperandAxes,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Remainder,
)
from quantjax.rounding import ROUNDINGS, Rounding

SHAPE = (7, 8)  # of a weight; 7 is in groups of 3 with a remainder
GRANULARITIES: tuple[Granularity, ...] = (
    PerTensor(),
    PerChannel(),
    PerToken(),
    PerGroup(4, axis=1),
    PerGroup(3, remainder=Remainder.SHORTER),
    PerBlock(7, 2),
)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Row(NamedTuple):
    """One combination."""

    format: Format
    granularity: Granularity
    rounding: Rounding
    dtype: Any

    @property
    def name(self) -> str:
        """For the test report."""
        format = self.format.label(self.format.max_bits)
        dtype = jnp.dtype(self.dtype).name
        return f"{format}-{self.granularity.name}-{self.rounding.name}-{dtype}"

    def trial(self, *, exact: bool) -> Trial:
        """Scales at the granularity: powers of two, or anything from 1 to 8."""
        is_token = isinstance(self.granularity, PerToken)
        axes = OperandAxes((0,), (1,)) if is_token else OperandAxes((1,), (0,))
        shape = self.granularity.scale_shape(SHAPE, axes, is_weight=not is_token)
        rng = np.random.default_rng(sum(shape))
        scales = 2.0 ** rng.integers(0, 3, shape) if exact else rng.uniform(1.0, 8.0, shape)
        theta = example_theta(self.format)
        return Trial(self.rounding, scales.astype(np.float32), SHAPE, self.dtype, theta)


def pairwise() -> list[Row]:
    """Rows in which any two values of different columns meet."""
    rows = []
    for i, format in enumerate(BUILT_IN):
        for j, granularity in enumerate(GRANULARITIES):
            rounding = ROUNDINGS[(i + j) % len(ROUNDINGS)]
            rows.append(Row(format, granularity, rounding, DTYPES[(i + 2 * j) % len(DTYPES)]))
    return rows


def some_widths(format: Format) -> list[int]:
    """The lowest, one between, and the highest; one bit where there is no other."""
    every = widths(format, example_theta(format))
    every = [bits for bits in every if bits > 1] or every
    return sorted({every[0], every[len(every) // 2], every[-1]})
