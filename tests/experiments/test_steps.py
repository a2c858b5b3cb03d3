"""The networks and the training step of benchmarks: steps learn, with fake quantization too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from experiments.models.cnn import SmallCNN
from experiments.steps import CASES, Case, Transformer, fenced, train_step
from tests.models import normal


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_has_ten_classes(name):
    case = CASES[name]
    x = jax.ShapeDtypeStruct((4, *case.shape[1:]), jnp.float32)
    variables = jax.eval_shape(case.model.init, jax.random.key(0), x)
    assert jax.eval_shape(case.model.apply, variables, x).shape == (4, 10)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_a_step_lowers_the_loss(quantized):
    case = Case(Transformer(layers=1, width=16), (8, 4, 16))
    x, labels = normal(0, *case.shape), jnp.arange(8) % 10
    variables = dict(jax.jit(case.model.init)(jax.random.key(0), x))

    def f(variables, x):
        return case.model.apply(variables, x), {}

    apply, qstate = lambda _, variables, x: f(variables, x), {}
    if quantized:
        plan = qj.plan(qj.uniform_policy(), qj.sites(f, variables, x))
        _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), variables, x)
        apply = qj.fake_quantize(f, plan)
        qstate = jax.jit(lambda state: qj.calibrate(plan, state, variables))(state)
    optimizer = optax.sgd(0.3)
    step, moments = train_step(apply, optimizer), optimizer.init(variables["params"])

    @jax.jit
    def loss(variables):
        logits, _ = apply(qstate, variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    trained = variables
    for _ in range(3):
        trained, moments = step(trained, moments, qstate, x, labels)
    assert loss(trained) < 0.9 * loss(variables)
    before, after = (
        np.concatenate([np.ravel(a) for a in jax.tree.leaves(v)]) for v in (variables, trained)
    )
    assert np.isfinite(after).all()
    assert (before != after).mean() > 0.9


def test_statistics_of_batch_norm_go_through_a_step():
    model = SmallCNN(channels=(2, 4), strides=(2, 2))
    x, labels = normal(0, 2, 8, 8, 1), jnp.array([1, 2])
    variables = dict(jax.jit(model.init)(jax.random.key(0), x))

    def f(_, variables, x):
        logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, {"batch_stats": new["batch_stats"]}

    optimizer = optax.sgd(0.1)
    trained, _ = train_step(f, optimizer)(
        variables, optimizer.init(variables["params"]), {}, x, labels
    )
    assert jax.tree.structure(trained) == jax.tree.structure(variables)
    pairs = zip(
        jax.tree.leaves(variables["batch_stats"]),
        jax.tree.leaves(trained["batch_stats"]),
        strict=True,
    )
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def test_fences_change_no_value():
    module = SmallCNN(channels=(2, 4), strides=(2, 2))
    x = normal(0, 2, 8, 8, 1)
    variables = module.init(jax.random.key(0), x)

    def f(variables, x):
        return module.apply(variables, x)

    np.testing.assert_allclose(fenced(f)(variables, x), f(variables, x), rtol=1e-5, atol=1e-6)
    text = str(jax.make_jaxpr(fenced(f))(variables, x))
    products = len(qj.sites(f, variables, x))
    assert text.count("optimization_barrier") == 2 * products > 0
