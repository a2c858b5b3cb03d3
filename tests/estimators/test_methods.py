"""Every published estimator: values, gradients of all that it learns, against float64 models."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import estimators as es
from quantjax.arithmetic import Arithmetic
from quantjax.estimators import ESTIMATORS, Estimator
from quantjax.formats import IntegerFormat, integer
from quantjax.simulation import apply, centered_codes, prepare
from tests.oracles import estimators as oracle

pytestmark = pytest.mark.thinned(3)

SIZE = 60
RNG = np.random.default_rng(11)
STEPS = RNG.uniform(-1.4, 1.4, SIZE).astype(np.float32)  # times the range: some of it is clipped
COTANGENT = RNG.normal(size=SIZE).astype(np.float32)


class Case(NamedTuple):
    """One estimator at one width, with numbers of its own."""

    estimator: Estimator
    model: Any
    bits: int = 4
    signed: bool = True
    zero_point: float = 0.0
    scale: float = 0.3
    own: Mapping[str, float] = MappingProxyType({})

    @property
    def x(self) -> np.ndarray:
        high = oracle.bounds(self.bits, signed=self.signed)[1]
        return STEPS * np.float32(self.scale * (high + 1))

    def __str__(self) -> str:
        family = "int" if self.signed else "uint"
        return f"{self.estimator.name}-{family}{self.bits}-" + "-".join(map(str, self.own.values()))


def factor(bits: int, *, signed: bool, entries: int = SIZE) -> float:
    return float(1 / np.sqrt(entries * oracle.bounds(bits, signed=signed)[1]))


def lsq(bits: int, *, signed: bool, plus: bool = False):
    def model(*args, **kwargs):
        g = factor(bits, signed=signed)
        return oracle.lsq(*args, **kwargs, factor=g, of_zero=g if plus else 1.0)

    return model


CASES = [
    Case(es.STRAIGHT_THROUGH, oracle.straight_through),
    Case(es.SAWB, oracle.straight_through, 2),
    Case(es.CLIPPED, oracle.clipped),
    Case(es.CLIPPED, oracle.clipped, 3, signed=False, zero_point=2.0),
    *(Case(es.LSQ, lsq(b, signed=True), b) for b in (2, 4, 8)),
    Case(es.LSQ_PLUS, lsq(4, signed=False, plus=True), 4, signed=False, zero_point=5.0),
    *(
        Case(es.PACT, oracle.pact, b, signed=False, own={"clip": c})
        for b, c in ((1, 0.5), (2, 1.7), (4, 1.7))
    ),
    Case(es.PACT, oracle.pact, 4, own={"clip": 1.7}),
    *(Case(es.DOREFA_WEIGHTS, oracle.dorefa_weights, b) for b in (2, 4)),
    Case(es.DOREFA_ACTIVATIONS, oracle.dorefa_activations, 3, signed=False, scale=1 / 7),
    Case(es.APPROX_SIGN, oracle.surrogate(oracle.approx_sign), 1, scale=0.7),
    *(
        Case(es.SWISH_SIGN, oracle.surrogate(oracle.swish_sign), 1, own={"beta": beta})
        for beta in (1.0, 5.0)
    ),
    *(
        Case(es.ERROR_DECAY, oracle.surrogate(oracle.error_decay), 1, own={"sharpness": t})
        for t in (0.1, 1.5, 8.0)
    ),
    Case(es.MAGNITUDE_AWARE, oracle.magnitude_aware, 1, scale=0.8),
    *(
        Case(es.DSQ, oracle.dsq, b, signed=s, zero_point=z, own={"alpha": a})
        for b, s, z, a in [(1, True, 0.0, 0.3), (2, True, 0.0, 0.2), (4, False, 3.0, 0.45)]
    ),
    *(
        Case(es.TQT, oracle.tqt, b, signed=s, own={"log2_threshold": t})
        for b, s, t in [(4, True, 0.7), (3, False, -1.2)]
    ),
    *(
        Case(
            es.QIL,
            oracle.qil,
            b,
            signed=s,
            own={"center": 0.9, "distance": 0.6, "gamma": g},
        )
        for b, s, g in [(3, True, 1.0), (4, True, 1.4), (2, False, 0.7)]
    ),
    *(
        Case(
            es.DIFFERENTIABLE_QUANTIZATION,
            oracle.differentiable_quantization,
            8,
            signed=s,
            own={"clip": 1.23},
        )
        for s in (True, False)
    ),
    *(
        Case(es.ROUNDED_WIDTH, oracle.rounded_width, 8, signed=s, own={"clip": 1.4, "width": w})
        for s, w in [(True, 3.4), (True, 3.6), (False, 2.2)]
    ),
]
EACH = pytest.mark.parametrize("case", CASES, ids=str)


def arguments(case: Case):
    theta = {name: jnp.float32(value) for name, value in case.own.items()}
    return jnp.asarray(case.x), jnp.float32(case.scale), jnp.float32(case.zero_point), theta


def run(case: Case, x, scale, zero_point, theta):
    qparams = qj.QParams(scale, zero_point, jnp.float32(case.bits), theta or ())
    arithmetic = Arithmetic(format_of(case), estimator=case.estimator)
    return apply(x, qparams, arithmetic)


def format_of(case: Case) -> IntegerFormat:
    """Narrow codes where a paper normalizes by the highest one."""
    normalized = case.estimator in (es.QIL, es.DOREFA_WEIGHTS)
    return integer(signed=case.signed, narrow=case.signed and normalized)


def expected(case: Case) -> oracle.Entry:
    own = {name: float(np.float32(value)) for name, value in case.own.items()}
    scale = float(np.float32(case.scale))
    x = np.float64(case.x)
    return case.model(x, scale, case.zero_point, case.bits, signed=case.signed, **own)


def close(got, want, *, terms: float = 1.0) -> None:
    """Up to the rounding of float32 sums, and of the models' central differences."""
    assert_allclose(np.float64(got), want, rtol=5e-5, atol=5e-5 * max(terms, 1.0))


