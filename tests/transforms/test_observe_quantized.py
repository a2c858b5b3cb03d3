"""``qj.fake_quantize(f, plan, observe=True)``: ranges that move during training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from tests.models import assert_same_bits

RNG = np.random.default_rng(2)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def flat(params, x):
    return jax.nn.relu(x @ params["one"]) @ params["two"]


def scanned(params, x):
    return lax.scan(lambda h, w: (jax.nn.relu(h @ w) + h, None), x, params["one"])[0]


MODELS = {
    "flat": (flat, {"one": normal(6, 8), "two": normal(8, 3)}),
    "scanned": (scanned, {"one": normal(3, 6, 6)}),
}
X = normal(10, 6)
NAMES = pytest.mark.parametrize("name", MODELS)


def planned(name: str, policy: qj.Policy | None = None):
    f, params = MODELS[name]
    plan = qj.plan(policy or qj.uniform_policy(activation_bits=3), qj.sites(f, params, X))
    _, state = qj.observe(f, plan)(qj.init(plan), params, X)
    return f, params, plan, state, qj.calibrate(plan, state, params)


@pytest.mark.thinned(2)
@NAMES
def test_the_value_is_that_without_observing(name):
    f, params, plan, _, qstate = planned(name)
    y, _ = jax.jit(qj.fake_quantize(f, plan, observe=True))(qstate, params, X)
    assert_array_equal(y, jax.jit(qj.fake_quantize(f, plan))(qstate, params, X))


def test_what_is_seen_are_the_operands_of_the_quantized_model():
    f, params, plan, state, qstate = planned("flat")
    _, seen = qj.fake_quantize(f, plan, observe=True)(qstate, params, X)
    # The first site has the same input, the second what the first, quantized, returns.
    assert_same_bits(seen["one"], state["one"])
    first = qj.Policy([qj.rule(qj.path("one"), qj.uniform_policy().rules[0].scheme)])
    alone = qj.plan(first, qj.sites(lambda p, x: x @ p["one"], params, X))
    hidden = qj.fake_quantize(lambda p, x: x @ p["one"], alone)({"one": qstate["one"]}, params, X)
    assert_array_equal(seen["two"]["activation"].extremes.high.squeeze(), jax.nn.relu(hidden).max())
    assert (
        seen["two"]["activation"].extremes.high != state["two"]["activation"].extremes.high
    ).all()


@pytest.mark.thinned(2)
@NAMES
def test_in_bypass_it_is_observing_the_float_model(name):
    f, params, plan, state, _ = planned(name)
    off = qj.calibrate(plan, state, params, weight_bits=0, activation_bits=0)
    y, seen = jax.jit(qj.fake_quantize(f, plan, observe=True))(off, params, X)
    again, want = jax.jit(qj.observe(f, plan))(qj.init(plan), params, X)
    assert_array_equal(y, again)
    assert_same_bits(seen, want)


@pytest.mark.thinned(2)
@NAMES
def test_the_state_goes_in_and_comes_out(name):
    f, params, plan, state, qstate = planned(name)
    run = jax.jit(qj.fake_quantize(f, plan, observe=True))
    _, after = run(qstate, params, X, state=state)
    for operands in after.values():
        for statistics in operands.values():
            assert (np.asarray(statistics.batches) == 2).all()
    _, wider = run(qstate, params, 3 * X, state=after)
    site = "one"
    high = [s[site]["activation"].extremes.high.max() for s in (after, wider)]
    assert high[1] > 1.5 * high[0]


def test_padding_is_masked():
    f, params, plan, _, qstate = planned("flat")
    run = jax.jit(qj.fake_quantize(f, plan, observe=True))
    padded = jnp.concatenate([X, jnp.full((2, 6), 1e3)])
    where = jnp.arange(12) < 10
    _, seen = run(qstate, params, padded, where=where)
    _, want = run(qstate, params, X)
    assert_same_bits(seen["one"]["activation"].extremes, want["one"]["activation"].extremes)


def test_no_gradient_flows_through_what_is_seen():
    f, params, plan, _, qstate = planned("flat")
    run = qj.fake_quantize(f, plan, observe=True)

    def loss(params):
        y, state = run(qstate, params, X)
        return jnp.sum(y**2) + sum(
            jnp.sum(s.extremes.high) for ops in state.values() for s in ops.values()
        )

    def plain(params):
        return jnp.sum(qj.fake_quantize(f, plan)(qstate, params, X) ** 2)

    assert_same_bits(jax.jit(jax.grad(loss))(params), jax.jit(jax.grad(plain))(params))


@pytest.mark.thinned(2)
@NAMES
def test_random_plans_keep_their_draws(name):
    scheme = qj.Scheme(weights=qj.weight_quantizer(bits=3, rounding=qj.rounding.STOCHASTIC))
    both = qj.Scheme(weights=scheme.weights, activations=qj.activation_quantizer(bits=4))
    f, params, plan, _, qstate = planned(name, qj.Policy([qj.rule(qj.weighted(), both)]))
    key = jax.random.key(4)
    y, _ = jax.jit(qj.fake_quantize(f, plan, observe=True))(qstate, params, X, key=key)
    assert_array_equal(y, jax.jit(qj.fake_quantize(f, plan))(qstate, params, X, key=key))


def test_ranges_follow_activations_that_grow():
    """A moving range, in one jitted step, as a training loop has it."""
    f, params, plan, state, _ = planned("flat")
    run = qj.fake_quantize(f, plan, observe=True)

    @jax.jit
    def step(state, x):
        qstate = qj.calibrate(plan, state, params, rule=qj.ranges.MOVING_AVERAGE)
        _, state = run(qstate, params, x, state=state)
        return state, qstate["one"]["activation"].scale

    scales = []
    for growth in np.linspace(1, 5, 30):
        state, scale = step(state, X * jnp.float32(growth))
        scales.append(float(scale.squeeze()))
    assert (np.diff(scales[1:]) > 0).all()
    assert scales[-1] > 1.05 * scales[0]


def test_a_state_of_another_plan_is_refused():
    f, params, plan, _, qstate = planned("flat")
    with pytest.raises(qj.errors.CalibrationError):
        qj.fake_quantize(f, plan, observe=True)(qstate, params, X, state={"one": {}})


def test_weights_alone_have_nothing_to_observe():
    f, params, plan, _, qstate = planned("flat", qj.uniform_policy(activation_bits=None))
    y, state = qj.fake_quantize(f, plan, observe=True)(qstate, params, X)
    assert state == {}
    assert_allclose(y, qj.fake_quantize(f, plan)(qstate, params, X))
