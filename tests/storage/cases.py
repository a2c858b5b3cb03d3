"""What is written and read in these tests: strategies, and a user's own classes and values."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import quantjax as qj
from quantjax.affine import DIVIDED, RECIPROCAL, RECIPROCAL_ADDED
from quantjax.estimators import CLIPPED, STRAIGHT_THROUGH, Estimator
from quantjax.formats import BUILT_IN, IntegerFormat, codebook, minifloat
from quantjax.granularity import Remainder
from quantjax.quantizer import Quantizer
from quantjax.ranges import K_MEANS, MIN_MAX, MOVING_AVERAGE, TTQ, TWN, XNOR, RangeRule
from quantjax.rounding import ROUNDINGS, Rounding
from quantjax.selectors import Selector
from quantjax.storage.codec import decode, encode
from tests import models

FLOAT32 = np.dtype("float32")
DOWN = Rounding("down", jnp.floor, is_nearest=False)
ZERO = Estimator("zero", lambda unclipped, low, high: jnp.zeros_like(unclipped))
HALF_RANGE = RangeRule("half_range", MIN_MAX.range)


class Side(enum.Enum):
    """An enumeration of the user's own."""

    LEFT = "left"
    RIGHT = "right"


@dataclasses.dataclass(frozen=True)
class Sided(Selector):
    """A selector of the user's own, with fields of many types."""

    side: Side
    limits: tuple[float, ...] = ()
    share: float = 0.5
    dtype: np.dtype = FLOAT32

    def matches(self, site: qj.Site) -> bool:
        return (site.operands[0].key == "weight") is (self.side is Side.LEFT)

    def __str__(self) -> str:
        return f"{self.side.value} side"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked(IntegerFormat):
    """A format of the user's own."""

    mark: str = "marked"


OWN = (DOWN, ZERO, HALF_RANGE, Side, Sided, Marked)

integer_formats = st.builds(
    qj.integer, max_bits=st.integers(1, 16), signed=st.booleans(), narrow=st.booleans()
)
library_formats = st.one_of(
    integer_formats,
    st.sampled_from(BUILT_IN),
    st.builds(minifloat, st.integers(1, 5), st.integers(0, 10)),
    st.sets(st.integers(-9, 9), min_size=2, max_size=5).map(tuple).map(codebook),
)
axes = st.none() | st.integers(-3, 3)
granularities = st.one_of(
    st.builds(qj.PerTensor),
    st.builds(qj.PerToken),
    st.builds(qj.PerChannel, axis=axes),
    st.builds(qj.PerGroup, st.integers(1, 4096), axis=axes, remainder=st.sampled_from(Remainder)),
    st.builds(
        qj.PerBlock,
        st.integers(1, 512),
        st.integers(1, 512),
        axes=st.none() | st.tuples(st.just(0), st.integers(1, 3)),
        remainder=st.sampled_from(Remainder),
    ),
)
counts = st.integers(1, 9)
row_selectors = st.one_of(
    st.builds(qj.everything),
    st.builds(qj.weighted),
    st.builds(qj.backward),
    st.builds(qj.path, st.text(max_size=12)),
    st.builds(qj.scope, st.text(max_size=12)),
    st.lists(st.sampled_from(qj.Op), max_size=3).map(lambda ops: qj.op(*ops)),
    st.builds(qj.role, st.sampled_from(qj.Role)),
    st.builds(qj.at_least, multiply_adds=st.integers(0, 10**12), parameters=st.integers(0, 99)),
)
library_selectors = st.recursive(
    row_selectors,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: qj.all_of(*parts)),
        st.lists(inner, max_size=3).map(lambda parts: qj.any_of(*parts)),
        st.builds(qj.not_, inner),
        st.builds(qj.first, inner, count=counts),
        st.builds(qj.last, inner, count=counts),
        st.builds(qj.first_use, inner),
        st.builds(qj.every_use, inner),
        st.builds(qj.costliest, st.floats(0.0, 1.0, exclude_min=True), inner),
    ),
    max_leaves=4,
)
own_selectors = st.builds(
    Sided,
    side=st.sampled_from(Side),
    limits=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    share=st.floats(allow_nan=False),
    dtype=st.sampled_from([np.dtype("int8"), np.dtype(ml_dtypes.bfloat16), np.dtype("int4")]),
)


