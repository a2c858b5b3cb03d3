"""Observing leaves the model as it is and sees every entry once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import quantjax as qj
from quantjax import statistics
from quantjax.statistics import merge_unordered
from tests.models import assert_same_bits, cnn, dense, mlp, normal, planned

POLICY = qj.uniform_policy()


@pytest.fixture(scope="module")
def case():
    return mlp()


@pytest.fixture(scope="module")
def plan(case):
    return planned(case, POLICY)


def test_statistics_are_those_of_the_operands(case, plan):
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    stats = state["params/Dense_0/kernel"]["activation"]
    assert float(stats.extremes.low[0, 0]) == float(np.min(case.x))
    assert float(stats.extremes.high[0, 0]) == float(np.max(case.x))
    hidden = state["params/Dense_1/kernel"]["activation"]
    assert float(hidden.extremes.low[0, 0]) >= 0.0  # after the ReLU
    assert int(stats.batches) == 1


def test_scan_over_batches_equals_a_loop(case, plan):
    batches = jnp.stack([normal(seed, 6, 8) for seed in range(4)])
    observing = qj.observe(case.f, plan)
    state, outputs = qj.init(plan), []
    for batch in batches:
        y, state = jax.jit(observing)(state, case.params, batch)
        outputs.append(y)

    def step(state, batch):
        y, state = observing(state, case.params, batch)
        return state, y

    scanned, ys = jax.lax.scan(step, qj.init(plan), batches)
    pick = lambda s: [o["activation"].extremes for o in s.values()]  # noqa: E731
    assert_same_bits(pick(scanned), pick(state))
    np.testing.assert_allclose(ys, jnp.stack(outputs), rtol=1e-6)
    assert int(scanned["params/Dense_0/kernel"]["activation"].batches) == 4


@pytest.mark.parametrize("jitted", [False, True])
def test_a_mask_equals_dropping_the_rows(case, plan, jitted):
    observing = qj.observe(case.f, plan)
    masked_observing = (
        jax.jit(lambda s, p, x, m: observing(s, p, x, where=m))
        if jitted
        else lambda s, p, x, m: observing(s, p, x, where=m)
    )
    padded = case.x.at[4:].set(1e6)
    mask = jnp.arange(6) < 4
    y, masked = masked_observing(qj.init(plan), case.params, padded, mask)
    _, kept = observing(qj.init(plan), case.params, case.x[:4])
    assert y.shape == (6, 4)
    for name, operands in kept.items():
        for left, right in zip(
            masked[name]["activation"].extremes, operands["activation"].extremes, strict=True
        ):
            np.testing.assert_allclose(left, right, rtol=1e-6)


def test_a_mask_of_time_steps(case):
    def f(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    params = {"w": normal(0, 3, 4), "v": normal(1, 4, 2)}
    x = normal(2, 2, 5, 3)
    plan = qj.plan(POLICY, qj.sites(f, params, x))
    mask = jnp.array([[True] * 5, [True] * 2 + [False] * 3])
    _, state = qj.observe(f, plan)(qj.init(plan), params, x, where=mask)
    kept = np.concatenate([x[0], x[1, :2]])
    assert float(state["w"]["activation"].extremes.high[0, 0, 0]) == float(kept.max())


def test_nan_under_the_mask_is_not_seen(case, plan):
    padded = case.x.at[5].set(jnp.nan)
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, padded, where=jnp.arange(6) < 5)
    assert qj.check(qj.calibrate(plan, state, case.params)) == []


def test_states_of_two_shards_merge_to_that_of_both(case, plan):
    observing = qj.observe(case.f, plan)
    left, right, both = (
        observing(qj.init(plan), case.params, x)[1] for x in (case.x[:2], case.x[2:], case.x)
    )
    for name in both:
        merged = merge_unordered(left[name]["activation"], right[name]["activation"])
        for side, whole in zip(merged.extremes, both[name]["activation"].extremes, strict=True):
            np.testing.assert_allclose(side, whole, rtol=1e-6)


def test_several_models_at_once(case, plan):
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), case.params)
    observing = qj.observe(case.f, plan)
    y, state = jax.vmap(observing, in_axes=(None, 0, None))(qj.init(plan), params, case.x)
    for lane in range(2):
        one = jax.tree.map(lambda leaf, lane=lane: leaf[lane], params)
        y_one, alone = observing(qj.init(plan), one, case.x)
        np.testing.assert_allclose(y[lane], y_one, rtol=1e-5)
        for name in alone:
            np.testing.assert_allclose(
                state[name]["activation"].extremes.high[lane],
                alone[name]["activation"].extremes.high,
                rtol=1e-6,
            )


def test_weight_only_plans_observe_nothing():
    case = dense()
    plan = planned(case, qj.uniform_policy(activation_bits=None))
    y, state = qj.observe(case.f, plan)({}, case.params, case.x)
    assert state == {}
    assert_same_bits(y, case.f(case.params, case.x))


def test_an_input_that_is_no_float_is_passed_through():
    def f(params, tokens):
        return params["table"][tokens] @ params["w"]

    params = {"table": normal(0, 7, 4), "w": normal(1, 4, 2)}
    tokens = jnp.array([1, 6, 3])
    plan = qj.plan(POLICY, qj.sites(f, params, tokens))
    y, state = qj.observe(f, plan)(qj.init(plan), params, tokens)
    assert_same_bits(y, f(params, tokens))
    assert set(state) == {"w"}


def test_observing_a_convolution_per_channel():
    case = cnn()
    scheme = qj.Scheme(activations=qj.activation_quantizer(granularity=qj.PerChannel()))
    plan = planned(case, qj.Policy([qj.rule(qj.path("*Conv_0*"), scheme)]))
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    stats = state["params/Conv_0/kernel"]["activation"]
    assert stats.scale_shape == (1, 1, 1, 3)
    np.testing.assert_array_equal(
        stats.extremes.high[0, 0, 0], np.asarray(case.x).max(axis=(0, 1, 2))
    )


@pytest.mark.parametrize("jitted", [False, True])
def test_under_checkify_nothing_is_out_of_bounds(jitted):
    """A histogram that widens, and one that is new, put counts nowhere but into their bins."""
    case = dense()
    plan = planned(case, qj.uniform_policy())
    checked = checkify.checkify(qj.observe(case.f, plan), errors=checkify.all_checks)
    checked = jax.jit(checked) if jitted else checked
    state = qj.init(plan)
    for scale in (1.0, 100.0):
        error, (_, state) = checked(state, case.params, scale * case.x)
        assert error.get() is None
    counts = state["w"]["activation"].distribution.counts
    assert int(statistics.as_integer(counts).sum()) == 2 * case.x.size


def test_rows_of_a_mapped_while_that_have_ended_are_said_to_be_observed():
    """What the note says is so: the ended row's result, which its own run never multiplies."""

    def one(p, x, n):
        step = lambda c: (c[0] + 1, c[1] @ p["w"])  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < n, step, (0, x))[1]

    params, x, n = {"w": 3.0 * jnp.eye(4)}, jnp.ones((2, 4)), jnp.array([3, 1])
    mapped = jax.vmap(one, (None, 0, 0))
    (site,) = qj.sites(mapped, params, x, n)
    assert site.reason == "rows that have ended are observed until the last one does"
    (alone,) = qj.sites(one, params, x[0], n[0])
    assert site.name == alone.name
    assert not alone.reason
    x = x * jnp.array([[0.01], [1.0]])
    plan = qj.plan(qj.uniform_policy(), qj.sites(mapped, params, x, n))
    _, state = qj.observe(mapped, plan)(qj.init(plan), params, x, n)
    assert float(state["w"]["activation"].extremes.high[0, 0]) == 3.0
    plan = qj.plan(qj.uniform_policy(), qj.sites(one, params, x[0], n[0]))
    observe = jax.vmap(qj.observe(one, plan), (None, None, 0, 0))
    _, states = observe(qj.init(plan), params, x, n)
    assert float(states["w"]["activation"].extremes.high.max()) == 1.0
