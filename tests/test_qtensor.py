"""QTensor: a pytree of codes that survives what JAX does to trees; encode and its errors."""

import copy
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import QParams, QTensor, encode, errors, fake_quant, integer
from quantjax.formats import E2M1, E4M3FN, E5M2
from tests.oracles import integers as oracle
from tests.oracles.integers import Integers
from tests.refused import refused

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 8)).astype(np.float32))


def qparams(groups=(1, 8), *, bits=4.0, zero_point=0.0) -> QParams:
    scale = np.random.default_rng(1).uniform(0.1, 0.3, groups).astype(np.float32)
    return QParams(jnp.asarray(scale), jnp.full(groups, zero_point), jnp.float32(bits))


def stored(groups=(1, 8), **options) -> QTensor:
    return encode(X, qparams(groups, **options), integer())


def same(left: QTensor, right: QTensor) -> bool:
    equal = jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, left, right)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(jax.tree.leaves(equal))


def test_flattening_and_back():
    tensor = stored()
    leaves, structure = jax.tree.flatten(tensor)
    assert [leaf.shape for leaf in leaves] == [(6, 8), (1, 8), (1, 8), ()]
    assert same(jax.tree.unflatten(structure, leaves), tensor)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tensor)]
    assert names[:2] == [".stored", ".qparams.scale"]


@pytest.mark.parametrize(
    "trip",
    [
        lambda t: jax.tree.map(lambda leaf: leaf, t),
        lambda t: jax.jit(lambda t: t)(t),
        lambda t: jax.device_put(t, jax.devices()[0]),
        lambda t: pickle.loads(pickle.dumps(t)),
        copy.copy,
        copy.deepcopy,
        lambda t: lax.cond(True, lambda t: t, lambda t: t, t),
        lambda t: lax.fori_loop(0, 2, lambda _, t: t, t),
    ],
    ids=["map", "jit", "device_put", "pickle", "copy", "deepcopy", "cond", "loop"],
)
def test_round_trips(trip):
    assert same(trip(stored()), stored())


def test_format_and_dtype_are_static():
    tensor = stored()
    others = [
        encode(X, qparams(), integer(max_bits=16)),
        encode(X, qparams(), integer(narrow=True)),
        encode(X.astype(jnp.bfloat16), qparams(), integer()),
    ]
    structures = {jax.tree.structure(t) for t in (tensor, *others)}
    assert len(structures) == 4
    with pytest.raises(ValueError, match="QTensor"):
        jax.tree.map(lambda a, b: a, tensor, others[0])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("groups", [(1, 1), (1, 8), (3, 8), (6, 4)], ids=str)
def test_stacking_scanning_and_slicing_leaves(groups):
    layers = jnp.stack([X, 2 * X, -X])
    each = [encode(layer, qparams(groups), integer()) for layer in layers]
    want = np.stack([t.dequantize() for t in each])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    assert stacked.shape == (3, 6, 8)
    # As one tensor of three axes, and one layer at a time.
    assert_array_equal(stacked.dequantize(), want)
    assert_array_equal(jax.vmap(QTensor.dequantize)(stacked), want)
    _, scanned = lax.scan(lambda carry, t: (carry, t.dequantize()), 0, stacked)
    assert_array_equal(scanned, want)
    for i, layer in enumerate(each):
        assert same(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), layer)
    # Made in one go, from stacked parameters or shared ones.
    shared = jax.vmap(lambda x: encode(x, qparams(groups), integer()))(layers)
    assert same(shared, stacked)


