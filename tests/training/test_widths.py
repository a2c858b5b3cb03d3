"""Ranges survive a change of width: against calibration, by hand, traced, stacked, at 0 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors, formats
from quantjax.affine import Fault
from quantjax.training import delayed_bits, with_bits
from tests import models
from tests.refused import refused
from tests.training import cases

WIDTHS = st.integers(1, 8)
POLICY = qj.uniform_policy(weight_bits=8, activation_bits=8)
MLP = models.mlp()


@functools.cache
def mlp_ready():
    return models.ready(MLP, POLICY)


def ends(qparams, quantizer):
    """What the outermost codes stand for, in float64."""
    low, high = (
        np.float64(v) for v in quantizer.format.level_range(jnp.asarray(qparams.bits, jnp.float32))
    )
    scale, zero = np.float64(qparams.scale), np.float64(qparams.zero_point)
    return (low - zero) * scale, (high - zero) * scale


def quantizers(plan):
    return {(e.site.name, o.key): o.quantizer for e in plan.quantized for o in e.quantized}


@given(wb=WIDTHS, ab=WIDTHS)
def test_equal_to_calibration_at_that_width(wb, ab):
    """Min-max ranges do not depend on the width, so both ways lead to one place."""
    case, ready = MLP, mlp_ready()
    calibrated = qj.calibrate(
        ready.plan, ready.state, case.params, weight_bits=wb, activation_bits=ab
    )
    changed = with_bits(ready.plan, ready.qstate, weight_bits=wb, activation_bits=ab)
    for (site, key), quantizer in quantizers(ready.plan).items():
        new, want = changed[site][key], calibrated[site][key]
        assert float(new.bits) == float(want.bits) == (wb if key == "weight" else ab)
        assert_allclose(new.scale, want.scale, rtol=1e-6)
        # Calibration rounds the zero point of each width, here that of 8 bits is carried over.
        tolerance = 0.0 if quantizer.symmetric else 0.51 + 0.5 / 255 * 2**ab
        assert_allclose(new.zero_point, want.zero_point, atol=tolerance)


@given(
    old=WIDTHS,
    new=WIDTHS,
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    zero=st.floats(-3.0, 3.0, width=32),
    signed=st.booleans(),
    narrow=st.booleans(),
    symmetric=st.booleans(),
)
def test_the_range_stays(old, new, scale, zero, signed, narrow, symmetric):
    """By an independent model in float64: steps times scale, and the low end of asymmetric ones."""
    format = qj.integer(signed=signed, narrow=narrow)
    if symmetric and not signed:
        symmetric = False
    quantizer = qj.weight_quantizer(
        format=format, symmetric=symmetric, granularity=qj.PerTensor(), bits=8
    )
    plan, _, _ = cases.one_product([[1.0], [2.0]], quantizer)
    before = cases.qparams([[scale]], 0.0 if symmetric else zero, old)
    after = with_bits(plan, {"w": {"weight": before}}, weight_bits=new)["w"]["weight"]

    def steps(bits):
        if symmetric:
            return 2.0 ** (bits - 1) if not narrow else max(2.0 ** (bits - 1) - 1, 1.0)
        low = {True: -(2 ** (bits - 1)) + narrow, False: int(narrow)}[signed]
        high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        return {True: 2.0 if signed else 1.0, False: float(high - low)}[bits == 1]

    assert_allclose(after.scale, [[scale * steps(old) / steps(new)]], rtol=1e-6)
    if symmetric:
        assert float(after.zero_point[0, 0]) == 0.0
    else:
        lows = [ends(q, quantizer)[0] for q in (before, after)]
        assert_allclose(lows[1], lows[0], rtol=1e-5, atol=1e-5 * scale)
        if signed is False or old != 1:
            highs = [ends(q, quantizer)[1] for q in (before, after)]
            assert_allclose(highs[1], highs[0], rtol=1e-4, atol=1e-4 * scale)
    if old == new:
        models.assert_same_bits(after, before._replace(bits=jnp.float32(new)))


def test_what_is_not_named_stays_bit_for_bit():
    ready = models.ready(models.cnn(), POLICY)
    models.assert_same_bits(with_bits(ready.plan, ready.qstate), ready.qstate)
    same = with_bits(ready.plan, ready.qstate, weight_bits=8, activation_bits=8)
    models.assert_same_bits(same, ready.qstate)
    name = next(iter(ready.qstate))
    some = with_bits(ready.plan, ready.qstate, weight_bits={name: 3})
    assert float(some[name]["weight"].bits) == 3
    models.assert_same_bits(some[name]["activation"], ready.qstate[name]["activation"])
    others = [site for site in ready.qstate if site != name]
    models.assert_same_bits([some[s] for s in others], [ready.qstate[s] for s in others])


def test_theta_stays_and_learned_clips_decide():
    """PACT's scale follows from its clip, at every width."""
    quantizer = qj.activation_quantizer(
        estimator=qj.estimators.PACT, symmetric=True, format=qj.integer(signed=False)
    )
    case = models.Case(
        lambda p, x: jax.nn.relu(x) @ p["w"], {"w": jnp.eye(3)}, models.normal(0, 8, 3)
    )
    ready = models.ready(case, models.policy(None, quantizer))
    (before,) = ready.qstate["w"].values()
    changed = with_bits(ready.plan, ready.qstate, activation_bits=2)
    (after,) = changed["w"].values()
    models.assert_same_bits(after.theta, before.theta)
    y = qj.fake_quantize(case.f, ready.plan)(changed, case.params, case.x)
    clip = np.float64(before.theta["clip"])
    x = np.clip(np.float64(case.x), 0.0, clip)
    assert_allclose(y, np.round(x / clip * 3) * clip / 3, rtol=1e-5, atol=1e-6)