@EACH
def test_values_and_gradients_are_those_of_the_paper(case):
    primals = arguments(case)
    y, pull = jax.vjp(lambda *primals: run(case, *primals), *primals)
    want = expected(case)
    close(y, want.y)
    if case.estimator is es.DOREFA_WEIGHTS:  # whose model sums over outputs
        close(pull(jnp.ones(SIZE))[0], want.x)
        pulled = pull(jnp.asarray(COTANGENT))
    else:
        pulled = pull(jnp.asarray(COTANGENT))
        close(pulled[0], COTANGENT * want.x)
    to_others = {"scale": pulled[1], "zero_point": pulled[2], **pulled[3]}
    assert want.others, "a model without parameters proves nothing of them"
    for name, each in want.others.items():
        terms = np.abs(COTANGENT * each)
        close(to_others[name], np.sum(COTANGENT * each), terms=terms.max())
    # Some entries are clipped or flat and some are not, or one of the formulas goes untested.
    assert np.unique(np.round(want.y, 4)).size >= 2


@EACH
def test_products_of_codes_have_the_same_gradients(case):
    """``scale · centered codes``, which is what a simulated product multiplies."""

    def product(x, scale, zero_point, theta):
        qparams = qj.QParams(scale, zero_point, jnp.float32(case.bits), theta or ())
        arithmetic = Arithmetic(format_of(case), estimator=case.estimator)
        x, qparams = prepare(x, qparams, arithmetic)
        return qparams.scale * centered_codes(x, qparams, arithmetic)

    primals = arguments(case)
    values, gradients = (
        jax.vjp(f, *primals) for f in (product, lambda *primals: run(case, *primals))
    )
    assert_array_equal(values[0], gradients[0])
    for a, b in zip(
        jax.tree.leaves(values[1](jnp.asarray(COTANGENT))),
        jax.tree.leaves(gradients[1](jnp.asarray(COTANGENT))),
        strict=True,
    ):
        close(a, b, terms=float(np.abs(b).max()))


@EACH
def test_forward_mode_agrees_with_reverse_mode(case):
    primals = arguments(case)
    tangents = jax.tree.map(lambda a: jnp.float32(0.3) * jnp.ones_like(a), primals)
    _, pushed = jax.jvp(lambda *p: run(case, *p), primals, tangents)
    pulled = jax.vjp(lambda *p: run(case, *p), *primals)[1](jnp.asarray(COTANGENT))
    reverse = jax.tree.leaves(jax.tree.map(jnp.vdot, pulled, tangents))
    close(np.vdot(COTANGENT, pushed), sum(reverse), terms=float(max(map(abs, reverse))))


