"""Tensors with parameters, drawn at fixed shapes: a new shape would compile anew."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quantjax.affine import QParams
from quantjax.arithmetic import Arithmetic
from quantjax.formats import IntegerFormat, integer
from tests.oracles.integers import Integers, bounds

SHAPE = (6, 8)
# Scalar, tensor, columns, rows, groups of two rows, groups of four columns.
GROUPS = ((), (1, 1), (1, 8), (6, 1), (3, 8), (6, 2))
FAMILIES = tuple((signed, narrow) for signed in (True, False) for narrow in (False, True))
HALF_TYPES = (jnp.bfloat16, jnp.float16)


class Case(NamedTuple):
    """A tensor and how it is quantized; NumPy arrays."""

    x: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    family: Integers

    @property
    def qparams(self) -> QParams:
        """The same as arrays of JAX."""
        arrays = (self.scale, self.zero_point, np.float32(self.family.bits))
        return QParams(*(jnp.asarray(array, jnp.float32) for array in arrays))

    @property
    def format(self) -> IntegerFormat:
        """A container of 16 bits, so that every width runs the same program."""
        return container(self.family)

    @property
    def arithmetic(self) -> Arithmetic:
        """Default rounding and estimator."""
        return Arithmetic(self.format)


def container(family: Integers) -> IntegerFormat:
    """The 16-bit format of a family."""
    return integer(max_bits=16, signed=family.signed, narrow=family.narrow)


def _powers(low: int, high: int) -> st.SearchStrategy[float]:
    return st.floats(2.0**low, 2.0**high, width=32)


def multiples() -> st.SearchStrategy[float]:
    """How many scales a value is away from zero: ties, integers, and anything but subnormals.

    Those are zero on CPU, and -0 and 0 have one and the same sign at one bit.
    """
    anything = st.one_of(
        st.integers(-300, 300).map(lambda n: n / 2),
        st.floats(-9.0, 9.0, width=32),
        st.floats(-(2.0**18), 2.0**18, width=32),
    )
    return anything.map(lambda n: n if abs(n) > 2.0**-40 else 0.0)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    bits: st.SearchStrategy[int] | None = None,
    dtype: Any = jnp.float32,
) -> Case:
    """Any family and granularity; the scale in a range where nothing under- or overflows."""
    is_half = dtype in HALF_TYPES
    width = draw(st.integers(1, 16) if bits is None else bits)
    signed, narrow = draw(st.sampled_from(FAMILIES))
    family = Integers(width, signed, narrow)
    groups = draw(st.sampled_from(GROUPS))
    span = (-6, 4) if is_half else (-40, 40)
    scale = draw(npst.arrays(np.float32, groups, elements=_powers(*span), fill=st.nothing()))
    zero_point = np.zeros(groups, np.float32)
    if draw(st.booleans()):
        codes = st.integers(*bounds(family)).map(np.float32)
        zero_point = draw(npst.arrays(np.float32, groups, elements=codes, fill=st.nothing()))
    steps = draw(npst.arrays(np.float32, SHAPE, elements=multiples().map(np.float32)))
    x = steps * spread_scale(scale)
    if is_half:
        limit = float(jnp.finfo(dtype).max) / 4
        x = np.asarray(jnp.asarray(np.clip(x, -limit, limit)).astype(dtype))
    return Case(x, np.asarray(scale), np.asarray(zero_point), family)


def spread_scale(scale: np.ndarray) -> np.ndarray:
    """A scale for each entry of a tensor of ``SHAPE``."""
    scale = np.asarray(scale)
    if scale.ndim == 0:
        return scale
    for axis, n in enumerate(SHAPE):
        if scale.shape[axis] not in (1, n):
            scale = np.repeat(scale, n // scale.shape[axis], axis)
    return scale