def test_zero_bits_and_back():
    """Bypass is the model itself; the scales are there when quantization begins."""
    case = models.mlp()
    ready = models.ready(case, qj.uniform_policy(weight_bits=4, activation_bits=4))
    asleep = with_bits(ready.plan, ready.qstate, weight_bits=0, activation_bits=0)
    quantized = qj.fake_quantize(case.f, ready.plan)
    models.assert_same_bits(quantized(asleep, case.params, case.x), case.f(case.params, case.x))
    for site, operands in asleep.items():
        for key, qparams in operands.items():
            kept = ready.qstate[site][key]
            models.assert_same_bits(
                (qparams.scale, qparams.zero_point), (kept.scale, kept.zero_point)
            )
    awake = with_bits(ready.plan, asleep, weight_bits=4, activation_bits=4)
    models.assert_same_bits(awake, ready.qstate)
    still = with_bits(ready.plan, asleep, weight_bits=0)
    models.assert_same_bits(still, asleep)


def test_delayed_quantization_in_one_program():
    case = models.mlp()
    ready = models.ready(case, qj.uniform_policy(weight_bits=4, activation_bits=4))
    quantized, bits = qj.fake_quantize(case.f, ready.plan), delayed_bits(2, 4)
    traced = []

    @jax.jit
    def run(step, qstate, params, x):
        traced.append(1)
        now = with_bits(ready.plan, qstate, weight_bits=bits(step), activation_bits=bits(step))
        return quantized(now, params, x)

    outs = [run(jnp.int32(step), ready.qstate, case.params, case.x) for step in range(4)]
    assert len(traced) == 1
    expected = jax.jit(case.f)(case.params, case.x)
    assert_array_equal(outs[1], expected)
    assert_array_equal(outs[2], jax.jit(quantized)(ready.qstate, case.params, case.x))
    assert not np.array_equal(outs[1], outs[2])


