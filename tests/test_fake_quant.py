"""The public function: what it takes, what it refuses, what it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from quantjax import QParams, errors, fake_quant, integer
from quantjax.arithmetic import Arithmetic
from quantjax.simulation import apply
from tests.oracles import integers as oracle
from tests.oracles.integers import Integers

X = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)


def test_defaults_are_eight_signed_full_bits():
    x = jnp.array([-1.0, -0.104, 0.5, 1.0])
    assert_array_equal(fake_quant(x, 1 / 128), oracle.fake_quant(x, 1 / 128, 0, Integers(8)))
    assert fake_quant(jnp.array([-500.0, 500.0]), 1.0).tolist() == [-128, 127]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"bits": 4}, [-8, 7]),
        ({"bits": 4, "narrow": True}, [-7, 7]),
        ({"bits": 4, "signed": False}, [0, 15]),
        ({"bits": 4, "signed": False, "narrow": True}, [1, 15]),
        ({"bits": 1}, [-1, 1]),
        ({"bits": 16}, [-32768, 32767]),
        ({"bits": 16, "signed": False}, [0, 65535]),
    ],
)
def test_options(options, want):
    assert fake_quant(jnp.array([-1e6, 1e6]), 1.0, **options).tolist() == want
    shifted = fake_quant(jnp.array([-1e6, 1e6]), 1.0, 1, **options)
    assert shifted.tolist() == [code - 1 for code in want]


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [
        (0.1, 0),
        (0.1, 3),
        (jnp.float32(0.1), jnp.float32(-2)),
        (jnp.full((1, 8), 0.1), 1),
        (0.1, jnp.arange(8.0)[None]),
        (jnp.full((3, 8), 0.1), jnp.full((1, 1), 2.0)),
        (np.full((6, 1), 0.1), np.zeros((6, 1))),
        (jnp.full((6, 8), 0.1, jnp.bfloat16), 0),
    ],
    ids=range(8),
)
def test_scales_and_zero_points_of_any_fitting_shape_and_kind(scale, zero_point):
    want = oracle.fake_quant(
        X, np.asarray(scale, np.float32), np.asarray(zero_point, np.float32), Integers(8)
    )
    assert_array_equal(fake_quant(jnp.asarray(X), scale, zero_point), want)
    assert_array_equal(fake_quant(X, scale, zero_point), want)
    assert_array_equal(jax.jit(fake_quant)(X, scale, zero_point), want)


def test_a_scalar_tensor():
    y = fake_quant(jnp.float32(0.26), 0.1)
    assert y.shape == ()
    np.testing.assert_allclose(y, 0.3, rtol=1e-6)


@pytest.mark.parametrize("bits", [-1, 17, 2.5, np.nan, np.inf, np.float32(7.9)])
def test_widths_that_are_none_raise(bits):
    for call in (fake_quant, jax.jit(lambda x, s: fake_quant(x, s, bits=bits))):
        with pytest.raises(errors.BitsError, match=r"no whole width of u?int") as caught:
            call(X, 0.1) if call is not fake_quant else call(X, 0.1, bits=bits)
        assert "bits=8" in caught.value.fix


@pytest.mark.parametrize("bits", [-1.0, 17.0, 2.5, np.nan, np.inf])
def test_traced_widths_that_are_none_give_nan(bits):
    y = jax.jit(lambda x, bits: fake_quant(x, 0.1, bits=bits))(X, jnp.float32(bits))
    assert np.isnan(y).all()


@pytest.mark.parametrize("scale", [0.0, -0.1, np.nan, np.inf, jnp.array([[0.1] * 7 + [0.0]])])
def test_scales_that_are_none_raise(scale):
    with pytest.raises(errors.QuantizerError, match="not a positive finite number") as caught:
        fake_quant(X, scale)
    assert f"scale of shape {np.shape(scale)}" in caught.value.where


@pytest.mark.parametrize("bits", [True, np.True_, jnp.array(True), "8", None, [None]])
def test_what_is_no_number_is_no_width(bits):
    with pytest.raises(errors.ArgumentError, match="and a number is needed"):
        fake_quant(X, 0.1, bits=[bits] if bits is None else bits)


def test_a_width_is_what_float32_makes_of_it():
    """3.0000000000000004 is what sums of widths in float64 come to."""
    assert_array_equal(fake_quant(X, 0.1, bits=3.0 * (1 + 2**-52)), fake_quant(X, 0.1, bits=3))
    with pytest.raises(errors.BitsError, match="for one tensor"):
        fake_quant(X, 0.1, bits=[4, 8])


@pytest.mark.parametrize("zero_point", [np.nan, np.inf, jnp.array([[0.0] * 7 + [np.nan]])])
def test_zero_points_that_are_none_raise(zero_point):
    with pytest.raises(errors.QuantizerError, match="zero point is NaN or infinite") as caught:
        fake_quant(X, 0.1, zero_point)
    assert f"zero point of shape {np.shape(zero_point)}" in caught.value.where


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8), (5, 1), (4, 8), (12, 8)])
def test_scales_and_zero_points_that_do_not_fit_raise(shape):
    ones = jnp.ones(shape)
    for arguments in ((ones, 0), (0.1, ones), (jnp.ones((1, 8)), ones)):
        with pytest.raises(errors.GranularityError) as caught:
            fake_quant(X, *arguments)
        assert str(shape) in str(caught.value)
        assert "(6, 8)" in str(caught.value)


def test_options_have_names():
    with pytest.raises(TypeError):
        fake_quant(X, 0.1, 0, 4)


def test_learned_parameters_of_an_estimator_do_not_disturb():
    theta = {"clip": jnp.float32(3)}
    qparams = QParams(jnp.float32(0.1), jnp.float32(0), jnp.float32(4), theta)
    y = apply(jnp.asarray(X), qparams, Arithmetic(integer()))
    assert_array_equal(y, fake_quant(X, 0.1, bits=4))
    gradient = jax.grad(lambda q: apply(jnp.asarray(X), q, Arithmetic(integer())).sum())(qparams)
    assert jax.tree.structure(gradient) == jax.tree.structure(qparams)
    assert gradient.theta["clip"] == 0


def test_one_jitted_program_serves_scales_zero_points_and_widths():
    calls = []

    @jax.jit
    def run(scale, zero_point, bits):
        calls.append(bits)
        return fake_quant(X, scale, zero_point, bits=bits)

    for scale, zero_point, bits in [
        (0.1, 0.0, 8.0),
        (0.3, 2.0, 3.0),
        (2.0, -1.0, 1.0),
        (1.0, 0.0, 0.0),
    ]:
        got = run(jnp.float32(scale), jnp.float32(zero_point), jnp.float32(bits))
        assert_array_equal(got, fake_quant(X, scale, zero_point, bits=bits))
    assert len(calls) == 1


def test_scales_as_powers_of_two_lose_nothing():
    # Integers times a power of two within the range are their own quantized values.
    x = jnp.arange(-128.0, 128.0) * 2.0**-9
    assert_array_equal(fake_quant(x, 2.0**-9), x)
    assert_array_equal(fake_quant(x, 2.0**-9, -30, bits=16), x)
