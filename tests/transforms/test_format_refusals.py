"""What formats do not take through the verbs: each says so, and nothing is wrong without a word."""

import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax import errors, formats, ranges, rounding
from quantjax.affine import Fault, qparams_from_range
from quantjax.ranges import FitRule
from tests import models
from tests.refused import refused

PARAMS = {"w": models.normal(0, 32, 6)}
X = models.normal(1, 5, 32)
WIDE = formats.minifloat(5, 10, specials=formats.Specials.IEEE)


def f(params, x):
    return x @ params["w"]


def planned(
    weights: qj.Quantizer | None = None, activations: qj.Quantizer | None = None
) -> qj.Plan:
    scheme = qj.Scheme(weights=weights, activations=activations)
    return qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, PARAMS, X))


def test_exponents_whose_sums_overflow_are_refused():
    plan = planned(qj.weight_quantizer(format=WIDE))
    with refused(errors.BitsError, "too large for sums", "6 exponent bits"):
        qj.calibrate(plan, {}, PARAMS, weight_bits=qj.FloatBits(7, 8))
    qj.calibrate(plan, {}, PARAMS, weight_bits=qj.FloatBits(6, 8))


def test_traced_exponents_whose_sums_overflow_have_a_fault():
    plan = planned(qj.weight_quantizer(format=WIDE))
    run = jax.jit(lambda e: qj.calibrate(plan, {}, PARAMS, weight_bits=qj.FloatBits(e, 8)))
    assert not qj.check(run(jnp.float32(6)))
    found = qj.check(run(jnp.float32(7)))
    assert [problem.site for problem in found] == ["w"]
    qparams = run(jnp.float32(7))["w"]["weight"]
    assert jnp.isnan(qparams.scale).all()
    assert (qparams.zero_point == Fault.BITS_OUTSIDE_FORMAT).all()


def test_an_infinity_leaves_no_scale_of_two_levels():
    live = qj.activation_quantizer(
        format=formats.NVFP4, granularity=qj.PerGroup(16), range=qj.RangeMode.LIVE
    )
    plan = planned(activations=live)
    fake = jax.jit(qj.fake_quantize(f, plan))
    qstate = qj.calibrate(plan, {}, PARAMS)
    assert jnp.isfinite(fake(qstate, PARAMS, X)).all()
    assert jnp.isnan(fake(qstate, PARAMS, X.at[0, 0].set(jnp.inf))).all()
    # Its elements alone know nothing of other rows.
    other = qj.activation_quantizer(
        format=formats.MXFP4, granularity=qj.PerGroup(16), range=qj.RangeMode.LIVE
    )
    rows = jax.jit(qj.fake_quantize(f, planned(activations=other)))
    out = rows(
        qj.calibrate(planned(activations=other), {}, PARAMS), PARAMS, X.at[0, 0].set(jnp.inf)
    )
    assert jnp.isfinite(out[1:]).all()


def test_a_tree_frozen_with_other_parameters_is_refused():
    plan = planned(qj.weight_quantizer(format=formats.E4M3FN))
    frozen = qj.freeze(plan, qj.calibrate(plan, {}, PARAMS, weight_bits=qj.FloatBits(5, 2)), PARAMS)
    assert "e4m3fn*8" in repr(frozen["w"])
    for transform in (lambda g: g, jax.jit):
        with refused(errors.FreezeError, "w"):
            transform(qj.execute(f, plan))(qj.calibrate(plan, {}, PARAMS), frozen, X)


@pytest.mark.parametrize("bits", [None, jnp.float32(2)])
def test_what_calibration_returns_can_be_donated(bits):
    weights = qj.weight_quantizer(format=formats.ternary(learned=True), rule=ranges.TWN)
    plan = planned(weights)
    qstate = qj.calibrate(plan, {}, PARAMS, weight_bits=bits)
    leaves = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(qstate)]
    assert len(set(leaves)) == len(leaves)
    if bits is not None:
        assert bits.unsafe_buffer_pointer() not in leaves