def test_gradients_reach_scales_and_are_finite_at_zero_bits():
    case = models.dense()
    ready = models.ready(case, qj.uniform_policy(weight_bits=8, activation_bits=8))
    quantized = qj.fake_quantize(case.f, ready.plan)

    def loss(qstate, bits):
        now = with_bits(ready.plan, qstate, weight_bits=bits, activation_bits=bits)
        return jnp.sum(quantized(now, case.params, case.x) ** 2)

    for bits in (0.0, 1.0, 4.0, 8.0):
        gradient = jax.grad(loss)(ready.qstate, jnp.float32(bits))
        leaves = jax.tree.leaves(gradient)
        assert all(np.isfinite(leaf).all() for leaf in leaves), bits
        assert (float(sum(jnp.abs(leaf).sum() for leaf in leaves)) > 0.0) == (bits > 0.0)
    # s' = 16 s between 8 and 4 bits, so the gradient is 16 times that of the scale at 4 bits.
    at_four = with_bits(ready.plan, ready.qstate, weight_bits=4)
    own = jax.grad(lambda q: jnp.sum(quantized(q, case.params, case.x) ** 2))(at_four)
    through = jax.grad(
        lambda q: jnp.sum(
            quantized(with_bits(ready.plan, q, weight_bits=4), case.params, case.x) ** 2
        )
    )(ready.qstate)
    name = next(iter(own))
    assert_allclose(through[name]["weight"].scale, 16.0 * own[name]["weight"].scale, rtol=1e-6)


def test_layers_of_a_scan_take_a_width_each():
    case, plan, qstate = cases.stacked(3, activations=qj.activation_quantizer(bits=8))
    (name,) = qstate
    changed = with_bits(plan, qstate, weight_bits=jnp.array([2.0, 4.0, 0.0]), activation_bits=4)
    before, after = (q[name]["weight"] for q in (qstate, changed))
    assert_array_equal(after.bits, [2.0, 4.0, 0.0])
    factors = np.array([4.0, 1.0, 1.0])[:, None, None]
    assert_allclose(after.scale, factors * np.asarray(before.scale), rtol=1e-6)
    assert changed[name]["activation"].bits.shape == (3,)
    out = qj.fake_quantize(case.f, plan)(changed, case.params, case.x)
    assert np.isfinite(out).all()
    direct = qj.calibrate(
        plan,
        qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)[1],
        case.params,
        weight_bits=jnp.array([2.0, 4.0, 4.0]),
    )
    assert_allclose(after.scale, direct[name]["weight"].scale, rtol=1e-6)


def test_a_grid_of_widths_is_the_cells_one_by_one():
    ready = models.ready(models.mlp(), POLICY)
    widths = jnp.arange(0.0, 9.0)

    def change(bits):
        return with_bits(ready.plan, ready.qstate, weight_bits=bits, activation_bits=bits)

    grid = jax.jit(jax.vmap(change))(widths)
    for cell, bits in enumerate(widths):
        alone = jax.jit(change)(bits)
        models.assert_same_bits(jax.tree.map(lambda leaf, at=cell: leaf[at], grid), alone)


@pytest.mark.parametrize(
    ("format", "widths"),
    [
        (formats.minifloat(2, 3), (6, 5, 4)),
        (formats.integer(scale_rule=formats.POWER_OF_TWO, narrow=True), (8, 4, 3, 2)),
        (formats.normal_float(), (4, 3, 2)),
        (formats.apot(), (4, 3, 5)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_formats_of_all_kinds(format, widths):
    """The largest level stands for the same number; scales obey the format's rule."""
    quantizer = qj.weight_quantizer(format=format, bits=widths[0])
    plan, qstate, params = cases.one_product(models.normal(3, 6, 5), quantizer)
    for bits in widths:
        after = with_bits(plan, qstate, weight_bits=bits)["w"]["weight"]
        want = qj.calibrate(plan, {}, params, weight_bits=bits)["w"]["weight"]
        if format.scale_rule == formats.REAL:
            assert_allclose(after.scale, want.scale, rtol=1e-6)
        else:
            assert (np.frexp(after.scale)[0] == 0.5).all()
            assert (after.scale >= want.scale).all()  # rounded up once more
            assert (after.scale <= 2 * want.scale).all()


@pytest.mark.parametrize("rule", [formats.MX_FLOOR, formats.MX_CEIL])
def test_full_integers_in_blocks_keep_their_range(rule):
    """One step more than the highest code is a binade more, by which the scale was too large."""
    format = formats.mx(qj.integer(), scale_rule=rule)
    weights = qj.weight_quantizer(format=format, granularity=qj.PerGroup(8))
    plan = qj.plan(
        qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))]),
        qj.sites(lambda p, x: x @ p["w"], {"w": models.normal(0, 32, 4)}, jnp.ones((1, 32))),
    )
    params = {"w": models.normal(0, 32, 4)}
    qstate = qj.calibrate(plan, {}, params)
    for bits in (7, 4, 2):
        moved = with_bits(plan, qstate, weight_bits=bits)["w"]["weight"].scale
        want = qj.calibrate(plan, {}, params, weight_bits=bits)["w"]["weight"].scale
        assert_array_equal(moved, want)


