"""Each form of product, bit for bit against int64 sums of codes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.products import Exactness
from tests.models import assert_same_bits
from tests.oracles.integers import Integers, codes
from tests.products.forms import CONVS, DOTS, FORMS, expected, hand_made, plan_of, quantized
from tests.products.terms import PADDING, Terms, product, values


@pytest.mark.parametrize("name", FORMS)
def test_the_list_of_terms_is_the_product_itself(name):
    """The oracle describes what JAX computes: small integers, on which float32 is exact."""
    form = FORMS[name]
    draw = np.random.default_rng(0)
    x, w = draw.integers(-9, 10, form.x), draw.integers(-9, 10, form.w)
    params = {"w": jnp.asarray(w.T if form.transposed else w, jnp.float32)}
    out = form.f(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(out, product(form.terms(), x, w))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", FORMS)
def test_outputs_are_exact_sums_scaled_once(name):
    form = FORMS[name]
    case = form.case()
    plan = plan_of(case)
    assert [entry.sizing.exactness for entry in plan.quantized] == [Exactness.EXACT]
    fake = qj.fake_quantize(case.f, plan)
    run = jax.jit(fake)
    for qstate in (hand_made(plan, unit=True), hand_made(plan, 1), hand_made(plan, 2)):
        want = expected(form, case, qstate["w"])
        assert_same_bits(run(qstate, case.params, case.x), want)
    if name in ("plain", "out_projection", "strided"):
        assert_same_bits(fake(qstate, case.params, case.x), want)


@pytest.mark.parametrize("name", ["plain", "batched", "dense_general", "strided", "grouped"])
def test_outputs_are_exact_with_signed_activations_and_a_scale_a_tensor(name):
    form = FORMS[name]
    case = form.case(7)
    signed = qj.activation_quantizer(format=qj.integer(signed=True), symmetric=False)
    plan = plan_of(case, qj.weight_quantizer(granularity=qj.PerTensor()), signed)
    qstate = hand_made(plan, 3)
    got = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    assert_same_bits(got, expected(form, case, qstate["w"], signed=True))


def uncentered(terms: Terms, x: Any, w: Any, zero_x: int, pad: int) -> np.ndarray:
    """What an integer program computes: raw codes, ``pad`` in the padding, zero point folded."""
    total = product(terms, x, w, pad=pad)
    return total - zero_x * product(terms, np.ones_like(x), w, pad=1)


@pytest.mark.parametrize("name", [n for n in CONVS if (CONVS[n].terms().lhs == PADDING).any()])
def test_padding_holds_the_zero_point(name):
    """Padding with code 0, the mistake that is easy to make, gives other sums at every border."""
    form = CONVS[name]
    case = form.case()
    plan = plan_of(case)
    qstate = hand_made(plan, unit=True)
    zero = int(qstate["w"]["activation"].zero_point.ravel()[0])
    assert zero > 10
    x = codes(np.asarray(case.x), np.float32(1), np.float32(zero), Integers(8, False))
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True).centered
    terms = form.terms()
    got = np.asarray(jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x))
    np.testing.assert_array_equal(got, uncentered(terms, x, w, zero, pad=zero))
    padded = np.zeros(terms.shape, bool).ravel()
    padded[terms.out[terms.lhs == PADDING]] = True
    wrong = uncentered(terms, x, w, zero, pad=0).ravel() != got.ravel()
    assert wrong[padded].mean() > 0.9
    assert not wrong[~padded].any()


@pytest.mark.parametrize("name", ["plain", "weight_left", "conv_2d_same"])
def test_one_operand_alone_is_quantized(name):
    """Weight-only quantization: the other operand is the model's own, in float."""
    form = FORMS[name]
    case = form.case()
    scheme = qj.Scheme(weights=qj.weight_quantizer())
    plan = qj.plan(
        qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(case.f, case.params, case.x)
    )
    (entry,) = plan.quantized
    assert entry.sizing.exactness is Exactness.FLOAT
    qstate = hand_made(plan)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
    want = product(form.terms(), np.float64(case.x), w.centered * np.float64(w.scale))
    got = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["plain", "batched", "strided"])
@pytest.mark.parametrize("bypassed", ["weight", "activation"])
def test_width_zero_of_one_operand_leaves_it_in_float(name, bypassed):
    form = FORMS[name]
    case = form.case()
    plan = plan_of(case)
    qstate = hand_made(plan)
    scaled = qstate["w"][bypassed]
    qstate["w"][bypassed] = scaled._replace(bits=jnp.float32(0))
    x = quantized(case.x, qstate["w"]["activation"], signed=False)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
    reals = {
        "activation": np.float64(case.x) if bypassed == "activation" else x.centered * x.scale,
        "weight": np.float64(case.params["w"]) if bypassed == "weight" else w.centered * w.scale,
    }
    want = product(form.terms(), reals["activation"], reals["weight"])
    got = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_products_of_two_activations():
    """Attention scores and values: both operands have ranges of their own."""

    def attend(params: Any, x: jax.Array) -> jax.Array:
        del params
        scores = jnp.einsum("bqd,bkd->bqk", x, x[:, ::-1])
        return jnp.einsum("bqk,bkd->bqd", jnp.tanh(scores / 1e4), x)

    x = DOTS["batched"].case().x
    everything = qj.Policy(
        [qj.rule(qj.everything(), qj.Scheme(activations=qj.activation_quantizer()))]
    )
    plan = qj.plan(everything, qj.sites(attend, {}, x))
    assert [[o.key for o in entry.quantized] for entry in plan.quantized] == [["lhs", "rhs"]] * 2
    _, state = qj.observe(attend, plan)(qj.init(plan), {}, x)
    qstate = qj.calibrate(plan, state, {})

    def dequantized(x: jax.Array, qparams: Any) -> np.ndarray:
        one = quantized(x, qparams, signed=False)
        return one.centered * np.float64(one.scale)

    first, second = (qstate[entry.site.name] for entry in plan.quantized)
    left, right = dequantized(x, first["lhs"]), dequantized(x[:, ::-1], first["rhs"])
    scores = np.tanh(np.einsum("bqd,bkd->bqk", left, right) / 1e4)
    probabilities = dequantized(np.float32(scores), second["lhs"])
    want = np.einsum("bqk,bkd->bqd", probabilities, dequantized(x, second["rhs"]))
    got = jax.jit(qj.fake_quantize(attend, plan))(qstate, {}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_terms_know_padding():
    terms = CONVS["conv_1d"].terms()
    assert (terms.lhs == PADDING).sum() == 2 * 2 * 3 * 4  # both ends, two images, 3 in, 4 out
    assert set(values(terms, np.zeros(54, np.int64), pad=7)) == {0, 7}