def test_a_fit_that_is_told_the_width_alone_takes_no_exponent():
    def fit(x, shape, format, bits):
        largest = jnp.max(jnp.abs(x)).reshape(shape)
        seen = jnp.asarray(True)
        ends = (-largest, largest, bits)
        return qparams_from_range(*ends, format=format, symmetric=True, calibrated=seen)

    weights = qj.weight_quantizer(
        format=formats.E4M3FN, granularity=qj.PerTensor(), rule=FitRule("mine", fit)
    )
    plan = planned(weights)
    qj.calibrate(plan, {}, PARAMS)
    with refused(errors.CalibrationError, "mine", "the width alone"):
        qj.calibrate(plan, {}, PARAMS, weight_bits=qj.FloatBits(2, 5))


def test_one_tensor_has_one_width():
    with refused(errors.BitsError, "widths of shape (2,)", "jax.vmap"):
        qj.fake_quant(jnp.ones((2, 2)), 0.1, bits=jnp.array([2.0, 8.0]))


def test_what_is_no_rule_does_not_stack():
    with refused(errors.PolicyError, "half_even"):
        ranges.stack([ranges.MIN_MAX, rounding.HALF_EVEN])


def test_a_stack_with_a_rule_that_needs_the_tensor_serves_no_activations():
    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=2, activation_bits=8))
    rule = ranges.stack([ranges.MIN_MAX, ranges.TWN])[0]
    with refused(errors.CalibrationError, "min_max, twn", "needs the tensor itself", "activation"):
        qj.calibrate(plan, qj.init(plan), case.params, rule=rule)


def test_a_dtype_is_no_format():
    with refused(errors.ArgumentError, "the class float8_e4m3fn", "a Format is needed"):
        qj.weight_quantizer(format=jnp.float8_e4m3fn)


@pytest.mark.parametrize(
    ("format", "bits", "held"),
    [
        (formats.NF4, 3, "from 4 up to 4"),
        (formats.lognet(), 1, "from 2 up to 4"),
        (formats.E4M3FN, 3, "from 5 up to 8"),
        (formats.E4M3FN, qj.FloatBits(5, 7), "from 6 up to 8 with [5.] exponent bits"),
    ],
)
def test_a_width_that_a_format_lacks_is_answered_with_those_that_it_has(format, bits, held):
    with refused(errors.BitsError, held):
        qj.calibrate(planned(qj.weight_quantizer(format=format)), {}, PARAMS, weight_bits=bits)


def test_nothing_has_a_range_in_an_empty_tensor():
    span = jnp.zeros((0, 1))
    scale = formats.NVFP4.scale_rule.scale(
        formats.Span(span, span, jnp.float32(6.0), jnp.float32(2.0))
    )
    assert scale.shape == (0, 1)


@pytest.mark.parametrize(
    ("format", "theta", "name"),
    [
        (formats.E4M3FN, {"exponent": 4.0}, "exponent_bits"),
        (formats.TERNARY, {"border": 0.3}, "threshold"),
        (formats.ternary(learned=True), {"threshold": 0.3}, "negative"),
    ],
)
def test_a_parameter_that_is_missing_is_named(format, theta, name):
    theta = {key: jnp.float32(value) for key, value in theta.items()}
    with refused(errors.FormatError, f"has no {name}"):
        qj.fake_quant(X, 0.1, format=format, theta=theta)


@pytest.mark.parametrize("format", [qj.integer(), formats.MXFP4], ids=["int8", "mxfp4"])
def test_a_batch_of_nothing(format):
    live = qj.activation_quantizer(
        format=format, symmetric=True, granularity=qj.PerGroup(16), range=qj.RangeMode.LIVE
    )
    plan = planned(activations=live)
    qstate = qj.calibrate(plan, {}, PARAMS)
    assert qj.fake_quantize(f, plan)(qstate, PARAMS, X[:0]).shape == (0, 6)