def test_minifloats_take_exponent_bits():
    quantizer = qj.weight_quantizer(format=formats.E4M3FN)
    plan, _, params = cases.one_product(models.normal(3, 6, 5), quantizer)
    width = qj.FloatBits(4, 3)
    qstate = qj.calibrate(plan, {}, params, weight_bits=width)
    for other in (qj.FloatBits(3, 4), qj.FloatBits(2, 3)):  # of as many bits, and of fewer
        after = with_bits(plan, qstate, weight_bits=other)["w"]["weight"]
        want = qj.calibrate(plan, {}, params, weight_bits=other)["w"]["weight"]
        assert_allclose(after.scale, want.scale, rtol=1e-6)
        models.assert_same_bits((after.bits, after.theta), (want.bits, want.theta))
    same = with_bits(plan, qstate, weight_bits=width)
    models.assert_same_bits(same, qstate)
    asleep = with_bits(plan, qstate, weight_bits=0)
    woken = with_bits(plan, asleep, weight_bits=qj.FloatBits(2, 3))["w"]["weight"]
    models.assert_same_bits(woken.scale, qstate["w"]["weight"].scale)
    models.assert_same_bits(woken.theta, want.theta)


def test_live_ranges_change_their_width_alone():
    live = qj.activation_quantizer(bits=8, range=qj.RangeMode.LIVE)
    case = models.dense()
    ready = models.ready(case, models.policy(None, live))
    changed = with_bits(ready.plan, ready.qstate, activation_bits=3)
    direct = qj.calibrate(ready.plan, ready.state, case.params, activation_bits=3)
    models.assert_same_bits(changed, direct)


def test_gradients_have_widths_of_their_own():
    """The backward products of a training step, in one plan with the forward ones."""
    loss = jax.grad(lambda p, x: jnp.sum(jnp.tanh(x @ p["v"]) @ p["w"]))
    params = {"v": models.normal(0, 4, 4), "w": models.normal(1, 4, 3)}
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=8),
        gradients=qj.gradient_quantizer(bits=8),
    )
    case = models.Case(loss, params, models.normal(2, 5, 4))
    plan = models.planned(case, qj.Policy([qj.rule(qj.everything(), scheme)]))
    qstate = qj.calibrate(plan, qj.init(plan), params)
    changed = with_bits(plan, qstate, gradient_bits=4)
    widths = {
        (site, key): float(qparams.bits)
        for site, operands in changed.items()
        for key, qparams in operands.items()
    }
    roles = {
        (e.site.name, o.key): o.operand.role.value for e in plan.quantized for o in e.quantized
    }
    assert "gradient" in roles.values()
    assert widths == {key: 4.0 if role == "gradient" else 8.0 for key, role in roles.items()}
    models.assert_same_bits(changed, qj.calibrate(plan, qj.init(plan), params, gradient_bits=4))


def test_scales_stay_normal_numbers():
    plan, _, _ = cases.one_product([[1.0], [-2.0]])
    tiny = {"w": {"weight": cases.qparams([[2.0**-125]], bits=1.0)}}
    after = with_bits(plan, tiny, weight_bits=8)["w"]["weight"]
    assert float(after.scale[0, 0]) == np.finfo(np.float32).smallest_normal


