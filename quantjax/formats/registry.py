"""The formats that come with the library, as values: what tests, benchmarks and studies go over.

Nothing is looked up here by name, and nothing has to be added for a format of your own: wherever a
format is asked for, any :class:`quantjax.formats.Format` will do.
"""

from __future__ import annotations

import jax.numpy as jnp

from quantjax.formats.apot import apot
from quantjax.formats.base import Format, Theta
from quantjax.formats.codebook import LEVELS, NF4, CodebookFormat, learned_codebook, normal_float
from quantjax.formats.integer import integer
from quantjax.formats.logarithmic import inq, lognet
from quantjax.formats.microscaling import (
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
)
from quantjax.formats.minifloat import (
    BFLOAT16,
    E2M1,
    E2M3,
    E3M2,
    E3M4,
    E4M3,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FLOAT16,
)
from quantjax.formats.scales import POWER_OF_TWO
from quantjax.formats.ternary import TERNARY, TernaryFormat, ternary

BUILT_IN: tuple[Format, ...] = (
    integer(max_bits=1),
    integer(max_bits=8),
    integer(max_bits=8, narrow=True),
    integer(max_bits=8, signed=False),
    integer(max_bits=8, signed=False, narrow=True),
    integer(max_bits=16),
    integer(max_bits=16, signed=False),
    integer(max_bits=8, scale_rule=POWER_OF_TWO),
    TERNARY,
    ternary(learned=True),
    lognet(max_bits=8),
    lognet(max_bits=8, per_octave=2),
    lognet(max_bits=8, signed=False),
    inq(max_bits=8),
    apot(max_bits=8),
    apot(max_bits=8, signed=False),
    NF4,
    normal_float(max_bits=8),
    learned_codebook(max_bits=4),
    E2M1,
    E2M3,
    E3M2,
    E3M4,
    E4M3,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    BFLOAT16,
    FLOAT16,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
)
"""One of each kind, in containers that hold all of its widths.

>>> len(BUILT_IN) == len({format.label(format.max_bits) for format in BUILT_IN})
True
"""


def example_theta(format: Format) -> Theta:
    """Parameters with which a format can be tried, ``()`` where it has none.

    Evenly spaced levels for a learned codebook, the two highest equal, as training can make them. A
    threshold that is not half the level for ternary codes, and between the levels where those are
    learned.

    >>> example_theta(learned_codebook(max_bits=2, signed=False))["levels"][-2:].tolist()
    [0.6666666865348816, 0.6666666865348816]
    """
    if isinstance(format, CodebookFormat) and not format.codebook:
        low = -1.0 if format.signed else 0.0
        levels = jnp.linspace(low, 1.0, 1 << format.max_bits, dtype=jnp.float32)
        return {LEVELS: jnp.minimum(levels, levels[-2])}
    if isinstance(format, TernaryFormat):
        learned = {"negative": 0.25, "positive": 0.75} if format.learned else {}
        theta = {"threshold": 0.3} | learned
        return {name: jnp.float32(value) for name, value in theta.items()}
    return ()
