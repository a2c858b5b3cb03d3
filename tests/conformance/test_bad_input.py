"""Acceptance: bad input is an error that names the site, the shapes and one edit to try.

Nothing is lost by it: the state that went in is still usable.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from tests.models import Case, assert_same_bits, mlp, normal, planned, ready
from tests.refused import refused

FIRST, SECOND = "params/Dense_0/kernel", "params/Dense_1/kernel"
MLP = mlp()
FULL = qj.Scheme(weights=qj.weight_quantizer(), activations=qj.activation_quantizer())


@pytest.fixture(scope="module")
def mlp_ready() -> Any:
    return ready(MLP, qj.uniform_policy())


def test_calibration_that_was_never_run():
    plan = planned(MLP, qj.uniform_policy())
    state = qj.init(plan)
    with refused(errors.CalibrationError, "never run", FIRST, "activation", "qj.observe"):
        qj.calibrate(plan, state, MLP.params)
    _, state = qj.observe(MLP.f, plan)(state, MLP.params, MLP.x)
    qj.calibrate(plan, state, MLP.params)


@pytest.mark.parametrize("bits", [9, -1, 2.5, float("nan"), np.float32(8.5)])
@pytest.mark.parametrize("which", ["weight_bits", "activation_bits"])
def test_a_width_outside_the_format(mlp_ready, bits, which):
    plan, state, _ = mlp_ready
    helps = ["max_bits=16"] if bits == 9 else []  # of the others no container has one
    with refused(errors.BitsError, FIRST, which.removesuffix("_bits"), "up to 8", *helps):
        qj.calibrate(plan, state, MLP.params, **{which: bits})
    with refused(errors.BitsError, SECOND):
        qj.calibrate(plan, state, MLP.params, **{which: {SECOND: bits}})


@pytest.mark.parametrize("bits", [jnp.arange(2.0, 9.0), jnp.ones((1, 1)), [4, 8]])
def test_a_width_of_the_wrong_rank(mlp_ready, bits):
    plan, state, _ = mlp_ready
    shape = str(np.shape(bits))
    with refused(errors.BitsError, shape, FIRST, "jax.vmap"):
        qj.calibrate(plan, state, MLP.params, weight_bits=bits)


def test_widths_for_an_unknown_site(mlp_ready):
    plan, state, _ = mlp_ready
    with refused(errors.PolicyError, "weight_bits", "params/Dense_7/kernel", FIRST):
        qj.calibrate(plan, state, MLP.params, weight_bits={"params/Dense_7/kernel": 4})


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_calibration_batch_with_values_that_are_not_finite(mlp_ready, bad):
    plan, state, _ = mlp_ready
    observe = qj.observe(MLP.f, plan)
    x = MLP.x.at[2, 1].set(bad)
    words = [FIRST, "activation"] if bad == -jnp.inf else ["1 values", "6x8"]
    with refused(errors.DataError, *words, "where="):
        observe(state, MLP.params, x)
    keep = jnp.arange(6) != 2
    y, after = observe(state, MLP.params, x, where=keep)  # the edit that the message names
    assert np.isfinite(np.asarray(y)[keep]).all()
    qj.calibrate(plan, after, MLP.params)


def test_a_value_that_the_model_itself_makes_infinite():
    case = Case(lambda p, x: jnp.log(x) @ p["w"], {"w": normal(0, 3, 2)}, jnp.zeros((4, 3)))
    plan = planned(case, qj.uniform_policy())
    with refused(errors.DataError, "site w, activation", "the model itself"):
        qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)


def test_a_weight_that_is_not_finite(mlp_ready):
    plan, state, _ = mlp_ready
    broken = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.at[0, 0].set(jnp.nan) if "Dense_1" in str(path) and leaf.ndim == 2 else leaf
        ),
        MLP.params,
    )
    with refused(errors.DataError, SECOND, "weight", "NaN"):
        qj.calibrate(plan, state, broken)


def test_a_mask_of_minus_infinity_and_an_empty_cache_are_inputs_like_others():
    def attend(p, x, mask, cache):
        keys = jnp.concatenate([cache, x @ p["k"]])
        return jax.nn.softmax(x @ keys.T + mask) @ keys

    x, mask = normal(1, 4, 4), jnp.where(jnp.tril(jnp.ones((4, 4))) > 0, 0.0, -jnp.inf)
    args = {"k": normal(2, 4, 4)}, x, mask, jnp.zeros((0, 4))
    plan = qj.plan(qj.Policy([qj.rule(qj.everything(), FULL)]), qj.sites(attend, *args))
    _, eager = qj.observe(attend, plan)(qj.init(plan), *args)
    _, jitted = jax.jit(qj.observe(attend, plan))(qj.init(plan), *args)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_an_empty_calibration_batch(mlp_ready):
    plan, state, _ = mlp_ready
    with refused(errors.DataError, "empty", "0x8"):
        qj.observe(MLP.f, plan)(state, MLP.params, MLP.x[:0])


def test_a_mask_that_leaves_nothing(mlp_ready):
    plan, state, _ = mlp_ready
    with refused(errors.DataError, "mask", "skip this batch"):
        qj.observe(MLP.f, plan)(state, MLP.params, MLP.x, where=jnp.zeros(6, bool))


@pytest.mark.parametrize("shape", [(5,), (8,), (6, 8, 1), (1,)])
def test_a_mask_of_another_shape(mlp_ready, shape):
    plan, state, _ = mlp_ready
    text = "x".join(map(str, shape))
    with refused(errors.DataError, text, FIRST, "6x8", "(batch,)"):
        qj.observe(MLP.f, plan)(state, MLP.params, MLP.x, where=jnp.ones(shape, bool))


def test_a_qstate_without_a_site_or_an_operand(mlp_ready):
    plan, _, qstate = mlp_ready
    lacking = {FIRST: qstate[FIRST]}
    partial = {**qstate, SECOND: {"weight": qstate[SECOND]["weight"]}}
    run = qj.fake_quantize(MLP.f, plan)
    with refused(errors.CalibrationError, SECOND, "activation 6x16", "qj.calibrate"):
        run(lacking, MLP.params, MLP.x)
    with refused(errors.CalibrationError, SECOND, "activation", "6x16"):
        run(partial, MLP.params, MLP.x)


@pytest.mark.parametrize("activations", [qj.PerTensor(), qj.PerToken()], ids=str)
def test_a_batch_of_qstates_is_not_a_qstate(activations):
    plan = planned(MLP, qj.uniform_policy(activation_granularity=activations))
    _, state = qj.observe(MLP.f, plan)(qj.init(plan), MLP.params, MLP.x)
    cells = jax.vmap(
        lambda b: qj.calibrate(plan, state, MLP.params, weight_bits=b, activation_bits=b)
    )(jnp.array([2.0, 8.0, 4.0]))
    run = qj.fake_quantize(MLP.f, plan)
    with refused(errors.CalibrationError, FIRST, "(3,", "jax.vmap or jax.lax.map"):
        run(cells, MLP.params, MLP.x)
    assert jax.vmap(run, (0, None, None))(cells, MLP.params, MLP.x).shape == (3, 6, 4)


def test_statistics_of_another_plan(mlp_ready):
    per_channel = planned(MLP, qj.uniform_policy(activation_granularity=qj.PerChannel()))
    observe = qj.observe(MLP.f, per_channel)
    with refused(errors.CalibrationError, FIRST, "(1, 1)", "(1, 8)", "qj.init(plan)"):
        observe(mlp_ready.state, MLP.params, MLP.x)
    with refused(errors.CalibrationError, FIRST, "(1, 1)", "(1, 8)", "qj.init(plan)"):
        qj.calibrate(per_channel, mlp_ready.state, MLP.params)
    with refused(errors.CalibrationError, FIRST, "qj.init(plan)"):
        observe({}, MLP.params, MLP.x)


def test_a_refused_batch_costs_nothing_that_was_collected(mlp_ready):
    plan, state, qstate = mlp_ready
    saved = jax.tree.map(np.array, state)
    observe = qj.observe(MLP.f, plan)
    for bad in (MLP.x.at[0, 0].set(jnp.nan), MLP.x[:0]):
        with pytest.raises(errors.DataError):
            observe(state, MLP.params, bad)
    assert_same_bits(state, saved)
    assert_same_bits(qj.calibrate(plan, state, MLP.params), qstate)
    _, after = observe(state, MLP.params, MLP.x)
    assert int(after[FIRST]["activation"].batches) == 2


def test_frozen_parameters_where_a_model_runs_in_float(mlp_ready):
    """A model that decodes its codes itself is none of these."""
    (f, params, x), (plan, _, qstate) = MLP, mlp_ready
    frozen = qj.freeze(plan, qstate, params)
    for verb in (
        lambda: qj.sites(f, frozen, x),
        lambda: qj.tap(f, qj.everything())(frozen, x),
        lambda: qj.batch_norms(f, frozen, x),
    ):
        with refused(errors.ArgumentError, "these parameters are frozen", FIRST):
            verb()
    decoded = lambda frozen, x: f(qj.dequantize_params(frozen), x)  # noqa: E731
    assert len(qj.sites(decoded, frozen, x)) == len(plan.sites)
    with pytest.raises(TypeError, match="concatenate tuple"):
        qj.sites(lambda p, x: x.shape + 1, params, x)
    policy = qj.uniform_policy(weight_bits=8, activation_bits=None)
    with refused(errors.PolicyError, "all are quantized already"):
        qj.quantize_params(frozen, policy)
