"""quantize_params and dequantize_params: which leaves, by which rule, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax
from quantjax import (
    PerChannel,
    PerGroup,
    PerTensor,
    Policy,
    QTensor,
    Scheme,
    dequantize_params,
    errors,
    everything,
    integer,
    path,
    quantize_params,
    ranges,
    rule,
    weight_quantizer,
)
from quantjax.rounding import HALF_AWAY, HALF_EVEN
from tests.oracles import affine as oracle
from tests.oracles import integers
from tests.oracles.extremes import group_extremes
from tests.oracles.integers import Integers


def scheme(bits=4, granularity=None, **options) -> Scheme:
    granularity = granularity or PerChannel(axis=-1)
    return Scheme(weights=weight_quantizer(bits=bits, granularity=granularity, **options))


def whole(bits=4, granularity=None, **options) -> Policy:
    return Policy([rule(everything(), scheme(bits, granularity, **options))])


def weights(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


PARAMS = {
    "encoder": {"kernel": weights(8, 4), "bias": weights(4), "scale": weights(4)},
    "conv": {"kernel": weights(3, 3, 2, 6).astype(jnp.bfloat16)},
    "head": {"kernel": weights(4, 2, seed=1), "table": jnp.arange(6).reshape(2, 3)},
    "step": 3,
    "rate": 0.1,
}


def quantized(tree) -> dict[str, QTensor]:
    """The QTensors of a tree by their path."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    name = jax.tree_util.keystr
    return {
        name(p, simple=True, separator="/"): leaf for p, leaf in flat if isinstance(leaf, QTensor)
    }


def test_kernels_are_quantized_and_nothing_else_is_touched():
    result = quantize_params(PARAMS, whole())
    assert set(quantized(result)) == {"encoder/kernel", "conv/kernel", "head/kernel"}
    assert result["encoder"]["bias"] is PARAMS["encoder"]["bias"]
    assert result["head"]["table"] is PARAMS["head"]["table"]
    assert (result["step"], result["rate"]) == (3, 0.1)
    restored = dequantize_params(result)
    assert jax.tree.structure(restored) == jax.tree.structure(PARAMS)
    shapes = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), PARAMS)
    assert jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), restored) == shapes


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        (PerTensor(), (1, 1)),
        (PerChannel(axis=-1), (1, 6)),
        (PerChannel(axis=0), (8, 1)),
        (PerGroup(4, axis=-2), (2, 6)),
        (PerGroup(3, axis=-1), (8, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"format": integer(narrow=True)}])
def test_codes_are_those_of_the_kernels_own_range(granularity, groups, options):
    kernel = weights(8, 6)
    tensor = quantize_params({"kernel": kernel}, whole(3, granularity, **options))["kernel"]
    x, family = np.asarray(kernel), Integers(3, narrow="format" in options)
    low, high = group_extremes(x, groups)
    want = oracle.float32_parameters(low, high, family, symmetric="symmetric" not in options)
    assert_array_equal(tensor.qparams.scale, want.scale)
    one_for_all = "symmetric" not in options
    assert tensor.qparams.zero_point.shape == ((1, 1) if one_for_all else want.zero_point.shape)
    assert_array_equal(np.broadcast_to(tensor.qparams.zero_point, groups), want.zero_point)
    assert_array_equal(tensor.codes, integers.codes(x, *want, family))
    assert_array_equal(dequantize_params(tensor), integers.fake_quant(x, *want, family))


def test_the_rounding_is_the_quantizers():
    kernel = jnp.array([[-8.0, 0.5], [2.5, -1.5]])  # at four bits, a scale of 1
    for rounding, codes in ((HALF_EVEN, [[-8, 0], [2, -2]]), (HALF_AWAY, [[-8, 1], [3, -2]])):
        policy = whole(4, PerTensor(), rounding=rounding)
        assert quantize_params({"kernel": kernel}, policy)["kernel"].codes.tolist() == codes


def test_the_first_rule_that_matches_decides():
    policy = Policy(
        [
            rule(path("head/*"), Scheme()),
            rule(path("conv/kernel"), scheme(bits=2)),
            rule(everything(), scheme(bits=8)),
            rule(path("encoder/*"), scheme(bits=3)),
        ]
    )
    result = quantized(quantize_params(PARAMS, policy))
    widths = {name: float(tensor.qparams.bits) for name, tensor in result.items()}
    assert widths == {"conv/kernel": 2, "encoder/kernel": 8}


def test_no_rule_no_change():
    result = quantize_params(PARAMS, Policy([]))
    assert all(
        a is b for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(PARAMS), strict=True)
    )