def test_a_part_of_the_rows_is_a_tensor_too():
    tensor, whole = stored((3, 8)), stored((3, 8)).dequantize()
    part = QTensor(
        tensor.codes[2:4],
        tensor.qparams._replace(
            scale=tensor.qparams.scale[1:2], zero_point=tensor.qparams.zero_point[1:2]
        ),
        tensor.format,
        tensor.dtype,
    )
    assert_array_equal(part.dequantize(), whole[2:4])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("max_bits", [3, 8, 11, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_containers(max_bits, signed):
    small, kind = max_bits <= 8, "int" if signed else "uint"
    family = Integers(max_bits, signed)
    parameters = qparams(bits=max_bits, zero_point=2.0 if max_bits > 1 else 0.0)
    x = X * 2.0**max_bits  # beyond the range on both sides
    for function in (encode, jax.jit(encode, static_argnums=2)):
        tensor = function(x, parameters, integer(max_bits=max_bits, signed=signed))
        assert tensor.codes.dtype == f"{kind}{8 if small else 16}"
        want = oracle.codes(np.asarray(x), parameters.scale, parameters.zero_point, family)
        assert_array_equal(np.asarray(tensor.codes, np.int64), want)
        assert {want.min(), want.max()} == set(oracle.bounds(family))
        stored = {3: 48 // 2, 8: 48}.get(max_bits, 2 * 48)  # codes of 3 bits take half a byte
        assert tensor.nbytes == stored + 4 * (8 + 8 + 1)


def test_shape_size_and_bytes():
    tensor = stored((3, 8))
    assert (tensor.shape, tensor.ndim, tensor.size) == ((6, 8), 2, 48)
    assert tensor.nbytes == 48 + 4 * (24 + 24 + 1)
    # As planned by eval_shape, before anything is computed.
    planned = jax.eval_shape(lambda x: encode(x, qparams((3, 8)), integer()), X)
    assert (planned.shape, planned.nbytes, planned.dtype) == ((6, 8), tensor.nbytes, jnp.float32)


def test_repr():
    assert repr(stored()) == "QTensor(int4[6x8], scale[1x8], float32)"
    scalar = encode(X, qparams((), bits=8.0), integer(signed=False))
    assert repr(scalar) == "QTensor(uint8[6x8], scale[scalar], float32)"
    widths = jnp.array([2.0, 4.0, 8.0])
    stacked = jax.vmap(lambda bits: encode(X, qparams()._replace(bits=bits), integer()))(widths)
    assert repr(stacked) == "QTensor(int2,4,8[3x6x8], scale[3x1x8], float32)"
    seen = []
    jax.jit(lambda t: seen.append(repr(t)))(stored())
    seen.append(repr(jax.eval_shape(lambda: stored())))
    seen.append(
        repr(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored()))
    )
    assert seen == ["QTensor(int?[6x8], scale[1x8], float32)"] * 3
    assert "QTensor" in repr(jax.tree.map(lambda leaf: None, stored()))


@pytest.mark.parametrize("make", [np.asarray, np.array, np.mean, jnp.asarray])
def test_codes_are_no_array_by_themselves(make):
    shown = "QTensor(int4[6x8], scale[1x8], float32)"
    with refused(errors.ArgumentError, shown, "tensor.dequantize(), or tensor.codes"):
        make(stored())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_decoding_gives_the_original_type(dtype):
    tensor = encode(X.astype(dtype), qparams(), integer())
    assert tensor.dtype == tensor.dequantize().dtype == dtype
    assert tensor.qparams.scale.dtype == jnp.float32


@pytest.mark.parametrize("bits", [0.0, 9.0, 16.0, 2.5, -1.0, jnp.nan])
def test_widths_without_codes_raise(bits):
    with pytest.raises(errors.BitsError, match="bits") as caught:
        encode(X, qparams(bits=bits), integer())
    assert "(6, 8)" in caught.value.where
    with pytest.raises(errors.BitsError):
        jax.vmap(lambda x: encode(x, qparams(bits=bits), integer()))(X[None])


def test_one_bad_width_of_several_raises():
    parameters = qparams()._replace(bits=jnp.array([4.0, 0.0]))
    with pytest.raises(errors.BitsError, match="bypass"):
        encode(X, parameters, integer())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nan_raises_and_infinity_does_not(dtype):
    with pytest.raises(errors.DataError, match="NaN") as caught:
        encode(X.at[2, 3].set(jnp.nan).astype(dtype), qparams(), integer())
    assert "(6, 8)" in caught.value.where
    assert encode(X.at[2, 3].set(jnp.inf).astype(dtype), qparams(), integer()).codes[2, 3] == 7


def test_scales_that_do_not_fit_raise():
    with pytest.raises(errors.GranularityError, match=r"\(5, 8\)"):
        encode(X, qparams((5, 8)), integer())


def test_gradients_reach_the_scale_of_codes():
    tensor = stored()

    def loss(scale):
        changed = QTensor(
            tensor.codes, tensor.qparams._replace(scale=scale), tensor.format, tensor.dtype
        )
        return changed.dequantize().sum()

    want = np.asarray(tensor.codes, np.float64).sum(0, keepdims=True)
    np.testing.assert_allclose(jax.grad(loss)(tensor.qparams.scale), want, rtol=1e-6)


def test_plain_numbers_as_parameters():
    tensor = encode([0.1, -0.3], QParams(0.1, 0.0, 8.0), integer())
    assert tensor.codes.tolist() == [1, -3]
    assert_array_equal(tensor.dequantize(), fake_quant(jnp.array([0.1, -0.3]), 0.1))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_none_raise_or_decode_to_nan(scale):
    x, qparams = jnp.array([0.5, 1.0]), QParams(jnp.float32(scale), jnp.zeros(()), jnp.float32(8))
    with pytest.raises(errors.QuantizerError, match="not a positive finite number") as caught:
        encode(x, qparams, integer())
    assert "qj.encode" in caught.value.where
    decoded = jax.jit(lambda x, q: encode(x, q, integer()).dequantize())(x, qparams)
    assert np.isnan(decoded).all()


@pytest.mark.parametrize("bits", [0.0, -1.0, 2.5, 9.0, np.nan])
def test_traced_widths_that_are_none_decode_to_nan(bits):
    """Codes beyond the container would be stored as others."""
    qparams = lambda bits: QParams(jnp.float32(0.01), jnp.float32(0), bits)  # noqa: E731
    x = jnp.array([1.0, 2.0, 4.0])
    decoded = jax.jit(lambda bits: encode(x, qparams(bits), integer()).dequantize())(bits)
    assert np.isnan(decoded).all()


def test_zero_points_that_are_none_raise():
    with pytest.raises(errors.QuantizerError, match="zero point is NaN"):
        encode(jnp.ones(2), QParams(jnp.ones(()), jnp.float32(np.nan), jnp.float32(8)), integer())


@pytest.mark.parametrize("format", [E2M1, E4M3FN, E5M2], ids=lambda format: format.name)
def test_the_sign_of_zero_is_a_bit_of_a_code(format):
    """As casts have it: what underflows below zero is another pattern than what does above."""
    peer = {E2M1: "float4_e2m1fn", E4M3FN: "float8_e4m3fn", E5M2: "float8_e5m2"}[format]
    x = np.float32([-0.0, 0.0, -1e-9, 1e-9, -1.0])
    p = QParams(jnp.float32(1), jnp.float32(0), jnp.float32(format.max_bits))
    tensor = encode(jnp.asarray(x), p, format)
    cast = x.astype(getattr(ml_dtypes, peer))
    assert_array_equal(tensor.codes, cast.view(np.uint8))
    assert_array_equal(np.signbit(tensor.dequantize()), np.signbit(x))