@EACH
def test_jit_vmap_and_traced_widths_change_nothing(case):
    """Bypass passes value and gradient as they are."""
    x, scale, zero_point, theta = arguments(case)
    arithmetic = Arithmetic(format_of(case), estimator=case.estimator)

    def both(bits):
        def value(x):
            return apply(x, qj.QParams(scale, zero_point, bits, theta or ()), arithmetic)

        return value(x), jax.grad(lambda x: jnp.vdot(value(x), jnp.asarray(COTANGENT)))(x)

    batch = jax.jit(jax.vmap(both))(jnp.array([0.0, case.bits]))
    assert_array_equal(batch[0][0], x)
    assert_array_equal(batch[1][0], COTANGENT)
    alone = both(jnp.float32(case.bits))
    for got, want in zip(batch, alone, strict=True):
        close(got[1], want)


def test_the_gradient_of_ewgs_depends_on_its_sign():
    bits, scale, delta = 3, 0.25, 0.6
    x = jnp.asarray(STEPS * np.float32(1.2))
    for signed, zero_point in ((True, 0.0), (False, 3.0)):
        arithmetic = Arithmetic(integer(signed=signed), estimator=es.EWGS)

        def value(x, scale, zero_point, arithmetic=arithmetic):
            theta = {"delta": jnp.float32(delta)}
            return apply(x, qj.QParams(scale, zero_point, jnp.float32(bits), theta), arithmetic)

        primals = x, jnp.float32(scale), jnp.float32(zero_point)
        y, pull = jax.vjp(value, *primals)
        to_x, to_scale, to_zero = pull(jnp.asarray(COTANGENT))
        want = oracle.ewgs(
            np.float64(COTANGENT), np.float64(x), scale, zero_point, bits, signed=signed,
            delta=float(np.float32(delta)),
        )  # fmt: skip
        close(y, want[0])
        close(to_x, want[1])
        close(to_scale, want[2].sum(), terms=np.abs(want[2]).max())
        close(to_zero, want[3].sum(), terms=np.abs(want[3]).max())
        # Scaled somewhere, and in both directions.
        ratio = want[1][want[1] != 0] / COTANGENT[want[1] != 0]
        assert ratio.min() < 0.97 < 1.03 < ratio.max()


def test_ewgs_without_scaling_is_the_clipped_estimator():
    x = jnp.asarray(STEPS)

    def gradient(estimator, theta):
        value = lambda x: jnp.vdot(  # noqa: E731
            qj.fake_quant(x, 0.25, bits=3, estimator=estimator, theta=theta), COTANGENT
        )
        return jax.grad(value)(x)

    assert_array_equal(gradient(es.EWGS, {"delta": jnp.float32(0.0)}), gradient(es.CLIPPED, ()))


def test_surrogates_are_finite_far_out():
    x = jnp.array([-1e30, -300.0, 300.0, 1e30, jnp.inf])
    for estimator in (es.APPROX_SIGN, es.SWISH_SIGN, es.ERROR_DECAY, es.MAGNITUDE_AWARE):
        qparams = estimator.started(qj.QParams(*map(jnp.float32, (0.5, 0.0, 1.0))), integer())
        arithmetic = Arithmetic(integer(), estimator=estimator)
        to_x = jax.grad(lambda x, q=qparams, a=arithmetic: apply(x, q, a).sum())(x)
        assert_allclose(to_x[:4], 0.0, atol=1e-30)


def test_lsq_counts_the_entries_that_share_a_scale():
    x = jnp.asarray(RNG.normal(size=(6, 4, 5)).astype(np.float32))

    def to_scale(estimator, groups):
        scale = jnp.full(groups, 0.2)
        value = lambda scale: qj.fake_quant(x, scale, bits=4, estimator=estimator).sum()  # noqa: E731
        return jax.grad(value)(scale)

    plain = to_scale(es.CLIPPED, (1, 1, 5))
    assert_allclose(to_scale(es.LSQ, (1, 1, 5)), plain / np.sqrt(24 * 7), rtol=1e-5)
    assert_allclose(to_scale(es.LSQ_FEATURES, (1, 1, 5)), plain / np.sqrt(4 * 7), rtol=1e-5)
    assert_allclose(
        to_scale(es.LSQ, (1, 1, 1)), to_scale(es.CLIPPED, (1, 1, 1)) / np.sqrt(120 * 7), rtol=1e-5
    )


