"""XNOR-Net's scale against a float64 model and against its neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import errors
from quantjax.affine import SMALLEST_SCALE, Fault, qparams_from_range
from quantjax.arithmetic import Arithmetic
from quantjax.formats import POWER_OF_TWO, integer
from quantjax.formats.logarithmic import lognet
from quantjax.formats.ternary import TERNARY
from quantjax.ranges.xnor import XNOR
from quantjax.simulation import apply
from tests.oracles.groups import by_group

SHAPE, GROUPS = (6, 8), ((1, 1), (1, 8), (6, 1), (3, 8), (6, 2))
BINARY, ONE = integer(max_bits=1), jnp.float32(1)


@functools.cache
def fitting(groups, format=BINARY):
    return jax.jit(lambda w, bits: XNOR.fit(w, groups, format, bits))


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


@pytest.mark.parametrize("groups", GROUPS)
def test_the_scale_is_the_mean_magnitude(groups):
    w = weights()
    scale, zero_point, bits, theta = fitting(groups)(w, ONE)
    want = np.zeros(groups)
    for home, entries in by_group(np.float64(w), groups):
        want[home] = np.abs(entries).mean()
    assert_allclose(scale, want, rtol=1e-6)
    assert scale.dtype == jnp.float32
    assert_array_equal(zero_point, np.zeros(groups))
    assert float(bits) == 1
    assert theta == ()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("factor", [0.9, 0.99, 1.01, 1.1])
def test_no_other_scale_has_a_smaller_error(groups, factor):
    w = weights(1)
    qparams = fitting(groups)(w, ONE)
    arithmetic = Arithmetic(BINARY)

    def error(qparams):
        y = np.float64(apply(jnp.asarray(w), qparams, arithmetic))
        return np.array([(e**2).sum() for _, e in by_group(np.float64(w) - y, groups)])

    best, other = error(qparams), error(qparams._replace(scale=qparams.scale * factor))
    assert (best < other).all()
    # And it is the least-squares solution, not just better than these: ‖w‖² - ‖w‖₁² / n.
    want = [
        (e**2).sum() - np.abs(e).sum() ** 2 / e.size for _, e in by_group(np.float64(w), groups)
    ]
    assert_allclose(best, want, rtol=1e-5)


@pytest.mark.parametrize("narrow", [True, False])
def test_other_widths_span_the_largest_magnitude(narrow):
    format = integer(max_bits=8, narrow=narrow)
    w, groups = weights(2), (1, 8)
    top = jnp.abs(jnp.asarray(w)).max(0, keepdims=True)
    for bits in (2, 4, 8):
        want = qparams_from_range(
            -top, top, jnp.float32(bits), format=format, symmetric=True, calibrated=jnp.bool_(True)
        )
        got = fitting(groups, format)(w, jnp.float32(bits))
        jax.tree.map(assert_array_equal, got, want)
    assert_array_equal(fitting(groups, format)(w, jnp.float32(0)).scale, np.ones(groups))
    assert (
        fitting(groups, format)(w, jnp.float32(9)).zero_point == Fault.BITS_OUTSIDE_FORMAT
    ).all()


def test_traced_widths_are_static_widths():
    format, w = integer(max_bits=8), jnp.asarray(weights(3))
    at = jnp.array([1.0, 2.0, 8.0, 0.0])
    fit = lambda bits: XNOR.fit(w, (6, 2), format, bits)  # noqa: E731
    many, together = jax.jit(jax.vmap(fit))(at), jax.jit(lambda: fit(1.0 * ONE))()
    for i in range(len(at)):
        jax.tree.map(lambda a, b, i=i: assert_allclose(a[i], b, rtol=3e-7), many, fit(at[i]))
    jax.tree.map(lambda a, b: assert_allclose(a[0], b, rtol=3e-7), many, together)
    stack = jnp.stack([w, 2.0 * w])
    both = jax.vmap(lambda w: XNOR.fit(w, (6, 2), format, ONE).scale)(stack)
    assert_allclose(both[1], 2.0 * both[0], rtol=3e-7)


def test_the_scale_rule_of_the_format_is_followed():
    w = jnp.array([[0.3, -0.7, 0.5]])
    format = integer(max_bits=1, scale_rule=POWER_OF_TWO)
    assert XNOR.fit(w, (1, 1), format, ONE).scale.tolist() == [[0.5]]


def test_zero_one_element_and_broken_groups():
    w = jnp.array([[0.0, 0.0], [1.0, 3.0], [jnp.nan, 1.0], [jnp.inf, 1.0]])
    got = XNOR.fit(w, (4, 1), BINARY, ONE)
    assert_array_equal(got.scale, [[SMALLEST_SCALE], [2.0], [np.nan], [np.nan]])
    assert got.zero_point[2:].tolist() == [[float(Fault.NOT_FINITE)]] * 2
    single = XNOR.fit(jnp.array([-0.37]), (1,), BINARY, ONE)
    assert_array_equal(single.scale, np.float32([0.37]))
    # The sum overflows: said, not hidden.
    huge = XNOR.fit(jnp.full((4,), 3e38), (1,), BINARY, ONE)
    assert np.isnan(huge.scale).all()


@pytest.mark.parametrize("format", [integer(signed=False), TERNARY, lognet()], ids=lambda f: f.name)
def test_formats_without_plus_and_minus_one_are_refused(format):
    with pytest.raises(errors.FormatError, match="no one-bit codes"):
        XNOR.fit(jnp.ones((2, 2)), (1, 1), format, ONE)


@pytest.mark.parametrize("groups", [(1, 1), (1, 8), (32, 1)])
def test_the_scale_is_the_same_eagerly_and_compiled(groups):
    draw = np.random.default_rng(3)
    compiled = fitting(groups)
    for _ in range(12):
        w = jnp.asarray(draw.normal(size=(32, 8)), jnp.float32)
        assert_array_equal(XNOR.fit(w, groups, BINARY, ONE).scale, compiled(w, ONE).scale)
