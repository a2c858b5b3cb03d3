"""What is made of a GPU's quotient, against IEEE's own division."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantjax.formats import divide_by_scale
from quantjax.formats.division import corrected
from quantjax.formats.scales import significand

PLACES = (-3, -2, -1, 0, 1, 2, 3)
NUMBERS = st.floats(2.0**-60, 2.0**60, width=32)


def off(quotient: np.ndarray, places: int | np.ndarray) -> np.ndarray:
    """The quotient, that many last places off."""
    return (quotient.view(np.int32) + np.asarray(places, np.int32)).view(np.float32)


def operands(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    exponents = draw.integers(-40, 40, (2, number))
    x, d = np.ldexp(draw.uniform(1.0, 2.0, (2, number)), exponents).astype(np.float32)
    return x * draw.choice(np.float32([-1.0, 1.0]), number), d


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_quotient_some_places_off_becomes_the_rounded_one(compiled):
    run = jax.jit(corrected) if compiled else corrected
    x, d = operands(0, 200_000)
    want = x / d
    places = np.random.default_rng(1).integers(-3, 4, len(x))
    np.testing.assert_array_equal(run(x, d, off(want, places)), want)


@pytest.mark.parametrize("places", PLACES)
def test_quotients_next_to_powers_of_two(places):
    """Where the distance of neighbors changes."""
    near = off(np.full(41, 1.0, np.float32), np.arange(-20, 21))
    x, d = (side.ravel() for side in np.meshgrid(near, near))
    for scale in (np.float32(1.0), np.float32(2.0**-20), np.float32(1024.0)):
        want = x * scale / d
        np.testing.assert_array_equal(corrected(x * scale, d, off(want, places)), want)


@pytest.mark.parametrize("places", PLACES)
def test_ties_stay_ties(places):
    """Scales of 12 bits times halves: the codes' borders, which a reciprocal moves."""
    draw = np.random.default_rng(2)
    d = np.ldexp(draw.integers(2049, 4096, (500, 1)), draw.integers(-24, 0, (500, 1)))
    want = np.arange(-160, 160).astype(np.float32) + np.float32(0.5)
    x = (d * want).astype(np.float32)
    d, want = np.broadcast_to(d, x.shape).astype(np.float32), np.broadcast_to(want, x.shape)
    np.testing.assert_array_equal(corrected(x, d, off(want.copy(), places)), want)


@given(NUMBERS, NUMBERS, st.sampled_from(PLACES))
def test_any_two_numbers(x, d, places):
    x, d = np.float32([x]), np.float32([d])
    want = x / d
    np.testing.assert_array_equal(corrected(x, d, off(want, places)), want)


@pytest.mark.parametrize("x", [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38])
def test_what_is_no_normal_number_keeps_the_quotient_given(x):
    x = np.float32([x])
    for d in np.float32([1.0, 1e-38, 1e-42]):
        with np.errstate(over="ignore"):
            quotient = x / d
        divisor = np.full_like(x, d)
        if 1e-37 < abs(quotient[0]) < 1e37 or quotient[0] == x[0] == np.float32(3e38):
            continue
        np.testing.assert_array_equal(corrected(x, divisor, quotient), quotient)


def test_zeros_keep_their_sign_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.float32([-0.0, 0.0, -1e-30, 1e-30])
    got = divide_by_scale(x, jnp.float32([1.0, 1.0, 1e30, 1e30]))
    np.testing.assert_array_equal(np.signbit(got), [True, False, True, False])


def test_the_significand():
    np.testing.assert_array_equal(
        significand(jnp.float32([1.0, -1.5, 3.0, 0.375, 2.0**-126])), [1.0, 1.5, 1.5, 1.5, 1.0]
    )


def test_on_a_gpu_the_quotient_is_corrected_and_its_derivative_is_the_quotients(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, d = (jnp.asarray(side) for side in operands(3, 1000))
    x = x.at[0].set(jnp.inf).at[1].set(0.0)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(divide_by_scale(x, d), np.asarray(x) / np.asarray(d))
    assert jax.grad(divide_by_scale, (0, 1))(jnp.float32(3.0), jnp.float32(0.5)) == (2.0, -12.0)
