"""The decoder: against NumPy in float64, with and without a cache, in linen and in nnx."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quantjax as qj
from experiments.models import decoder_nnx
from experiments.models.attention import FLOAT_CACHE
from experiments.models.decoder import Decoder, DecoderShape, stories260k_shape
from experiments.models.errors import ModelShapeError
from experiments.models.generation import greedy
from experiments.models.kv_cache import quantized_cache
from quantjax.adapters import nnx as qnnx
from tests.experiments.models.oracles import llama, tokens, variables_of

SHAPE = DecoderShape(
    width=16, hidden=20, layers=3, heads=4, kv_heads=2, vocabulary=11, positions=12
)
MODEL = Decoder(SHAPE)
TOKENS = tokens(0, 11, 2, 6)
VARIABLES = variables_of(MODEL, TOKENS)
STEP = jax.jit(partial(MODEL.apply, method="step"))
FULL = jax.jit(MODEL.apply)


def _as_in_files(params: Any) -> dict[str, np.ndarray]:
    """The arrays by the names of llama2.c, matrices (out, in)."""
    names = {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}
    names |= {"gate": "w1", "down": "w2", "up": "w3"}
    return {
        "tok_emb": np.asarray(params["embedding"]["embedding"]),
        "attn_norm": np.asarray(params["layers"]["attention_norm"]["scale"]),
        "ffn_norm": np.asarray(params["layers"]["mlp_norm"]["scale"]),
        "final_norm": np.asarray(params["norm"]["scale"]),
        **{
            theirs: np.swapaxes(params["layers"][ours]["kernel"], 1, 2)
            for ours, theirs in names.items()
        },
    }


def test_the_size_is_that_of_stories260k():
    model = Decoder(stories260k_shape())
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == 260_032


def test_logits_are_those_of_numpy():
    weights = _as_in_files(VARIABLES["params"])
    expected = np.stack([llama(weights, 4, 2, text) for text in TOKENS])
    np.testing.assert_allclose(FULL(VARIABLES, TOKENS), expected, atol=2e-5)


def test_a_token_sees_none_after_it():
    other = TOKENS.at[:, 4].add(1) % 11
    before, after = FULL(VARIABLES, TOKENS), FULL(VARIABLES, other)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("lengths", [(6,), (2, 4), (1, 1, 1, 1, 1, 1)], ids=str)
def test_steps_with_a_cache_are_the_whole_text(lengths: tuple[int, ...]):
    cache, start, out = SHAPE.empty_cache(2, positions=8), 0, []
    for length in lengths:
        part = TOKENS[:, start : start + length]
        logits, cache = STEP(VARIABLES, part, cache, jnp.int32(start))
        out.append(logits)
        start += length
    together = jnp.concatenate(out, axis=1)
    np.testing.assert_allclose(together, FULL(VARIABLES, TOKENS), atol=1e-5)


@pytest.mark.parametrize("codec", [FLOAT_CACHE, quantized_cache(8)], ids=["floats", "codes"])
def test_parameters_in_bfloat16_step_as_well(codec):
    model = Decoder(SHAPE, codec)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), VARIABLES)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote
        cache, out = SHAPE.empty_cache(2, positions=8, codec=codec), []
        for start in range(3):
            part = TOKENS[:, start : start + 1]
            logits, cache = model.apply(variables, part, cache, jnp.int32(start), method="step")
            out.append(logits)
        whole = MODEL.apply(variables, TOKENS[:, :3])
    assert out[0].dtype == whole.dtype
    together = jnp.concatenate(out, axis=1).astype(jnp.float32)
    scale = float(jnp.abs(whole).max())
    np.testing.assert_allclose(together, whole.astype(jnp.float32), atol=0.05 * scale)


def test_a_full_cache_gives_nan():
    cache = SHAPE.empty_cache(2, positions=8)
    logits, _ = STEP(VARIABLES, TOKENS, cache, jnp.int32(3))
    assert jnp.isnan(logits).all()


def _module() -> decoder_nnx.Decoder:
    """Without arrays, which would be drawn one by one."""
    return nnx.eval_shape(lambda: decoder_nnx.Decoder(SHAPE, rngs=nnx.Rngs(0)))


def test_the_nnx_decoder_is_the_same():
    f, params, state = qnnx.functional(_module())
    converted = decoder_nnx.from_linen(VARIABLES)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, params)
    logits, _ = jax.jit(f)(converted, state, TOKENS)
    np.testing.assert_allclose(logits, FULL(VARIABLES, TOKENS), rtol=1e-6, atol=1e-6)


def test_the_nnx_decoder_steps_alike():
    f, _, state = qnnx.functional(_module(), method=decoder_nnx.Decoder.step)
    params, step = decoder_nnx.from_linen(VARIABLES), jax.jit(f)
    caches = [SHAPE.empty_cache(2, positions=8) for _ in range(2)]
    for start in (0, 1):
        part = TOKENS[:, start : start + 1]
        (logits, caches[0]), _ = step(params, state, part, caches[0], jnp.int32(start))
        expected, caches[1] = STEP(VARIABLES, part, caches[1], jnp.int32(start))
        np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), *caches)


def test_greedy_text_is_that_of_whole_texts_again_and_again():
    """With float64 logits of NumPy, each token the likeliest after all before it."""
    step = partial(MODEL.apply, VARIABLES, method="step")
    prompt, cache = TOKENS[:, :2], SHAPE.empty_cache(2, positions=7)
    out, cache = jax.jit(partial(greedy, step, count=6))(cache, prompt)
    weights = _as_in_files(VARIABLES["params"])
    for row in range(2):
        text = list(np.asarray(prompt[row]))
        for _ in range(6):
            text.append(int(llama(weights, 4, 2, np.array(text))[-1].argmax()))
        assert out[row].tolist() == text[2:]
    assert bool((cache.keys != 0).any(axis=(0, 1, 3, 4)).all())  # the last token is not run


def test_one_token_is_generated_without_a_scan():
    step = partial(MODEL.apply, VARIABLES, method="step")
    cache = SHAPE.empty_cache(2, positions=2)
    out, _ = jax.jit(partial(greedy, step, count=1))(cache, TOKENS[:, :2])
    assert out.tolist() == jnp.argmax(FULL(VARIABLES, TOKENS)[:, 1:2], axis=-1).tolist()


@pytest.mark.parametrize("count", [0, -1])
def test_no_tokens_are_no_text(count: int):
    with pytest.raises(ValueError, match="are no text"):
        greedy(lambda *_: None, None, jnp.zeros((1, 2), jnp.int32), count=count)  # type: ignore[arg-type]


def test_every_product_is_a_site_with_the_layers_stacked():
    sites = {site.name: site for site in qj.sites(MODEL.apply, VARIABLES, TOKENS)}
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        assert sites[f"params/layers/{name}/kernel"].steps == (3,)
    stepped = qj.sites(
        partial(MODEL.apply, method="step"),
        VARIABLES,
        TOKENS[:, :1],
        SHAPE.empty_cache(2, positions=8),
        jnp.int32(0),
    )
    # A plan of whole texts knows the weighted sites of the steps by their names.
    assert {s.name for s in stepped if s.name.startswith("params/")} == {
        name for name in sites if name.startswith("params/")
    }


def test_with_weights_of_eight_bits_it_is_near_and_at_bypass_itself():
    policy = qj.uniform_policy(activation_bits=None)
    plan = qj.plan(policy, qj.sites(MODEL.apply, VARIABLES, TOKENS))

    @jax.jit
    def logits(bits: jax.Array) -> jax.Array:
        qstate = qj.calibrate(plan, {}, VARIABLES, weight_bits=bits)
        return qj.fake_quantize(MODEL.apply, plan)(qstate, VARIABLES, TOKENS)

    full = FULL(VARIABLES, TOKENS)
    error = [float(jnp.abs(logits(jnp.float32(bits)) - full).max()) for bits in (0, 8, 3)]
    np.testing.assert_allclose(error[0], 0.0, atol=1e-6)
    assert 0 < error[1] < 0.1 * float(jnp.abs(full).max())
    assert error[1] < error[2]


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 10, "heads": 4},
        {"width": 16, "heads": 4, "kv_heads": 3},
        {"width": 12, "heads": 4, "kv_heads": 2},
        {"layers": 0},
        {"vocabulary": -512},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]):
    with pytest.raises(ModelShapeError, match="try:"):
        DecoderShape(**sizes)


def test_more_tokens_than_positions_are_refused():
    text = jnp.zeros((1, 13), jnp.int32)
    with pytest.raises(ModelShapeError, match="13 tokens for 12 positions"):
        MODEL.apply(VARIABLES, text)
    with pytest.raises(ModelShapeError, match="13 tokens for 12 positions"):
        MODEL.apply(VARIABLES, text, SHAPE.empty_cache(1), jnp.int32(0), method="step")