@st.composite
def quantizers(draw: Any, formats: Any = library_formats, own: tuple[Any, ...] = ()) -> Any:
    """Any quantizer that can exist; ``own`` named values beside the library's."""

    def named(*library: Any) -> Any:
        return draw(st.sampled_from([*library, *(v for v in own if type(v) is type(library[0]))]))

    format = draw(formats)
    granularity = draw(granularities)
    token = isinstance(granularity, qj.PerToken)
    return Quantizer(
        format=format,
        bits=draw(st.integers(0, format.max_bits).filter(format.known_valid)),
        symmetric=not format.has_zero_point or draw(st.booleans()),
        granularity=granularity,
        rule=named(MIN_MAX, MOVING_AVERAGE, K_MEANS, TTQ, TWN, XNOR),
        range=qj.RangeMode.LIVE if token else draw(st.sampled_from(qj.RangeMode)),
        rounding=named(*ROUNDINGS),
        estimator=named(CLIPPED, STRAIGHT_THROUGH),
        scaling=named(DIVIDED, RECIPROCAL, RECIPROCAL_ADDED),
    )


def policies(quantizer: Any, selectors: Any) -> Any:
    """Up to four rules."""
    scheme = st.builds(qj.Scheme, weights=st.none() | quantizer, activations=st.none() | quantizer)
    rule = st.builds(qj.rule, selectors, scheme, optional=st.booleans())
    return st.builds(qj.Policy, st.lists(rule, max_size=4))


library_policies = policies(quantizers(), library_selectors)
own_policies = policies(
    quantizers(st.builds(Marked, max_bits=st.integers(1, 16), mark=st.text(max_size=5)), OWN[:3]),
    own_selectors,
)

SPECIAL_BITS = (
    0x00000000,  # 0
    0x80000000,  # -0
    0x00000001,  # the smallest subnormal number
    0x807FFFFF,  # the largest negative subnormal number
    0x00800000,  # the smallest normal number
    0x7F7FFFFF,  # the largest number
    0x7F800000,  # infinity
    0xFF800000,  # minus infinity
    0x7FC00000,  # the NaN that arithmetic makes
    0xFFC00000,  # NaN with a sign
    0x7FC00001,  # NaN with a payload
    0x7F800001,  # NaN that signals
    0x3DCCCCCD,  # 0.1
)
float32_bits = st.sampled_from(SPECIAL_BITS) | st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def float32_arrays(draw: Any) -> Any:
    """Any bits whatever, as a JAX array."""
    shape = draw(shapes)
    size = int(np.prod(shape))
    bits = np.array(draw(st.lists(float32_bits, min_size=size, max_size=size)), np.uint32)
    return jnp.asarray(bits.view(np.float32).reshape(shape))


keys = st.text(max_size=6)


def trees(leaves: Any, names: Any = keys) -> Any:
    """Dictionaries, lists, tuples and None around leaves."""
    return st.recursive(
        leaves | st.none(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(names, inner, max_size=3),
        ),
        max_leaves=6,
    )


qparams = st.builds(
    qj.QParams,
    scale=float32_arrays(),
    zero_point=float32_arrays(),
    bits=float32_arrays(),
    theta=st.just(()) | trees(float32_arrays()),
)
qstates = st.dictionaries(keys, st.dictionaries(keys, qparams, max_size=2), max_size=3)


def edited(path: Path, old: str, new: str) -> Path:
    """The file with one text replaced by another, as somebody might do by hand."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1, f"{old} is not in {text}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def document(path: Path) -> Any:
    """The file's data, by the standard library's parser alone."""
    return json.loads(path.read_text(encoding="utf-8"))


def assert_loaded(actual, expected) -> None:
    """Structure (``QTensor`` formats and dtypes are part of it), container types and bits."""
    models.assert_same_bits(actual, expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(actual))


def frozen_params() -> dict:
    """A model's parameters with kernels as codes."""
    case = models.cnn()
    weights = qj.weight_quantizer(bits=4, granularity=qj.PerChannel(axis=-1))
    policy = qj.Policy([qj.rule(qj.path("*kernel"), qj.Scheme(weights=weights))])
    return qj.quantize_params(case.params, policy)


def trip(value: Any, extra: Any = ()) -> Any:
    """Through text, as a file would."""
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)), extra=extra)