def test_a_rule_that_matches_nothing_raises_unless_optional():
    for pattern in ("encodr/*", "encoder/bias", "head/table"):
        policy = Policy([rule(path(pattern), scheme()), rule(everything(), scheme())])
        with pytest.raises(errors.PolicyError, match="matches no kernel") as caught:
            quantize_params(PARAMS, policy)
        assert pattern in caught.value.what
        assert "encoder/kernel" in caught.value.where
    policy = Policy([rule(path("encodr/*"), scheme(), optional=True), rule(everything(), scheme())])
    assert len(quantized(quantize_params(PARAMS, policy))) == 3


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(4)], ids=str)
def test_an_axis_that_is_not_stated_raises_and_the_fix_works(granularity):
    params = {"kernel": weights(8, 4)}
    with pytest.raises(errors.GranularityError, match="no axis is stated") as caught:
        quantize_params(params, whole(4, granularity))
    assert "kernel 8x4" in caught.value.where
    fixed = eval(caught.value.fix, {"qj": quantjax})
    assert type(fixed) is type(granularity)
    quantize_params(params, whole(4, fixed))


def test_groups_that_do_not_divide_raise_and_the_fix_works():
    params = {"kernel": weights(8, 4)}
    with pytest.raises(errors.GranularityError, match="groups of 3") as caught:
        quantize_params(params, whole(4, PerGroup(3, axis=-2)))
    fixed = eval(caught.value.fix, {"qj": quantjax})
    assert quantize_params(params, whole(4, fixed))["kernel"].qparams.scale.shape == (3, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_kernels_without_a_range_raise(value):
    params = {"a": {"kernel": weights(8, 4).at[1, 1].set(value)}}
    with pytest.raises(errors.DataError, match="not finite") as caught:
        quantize_params(params, whole())
    assert "a/kernel 8x4" in caught.value.where
    exempt = rule(path("a/kernel"), Scheme())
    assert "qj.rule(qj.path('a/kernel'), qj.Scheme())" in caught.value.fix
    quantize_params(params, Policy([exempt, rule(everything(), scheme(), optional=True)]))
    # Under a trace nothing can be raised; the values of that channel say it.
    restored = jax.jit(lambda p: dequantize_params(quantize_params(p, whole())))(params)
    assert_array_equal(np.isnan(restored["a"]["kernel"]).all(0), [False, True, False, False])


def test_an_empty_kernel_raises():
    with pytest.raises(errors.DataError, match="without entries"):
        quantize_params({"kernel": jnp.zeros((0, 4))}, whole())


def test_bypass_has_no_codes():
    with pytest.raises(errors.BitsError, match="bypass"):
        quantize_params({"kernel": weights(8, 4)}, whole(bits=0))


def test_jit_gives_the_same_codes():
    arrays = {name: PARAMS[name] for name in ("encoder", "conv", "head")}
    for policy in (whole(), whole(2, PerTensor(), rule=ranges.MOVING_AVERAGE)):
        eager = quantize_params(arrays, policy)
        jitted = jax.jit(lambda p, policy=policy: quantize_params(p, policy))(arrays)
        assert jax.tree.structure(jitted) == jax.tree.structure(eager)
        jax.tree.map(assert_array_equal, jitted, eager)


def test_what_is_quantized_already_stays():
    once = quantize_params(PARAMS, whole())
    policy = Policy([rule(everything(), scheme(8, PerTensor()), optional=True)])
    twice = quantize_params(once, policy)
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    assert quantized(twice) == quantized(once)


def test_dequantizing_floats_changes_nothing():
    restored = dequantize_params(PARAMS)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(PARAMS), strict=True)
    )


class Small(nn.Module):
    """A convolution, a normalization and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.LayerNorm()(x).reshape(x.shape[0], -1)
        return nn.Dense(5)(x)


def test_a_linen_model_of_eight_bits_is_close_to_itself():
    model, x = Small(), weights(4, 6, 6, 2)
    variables = model.init(jax.random.key(0), x)
    policy = Policy([rule(path("*/kernel"), scheme(8))])
    smaller = quantize_params(variables, policy)
    assert set(quantized(smaller)) == {"params/Conv_0/kernel", "params/Dense_0/kernel"}
    exact, got = model.apply(variables, x), model.apply(dequantize_params(smaller), x)
    assert_allclose(got, exact, atol=0.03 * float(jnp.abs(exact).max()))
    assert not jnp.array_equal(got, exact)
    size = sum(tensor.nbytes for tensor in quantized(smaller).values())
    assert size < 0.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    coarser = quantize_params(variables, Policy([rule(path("*/kernel"), scheme(2))]))
    rough = model.apply(dequantize_params(coarser), x)
    assert jnp.abs(rough - exact).mean() > 5 * jnp.abs(got - exact).mean()
