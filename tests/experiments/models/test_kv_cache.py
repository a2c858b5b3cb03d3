"""Keys and values as codes: what a store reads, when it writes, widths as arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments.models.attention import Cache, CacheCodec
from experiments.models.decoder import Decoder, DecoderShape
from experiments.models.kv_cache import NARROW_INT8, quantized_cache
from tests.experiments.models.oracles import tokens, variables_of
from tests.models import assert_same_bits, normal

SHAPE = (2, 6, 3, 8)
VALUES = normal(0, *SHAPE) * jnp.asarray(np.logspace(-3, 3, 6), jnp.float32)[None, :, None, None]


def filled(codec: CacheCodec, values: jax.Array = VALUES) -> qj.QTensor:
    return codec.write(codec.empty(values.shape), values, jnp.int32(0))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_store_reads_what_fake_quant_gives(bits: int):
    store = filled(quantized_cache(bits))
    steps = max(2 ** (bits - 1) - 1, 1)
    scale = jnp.abs(VALUES).max(axis=-1, keepdims=True) / steps
    np.testing.assert_allclose(store.qparams.scale, scale, rtol=1e-6)
    expected = qj.fake_quant(VALUES, store.qparams.scale, bits=bits, format=NARROW_INT8)
    np.testing.assert_array_equal(store.dequantize(), expected)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_codes_are_those_of_numpy(bits: int):
    x = np.asarray(VALUES, np.float64)
    top = 2 ** (bits - 1) - 1
    scale = (np.abs(x).max(axis=-1, keepdims=True) / top).astype(np.float32)
    expected = np.clip(np.rint(x / scale), -top, top)
    codes = filled(quantized_cache(bits)).codes
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, expected)


def test_the_error_is_at_most_half_a_step_of_each_head():
    store = filled(quantized_cache(5))
    error = jnp.abs(store.dequantize() - VALUES)
    assert bool((error <= 0.5001 * store.qparams.scale).all())


def test_an_empty_store_reads_zeros_and_so_do_zeros():
    codec = quantized_cache(4)
    np.testing.assert_array_equal(codec.read(codec.empty(SHAPE)), 0.0)
    np.testing.assert_array_equal(filled(codec, jnp.zeros(SHAPE)).dequantize(), 0.0)


def test_each_position_is_written_once():
    codec = quantized_cache(4)
    store = codec.empty(SHAPE)
    for position in range(6):
        before = store
        store = codec.write(store, VALUES[:, position : position + 1], jnp.int32(position))
        untouched = [i for i in range(6) if i != position]
        assert_same_bits(store.codes[:, untouched], before.codes[:, untouched])
        assert_same_bits(store.qparams.scale[:, untouched], before.qparams.scale[:, untouched])
    assert_same_bits(store, filled(codec))


def test_a_head_knows_nothing_of_others():
    other = VALUES.at[:, :, 1].multiply(1000.0)
    store, changed = (filled(quantized_cache(4), values) for values in (VALUES, other))
    np.testing.assert_array_equal(store.codes[:, :, 0], changed.codes[:, :, 0])
    np.testing.assert_array_equal(store.qparams.scale[:, :, 2], changed.qparams.scale[:, :, 2])


def test_powers_of_two_change_scales_alone():
    store, larger = (filled(quantized_cache(4), values) for values in (VALUES, 8.0 * VALUES))
    assert_same_bits(larger.codes, store.codes)
    assert_same_bits(larger.qparams.scale, 8.0 * store.qparams.scale)


def test_traced_widths_are_static_widths():
    widths = jnp.arange(1.0, 9)
    traced = jax.jit(jax.vmap(lambda bits: filled(quantized_cache(bits)).dequantize()))(widths)
    for row, bits in zip(traced, range(1, 9), strict=True):
        assert_same_bits(row, filled(quantized_cache(bits)).dequantize())


def test_a_container_of_four_bits_has_the_same_codes_in_half_the_bytes():
    wide = filled(quantized_cache(4))
    packed = filled(quantized_cache(format=qj.integer(max_bits=4, narrow=True)))
    assert packed.stored.nbytes * 2 == wide.stored.nbytes == VALUES.size
    assert_same_bits(packed.codes, wide.codes)
    assert_same_bits(packed.dequantize(), wide.dequantize())


def test_bytes_are_codes_and_a_scale_for_each_position_and_head():
    store = filled(quantized_cache())
    assert store.nbytes == VALUES.size + 4 * VALUES.size // 8 + 4 + 4


def test_what_does_not_fit_reads_nan():
    codec = quantized_cache(4)
    store = codec.write(codec.empty(SHAPE), jnp.full((2, 1, 3, 8), jnp.nan), jnp.int32(5))
    assert bool(jnp.isnan(codec.read(store)[:, 5]).all())
    assert bool((codec.read(store)[:, :5] == 0.0).all())


@pytest.mark.parametrize("bits", [0, 9, 3.5, -1])
def test_widths_that_there_are_not_raise_and_traced_read_nan(bits: float):
    with pytest.raises(qj.errors.BitsError, match="a cache of"):
        quantized_cache(bits)
    read = jax.jit(lambda bits: filled(quantized_cache(bits)).dequantize())
    assert bool(jnp.isnan(read(jnp.float32(bits))).all())


@pytest.mark.parametrize(
    "format", [qj.integer(signed=False), qj.formats.E4M3FN], ids=["unsigned", "e4m3"]
)
def test_formats_without_signed_integers_are_refused(format: qj.Format):
    with pytest.raises(qj.errors.QuantizerError, match="try:"):
        quantized_cache(format=format)


DECODER = DecoderShape(
    width=16, hidden=20, layers=2, heads=4, kv_heads=2, vocabulary=11, positions=12
)
TOKENS = tokens(0, 11, 2, 6)
VARIABLES = variables_of(Decoder(DECODER), TOKENS)


@jax.jit
def logits_with(cache: Cache, text: jax.Array, position: jax.Array) -> tuple[jax.Array, Cache]:
    model = Decoder(DECODER, quantized_cache())  # widths are in the cache
    return model.apply(VARIABLES, text, cache, position, method="step")


def cache_of(bits: int) -> Cache:
    return DECODER.empty_cache(2, positions=8, codec=quantized_cache(bits))


def in_float() -> tuple[jax.Array, Cache]:
    run = jax.jit(partial(Decoder(DECODER).apply, method="step"))
    return run(VARIABLES, TOKENS, DECODER.empty_cache(2, positions=8), jnp.int32(0))


def test_a_decoder_with_more_bits_is_nearer_to_floats():
    expected, _ = in_float()
    errors = [
        float(jnp.abs(logits_with(cache_of(bits), TOKENS, jnp.int32(0))[0] - expected).mean())
        for bits in (8, 6, 4, 2)
    ]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.02 * float(jnp.abs(expected).mean())


def test_a_decoder_steps_as_it_reads_whole_texts():
    whole, held = logits_with(cache_of(4), TOKENS, jnp.int32(0))
    cache, out = cache_of(4), []
    for t in range(6):
        y, cache = logits_with(cache, TOKENS[:, t : t + 1], jnp.int32(t))
        out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(cache.keys.dequantize(), held.keys.dequantize(), atol=1e-5)


def test_the_first_layer_holds_the_codes_of_the_float_cache():
    _, held = logits_with(cache_of(4), TOKENS, jnp.int32(0))
    _, plain = in_float()
    for store, values in zip(held, plain, strict=True):
        expected = filled(quantized_cache(4), values[0]).codes
        differ = np.abs(np.asarray(store.codes[0], np.int32) - np.asarray(expected, np.int32))
        # Another program may sum in another order, and a tie go to the other side.
        assert differ.max() <= 1
        assert (differ > 0).mean() < 0.01


def test_layers_have_widths_each():
    def with_bits(store: qj.QTensor, bits: list[float]) -> qj.QTensor:
        qparams = store.qparams._replace(bits=jnp.array(bits))
        return qj.QTensor(store.stored, qparams, store.format, store.dtype, store.packing)

    cache = Cache(*(with_bits(store, [8.0, 2.0]) for store in cache_of(8)))
    _, held = logits_with(cache, TOKENS, jnp.int32(0))
    for store in held:
        codes = np.abs(np.asarray(store.codes, np.int32))
        assert codes[0].max() == 127
        assert codes[1].max() == 1


def test_weights_activations_and_cache_are_quantized_together():
    step = partial(Decoder(DECODER, quantized_cache(8)).apply, method="step")
    arguments = VARIABLES, TOKENS, cache_of(8), jnp.int32(0)
    policy = qj.uniform_policy(activation_granularity=qj.PerToken())
    plan = qj.plan(policy, qj.sites(step, *arguments))

    @jax.jit
    def quantized(*arguments):
        return qj.fake_quantize(step, plan)(qj.calibrate(plan, {}, VARIABLES), *arguments)

    logits, held = quantized(*arguments)
    expected, _ = in_float()
    assert 0 < float(jnp.abs(logits - expected).max()) < 0.1 * float(jnp.abs(expected).max())
    assert held.keys.codes.dtype == jnp.int8