def test_faults_and_widths_that_are_traced_and_wrong():
    plan, qstate, _ = cases.one_product([[1.0], [-2.0]])
    change = jax.jit(lambda q, bits: with_bits(plan, q, weight_bits=bits))
    wrong = change(qstate, jnp.float32(11.0))
    assert "outside the format" in qj.check(wrong)[0].what
    weight = qstate["w"]["weight"]
    unseen = weight._replace(
        scale=jnp.full_like(weight.scale, jnp.nan),
        zero_point=jnp.full_like(weight.scale, float(Fault.NEVER_CALIBRATED)),
    )
    after = change({"w": {"weight": unseen}}, jnp.float32(2.0))
    assert qj.check(after)[0].what == "calibration was never run"
    quantizer = qj.weight_quantizer(bits=8, symmetric=False)
    plan, _, _ = cases.one_product([[1.0], [-2.0]], quantizer)
    after = with_bits(plan, {"w": {"weight": unseen._replace(bits=jnp.float32(8))}}, weight_bits=2)
    assert qj.check(after)[0].what == "calibration was never run"


def test_mistakes_are_refused():
    plan, qstate, _ = cases.one_product([[1.0], [-2.0]])
    with refused(errors.BitsError, "9 bits are outside the format", "site w"):
        with_bits(plan, qstate, weight_bits=9)
    with refused(errors.BitsError, "a width of shape (2,)"):
        with_bits(plan, qstate, weight_bits=jnp.array([2.0, 4.0]))
    with refused(errors.PolicyError, "no activation is quantized"):
        with_bits(plan, qstate, activation_bits=4)
    with refused(errors.PolicyError, "site v"):
        with_bits(plan, qstate, weight_bits={"v": 4})
    with refused(errors.CalibrationError, "no QParams for a planned operand"):
        with_bits(plan, {"w": {}}, weight_bits=4)


@pytest.mark.parametrize("role", ["outputs", "biases"])
def test_outputs_and_biases_keep_their_width_or_take_another(role):
    quantizer = qj.activation_quantizer(bits=8) if role == "outputs" else qj.bias_quantizer()
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=8),
        activations=qj.activation_quantizer(bits=8),
        **{role: quantizer},
    )
    policy = qj.Policy([qj.rule(qj.weighted(), scheme)])
    ready = models.ready(MLP, policy)
    key = {"outputs": "output", "biases": "bias"}[role]
    site = next(name for name, operands in ready.qstate.items() if key in operands)
    changed = with_bits(ready.plan, ready.qstate, weight_bits=4)
    assert float(changed[site]["weight"].bits) == 4.0
    assert_array_equal(changed[site][key].scale, ready.qstate[site][key].scale)
    narrower = with_bits(ready.plan, ready.qstate, **{f"{key}_bits": 4})
    assert float(narrower[site][key].bits) == 4.0
    assert float(narrower[site]["weight"].bits) == 8.0
    assert (narrower[site][key].scale > ready.qstate[site][key].scale).all()


def test_a_width_that_the_estimator_does_not_go_with_is_refused():
    signs = qj.weight_quantizer(bits=1, estimator=qj.estimators.APPROX_SIGN)
    plan, qstate, params = cases.one_product(models.normal(0, 5, 3), signs)
    with refused(errors.EstimatorError, "one bit", "site w, weight"):
        qj.calibrate(plan, {}, params, weight_bits=4)
    with refused(errors.EstimatorError, "one bit"):
        with_bits(plan, qstate, weight_bits=4)
    assert float(with_bits(plan, qstate, weight_bits=0)["w"]["weight"].bits) == 0.0
    learned = qj.weight_quantizer(bits=4, estimator=qj.estimators.DIFFERENTIABLE_QUANTIZATION)
    plan, _, params = cases.one_product(models.normal(0, 5, 3), learned)
    with refused(errors.EstimatorError, "more than one bit"):
        qj.calibrate(plan, {}, params, weight_bits=1)
