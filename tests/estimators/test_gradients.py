"""Gradients of fake quantization against the papers' formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import Estimator, QParams, fake_quant, integer
from quantjax.arithmetic import Arithmetic
from quantjax.estimators import CLIPPED, STRAIGHT_THROUGH
from quantjax.estimators.gradients import scale_gradient
from quantjax.simulation import apply, centered_codes
from tests.laws.cases import GROUPS, SHAPE, spread_scale
from tests.oracles import gradients as oracle
from tests.oracles.integers import Integers, bounds

pytestmark = pytest.mark.thinned(3)

ORACLES = {CLIPPED: oracle.clipped, STRAIGHT_THROUGH: oracle.straight_through}
BOTH = pytest.mark.parametrize("estimator", ORACLES, ids=lambda e: e.name)
RNG = np.random.default_rng(3)
COTANGENT = RNG.normal(size=SHAPE).astype(np.float32)
STEPS = RNG.normal(size=SHAPE).astype(np.float32)  # times the width's range


def operands(groups: tuple[int, ...], family: Integers) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A tensor of which some lies inside the range and some far out; its scale and zero point."""
    rng = np.random.default_rng(family.bits)
    scale = rng.uniform(0.1, 0.4, groups).astype(np.float32)
    low, high = bounds(family)
    zero_point = rng.integers(low, high + 1, groups).astype(np.float32)
    x = STEPS * spread_scale(scale) * np.float32(high - low)
    return jnp.asarray(x), jnp.asarray(scale), jnp.asarray(zero_point)


def pull(function, primals, cotangent=COTANGENT):
    return jax.vjp(function, *primals)[1](jnp.asarray(cotangent))


def expected(estimator, primals, family) -> oracle.Gradients:
    x, scale, zero_point = (np.asarray(primal) for primal in primals)
    return ORACLES[estimator](np.float64(COTANGENT), x, scale, zero_point, family)


