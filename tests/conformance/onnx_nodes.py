"""ONNX's quantization operators in terms of quantjax, and the test cases that ONNX has for them.

What ONNX says of each type (Operator schemas, ``QuantizeLinear``, ``DequantizeLinear``,
``DynamicQuantizeLinear`` of ONNX 1.23 and the tables of ``Cast``):

| type | rounding | beyond the range |
|---|---|---|
| integers, ``QuantizeLinear`` | ``round(x / s) + z``, half to even | saturates |
| integers, ``Cast`` | towards zero | the lowest bits are kept |
| float8 | half to even | ``saturate=1``: highest number, infinities too; ``0``: infinity or NaN |
| float4e2m1 | half to even | saturates, whatever ``saturate`` says; NaN has no code |
| float16, bfloat16 | half to even | infinity |
| float8e8m0 | ``round_mode``: up, down, nearest | ``saturate`` |

A scale is a scalar, or has an entry for each index of ``axis``, or for each ``block_size`` of them.
"""

import functools
import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax import PerChannel, PerGroup, PerTensor, QParams, encode, formats, integer
from quantjax.affine import qparams_from_range
from quantjax.formats import Format, Overflow, power_of_two
from quantjax.formats.microscaling import e8m0_codes, e8m0_scales
from quantjax.formats.scales import ceil_exponent
from quantjax.granularity import OperandAxes
from quantjax.packing import Packing, pack, unpack
from quantjax.qtensor import packed
from quantjax.rounding import HALF_EVEN

onnx = pytest.importorskip("onnx")
numpy_helper = pytest.importorskip("onnx.numpy_helper")
shipped = pytest.importorskip("onnx.backend.test.case.node")

OPERATORS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "CastLike")

T = onnx.TensorProto
INTEGERS: Mapping[int, Format] = {
    getattr(T, f"{'' if signed else 'U'}INT{bits}"): integer(max_bits=bits, signed=signed)
    for bits in (2, 4, 8, 16)
    for signed in (True, False)
}
FLOAT8: Mapping[int, Format] = {
    T.FLOAT8E4M3FN: formats.E4M3FN,
    T.FLOAT8E4M3FNUZ: formats.E4M3FNUZ,
    T.FLOAT8E5M2: formats.E5M2,
    T.FLOAT8E5M2FNUZ: formats.E5M2FNUZ,
}
# Casts to these overflow to infinity, whatever `saturate` says.
FLOAT16: Mapping[int, Format] = {
    T.FLOAT16: replace(formats.FLOAT16, overflow=Overflow.SPECIAL),
    T.BFLOAT16: replace(formats.BFLOAT16, overflow=Overflow.SPECIAL),
}
FORMATS: Mapping[int, Format] = {
    **INTEGERS, **FLOAT8, **FLOAT16, T.FLOAT4E2M1: formats.E2M1
}  # fmt: skip
REALS: Mapping[int, Any] = {T.FLOAT: np.float32, T.DOUBLE: np.float64}


def find_cases() -> dict[str, Any]:
    """The cases of the installed ONNX that concern ``OPERATORS``, by name.

    One whose only node is such an operator, or that expands the operator of such a case.
    """
    # collect_testcases() imports the modules of all operators, which takes seconds in each worker.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of casts that overflow on purpose
        for path in sorted(Path(shipped.__path__[0]).glob("*.py")):
            if any(f'"{operator}"' in path.read_text(encoding="utf-8") for operator in OPERATORS):
                importlib.import_module(f"{shipped.__name__}.{path.stem}")
    return concerned(shipped._NodeTestCases)


def concerned(cases: Sequence[Any]) -> dict[str, Any]:
    """Those that concern ``OPERATORS``."""
    nodes = {case.name: [node.op_type for node in case.model.graph.node] for case in cases}
    own = {name for name, found in nodes.items() if len(found) == 1 and found[0] in OPERATORS}
    return {case.name: case for case in cases if case.name.split("_expanded")[0] in own}


def run(case: Any) -> list[np.ndarray]:
    """What quantjax makes of a case's inputs: the outputs, in ONNX's dtypes."""
    (node,) = case.model.graph.node
    inputs = [array(value) for value in case.data_sets[0][0]]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    operators = {
        "QuantizeLinear": quantize_linear,
        "DequantizeLinear": dequantize_linear,
        "DynamicQuantizeLinear": dynamic_quantize_linear,
        "Cast": cast,
        "CastLike": lambda x, like, **options: cast(x, to=element_type(like), **options),
    }
    # The node of an expanded CastLike is a Cast and leaves the second input aside.
    outputs = operators[node.op_type](*inputs[: len(node.input)], **attributes)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def array(value: Any) -> np.ndarray:
    """A tensor of ONNX as an array of its dtype."""
    return numpy_helper.to_array(value) if isinstance(value, T) else np.asarray(value)


def element_type(x: np.ndarray) -> int:
    """ONNX's number for a dtype."""
    return onnx.helper.np_dtype_to_tensor_dtype(x.dtype)


