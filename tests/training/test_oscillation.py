"""Oscillations against a plain Python model of the paper's algorithm; what is held stays held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax.training import (
    freeze_oscillations,
    frozen_share,
    with_bits,
)
from tests.training import cases


@functools.cache
def one():
    quantizer = qj.weight_quantizer(granularity=qj.PerTensor(), bits=4)
    return cases.one_product(np.ones((12, 1)), quantizer)


def by_hand(positions, scale, low, high, threshold, m):
    """Algorithm 1 for one weight in float64: where the latent weight is in each step.

    Returns the positions that an optimizer reaches, and at which step it was frozen.
    """
    level, average, direction, frequency, held = None, None, 0, 0.0, None
    reached, caught = [], None
    for step, position in enumerate(positions):
        here = position if held is None else held * scale
        now = float(np.clip(np.round(here / scale), low, high))
        if level is None:
            level, average = now, now
        if held is None:
            change = int(np.sign(now - level))
            oscillates = change * direction == -1
            frequency = m * oscillates + (1 - m) * frequency
            average = m * now + (1 - m) * average
            direction = change or direction
            level = now
            if frequency > threshold(step):
                held = float(np.clip(np.round(average), low, high))
                caught = step
        reached.append(here if held is None else held * scale)
    return reached, caught


@jax.jit
def follow(threshold, m, qstate, positions):
    """The optimizer asks for these positions, one after another; where the weights end up.

    What it is asked for last is where it is already.
    """
    tx = freeze_oscillations(one()[0], threshold, momentum=m)

    def move(carry, position):
        params, state = carry
        updates, state = tx.update({"w": position - params["w"]}, state, params, qstate=qstate)
        params = optax.apply_updates(params, updates)
        return (params, state), params["w"][:, 0]

    positions = jnp.asarray(positions, jnp.float32)[..., None]
    asked = jnp.concatenate([positions[1:], positions[-1:]])
    start = {"w": positions[0]}
    (_, state), reached = jax.lax.scan(move, (start, tx.init(start)), asked)
    return reached, state


@given(
    seed=st.integers(0, 9999),
    m=st.sampled_from([0.05, 0.25, 0.5]),
    threshold=st.sampled_from([0.04, 0.2, 0.4]),
    bits=st.integers(2, 4),
)
def test_the_algorithm_by_an_independent_model(seed, m, threshold, bits):
    """Random walks of 12 weights about a few levels, each as its own model has it."""
    _plan, qstate, _ = one()
    scale = 0.5
    weight = qstate["w"]["weight"]._replace(scale=jnp.full((1, 1), scale), bits=jnp.float32(bits))
    draw = np.random.default_rng(seed)
    positions = draw.normal(0.3, 0.5, size=(14, 12)).astype(np.float32)
    reached, state = follow(threshold, m, {"w": {"weight": weight}}, positions)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for i in range(12):
        want, caught = by_hand(positions[:, i], scale, low, high, lambda step: threshold, m)
        # What update t decides on is where the weight goes after it.
        after = [
            p if caught is None or t < caught else want[t]
            for t, p in enumerate([*positions[1:, i], positions[-1, i]])
        ]
        assert_allclose(reached[:, i], after, atol=1e-6)
        assert bool(state.weights["w"].frozen[i, 0]) == (caught is not None)


def test_by_hand():
    """0, 1, 0, 1: the third value is the first oscillation, f = m; the fourth f = m + (1 - m) m."""
    _, qstate, _ = one()
    weight = qstate["w"]["weight"]._replace(scale=jnp.ones((1, 1)))
    state_of = {"w": {"weight": weight}}
    positions = np.tile([[0.4], [0.6], [0.4], [0.6]], (1, 12))
    _, state = follow(0.5, 0.25, state_of, positions)
    followed = state.weights["w"]
    assert_allclose(followed.frequency, np.full((12, 1), 0.25 + 0.75 * 0.25))
    assert_allclose(followed.average[0, 0], 0.25 + 0.75 * 0.75 * 0.25, rtol=1e-6)
    assert int(followed.direction[0, 0]) == 1
    assert float(followed.level[0, 0]) == 1.0
    assert not followed.frozen.any()
    assert float(frozen_share(state)) == 0.0
    assert int(state.step) == 4
    held, state = follow(0.4, 0.25, state_of, positions)
    assert state.weights["w"].frozen.all()
    assert float(frozen_share(state)) == 1.0
    assert_allclose(held[-1], np.zeros(12), atol=1e-6)  # the average, 0.39, is rounded to 0


def test_one_way_is_no_oscillation():
    _plan, qstate, _ = one()
    positions = np.tile(np.linspace(-3.0, 3.0, 20)[:, None], (1, 12))
    reached, state = follow(0.0, 0.5, qstate, positions)
    assert not state.weights["w"].frozen.any()
    assert_allclose(reached[:-1], positions[1:], atol=1e-6)


def test_what_is_frozen_follows_a_learned_scale():
    """The integer stays, whatever gradient and whatever scale."""
    plan, qstate, params = one()
    weight = qstate["w"]["weight"]

    def with_scale(s):
        return {"w": {"weight": weight._replace(scale=jnp.full((1, 1), s))}}

    tx = freeze_oscillations(plan, 0.2, momentum=0.25)
    params, state = {"w": jnp.full((12, 1), 2.6)}, None
    state = tx.init(params)
    for step in (-0.2, 0.2, -0.2, 0.2):
        updates = {"w": jnp.full((12, 1), step)}
        updates, state = tx.update(updates, state, params, qstate=with_scale(1.0))
        params = optax.apply_updates(params, updates)
    assert state.weights["w"].frozen.all()
    code = state.weights["w"].level
    for scale in (1.05, 1.1, 2.0, 0.95):
        updates, state = tx.update(
            {"w": jnp.full((12, 1), -9.0)}, state, params, qstate=with_scale(scale)
        )
        params = optax.apply_updates(params, updates)
        assert_allclose(params["w"], scale * code, rtol=1e-6)
        assert_array_equal(state.weights["w"].level, code)
        frozen = qj.freeze(plan, with_scale(scale), params)["w"].codes
        assert_array_equal(frozen, code.astype(jnp.int8))


def test_thresholds_are_traced_or_schedules():
    plan, qstate, _ = one()
    weight = qstate["w"]["weight"]._replace(scale=jnp.ones((1, 1)))
    qstate = {"w": {"weight": weight}}
    params = {"w": jnp.full((12, 1), 0.4)}

    def frozen(threshold, momentum):
        tx = freeze_oscillations(plan, threshold, momentum=momentum)
        state, p = tx.init(params), params
        for step in (0.2, -0.2, 0.2, -0.2, 0.2):
            u, state = tx.update({"w": jnp.full((12, 1), step)}, state, p, qstate=qstate)
            p = optax.apply_updates(p, u)
        return frozen_share(state)

    thresholds = jnp.array([0.1, 0.3, 0.5, 0.9])
    grid = jax.jit(jax.vmap(frozen, in_axes=(0, None)))(thresholds, jnp.float32(0.25))
    # Frequencies after 3 oscillations: 0.25, 0.4375, 0.578; then no more steps.
    assert_array_equal(grid, [1.0, 1.0, 1.0, 0.0])

    def late(step):
        return jnp.where(step < 4, 1.0, 0.3)

    assert float(frozen(late, 0.25)) == 1.0
    assert float(frozen(lambda step: jnp.where(step < 4, 0.3, 1.0), 0.25)) == 1.0
    assert float(frozen(lambda step: jnp.float32(1.0), 0.25)) == 0.0


def test_a_change_of_width_starts_anew():
    plan, qstate, _ = one()
    weight = qstate["w"]["weight"]._replace(scale=jnp.ones((1, 1)))
    qstate = {"w": {"weight": weight}}
    tx = freeze_oscillations(plan, 0.2, momentum=0.25)
    params = {"w": jnp.full((12, 1), 0.4)}
    state = tx.init(params)
    for step in (0.2, -0.2, 0.2, -0.2):
        u, state = tx.update({"w": jnp.full((12, 1), step)}, state, params, qstate=qstate)
        params = optax.apply_updates(params, u)
    assert state.weights["w"].frozen.all()
    for bits in (0, 3):
        other = with_bits(plan, qstate, weight_bits=bits)
        u, after = tx.update({"w": jnp.full((12, 1), 0.7)}, state, params, qstate=other)
        assert not after.weights["w"].frozen.any()
        assert_array_equal(u["w"], jnp.full((12, 1), 0.7))
        assert_array_equal(after.weights["w"].frequency, jnp.zeros((12, 1)))


def test_below_zero_the_threshold_holds_everything_but_at_zero_bits():
    plan, qstate, params = one()
    tx = freeze_oscillations(plan, -1.0)
    updates = {"w": jnp.full((12, 1), 0.25)}
    moved, state = tx.update(updates, tx.init(params), params, qstate=qstate)
    assert float(frozen_share(state)) == 1.0
    level = qj.dequantize_params(qj.freeze(plan, qstate, params))
    assert_allclose(params["w"] + moved["w"], level["w"], rtol=1e-6)
    asleep = with_bits(plan, qstate, weight_bits=0)
    moved, state = tx.update(updates, tx.init(params), params, qstate=asleep)
    assert float(frozen_share(state)) == 0.0
    assert_array_equal(moved["w"], updates["w"])


def test_one_bit_codes_have_no_zero():
    """An average of 0.2 is no code of {-1, 1}: the nearest of them is kept."""
    quantizer = qj.weight_quantizer(bits=1, granularity=qj.PerTensor())
    plan, qstate, _ = cases.one_product(np.ones((12, 1)), quantizer)
    tx, params = freeze_oscillations(plan, 0.5, momentum=0.25), {"w": jnp.full((12, 1), 0.3)}
    state = tx.init(params)
    for position in (0.3, -0.1, 0.1, -0.1, 0.1, 0.1):
        updates = {"w": position - params["w"]}
        updates, state = tx.update(updates, state, params, qstate=qstate)
        params = optax.apply_updates(params, updates)
    assert state.weights["w"].frozen.all()
    assert_allclose(params["w"], jnp.full((12, 1), qstate["w"]["weight"].scale[0, 0]))


def test_training_ends_oscillations():
    """The paper's toy: one weight, whose best value lies between two levels."""
    plan, _, _ = cases.one_product([[1.0]], qj.weight_quantizer(bits=3))
    f, x = lambda p, x: x @ p["w"], jnp.array([[1.0]])
    qstate = {"w": {"weight": cases.qparams([[1.0]], bits=3)}}
    quantized = qj.fake_quantize(f, plan)
    gradient = jax.grad(lambda p: 0.5 * jnp.sum((quantized(qstate, p, x) - 0.6) ** 2))

    def codes(optimizer):
        params = {"w": jnp.array([[0.55]])}
        state, seen = optimizer.init(params), []
        move = jax.jit(lambda p, s: cases.step(optimizer, gradient(p), p, s, qstate=qstate))
        for _ in range(60):
            params, state = move(params, state)
            seen.append(float(quantized(qstate, params, x)[0, 0]))
        return np.array(seen[-20:])

    plain = optax.with_extra_args_support(optax.sgd(0.2))
    assert set(codes(plain)) == {0.0, 1.0}
    held = codes(optax.chain(optax.sgd(0.2), freeze_oscillations(plan, 0.1, momentum=0.05)))
    assert set(held) == {1.0}  # the level that is nearer to 0.6, where it is more often