def test_quant_noise_quantizes_a_share_and_leaves_the_rest():
    x = jnp.asarray(RNG.normal(size=(200, 50)).astype(np.float32))
    key, rate = jax.random.key(3), 0.3

    def value(x, scale, key=key, rate=rate):
        theta = {"rate": jnp.float32(rate)}
        return qj.fake_quant(x, scale, bits=3, theta=theta, estimator=es.QUANT_NOISE, key=key)

    y = value(x, 0.5)
    plain = qj.fake_quant(x, 0.5, bits=3)
    quantized = np.asarray(y == plain)
    assert_array_equal(y, jnp.where(quantized, plain, x))
    assert abs(quantized.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / x.size) + 1e-4
    to_x, to_scale = jax.grad(lambda *p: value(*p).sum(), (0, 1))(x, jnp.float32(0.5))
    assert_array_equal(to_x, np.ones(x.shape))
    q = np.asarray(plain) / 0.5
    # What passes as it is moves nothing else.
    assert_allclose(to_scale, np.sum((q - np.asarray(x) / 0.5)[quantized]), rtol=1e-4)
    assert_array_equal(value(x, 0.5, rate=1.0), plain)
    assert_array_equal(value(x, 0.5, rate=0.0), x)
    assert (value(x, 0.5, key=jax.random.key(4)) != y).any()
    with pytest.raises(qj.errors.KeyMissingError, match="quant-noise"):
        qj.fake_quant(x, 0.5, theta={"rate": jnp.float32(0.3)}, estimator=es.QUANT_NOISE, bits=3)


def test_learned_widths_are_the_formula():
    format = integer(max_bits=8)
    for scale, clip, want in ((0.1, 0.7, 4), (0.1, 0.71, 5), (1.0, 1.0, 2), (0.001, 9.0, 8)):
        qparams = qj.QParams(*map(jnp.float32, (scale, 0.0, 8.0)), {"clip": jnp.float32(clip)})
        bits = es.learned_bits(qparams, format, es.DIFFERENTIABLE_QUANTIZATION)
        assert float(bits) == want == min(np.ceil(np.log2(clip / scale + 1) - 1e-6) + 1, 8)
    theta = {"clip": jnp.float32(1.0), "width": jnp.float32(3.4)}
    qparams = qj.QParams(*map(jnp.float32, (0.1, 0.0, 8.0)), theta)

    def width(width):
        moved = qparams._replace(theta={**theta, "width": width})
        return es.learned_bits(moved, format, es.ROUNDED_WIDTH)

    assert float(width(jnp.float32(3.4))) == 3.0
    assert float(jax.grad(width)(jnp.float32(3.4))) == 1.0
    assert float(width(jnp.float32(11.0))) == 8.0
    # Bypass stays bypass, whatever was learned.
    assert (
        float(es.learned_bits(qparams._replace(bits=jnp.float32(0)), format, es.ROUNDED_WIDTH)) == 0
    )


def test_groups_need_one_width_together():
    theta = {"clip": jnp.array([[1.0], [3.0]])}
    qparams = qj.QParams(jnp.array([[0.5], [0.1]]), jnp.zeros((2, 1)), jnp.float32(8), theta)
    bits = es.learned_bits(qparams, integer(), es.DIFFERENTIABLE_QUANTIZATION)
    assert bits.shape == ()
    assert float(bits) == 6.0


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)
def test_what_calibration_starts_from_covers_the_range(estimator):
    """Values at the start are those without the estimator, unless it transforms them."""
    signed = estimator not in (es.PACT,)
    format = integer(signed=signed)
    bits = 1.0 if estimator in (es.APPROX_SIGN, es.SWISH_SIGN, es.ERROR_DECAY) else 4.0
    base = qj.QParams(jnp.float32(0.25), jnp.float32(0.0), jnp.float32(bits))
    qparams = estimator.started(base, format)
    assert set(qparams.theta or {}) == set(estimator.parameters)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(qparams))
    x = jnp.linspace(-1.6, 1.6, 23) if signed else jnp.linspace(0.0, 3.9, 23)
    y = apply(x, qparams, Arithmetic(format, estimator=estimator), jax.random.key(0))
    if estimator in (es.DOREFA_WEIGHTS, es.QUANT_NOISE, es.QIL):
        assert float(jnp.abs(y).max()) <= 2.0
    else:
        assert_array_equal(y, apply(x, base, Arithmetic(format)))


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e.parameters], ids=lambda e: e.name)
def test_missing_parameters_are_named(estimator):
    with pytest.raises(qj.errors.EstimatorError, match=estimator.parameters[0]):
        qj.fake_quant(jnp.ones(3), 0.1, estimator=estimator, key=jax.random.key(0))


def test_names_are_unique():
    assert len({estimator.name for estimator in ESTIMATORS}) == len(ESTIMATORS) == 20