def codes_of(x: np.ndarray) -> jax.Array:
    """The codes of an array of one of ``FORMATS``; several to a byte by quantjax's ``unpack``."""
    format = FORMATS[element_type(x)]
    if format.code_bits < 8:
        lying = np.frombuffer(numpy_helper.from_array(x).raw_data, np.uint8)
        signed = format.storage_dtype == jnp.int8
        return unpack(lying, Packing(format.code_bits, x.size, signed)).reshape(x.shape)
    return jnp.asarray(x.view(format.storage_dtype))


def with_dtype(codes: jax.Array, to: int) -> np.ndarray:
    """Codes as an array of ONNX's dtype."""
    dtype, codes = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to)), np.asarray(codes)
    return codes.astype(dtype) if to in INTEGERS else codes.view(dtype)


def parameters(
    shape: tuple[int, ...], scale: Any, zero_point: Any, *, format: Format, axis: int, size: int
) -> QParams:
    """ONNX's scales and zero points at the shape that the granularity gives them."""
    scale = np.asarray(scale)
    granularity = PerTensor() if scale.size == 1 else PerChannel(axis)
    granularity = PerGroup(size, axis) if size else granularity
    fitting = granularity.scale_shape(shape, OperandAxes((), ()), is_weight=False)
    zero = np.zeros(scale.shape) if zero_point is None else zero_point.astype(np.float32)
    assert format.has_zero_point or not np.any(zero)
    return QParams(
        jnp.asarray(scale.reshape(fitting), jnp.float32),
        jnp.asarray(zero.reshape(fitting), jnp.float32),
        jnp.float32(format.max_bits),
    )


def quantize_linear(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
) -> np.ndarray:
    """``saturate((x / scale) + zero_point)``."""
    to = output_dtype or (T.UINT8 if zero_point is None else element_type(zero_point))
    format = _overflowing(to, saturate)
    qparams = parameters(x.shape, scale, zero_point, format=format, axis=axis, size=block_size)
    return with_dtype(encode(jnp.asarray(x), qparams, format).codes, to)


def dequantize_linear(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> np.ndarray:
    """``(x - zero_point) * scale``."""
    format = FORMATS[element_type(x)]
    qparams = parameters(x.shape, scale, zero_point, format=format, axis=axis, size=block_size)
    dtype = REALS[output_dtype] if output_dtype else scale.dtype
    return np.asarray(packed(codes_of(x), qparams, format, dtype).dequantize())


def dynamic_quantize_linear(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """uint8 codes, scale and zero point of the range of ``x``, widened to hold 0."""
    x, format = jnp.asarray(x), INTEGERS[T.UINT8]
    qparams = qparams_from_range(
        x.min(), x.max(), 8, format=format, symmetric=False, calibrated=True
    )
    codes = encode(x, qparams, format).codes
    return np.asarray(codes), np.asarray(qparams.scale), np.uint8(qparams.zero_point)


def cast(x: np.ndarray, *, to: int, saturate: int = 1, round_mode: bytes = b"up") -> np.ndarray:
    """The values of ``x`` in another type."""
    reals = _reals(x)
    if to in REALS:
        return np.asarray(reals, REALS[to])
    if to == T.FLOAT8E8M0:
        assert saturate == 1
        assert round_mode == b"up"
        up = jnp.where(reals == 0.0, 0.0, power_of_two(ceil_exponent(reals)))
        return with_dtype(e8m0_codes(up), to)
    if to in INTEGERS:
        return with_dtype(_lowest_bits(reals, INTEGERS[to]), to)
    return with_dtype(_encoded(reals, _overflowing(to, saturate)), to)


def _overflowing(to: int, saturate: int) -> Format:
    overflow = Overflow.SATURATE if saturate else Overflow.SPECIAL
    return replace(FLOAT8[to], overflow=overflow) if to in FLOAT8 else FORMATS[to]


def _reals(x: np.ndarray) -> jax.Array:
    of = element_type(x)
    if of in REALS:
        assert np.array_equal(np.float64(np.float32(x)), np.float64(x), equal_nan=True)
        return jnp.asarray(x, jnp.float32)
    if of == T.FLOAT8E8M0:
        return e8m0_scales(jnp.asarray(x.view(np.uint8)))
    return _decoded(codes_of(x), FORMATS[of])


def _lowest_bits(reals: jax.Array, format: Format) -> jax.Array:
    """Whole numbers as integers, of which the format keeps the lowest bits, as ``pack`` does."""
    assert np.all(np.asarray(reals) % 1 == 0)  # or else they would be rounded towards zero
    signed = format.storage_dtype == jnp.int8
    whole = reals.astype(jnp.int32).astype(format.storage_dtype).reshape(-1)
    if format.code_bits < 8:
        whole = unpack(*pack(whole, format.code_bits, signed=signed))
    return whole.reshape(reals.shape)


@functools.partial(jax.jit, static_argnums=1)
def _encoded(reals: jax.Array, format: Format) -> jax.Array:
    bits = jnp.float32(format.max_bits)
    return format.encode(format.snap(reals, jnp.zeros(()), bits, HALF_EVEN).level, bits)


@functools.partial(jax.jit, static_argnums=1)
def _decoded(codes: jax.Array, format: Format) -> jax.Array:
    return format.decode(codes, jnp.float32(format.max_bits))
