"""Networks as they are published: their function stays, and what they get right in W8A8."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits

import quantjax as qj
from experiments.models.mobilenet import MobileNetV2, Stage
from experiments.models.resnet import ResNet
from tests import models
from tests.folding import cases


@pytest.mark.parametrize("blocks", [1, 3])
def test_resnet(blocks):
    """ResNet-8 and ResNet-20: each convolution has its batch norm."""
    case = cases.made_up(ResNet(blocks), models.normal(0, 2, 8, 8, 3))
    norms = cases.check_folds(case, 6 * blocks + 1, rtol=1e-3, atol=1e-3)
    table = qj.sites(case.f, case.params, case.x)
    assert [norm.site for norm in norms] == [site.name for site in table][:-1]
    assert norms[0].site == "params/conv1/kernel"


def test_mobilenet():
    """Expanded, filtered by channel, projected: three norms a block, two without an expansion."""
    stages = Stage(1, 4, 1, 1), Stage(3, 6, 2, 2)
    module = MobileNetV2(stages, classes=3, stem=8, head=16)
    case = cases.made_up(module, models.normal(0, 2, 8, 8, 3))
    norms = cases.check_folds(case, 2 + 2 + 3 + 3, rtol=1e-3, atol=1e-3)
    depthwise = [norm for norm in norms if "depthwise/" in norm.site]
    assert [norm.kernel.axes for norm in depthwise] == [(3,)] * 3


class Digits(nn.Module):
    """Two convolutions, the second of each channel by itself, and a head."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        def norm(z):
            return nn.relu(nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(z))

        x = norm(nn.Conv(16, (3, 3), use_bias=False)(x))
        x = norm(nn.Conv(16, (3, 3), strides=2, feature_group_count=16)(x))
        x = norm(nn.Conv(24, (1, 1), use_bias=False)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@functools.cache
def digits():
    """Trained for 300 steps: variables, images and labels it never saw."""
    data = load_digits()
    images = jnp.asarray(data.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(data.target, jnp.int32)
    variables = Digits().init(jax.random.key(0), images[:1])
    optimizer = optax.adam(1e-2)

    def loss(params, stats, x, y):
        tree = {"params": params, "batch_stats": stats}
        logits, new = Digits(train=True).apply(tree, x, mutable=["batch_stats"])
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return cross, new["batch_stats"]

    @jax.jit
    def step(params, stats, state, key):
        batch = jax.random.randint(key, (64,), 0, 1200)
        gradient, stats = jax.grad(loss, has_aux=True)(params, stats, images[batch], labels[batch])
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), stats, state

    params, stats = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # for optax, which counts steps in int32
        for key in jax.random.split(jax.random.key(1), 300):
            params, stats, state = step(params, stats, state, key)
    return {"params": params, "batch_stats": stats}, images, labels


def accuracy(policy, tree):
    """Of simulation, with ranges of 256 images that were trained on, and of the integer program."""
    _, images, labels = digits()
    f, seen, test = Digits().apply, images[:256], images[1200:]
    plan = qj.plan(policy, qj.sites(f, tree, seen))
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), tree, seen)
    qstate = qj.calibrate(plan, state, tree)
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, tree, test)
    executed = jax.jit(qj.execute(f, plan))(qstate, qj.freeze(plan, qstate, tree), test)
    assert_array_equal(executed, simulated)
    return float(jnp.mean(simulated.argmax(-1) == labels[1200:]))


@pytest.mark.slow
def test_accuracy_in_eight_bits_is_that_of_the_network_that_is_not_folded():
    variables, images, labels = digits()
    f = jax.jit(Digits().apply)
    norms = qj.batch_norms(f, variables, images[:1])
    assert [norm.reason for norm in norms] == ["", "", ""]
    folded = qj.fold_batch_norm(variables, norms)
    logits = [f(tree, images[1200:]) for tree in (variables, folded)]
    assert_allclose(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    in_float = float(jnp.mean(logits[0].argmax(-1) == labels[1200:]))
    policy = qj.uniform_policy(weight_bits=8, activation_bits=8)
    plain, after = accuracy(policy, variables), accuracy(policy, folded)
    assert in_float > 0.85
    one = 1.0 / 597
    assert after >= plain - 2 * one
    assert after >= in_float - 10 * one
