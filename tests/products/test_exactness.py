"""What a plan says about its sums, and that it says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.export import symbolic_shape

import quantjax as qj
from quantjax.products import Exactness, sizing
from tests.models import Case, dense, normal
from tests.products.forms import conv, hand_made, plan_of, quantized

SIXTEEN = qj.weight_quantizer(bits=16, format=qj.integer(max_bits=16))
A16 = qj.activation_quantizer(bits=16, format=qj.integer(max_bits=16, signed=False))
BOUND = st.integers(1, 2**16)


@given(BOUND, BOUND, st.integers(1, 10**6), st.integers(1, 49))
def test_what_is_called_exact_cannot_be_rounded(left, right, contraction, taps):
    size = sizing(contraction, left, right, taps=taps)
    largest = left * right
    if size.exactness is Exactness.EXACT:
        assert largest * contraction <= 2**24
        assert size.block == contraction
    elif size.exactness is Exactness.CHUNKED:
        assert largest * size.block <= 2**24 < largest * contraction < 2**31
        assert size.block >= taps
        assert size.reason == ""
    else:
        assert size.exactness is Exactness.ROUNDED
        assert largest * contraction > 2**24
        assert "rounded to float32" in size.reason


@pytest.mark.parametrize("bounds", [(None, 128), (255, None), (None, None)])
def test_an_operand_in_float_has_float_sums(bounds):
    assert sizing(10, *bounds).exactness is Exactness.FLOAT


def test_the_reasons_differ():
    assert "exceed int32" in sizing(100, 65535, 32768).reason
    assert "exceed int32" in sizing(10**6, 255, 128).reason
    assert "too few to split by" in sizing(200, 65535, 128).reason
    assert "before the number is known" in sizing(symbolic_shape("t")[0], 255, 255).reason
    assert "too few to split by" in sizing(49 * 64, 4095, 128, taps=49).reason


@pytest.mark.parametrize(
    ("weights", "activations", "exactness"),
    [
        (qj.weight_quantizer(bits=4), qj.activation_quantizer(bits=4), Exactness.EXACT),
        (SIXTEEN, qj.activation_quantizer(), Exactness.ROUNDED),
        (SIXTEEN, A16, Exactness.ROUNDED),
        (qj.weight_quantizer(granularity=qj.PerChannel(axis=0)), None, Exactness.FLOAT),
        (None, qj.activation_quantizer(granularity=qj.PerChannel()), Exactness.FLOAT),
    ],
)
def test_the_plan_names_its_sums_and_why(weights, activations, exactness):
    plan = plan_of(dense(features=64), weights, activations)
    (entry,) = plan.quantized
    assert entry.sizing.exactness is exactness
    table = str(plan)
    assert exactness.value in table
    assert entry.sizing.reason in " ".join(table.split())
    assert bool(entry.sizing.reason) == (exactness is Exactness.ROUNDED)


def test_sixteen_bit_codes_are_right_though_their_sums_are_rounded():
    case = dense(features=64)
    plan = plan_of(case, SIXTEEN, A16)
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    qstate = qj.calibrate(plan, state, case.params)
    got = np.asarray(jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x))
    want = np.float64(case.x) @ np.float64(case.params["w"])
    np.testing.assert_allclose(got, want, atol=5e-4)


def test_a_container_is_sized_by_its_format_not_by_the_width_in_use():
    """The width is traced: the same plan must be exact at every width of its container."""
    case = dense(features=600)
    exactness = {
        bits: plan_of(
            case,
            qj.weight_quantizer(bits=2, format=qj.integer(max_bits=bits)),
            qj.activation_quantizer(bits=2, format=qj.integer(max_bits=bits, signed=False)),
        )
        .quantized[0]
        .sizing.exactness
        for bits in (4, 8, 16)
    }
    assert exactness == {4: Exactness.EXACT, 8: Exactness.CHUNKED, 16: Exactness.ROUNDED}


def test_an_empty_batch_plans_the_same_sums():
    """The table may be made on any batch, one of no rows too."""
    case = dense(rows=0, features=600)
    assert plan_of(case).quantized[0].sizing == plan_of(dense(features=600)).quantized[0].sizing


def test_large_windows_of_a_convolution():
    """A window is not cut: where one alone is longer than a block, sums are rounded and say so."""
    form = conv((1, 9, 9, 8), (9, 9, 8, 2))
    case = form.case()
    twelve = qj.activation_quantizer(bits=12, format=qj.integer(max_bits=12, signed=False))
    (entry,) = plan_of(case, activations=twelve).quantized
    assert entry.sizing.exactness is Exactness.ROUNDED
    assert "2^" not in entry.reason
    assert "float32 sums 32 products" in entry.reason


def test_scales_along_the_sum_are_folded_into_the_operand():
    """Activations per channel: no integer program has one sum for them, so it is done in float."""
    case = Case(lambda p, x: x @ p["w"], {"w": 90.0 * normal(0, 6, 4)}, 120.0 * normal(1, 3, 6))
    plan = plan_of(case, activations=qj.activation_quantizer(granularity=qj.PerChannel()))
    (entry,) = plan.quantized
    assert next(o for o in entry.operands if not o.is_weight).scale_shape == (1, 6)
    qstate = hand_made(plan)
    x = quantized(case.x, qstate["w"]["activation"], signed=False)
    w = quantized(case.params["w"], qstate["w"]["weight"], signed=True)
    want = (x.centered * np.float64(x.scale)) @ (w.centered * np.float64(w.scale))
    got = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert jnp.issubdtype(got.dtype, jnp.float32)
