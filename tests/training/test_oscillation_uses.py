"""Which weights are followed, in which trees, through which moves; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors, formats
from quantjax.training import (
    OscillationState,
    by_part,
    freeze_oscillations,
    frozen_share,
    with_bits,
)
from tests import models
from tests.refused import refused
from tests.training import cases


@functools.cache
def one():
    quantizer = qj.weight_quantizer(granularity=qj.PerTensor(), bits=4)
    return cases.one_product(np.ones((12, 1)), quantizer)


def test_transposed_and_reshaped_parameters():
    """Codes are those of qj.freeze, at the parameter."""
    shapes = {"w": (5, 2, 3)}  # to 6 x 5

    def f(p, x):
        return x @ p["w"].reshape(5, 6).T

    case = models.Case(f, {"w": models.normal(0, *shapes["w"])}, models.normal(1, 2, 6))
    ready = models.ready(case, qj.uniform_policy(weight_bits=4, activation_bits=None))
    tx = freeze_oscillations(ready.plan, 0.2)
    updates = jax.tree.map(jnp.zeros_like, case.params)
    _, state = tx.update(updates, tx.init(case.params), case.params, qstate=ready.qstate)
    frozen = qj.freeze(ready.plan, ready.qstate, case.params)["w"]
    assert_array_equal(state.weights["w"].level, frozen.codes.astype(jnp.float32))


def test_layers_of_a_scan_with_a_width_each():
    case, plan, qstate = cases.stacked(3)
    qstate = with_bits(plan, qstate, weight_bits=jnp.array([2.0, 3.0, 4.0]))
    tx = freeze_oscillations(plan, 0.2)
    updates = jax.tree.map(jnp.zeros_like, case.params)
    _, state = tx.update(updates, tx.init(case.params), case.params, qstate=qstate)
    frozen = qj.freeze(plan, qstate, case.params)["w"]
    assert_array_equal(state.weights["w"].level, frozen.codes.astype(jnp.float32))
    asleep = with_bits(plan, qstate, weight_bits=jnp.array([2.0, 0.0, 4.0]))
    _, after = tx.update(updates, state, case.params, qstate=asleep)
    assert_array_equal(after.weights["w"].bits.ravel(), [2.0, 0.0, 4.0])


@pytest.mark.parametrize("tree", ["variables", "params", "pair", "a part, paired", "named"])
def test_trees_that_hold_the_weights(tree):
    """The planned tree, a part of it, or one with the qstate beside either."""
    case = models.mlp()
    ready = models.ready(case, qj.uniform_policy(weight_bits=4))
    trees = {
        "variables": case.params,
        "params": case.params["params"],
        "pair": (case.params, ready.qstate),
        "a part, paired": (case.params["params"], ready.qstate),
        "named": {"scales": ready.qstate, "weights": case.params["params"]},
    }
    chosen = trees[tree]
    optimizer = optax.chain(optax.sgd(0.1), freeze_oscillations(ready.plan, 0.2))
    state = optimizer.init(chosen)
    updates, state = optimizer.update(cases.ones_like(chosen), state, chosen, qstate=ready.qstate)
    assert sorted(state[1].weights) == ["params/Dense_0/kernel", "params/Dense_1/kernel"]
    cases.close(updates, jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.1), chosen))


def test_inside_by_part():
    """As the end of what moves the weights; scales move by themselves, at the same time."""
    case = models.mlp()
    ready = models.ready(case, qj.uniform_policy(weight_bits=4))
    weights = optax.chain(optax.sgd(0.1), freeze_oscillations(ready.plan, 0.0, momentum=1.0))
    optimizer = by_part(weights=weights, scale=optax.sgd(0.001))
    tree = case.params, ready.qstate
    state = optimizer.init(tree)
    name, seen = "params/Dense_0/kernel", []
    for sign in (2.0, -2.0, 2.0, -2.0, 2.0):
        # Two steps of the scale to and fro, so that every weight in the range oscillates.
        far = jax.tree.map(lambda leaf, sign=sign: jnp.full_like(leaf, sign), tree)
        updates, state = optimizer.update(far, state, tree, qstate=tree[1])
        tree = optax.apply_updates(tree, updates)
        seen.append(np.asarray(tree[0]["params"]["Dense_0"]["kernel"]))
    (inner,) = (
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, OscillationState))
        if isinstance(leaf, OscillationState)
    )
    frozen = np.asarray(inner.weights[name].frozen)
    assert frozen.mean() > 0.1
    assert float(frozen_share(inner)) > 0.1
    level = np.asarray(inner.weights[name].level)
    scale = np.asarray(tree[1][name]["weight"].scale) + 0.002  # that of the last update
    assert_allclose(seen[-1][frozen], (scale * level)[frozen], rtol=1e-4, atol=1e-6)
    assert not np.array_equal(tree[1][name]["weight"].scale, ready.qstate[name]["weight"].scale)


def test_half_precision_weights():
    plan, qstate, params = cases.one_product(models.normal(0, 8, 3), dtype=jnp.bfloat16)
    tx = freeze_oscillations(plan, 0.2)
    updates = jax.tree.map(jnp.zeros_like, params)
    after, state = tx.update(updates, tx.init(params), params, qstate=qstate)
    assert after["w"].dtype == jnp.bfloat16
    assert_array_equal(
        state.weights["w"].level, qj.freeze(plan, qstate, params)["w"].codes.astype(jnp.float32)
    )


def test_weights_that_are_cast_on_their_way():
    """The code is that of the rounded weight: 0.5009 is 0.5 in bfloat16, a tie that goes to 0."""

    def f(p, x):
        return x @ p["w"].astype(jnp.bfloat16)

    case = models.Case(f, {"w": jnp.full((2, 1), 0.5009)}, jnp.ones((1, 2), jnp.bfloat16))
    plan = models.planned(case, qj.uniform_policy(weight_bits=4, activation_bits=None))
    tx, still = freeze_oscillations(plan, 0.1), {"w": jnp.zeros((2, 1))}
    qstate = {"w": {"weight": cases.qparams([[1.0]])}}
    _, state = tx.update(still, tx.init(case.params), case.params, qstate=qstate)
    assert_array_equal(state.weights["w"].level, jnp.zeros((2, 1)))


COMPUTED = models.Case(
    lambda p, x: (x @ p["w"]) @ (2.0 * p["v"]),
    {"w": models.normal(0, 4, 4), "v": models.normal(1, 4, 4)},
    models.normal(2, 2, 4),
)


def test_what_cannot_be_followed():
    """Left out by default, refused where it is asked for."""
    plan = models.planned(COMPUTED, qj.uniform_policy(weight_bits=4, activation_bits=None))
    assert list(freeze_oscillations(plan, 0.1).init(COMPUTED.params).weights) == ["w"]
    with refused(errors.TrainingError, "cannot be followed", "computed from parameters"):
        freeze_oscillations(plan, 0.1, select=qj.weighted())
    for quantizer, reason in (
        (qj.weight_quantizer(format=formats.NF4), "no integers"),
        (qj.weight_quantizer(estimator=qj.estimators.DOREFA_WEIGHTS), "rounds a function of it"),
        (qj.weight_quantizer(range=qj.RangeMode.LIVE), "its range is live"),
    ):
        case = models.dense()
        plan = models.planned(case, models.policy(quantizer))
        with refused(errors.TrainingError, reason, "site w"):
            freeze_oscillations(plan, 0.1, select=qj.path("w"))
        with refused(errors.TrainingError, "the plan has no weight"):
            freeze_oscillations(plan, 0.1)


def test_a_parameter_of_two_sites_needs_a_choice():
    case = models.Case(
        lambda p, x: (x @ p["w"]) @ p["w"], {"w": models.normal(0, 4, 4)}, models.normal(1, 2, 4)
    )
    plan = models.planned(case, qj.uniform_policy(weight_bits=4))
    with refused(errors.TrainingError, "is the weight of two sites", "select=qj.path"):
        freeze_oscillations(plan, 0.1)
    name = plan.quantized[1].site.name
    chosen = freeze_oscillations(plan, 0.1, select=qj.path(name))
    assert list(chosen.init(case.params).weights) == ["w"]


def test_mistakes_are_refused():
    plan, qstate, params = one()
    for momentum in (0.0, 1.5, -0.1):
        with refused(errors.TrainingError, f"a momentum of {momentum:g}"):
            freeze_oscillations(plan, 0.1, momentum=momentum)
    tx = freeze_oscillations(plan, 0.1)
    state = tx.init(params)
    with refused(errors.TrainingError, "an update without params"):
        tx.update(params, state, qstate=qstate)
    with refused(errors.TrainingError, "an update without qstate"):
        tx.update(params, state, params)
    with refused(errors.TrainingError, "is not in the tree", "the tree has v"):
        tx.init({"v": params["w"]})
    with refused(errors.TrainingError, "'v' selects no weight"):
        freeze_oscillations(plan, 0.1, select=qj.path("v"))
    with refused(errors.CalibrationError, "no QParams"):
        tx.update(params, state, params, qstate={})
