"""Statistics and parameters to QParams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.affine import qparams_from_range
from quantjax.training import with_bits
from tests.models import assert_same_bits, cnn, dense, mlp, normal, planned, policy, ready
from tests.refused import refused

SITES = ("params/Dense_0/kernel", "params/Dense_1/kernel")


@pytest.fixture(scope="module")
def case():
    return mlp()


@pytest.fixture(scope="module")
def observed(case):
    return ready(case, qj.uniform_policy(weight_bits=4))


def test_weight_scales_are_those_of_the_parameters(case, observed):
    kernel = np.asarray(case.params["params"]["Dense_0"]["kernel"])
    weight = observed.qstate[SITES[0]]["weight"]
    expected = np.abs(kernel).max(axis=0, keepdims=True) / np.float32(8)
    np.testing.assert_array_equal(weight.scale, expected.astype(np.float32))
    np.testing.assert_array_equal(weight.zero_point, np.zeros((1, 16)))
    assert float(weight.bits) == 4.0


def test_activation_scales_are_those_of_the_batch(case, observed):
    x = np.asarray(case.x)
    low, high = min(x.min(), 0), max(x.max(), 0)
    activation = observed.qstate[SITES[0]]["activation"]
    scale = np.float32(np.float32(high - low) / np.float32(255))
    assert float(activation.scale[0, 0]) == scale
    assert float(activation.zero_point[0, 0]) == np.clip(-np.rint(low / scale), 0, 255)


def test_weights_follow_the_parameters_given_not_those_observed(case, observed):
    doubled = jax.tree.map(lambda leaf: 2 * leaf, case.params)
    qstate = qj.calibrate(observed.plan, observed.state, doubled)
    for name in SITES:
        np.testing.assert_array_equal(
            qstate[name]["weight"].scale, 2 * observed.qstate[name]["weight"].scale
        )
        assert_same_bits(qstate[name]["activation"], observed.qstate[name]["activation"])


def test_widths_by_site_leave_the_others_alone(case, observed):
    qstate = qj.calibrate(
        observed.plan,
        observed.state,
        case.params,
        weight_bits={SITES[1]: 2},
        activation_bits={SITES[0]: jnp.float32(5)},
    )
    bits = {(s, k): float(q.bits) for s, operands in qstate.items() for k, q in operands.items()}
    assert bits == {
        (SITES[0], "weight"): 4,
        (SITES[0], "activation"): 5,
        (SITES[1], "weight"): 2,
        (SITES[1], "activation"): 8,
    }


@pytest.mark.parametrize("bits", range(9))
def test_traced_widths_equal_static_ones(case, observed, bits):
    def calibrate(bits):
        return qj.calibrate(
            observed.plan, observed.state, case.params, weight_bits=bits, activation_bits=bits
        )

    assert_same_bits(jax.jit(calibrate)(jnp.float32(bits)), calibrate(bits))


def test_a_rule_for_all_takes_the_place_of_each_quantizers_own(case):
    own = policy(qj.weight_quantizer(), qj.activation_quantizer(rule=qj.ranges.MOVING_AVERAGE))
    plan = planned(case, own)
    state = qj.init(plan, averaging_constant=0.5)
    for seed in range(3):
        _, state = qj.observe(case.f, plan)(state, case.params, normal(seed, 6, 8))
    default = qj.calibrate(plan, state, case.params)
    wide = qj.calibrate(plan, state, case.params, rule=qj.ranges.MIN_MAX)
    scales = [q[SITES[0]]["activation"].scale[0, 0] for q in (default, wide)]
    assert float(scales[0]) < float(scales[1])
    rules = qj.ranges.stack([qj.ranges.MIN_MAX, qj.ranges.MOVING_AVERAGE])
    for index, alone in ((0, wide), (1, default)):
        assert_same_bits(qj.calibrate(plan, state, case.params, rule=rules[index]), alone)


def test_the_averaging_constant_is_an_axis_too(case):
    plan = planned(case, qj.uniform_policy())
    batches = [normal(seed, 6, 8) for seed in range(3)]

    def scale(constant):
        state = qj.init(plan, averaging_constant=constant)
        for batch in batches:
            _, state = qj.observe(case.f, plan)(state, case.params, batch)
        qstate = qj.calibrate(plan, state, case.params, rule=qj.ranges.MOVING_AVERAGE)
        return qstate[SITES[0]]["activation"].scale[0, 0]

    constants = jnp.array([0.0, 0.01, 1.0])
    many = jax.jit(jax.vmap(scale))(constants)
    np.testing.assert_allclose(many, [scale(c) for c in constants], rtol=1e-6)
    assert len(set(np.asarray(many).tolist())) == 3


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_qparams_are_the_range_at_the_width(case, observed, width):
    qstate = qj.calibrate(observed.plan, observed.state, case.params, activation_bits=width)
    stats = observed.state[SITES[1]]["activation"]
    expected = qparams_from_range(
        *stats.extremes,
        jnp.float32(width),
        format=qj.integer(signed=False),
        symmetric=False,
        calibrated=jnp.array(True),
    )
    assert_same_bits(qstate[SITES[1]]["activation"], expected)


def test_bypass_needs_no_observation(case):
    plan = planned(case, qj.uniform_policy())
    qstate = qj.calibrate(plan, qj.init(plan), case.params, weight_bits=0, activation_bits=0)
    for operands in qstate.values():
        for qparams in operands.values():
            assert np.all(np.asarray(qparams.scale) == 1.0)
    assert qj.check(qstate) == []


def test_group_scales_of_a_convolution_lie_along_its_input_channels():
    case = cnn()
    weights = qj.weight_quantizer(bits=4, granularity=qj.PerGroup(3))
    scheme = qj.Scheme(weights=weights)
    plan = planned(case, qj.Policy([qj.rule(qj.path("*Conv_1*"), scheme)]))
    qstate = qj.calibrate(plan, {}, case.params)
    kernel = np.asarray(case.params["params"]["Conv_1"]["kernel"])
    grouped = np.abs(kernel.reshape(3, 3, 2, 3, 8)).max(axis=(0, 1, 3))
    scale = qstate["params/Conv_1/kernel"]["weight"].scale
    assert scale.shape == (1, 1, 2, 8)
    np.testing.assert_array_equal(scale[0, 0], (grouped / np.float32(8)).astype(np.float32))


def test_a_weight_that_is_computed_is_calibrated_as_it_is_used():
    def f(params, x):
        direction = params["v"] / jnp.linalg.norm(params["v"], axis=0, keepdims=True)
        return x @ (direction * params["g"])

    params = {"v": normal(0, 6, 5), "g": normal(1, 1, 5)}
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, normal(2, 4, 6)))
    (name,) = qj.calibrate(plan, {}, params)
    scale = qj.calibrate(plan, {}, params)[name]["weight"].scale
    used = np.asarray(params["v"]) / np.linalg.norm(params["v"], axis=0, keepdims=True)
    used = used * np.asarray(params["g"])
    np.testing.assert_allclose(scale, np.abs(used).max(0, keepdims=True) / 128, rtol=1e-6)


def test_calibration_does_not_run_the_model(case, observed):
    runs = []

    def counted(params, x):
        runs.append(1)
        return case.f(params, x)

    plan = qj.plan(qj.uniform_policy(), qj.sites(counted, case.params, case.x))
    _, state = qj.observe(counted, plan)(qj.init(plan), case.params, case.x)
    before = len(runs)
    for bits in range(1, 9):
        qj.calibrate(plan, state, case.params, weight_bits=bits)
    assert len(runs) == before


def test_the_granularity_of_the_state_is_that_of_the_plan(observed):
    case = dense()
    plan = planned(case, qj.uniform_policy())
    state = qj.init(plan)
    assert {name: set(keys) for name, keys in state.items()} == {"w": {"activation"}}
    assert state["w"]["activation"].scale_shape == (1, 1)
    channel = policy(None, qj.activation_quantizer(granularity=qj.PerChannel()))
    assert qj.init(planned(case, channel))["w"]["activation"].scale_shape == (1, 6)


def test_traced_verbs_move_nothing_to_the_device(case, observed):
    """Widths are checked while tracing, by arrays of one number, which a guard has to let pass."""
    plan, state, _ = observed
    jax.clear_caches()
    with jax.transfer_guard("disallow"):
        verb = jax.jit(lambda s, p: qj.calibrate(plan, s, p, weight_bits=3, rule=qj.ranges.MSE))
        qstate = verb(state, case.params)
        frozen = jax.jit(functools.partial(qj.freeze, plan))(qstate, case.params)
        jax.jit(qj.execute(case.f, plan))(qstate, frozen, case.x)


def test_a_layer_that_never_takes_a_branch_needs_no_calibration():
    """Every other layer of a scan is left out by its number, whatever the data are."""

    def f(params, x):
        def layer(h, of_step):
            w, number = of_step
            taken = lambda h: jnp.tanh(h @ w)  # noqa: E731
            return jax.lax.cond(number % 2 == 0, taken, lambda h: h, h), None

        return jax.lax.scan(layer, x, (params["w"], jnp.arange(3)))[0]

    params, x = {"w": normal(0, 3, 8, 8)}, normal(1, 4, 8)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    with refused(errors.CalibrationError, "never run", "in cond"):
        qj.calibrate(plan, qj.init(plan), params)
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), params, x)
    qstate = qj.calibrate(plan, state, params)
    assert np.isnan(qstate["w"]["activation"].scale.ravel()).tolist() == [False, True, False]
    (problem,) = qj.check(qstate)
    assert problem.lanes == (1,)
    y = jax.jit(qj.fake_quantize(f, plan))(qstate, params, x)
    np.testing.assert_allclose(y, f(params, x), atol=0.1)
    executed = jax.jit(qj.execute(f, plan))(qstate, qj.freeze(plan, qstate, params), x)
    np.testing.assert_allclose(executed, y, rtol=1e-6)  # multiply-adds of the compiler


@pytest.mark.parametrize("make", [list, tuple, np.asarray, jnp.asarray])
def test_widths_of_layers_come_in_any_sequence(make):
    params = {"w": normal(0, 3, 6, 6)}

    def f(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, normal(1, 2, 6)))
    _, state = qj.observe(f, plan)(qj.init(plan), params, normal(1, 2, 6))
    widths = make([2, 4, 8])
    for given in (widths, {"w": widths}):
        found = qj.calibrate(plan, state, params, weight_bits=given, activation_bits=given)["w"]
        for operand in ("weight", "activation"):
            np.testing.assert_array_equal(found[operand].bits, [2, 4, 8])
        after = with_bits(plan, {"w": found}, weight_bits=widths[::-1])
        np.testing.assert_array_equal(after["w"]["weight"].bits, [8, 4, 2])