def close(got, want) -> None:
    """Equal to the rounding of sums of up to 48 float32 terms."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert_allclose(np.float64(a), b, rtol=2e-5, atol=2e-5 * max(np.abs(b).max(), 1e-3))


@BOTH
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize(("bits", "signed"), [(1, True), (2, False), (4, True), (8, False)])
def test_gradients_are_the_formulas_summed_over_each_group(estimator, groups, bits, signed):
    family = Integers(bits, signed)
    primals = operands(groups, family)
    got = pull(
        lambda *primals: fake_quant(*primals, bits=bits, signed=signed, estimator=estimator),
        primals,
    )
    want = expected(estimator, primals, family)
    assert_array_equal(got[0], np.float32(want.x))
    close(got, want)


@BOTH
def test_the_formulas_where_they_can_be_read_off(estimator):
    # Codes -2..1 about zero point 0, scale 1/2: below, inside, inside, half a step out, above.
    x, scale, zero = jnp.array([-9.0, -0.6, 0.2, 0.7, 9.0]), jnp.float32(0.5), jnp.float32(0)

    def each(*primals):
        return jax.jacobian(lambda *p: fake_quant(*p, bits=2, estimator=estimator), (0, 1, 2))(
            *primals
        )

    to_x, to_scale, to_zero = jax.jit(each)(x, scale, zero)
    inside = [0, 1, 1, 1, 0] if estimator is CLIPPED else [1] * 5
    assert_array_equal(to_x, np.diag(inside))
    codes, quotients = np.array([-2, -1, 0, 1, 1]), np.asarray(x) / 0.5
    assert_allclose(to_scale, codes - inside * quotients, rtol=1e-6)
    assert_array_equal(to_zero, 0.5 * (np.array(inside) - 1))


@BOTH
@pytest.mark.parametrize("groups", [(), (1, 8), (3, 8)], ids=str)
def test_forward_mode_agrees_with_reverse_mode(estimator, groups):
    primals = operands(groups, Integers(4))
    keys = jax.random.split(jax.random.key(0), 3)
    tangents = tuple(jax.random.normal(k, p.shape) for k, p in zip(keys, primals, strict=True))

    def function(*primals):
        return fake_quant(*primals, bits=4, estimator=estimator)

    _, pushed = jax.jvp(function, primals, tangents)
    pulled = pull(function, primals)
    forward = jnp.vdot(COTANGENT, pushed)
    reverse = sum(jnp.vdot(g, t) for g, t in zip(pulled, tangents, strict=True))
    assert_allclose(forward, reverse, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("groups", [(), (1, 8), (3, 8)], ids=str)
def test_codes_times_scale_have_the_gradients_of_fake_quant(estimator, bits, groups):
    family = Integers(bits)
    primals, arithmetic = operands(groups, family), Arithmetic(integer(), estimator=estimator)

    def product(x, scale, zero_point):
        qparams = QParams(scale, zero_point, jnp.float32(bits))
        whole = scale
        for axis, n in enumerate(SHAPE if groups else ()):
            whole = jnp.repeat(whole, n // groups[axis], axis)
        return whole * centered_codes(x, qparams, arithmetic)

    close(pull(product, primals), expected(estimator, primals, family))


@BOTH
def test_jit_vmap_and_traced_bits_keep_the_gradients(estimator):
    primals = operands((1, 8), Integers(4))

    def gradients(bits):
        return pull(lambda *p: fake_quant(*p, bits=bits, estimator=estimator), primals)

    widths = (0, 1, 4, 8)
    batched = jax.jit(jax.vmap(gradients))(jnp.array(widths, jnp.float32))
    for i, bits in enumerate(widths):
        for got, want in zip(batched, gradients(bits), strict=True):
            assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


def test_the_width_itself_has_no_gradient():
    x, scale, zero_point = operands((), Integers(4))
    to_bits = jax.grad(lambda bits: fake_quant(x, scale, zero_point, bits=bits).sum())
    assert to_bits(jnp.float32(4)) == 0


@BOTH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_have_the_types_of_their_primals(estimator, dtype):
    x, scale, zero_point = operands((1, 8), Integers(4))
    primals, cotangent = (x.astype(dtype), scale, zero_point), COTANGENT.astype(dtype)
    got = pull(lambda *p: fake_quant(*p, bits=4, estimator=estimator), primals, cotangent)
    assert [g.dtype for g in got] == [dtype, jnp.float32, jnp.float32]
    # Sums over a channel are made in float32.
    want = ORACLES[estimator](
        np.float64(cotangent), *(np.asarray(p, np.float32) for p in primals), Integers(4)
    )
    close(got[1:], want[1:])


def test_both_estimators_give_the_same_values():
    x, scale, zero_point = operands((), Integers(4))
    values = [
        fake_quant(x, scale, zero_point, bits=4, estimator=estimator) for estimator in ORACLES
    ]
    assert_array_equal(*values)


@pytest.mark.parametrize("x", [jnp.inf, -jnp.inf, 3e38])
def test_clipped_gradients_of_infinite_quotients_are_finite(x):
    # 0 · ∞ is NaN; what was clipped has the bound's gradient, however far out it lay.
    primals = jnp.array([x, 0.1]), jnp.float32(1e-3), jnp.float32(0)
    for function in (
        fake_quant,
        lambda x, s, z: s * centered_codes(x, QParams(s, z, jnp.float32(8)), Arithmetic(integer())),
    ):
        to_x, to_scale, to_zero = jax.grad(lambda *p, f=function: f(*p)[0], (0, 1, 2))(*primals)
        assert to_x.tolist() == [0, 0]
        assert_allclose(to_scale, 127 if x > 0 else -128)
        assert_allclose(to_zero, -1e-3)


def test_an_estimator_of_ones_own():
    tent = Estimator("tent", lambda at: jnp.maximum(1 - jnp.abs(at.unclipped) / 8, 0.0))
    x = jnp.array([0.0, 4.1, -6.0, 20.0])
    to_x = jax.grad(lambda x: fake_quant(x, 1.0, bits=4, estimator=tent).sum())(x)
    assert to_x.tolist() == [1.0, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("start", [0.05, 0.7])
def test_a_learned_scale_finds_the_range(start):
    # Of even values in -1..1 at four bits, the best step is about 2/15, its squared error step²/12.
    x, arithmetic = jnp.linspace(-1, 1, 511), Arithmetic(integer())

    def error(scale):
        qparams = QParams(scale, jnp.float32(0), jnp.float32(4))
        return jnp.mean((apply(x, qparams, arithmetic) - x) ** 2)

    def step(scale, _):
        return scale - 0.1 * jax.grad(error)(scale), None

    scale, _ = lax.scan(step, jnp.float32(start), length=400)
    assert_allclose(scale, 2 / 15, rtol=0.05)
    least = (2 / 15) ** 2 / 12
    assert error(scale) < 1.02 * least < error(jnp.float32(start)) / 10


def test_estimators_are_asked_at_bypass_for_the_widest_codes():
    """What they divide by is not 0 there, so that gradients of delayed widths are 0 and no NaN."""
    seen = []

    def resolve(qparams, own, format, shape):
        seen.append(float(qparams.bits))
        scale = own["alpha"] / (2.0**qparams.bits - 1.0)
        return qparams._replace(scale=scale, zero_point=jnp.zeros_like(qparams.zero_point))

    def start(qparams, format):
        seen.append(float(qparams.bits))
        return {"alpha": qparams.scale * (2.0**qparams.bits - 1.0)}

    pact = Estimator(
        "own-pact",
        lambda point: jnp.ones_like(point.scaled),
        parameters=("alpha",),
        start=start,
        resolve=resolve,
        transform=lambda x, qparams, own, format: jnp.clip(x, 0.0, own["alpha"]),
    )
    format = integer(signed=False)
    qparams = QParams(jnp.float32(1), jnp.float32(0), jnp.float32(0))
    started = pact.started(qparams, format)
    assert_allclose(started.theta["alpha"], 1.0, rtol=1e-6)
    arithmetic = Arithmetic(format, estimator=pact, symmetric=True)

    def loss(alpha, bits):
        used = started._replace(theta={"alpha": alpha}, bits=bits)
        with jax.disable_jit():
            resolved = arithmetic.resolved(used, ())
            assert float(resolved.bits) == float(bits)
        return jnp.sum(apply(jnp.linspace(-1.0, 3.0, 9), used, arithmetic) ** 2)

    alpha = jnp.float32(2.0)
    assert float(jax.grad(lambda a: loss(a, jnp.float32(0)))(alpha)) == 0.0
    assert float(jax.grad(lambda a: loss(a, jnp.float32(4)))(alpha)) > 0.0
    assert float(loss(alpha, jnp.float32(0))) == float(jnp.sum(jnp.linspace(-1.0, 3.0, 9) ** 2))
    assert set(seen) == {8.0, 4.0}


def test_second_derivatives_have_the_factor_of_the_gradient_too():
    """LSQ's own ``x g + stop_gradient(x - x g)``, differentiated as often as one likes."""

    def composed(x, g):
        return x * g + lax.stop_gradient(x - x * g)

    x, g = jnp.float32(3.0), jnp.float32(0.25)
    for loss in (lambda y: y**2, lambda y: y**3 + jnp.sin(y)):
        got, want = (
            jax.grad(jax.grad(lambda x, scaled=scaled, loss=loss: loss(scaled(x, g))))(x)
            for scaled in (scale_gradient, composed)
        )
        assert_allclose(got, want, rtol=1e-6)
