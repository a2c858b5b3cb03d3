"""Sizes by counting, gradients by hand, weights that are shared or stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.training import by_part, keep_between, learned_bits, weight_bits_total, with_bits
from tests import models
from tests.refused import refused
from tests.training import cases

LEARNED = qj.weight_quantizer(bits=4, estimator=qj.estimators.ROUNDED_WIDTH)


def kernels(params):
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]


def test_sizes_are_counted():
    case = models.cnn()
    ready = models.ready(case, qj.uniform_policy(weight_bits=3, activation_bits=8))
    entries = [kernel.size for kernel in kernels(case.params)]
    assert float(weight_bits_total(ready.plan, ready.qstate)) == 3 * sum(entries)
    name = ready.plan.quantized[0].site.name
    first = ready.plan.quantized[0].site.weight
    other = with_bits(ready.plan, ready.qstate, weight_bits={name: 8}, activation_bits=2)
    total = 3 * sum(entries) + 5 * np.prod(first.shape)
    assert float(weight_bits_total(ready.plan, other)) == total


def test_bypass_counts_the_dtype():
    for dtype, own in ((jnp.float32, 32), (jnp.bfloat16, 16)):
        plan, qstate, _ = cases.one_product(np.ones((6, 2)), dtype=dtype)
        asleep = with_bits(plan, qstate, weight_bits=0)
        assert float(weight_bits_total(plan, asleep)) == 12 * own
        assert float(weight_bits_total(plan, qstate)) == 12 * 4


def test_activations_do_not_count():
    case = models.dense()
    ready = models.ready(case, models.policy(None, qj.activation_quantizer(bits=4)))
    assert float(weight_bits_total(ready.plan, ready.qstate)) == 0.0
    assert float(learned_bits(ready.plan, ready.qstate)["w"]["activation"]) == 4.0


def test_stacked_layers_count_each():
    _, plan, qstate = cases.stacked(3)
    changed = with_bits(plan, qstate, weight_bits=jnp.array([2.0, 4.0, 8.0]))
    assert float(weight_bits_total(plan, changed)) == 16 * (2 + 4 + 8)
    (name,) = qstate
    assert_array_equal(learned_bits(plan, changed)[name]["weight"], [2.0, 4.0, 8.0])


def test_a_weight_of_two_sites_counts_once():
    case = models.Case(
        lambda p, x: (x @ p["w"]) @ p["w"], {"w": models.normal(0, 4, 4)}, models.normal(1, 2, 4)
    )
    ready = models.ready(case, qj.uniform_policy(weight_bits=4))
    assert len(ready.qstate) == 2
    first = next(iter(ready.qstate))
    changed = with_bits(ready.plan, ready.qstate, weight_bits={first: 6})
    assert float(weight_bits_total(ready.plan, changed)) == 16 * 6


def test_widths_that_are_learned():
    """Rounded straight through: total and gradient by hand, the widest group counts."""
    plan, qstate, _ = cases.one_product(models.normal(0, 6, 3), LEARNED)
    weight = qstate["w"]["weight"]
    theta = {**weight.theta, "width": jnp.array([[2.2, 5.6, 3.0]])}
    qstate = {"w": {"weight": weight._replace(theta=theta)}}
    value, gradient = jax.value_and_grad(lambda q: weight_bits_total(plan, q))(qstate)
    assert float(value) == 18 * 6
    assert_array_equal(gradient["w"]["weight"].theta["width"], [[0.0, 18.0, 0.0]])
    assert float(learned_bits(plan, qstate)["w"]["weight"]) == 6.0


def test_the_width_that_follows_from_clip_and_step():
    """ceil(log2(q_max/d + 1)) + 1, derivative 1/((q_max + d) ln 2) with respect to q_max."""
    quantizer = qj.weight_quantizer(
        bits=4,
        estimator=qj.estimators.DIFFERENTIABLE_QUANTIZATION,
        granularity=qj.PerTensor(),
    )
    plan, _, _ = cases.one_product(models.normal(0, 6, 3), quantizer)
    qstate = {"w": {"weight": cases.qparams([[0.25]], clip=[[3.0]])}}
    value, gradient = jax.value_and_grad(lambda q: weight_bits_total(plan, q))(qstate)
    assert float(value) == 18 * (np.ceil(np.log2(3.0 / 0.25 + 1.0)) + 1.0)
    slope = 18 / (3.25 * np.log(2.0))
    assert_allclose(gradient["w"]["weight"].theta["clip"], [[slope]], rtol=1e-5)
    assert_allclose(gradient["w"]["weight"].scale, [[-slope * 3.0 / 0.25]], rtol=1e-5)


def test_a_penalty_makes_a_model_as_small_as_asked():
    """Descent on the size alone stops at the budget."""
    plan, qstate, _ = cases.one_product(models.normal(0, 6, 3), LEARNED)
    budget = 18 * 3.0

    def loss(q):
        return jax.nn.relu(weight_bits_total(plan, q) - budget) / 18.0

    rate = optax.chain(optax.sgd(0.5), keep_between(1.0, 8.0, names=("width",)))
    optimizer = by_part(theta={"width": rate})
    state = optimizer.init(qstate)
    move = jax.jit(lambda q, state: cases.step(optimizer, jax.grad(loss)(q), q, state))
    assert float(weight_bits_total(plan, qstate)) == 18 * 4.0
    for _ in range(20):
        qstate, state = move(qstate, state)
    assert float(weight_bits_total(plan, qstate)) <= budget
    assert float(learned_bits(plan, qstate)["w"]["weight"]) == pytest.approx(3.0, abs=1.0)


def test_traced_widths_are_one_program():
    plan, qstate, _ = cases.one_product(np.ones((4, 4)))
    widths = jnp.arange(0.0, 9.0)
    sizes = jax.vmap(lambda b: weight_bits_total(plan, with_bits(plan, qstate, weight_bits=b)))
    assert_array_equal(jax.jit(sizes)(widths), 16 * np.array([32, *range(1, 9)]))


def test_a_qstate_of_another_plan_is_refused():
    plan, _, _ = cases.one_product(np.ones((4, 4)))
    for function in (learned_bits, weight_bits_total):
        with refused(errors.CalibrationError, "no QParams for a planned operand"):
            function(plan, cases.qstate())


@pytest.mark.parametrize(
    "f",
    [
        lambda p, x: jnp.tanh(p["w"][x]) @ p["w"].T,
        lambda p, x: jnp.tanh(jnp.eye(16)[x] @ p["w"]) @ p["w"].T,
        lambda p, x: (jnp.eye(16)[x] @ p["w"], jnp.eye(8)[x] @ p["w"].reshape(8, 16)),
        lambda p, x: (
            jnp.eye(16)[x] @ p["w"],
            jnp.eye(16)[x].astype("bfloat16") @ p["w"].astype("bfloat16"),
        ),
    ],
    ids=["looked up", "transposed", "reshaped", "cast"],
)
def test_a_tied_weight_counts_once_however_it_enters(f):
    """The table of a language model, looked up and turned around: it was counted twice."""
    params, tokens = {"w": models.normal(0, 16, 8)}, jnp.arange(3)
    policy = qj.uniform_policy(weight_bits=4, activation_bits=None)
    plan = qj.plan(policy, qj.sites(f, params, tokens))
    assert len(plan.quantized) == 2
    qstate = qj.calibrate(plan, {}, params)
    assert float(weight_bits_total(plan, qstate)) == 4 * 128
    wider = with_bits(plan, qstate, weight_bits={plan.quantized[1].site.name: 6})
    assert float(weight_bits_total(plan, wider)) == 6 * 128
