"""Schedules against plain Python, traced and concrete, at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.training import delayed_bits, error_decay, progressive_bits
from tests.refused import refused


def staged(step, boundaries, widths):
    """The last stage that has begun; 32 and more is float."""
    width = widths[0]
    for boundary, following in zip(boundaries, widths[1:], strict=True):
        if step >= boundary:
            width = following
    return 0.0 if width >= 32 else float(width)


@given(
    boundaries=st.lists(st.integers(0, 50), min_size=0, max_size=4).map(sorted),
    widths=st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 31, 32, 64]), min_size=5, max_size=5),
)
def test_stages_as_plain_python_has_them(boundaries, widths):
    widths = widths[: len(boundaries) + 1]
    steps = np.arange(55)
    bits = jax.vmap(progressive_bits(boundaries, widths))(steps)
    assert bits.dtype == jnp.float32
    assert_array_equal(bits, [staged(step, boundaries, widths) for step in steps])


def test_the_step_of_a_boundary_has_the_new_width():
    bits = progressive_bits([10], [8, 4])
    assert [float(bits(step)) for step in (9, 10, jnp.int32(9), jnp.float32(10.0))] == [8, 4, 8, 4]


def test_boundaries_and_widths_may_be_traced():
    """A sweep of schedules is one program."""
    traced = []

    @jax.jit
    def width(boundaries, widths, step):
        traced.append(1)
        return progressive_bits(boundaries, widths)(step)

    plans = (
        (jnp.array([5, 10]), jnp.array([32.0, 8.0, 2.0])),
        (jnp.array([1, 20]), jnp.array([8.0, 4.0, 0.0])),
    )
    for boundaries, widths in plans:
        for step in (0, 1, 5, 10, 25):
            expected = staged(step, boundaries.tolist(), widths.tolist())
            assert float(width(boundaries, widths, jnp.int32(step))) == expected
    assert len(traced) == 1


def test_widths_of_several_cells():
    """Trailing axes of widths are cells of a sweep."""
    bits = progressive_bits([3], jnp.array([[32.0, 8.0], [4.0, 2.0]]))
    assert_array_equal(bits(0), [0.0, 8.0])
    assert_array_equal(bits(3), [4.0, 2.0])
    assert_array_equal(delayed_bits(2, jnp.array([4.0, 32.0]))(5), [4.0, 0.0])


@given(start=st.integers(0, 40), bits=st.sampled_from([0, 1, 4, 8, 32]))
def test_delay_is_a_schedule_of_two_stages(start, bits):
    steps = np.arange(45)
    delayed = jax.vmap(delayed_bits(start, bits))(steps)
    assert_array_equal(delayed, jax.vmap(progressive_bits([start], [0, bits]))(steps))
    assert_array_equal(delayed == 0.0, (steps < start) | (bits in (0, 32)))


def test_a_delay_may_be_traced():
    starts = jnp.array([0, 3, 6])
    bits = jax.vmap(lambda start: delayed_bits(start, 4.0)(jnp.int32(3)))(starts)
    assert_array_equal(bits, [4.0, 4.0, 0.0])


@given(
    steps=st.integers(1, 1000),
    share=st.floats(0.0, 1.5),
    ends=st.tuples(st.floats(0.01, 1.0), st.floats(1.0, 100.0)),
)
def test_sharpness_grows_geometrically(steps, share, ends):
    smallest, largest = ends
    step = int(share * steps)
    t = error_decay(steps, smallest=smallest, largest=largest)
    done = min(step / steps, 1.0)
    expected = smallest * (largest / smallest) ** done
    assert float(t(step)) == pytest.approx(expected, rel=1e-5)


def test_sharpness_of_the_paper():
    """t = 0.1 · 10^(2 i/N): equal factors in equal steps, from 0.1 to 10."""
    t = jax.vmap(error_decay(8))(jnp.arange(9))
    assert_allclose(t, 0.1 * 10.0 ** (2.0 * np.arange(9) / 8), rtol=1e-6)
    assert_allclose(t[1:] / t[:-1], np.full(8, 10.0**0.25), rtol=1e-6)
    grid = jax.vmap(lambda largest: error_decay(10, largest=largest)(10))(jnp.array([1.0, 5.0]))
    assert_allclose(grid, [1.0, 5.0], rtol=1e-6)


def test_sharpness_reaches_the_estimator():
    """The surrogate is nearly 1 at first and a sharp bump at the end."""
    t = error_decay(100)
    estimator = qj.estimators.ERROR_DECAY

    def slope(step, x):
        theta = {"sharpness": t(step)}

        def quantized(x):
            return qj.fake_quant(x, 1.0, bits=1, estimator=estimator, theta=theta)

        return float(jax.grad(quantized)(x))

    assert slope(0, 0.9) == pytest.approx(1.0, abs=0.02)
    assert slope(100, 0.9) < 1e-3
    assert slope(100, 0.0) == pytest.approx(10.0, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: progressive_bits([10], [8]), "widths of shape (1,) for boundaries of shape (1,)"),
        (lambda: progressive_bits([10, 5], [8, 4, 2]), "that do not ascend"),
        (lambda: progressive_bits([10], [8, 2.5]), "a width of 2.5 bits"),
        (lambda: progressive_bits([10], [-1, 2]), "a width of -1 bits"),
        (lambda: progressive_bits([[10]], [8, 2]), "boundaries of shape (1, 1)"),
        (lambda: delayed_bits(10, -4), "a width of -4 bits"),
        (lambda: delayed_bits(10, np.nan), "a width of nan bits"),
        (lambda: error_decay(0), "steps = 0"),
        (lambda: error_decay(10, smallest=0.0), "smallest = 0"),
        (lambda: error_decay(10, largest=-1.0), "largest = -1"),
    ],
)
def test_mistakes_are_refused(make, problem):
    with refused(errors.TrainingError, problem):
        make()
