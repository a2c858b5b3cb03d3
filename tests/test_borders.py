"""The range's borders in terms of ``x``, against dividing and rounding each entry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quantjax as qj
from quantjax import simulation
from quantjax.affine import QParams
from quantjax.borders import rounds_outside
from quantjax.formats import divide_by_scale
from quantjax.rounding import HALF_AWAY, HALF_EVEN, Rounding

EIGHT = jnp.float32(8.0)
NEAREST = [HALF_EVEN, HALF_AWAY]
BOUNDS = st.integers(-70_000, 70_000)


def around(scale: np.ndarray, bounds: list[int], reach: int = 40) -> np.ndarray:
    """All float32 numbers next to where rounding changes at the bounds; a row for each scale."""
    edges = np.float32([n + half for n in bounds for half in (-0.5, 0.5)]) * scale
    bits = edges.view(np.int32)[..., None] + np.arange(-reach, reach + 1, dtype=np.int32)
    return bits.view(np.float32).reshape(len(scale), -1)


def divided(x, scale, low, high, rounding):
    level = rounding.apply(divide_by_scale(jnp.asarray(x), jnp.broadcast_to(scale, x.shape)))
    return (level < low) | (level > high)


@pytest.fixture
def divide_again(monkeypatch) -> Iterator[Callable[[], None]]:
    """Call it, and nothing has borders from there on; traces of jitted functions do not stay."""

    def switch() -> None:
        monkeypatch.setattr(simulation, "_has_borders", lambda *_: False)
        jax.clear_caches()

    yield switch
    jax.clear_caches()


def check(x, scale, low, high, rounding):
    bounds = (jnp.full((1, 1), bound, jnp.float32) for bound in (low, high))
    got = jax.jit(rounds_outside, static_argnums=5)(
        jnp.asarray(x), jnp.asarray(scale), *bounds, EIGHT, rounding
    )
    want = divided(x, scale, low, high, rounding)
    np.testing.assert_array_equal(got, want)
    return want


@pytest.mark.parametrize("rounding", NEAREST, ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("low", "high"),
    [(-128, 127), (-127, 127), (0, 255), (-3, 252), (-1, 1), (0, 0), (-32768, 32767)],
)
def test_every_number_next_to_a_border(low, high, rounding):
    draw = np.random.default_rng(0)
    scale = np.ldexp(draw.uniform(1.0, 2.0, (3000, 1)), draw.integers(-60, 60, (3000, 1)))
    scale = scale.astype(np.float32)
    want = check(around(scale, [low, high]), scale, low, high, rounding)
    assert 0.2 < float(want.mean()) < 0.8


@pytest.mark.parametrize("rounding", NEAREST, ids=lambda r: r.name)
def test_exact_ties(rounding):
    """Scales of few bits, where a border is a tie."""
    scale = np.float32([[0.5], [1.0], [0.75], [2.0**-20 * 3.0], [1000.0]])
    for low, high in ((-8, 7), (-7, 8), (0, 15), (0, 16)):
        check(around(scale, [low, high]), scale, low, high, rounding)


@given(BOUNDS, st.integers(0, 70_000), st.floats(2.0**-100, 2.0**100, width=32))
def test_any_range_and_scale(low, length, scale):
    scale = np.float32([[scale]])
    check(around(scale, [low, low + length]), scale, low, low + length, HALF_EVEN)


def test_nowhere_and_everywhere():
    x = np.float32([[np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38]])
    for scale in (1.0, 1e38, 1e-37, np.nan):
        scale = np.float32([[scale]])
        check(x, scale, -128, 127, HALF_EVEN)
        check(x, scale, 0, 255, HALF_EVEN)


@given(st.floats(width=32), st.floats(2.0**-100, 2.0**100, width=32), BOUNDS)
def test_nothing_is_outside_at_width_0(x, scale, bound):
    bound = jnp.full((1,), bound, jnp.float32)
    x, scale = jnp.full((2,), x, jnp.float32), jnp.full((1,), scale, jnp.float32)
    assert not rounds_outside(x, scale, bound, bound, jnp.float32(0), HALF_EVEN).any()


@pytest.mark.thinned(7)
@pytest.mark.parametrize("bits", [0, 1, 2, 4, 8])
@pytest.mark.parametrize(
    "format",
    [qj.integer(), qj.integer(narrow=True), qj.integer(signed=False)],
    ids=["full", "narrow", "unsigned"],
)
@pytest.mark.parametrize("zero", [0.0, 3.0])
@pytest.mark.parametrize("spoilt", [0.5, np.nan])
def test_gradients_are_those_of_dividing_again(bits, format, zero, spoilt, divide_again):
    """Of ``fake_quant`` and of codes that a product multiplies, by few scales and by many."""
    draw = np.random.default_rng(bits)
    x = jnp.asarray(8.0 * draw.normal(size=(256, 4)), jnp.float32)
    x = x.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[2, 2].set(-jnp.inf)
    qparams = QParams(
        jnp.asarray(draw.uniform(0.1, 2.0, (1, 4)), jnp.float32).at[0, 3].set(spoilt),
        jnp.full((1, 4), zero),
        jnp.float32(bits),
    )
    arithmetic = simulation.Arithmetic(format)

    def gradients() -> list[jax.Array]:
        real = lambda x: jnp.sum(jnp.sin(simulation.apply(x, qparams, arithmetic)))  # noqa: E731
        codes = lambda x: jnp.sum(  # noqa: E731
            jnp.sin(simulation.codes_or_values(x, qparams, arithmetic)[0])
        )
        return [jax.jit(jax.grad(f))(x) for f in (real, codes)]

    compared = gradients()
    divide_again()
    for got, want in zip(compared, gradients(), strict=True):
        np.testing.assert_array_equal(got, want)
        assert jnp.isnan(got[0, 0])  # and no 0, which would hide it
    assert 0 < float((compared[0] == 0).mean()) < 1 or bits in (0, 8)


def test_a_trained_model_divides_each_entry_once(divide_again):
    """In the forward pass, and not once more for the gradient."""
    f = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    w, x = jnp.linspace(-1.0, 1.0, 256 * 4).reshape(256, 4), jnp.ones((2, 256))
    plan = qj.plan(qj.uniform_policy(weight_bits=4), qj.sites(f, w, x))
    qstate = qj.calibrate(plan, qj.observe(f, plan)(qj.init(plan), w, x)[1], w)

    def rounded() -> int:
        loss = lambda w: qj.fake_quantize(f, plan)(qstate, w, x).sum()  # noqa: E731
        return len(re.findall(r"f32\[256,4\] = round\[", str(jax.make_jaxpr(jax.grad(loss))(w))))

    once = rounded()
    divide_again()
    assert rounded() == 2 * once > 0


@pytest.mark.parametrize(
    ("scale", "zero_point"), [((1, 4), (1, 1)), ((1, 1), (1, 4)), ((), (1, 4)), ((1, 4), ())]
)
def test_scales_and_zero_points_need_not_have_one_shape(scale, zero_point, divide_again):
    x = jnp.linspace(-9.0, 9.0, 1200).reshape(300, 4)
    scales = 0.5 + jnp.arange(np.prod(scale, dtype=int), dtype=jnp.float32).reshape(scale)
    zeros = 1.0 + jnp.arange(np.prod(zero_point, dtype=int), dtype=jnp.float32).reshape(zero_point)
    gradient = jax.grad(lambda x: jnp.sum(qj.fake_quant(x, scales, zeros, bits=4)))
    compared = gradient(x)
    divide_again()
    np.testing.assert_array_equal(compared, gradient(x))
    assert 0 < float(compared.mean()) < 1


def test_a_rounding_that_is_not_odd_divides_again():
    """Half up: -4.5 becomes -4, which three bits hold, and 3.5 becomes 4, which they do not."""
    half_up = Rounding("half_up", lambda values: jnp.floor(values + 0.5), is_nearest=True)
    x = jnp.tile(jnp.array([-4.5, 3.5, -4.6, 3.4]), 100)
    gradient = jax.grad(lambda x: jnp.sum(qj.fake_quant(x, 1.0, bits=3, rounding=half_up)))(x)
    np.testing.assert_array_equal(gradient[:4], [1.0, 0.0, 0.0, 1.0])


def test_where_the_scale_moves_too_entries_are_divided():
    """The gradient of the scale needs the quotient."""
    x, scale = jnp.linspace(-3.0, 3.0, 300), jnp.full(1, 0.5)

    def loss(x: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(qj.fake_quant(x, scale, bits=2.0))

    both, alone = jax.grad(loss, (0, 1))(x, scale), jax.grad(loss)(x, scale)
    np.testing.assert_array_equal(both[0], alone)
    assert float(both[1][0]) != 0.0
