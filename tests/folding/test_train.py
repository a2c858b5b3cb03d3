"""Training with folded kernels: in float it is the model, quantized it is what is deployed."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.training import (
    Held,
    by_part,
    fold_batch_norm,
    folded_training,
    keep_positive,
    reestimate,
    refolded,
    renamed,
)
from tests import models
from tests.folding import cases
from tests.refused import refused
from tests.training.cases import close
from tests.training.cases import step as update

CASE = models.cnn()
NORMS = cases.found(CASE)
POLICY = qj.uniform_policy(weight_bits=4, activation_bits=8)


def train(variables, x):
    return models.CNN(train=True).apply(variables, x, mutable=["batch_stats"])


FOLDED = folded_training(train, NORMS)
TRAINING = models.Case(FOLDED, CASE.params, CASE.x)


def folded_function(variables, x):
    """Evaluation-mode training: the other way."""
    return CASE.f(fold_batch_norm(variables, NORMS), x)


def test_in_float_it_is_the_model():
    """Outputs, new statistics and gradients; no gradient to the running variance."""
    close(FOLDED(CASE.params, CASE.x), train(CASE.params, CASE.x), rtol=1e-5, atol=1e-5)

    def gradient(f):
        loss = lambda v: jnp.sum(jnp.tanh(f(v, CASE.x)[0]) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(CASE.params)

    found, wanted = gradient(FOLDED), gradient(train)
    close(found, wanted, rtol=1e-3, atol=1e-4)
    assert_allclose(found["batch_stats"]["BatchNorm_0"]["var"], jnp.zeros(6), atol=1e-4)
    assert np.abs(found["params"]["BatchNorm_0"]["scale"]).min() > 1e-4


def test_a_scale_of_zero_does_no_harm():
    variables = jax.tree.map(lambda a: a, CASE.params)
    scale = variables["params"]["BatchNorm_0"]["scale"]
    variables["params"]["BatchNorm_0"]["scale"] = scale.at[1].set(0.0).at[2].multiply(-1.0)
    close(FOLDED(variables, CASE.x), train(variables, CASE.x), rtol=1e-5, atol=1e-5)


def test_what_is_quantized_is_the_folded_kernel():
    """Calibrated in training mode: the scales, and the codes, of ``W k``, by NumPy in float64."""
    training = models.ready(TRAINING, POLICY)
    names = [entry.site.name for entry in training.plan.quantized]
    assert [name.startswith("f(") for name in names] == [True, True, False]
    own = models.planned(CASE, POLICY)
    state = renamed(training.qstate, training.plan, own)
    frozen = qj.freeze(own, state, fold_batch_norm(CASE.params, NORMS))
    params, stats = CASE.params["params"], CASE.params["batch_stats"]
    for name, index in zip(names[:2], (0, 1), strict=True):
        layer, norm = f"Conv_{index}", f"BatchNorm_{index}"
        k = np.float64(params[norm]["scale"]) / np.sqrt(np.float64(stats[norm]["var"]) + 1e-5)
        kernel = np.float64(params[layer]["kernel"]) * k
        scale = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True) / 8
        assert_allclose(training.qstate[name]["weight"].scale, scale, rtol=1e-5)
        found = frozen["params"][layer]["kernel"].dequantize() / scale
        codes = np.clip(np.round(kernel / scale), -8, 7)
        assert np.mean(np.abs(found - codes) < 1e-3) > 0.99  # but for ties
        assert np.abs(found - codes).max() < 1.001


class Stack(nn.Module):
    """A convolution, layers in a scan, grouped and depthwise ones."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        def norm(z):
            return nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(z)

        outer = self

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                z = nn.Dense(4, use_bias=False)(x)
                norm = nn.BatchNorm(use_running_average=not outer.train, momentum=0.9)
                return x + nn.tanh(norm(z)), None

        x = nn.relu(norm(nn.Conv(4, (3, 3), feature_group_count=2)(x)))
        x = nn.relu(norm(nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False)(x)))
        x = nn.relu(norm(nn.ConvTranspose(4, (2, 2))(x)))
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers()(x, None)[0]


def test_groups_stacked_layers_and_remat():
    x = models.normal(0, 3, 4, 4, 4)
    case = cases.made_up(Stack(), x)
    norms = cases.check_folds(case, 4)

    def f(variables, x):
        return Stack(train=True).apply(variables, x, mutable=["batch_stats"])

    g = folded_training(f, norms)
    close(g(case.params, x), f(case.params, x), rtol=1e-4, atol=1e-5)
    table = qj.sites(g, case.params, x)
    assert [site.steps for site in table] == [(), (), (), (3,)]
    assert all(site.name.startswith("f(") for site in table)


@pytest.mark.parametrize(
    ("equation", "kernel"), [("nti,hio->nhto", (2, 5, 4)), ("io,nti->nto", (5, 4))]
)
def test_products_with_channels_in_other_places(equation, kernel):
    """Two channel axes with another between them; the kernel on the left."""
    left = equation.startswith("io")
    shape = (1, 2, 1, 4) if len(kernel) == 3 else (1, 1, 4)
    own = tuple(n for n in shape if n > 1)
    params = {"w": models.normal(0, *kernel), "norm": cases.norm_params(0, 0, own)}

    def product(p, x):
        return jnp.einsum(equation, *((p["w"], x) if left else (x, p["w"])))

    def evaluate(p, x):
        m, v, g, b = (p["norm"][k].reshape(shape) for k in ("mean", "var", "scale", "offset"))
        return (product(p, x) - m) / jnp.sqrt(v + cases.EPSILON) * g + b

    norms = qj.batch_norms(evaluate, params, models.normal(1, 3, 2, 5))
    g = folded_training(product, norms)
    x = models.normal(1, 3, 2, 5)
    assert_allclose(g(params, x), product(params, x), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(g(params, x), product(params, x))


def steps_of(f, batches=4):
    """Quantization-aware training of ``f(params, stats, x)``: plan, qstate, variables, losses."""
    plan = qj.plan(POLICY, qj.sites(f, CASE.params, CASE.x))
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), CASE.params, CASE.x)
    qstate = qj.calibrate(plan, state, CASE.params)
    quantized = qj.fake_quantize(f, plan)
    labels = jnp.arange(4) % 4

    def loss(tree, stats):
        params, qstate = tree
        out = quantized(qstate, {"params": params, "batch_stats": stats}, CASE.x)
        logits, stats = (out[0], out[1]["batch_stats"]) if isinstance(out, tuple) else (out, stats)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), stats

    scales = optax.chain(optax.sgd(1e-3), keep_positive())
    optimizer = by_part(weights=optax.sgd(0.05), scale=scales)

    @jax.jit
    def move(tree, stats, state):
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(tree, stats)
        tree, state = update(optimizer, gradient, tree, state)
        return tree, stats, state, value

    tree, stats, losses = (CASE.params["params"], qstate), CASE.params["batch_stats"], []
    state = optimizer.init(tree)
    for _ in range(batches):
        tree, stats, state, value = move(tree, stats, state)
        losses.append(float(value))
    return plan, tree[1], {"params": tree[0], "batch_stats": stats}, losses


@functools.cache
def trained_in_evaluation_mode():
    return steps_of(folded_function)


@functools.cache
def trained_in_training_mode():
    return steps_of(FOLDED)


def deployed(plan, qstate, variables):
    """The folded tree, its plan, and the qstate under its names."""
    folded = fold_batch_norm(variables, NORMS)
    own = models.planned(CASE._replace(params=folded), POLICY)
    names = [entry.site.name for entry in own.quantized]
    assert names == ["params/Conv_0/kernel", "params/Conv_1/kernel", "params/Dense_0/kernel"]
    state = renamed(qstate, plan, own)
    assert list(state) == names
    return folded, own, state


@pytest.mark.slow
def test_evaluation_mode_and_what_is_deployed():
    """Simulation of the folded function, of the deployed tree, and its integer program: all one."""
    plan, qstate, variables, losses = trained_in_evaluation_mode()
    assert losses[-1] < losses[0]
    assert plan.quantized[0].site.name.startswith("f(")
    folded, own, state = deployed(plan, qstate, variables)
    quantized = jax.jit(qj.fake_quantize(folded_function, plan))
    simulated = quantized(qstate, variables, CASE.x)
    again = jax.jit(qj.fake_quantize(CASE.f, own))(state, folded, CASE.x)
    assert_allclose(again, simulated, rtol=1e-5, atol=1e-6)
    frozen = qj.freeze(own, state, folded)
    assert isinstance(frozen["params"]["Conv_0"]["kernel"], qj.QTensor)
    executed = jax.jit(qj.execute(CASE.f, own))(state, frozen, CASE.x)
    assert_array_equal(executed, again)
    # The kernels' own quantization would be another: folding does matter.
    plain = models.ready(CASE, POLICY)
    other = qj.fake_quantize(CASE.f, plain.plan)(plain.qstate, variables, CASE.x)
    assert np.abs(other - simulated).max() > 1e-3


def reestimated(plan, qstate, variables, batches):
    """Variables whose statistics are those of the batches; quantized kernels stay."""
    held = models.planned(TRAINING._replace(params=Held(variables, variables)), POLICY)
    state = renamed(qstate, plan, held)
    passes = jax.jit(qj.fake_quantize(FOLDED, held))

    def pass_of(stats, x):
        moved = Held({**variables, "batch_stats": stats}, variables)
        return passes(state, moved, x)[1]["batch_stats"]

    return {**variables, "batch_stats": reestimate(pass_of, variables["batch_stats"], batches)}


def test_training_mode_reestimation_and_what_is_deployed():
    """QAT with statistics of the batch, statistics anew, folded, frozen, executed: as simulated.

    Anew from the one batch that is evaluated, the running statistics are those of the batch, and
    the integer program returns what simulation in training mode does.
    """
    plan, qstate, variables, losses = trained_in_training_mode()
    assert losses[-1] < losses[0]
    moved = reestimated(plan, qstate, variables, [CASE.x])
    stats = moved["batch_stats"], variables["batch_stats"]
    assert np.abs(np.subtract(*(s["BatchNorm_1"]["var"] for s in stats))).max() > 1e-2
    folded, own, state = deployed(plan, qstate, moved)
    state = refolded(state, own, NORMS, variables, moved)
    frozen = qj.freeze(own, state, folded)
    executed = jax.jit(qj.execute(CASE.f, own))(state, frozen, CASE.x)
    simulated = jax.jit(qj.fake_quantize(CASE.f, own))(state, folded, CASE.x)
    assert_array_equal(executed, simulated)
    in_training, _ = jax.jit(qj.fake_quantize(FOLDED, plan))(qstate, variables, CASE.x)
    step = np.abs(in_training).max() / 127  # an activation may fall on the other side of a tie
    assert_allclose(executed, in_training, atol=2 * step)
    assert np.median(np.abs(executed - in_training)) < 0.05 * step
    # Kernels are the codes that were trained.
    before = qj.freeze(own, renamed(qstate, plan, own), fold_batch_norm(variables, NORMS))
    for layer in ("Conv_0", "Conv_1"):
        codes = (tree["params"][layer]["kernel"].codes for tree in (frozen, before))
        assert np.mean(np.equal(*codes)) > 0.99


def test_a_scale_that_channels_share_cannot_follow():
    policy = models.policy(qj.weight_quantizer(bits=4, granularity=qj.PerTensor()))
    plan = models.planned(CASE, policy)
    qstate = qj.calibrate(plan, {}, CASE.params)
    with refused(errors.TrainingError, "cannot follow", "6 channels", "PerChannel"):
        refolded(qstate, plan, NORMS, CASE.params, CASE.params)
    plan = models.planned(CASE, models.policy(qj.weight_quantizer(bits=4)))
    qstate = qj.calibrate(plan, {}, CASE.params)
    models.assert_same_bits(refolded(qstate, plan, NORMS, CASE.params, CASE.params), qstate)


@pytest.mark.parametrize("which", ["before", "after"])
def test_a_channel_whose_scale_is_zero_keeps_a_usable_range(which):
    plan = models.planned(CASE, models.policy(qj.weight_quantizer(bits=4)))
    trees = {"before": CASE.params, "after": CASE.params}
    scale = CASE.params["params"]["BatchNorm_0"]["scale"].at[1].set(0.0)
    norm = {**CASE.params["params"]["BatchNorm_0"], "scale": scale}
    trees[which] = {**CASE.params, "params": {**CASE.params["params"], "BatchNorm_0": norm}}
    folded = [fold_batch_norm(tree, NORMS) for tree in trees.values()]
    qstate = qj.calibrate(plan, {}, folded[0])
    moved = refolded(qstate, plan, NORMS, *trees.values())
    assert qj.check(moved) == []
    kernel = qj.freeze(plan, moved, folded[1])["params"]["Conv_0"]["kernel"]
    assert np.isfinite(kernel.dequantize()).all()
    zero = np.asarray(folded[1]["params"]["Conv_0"]["kernel"])[..., 1]
    if which == "after":
        assert not zero.any()
        assert not np.asarray(kernel.codes)[..., 1].any()


def test_the_same_codes_in_training_and_when_deployed():
    """The same QParams, and W times the same factor: each product is what the other one is, over
    the factor."""
    plan, qstate, variables, _ = trained_in_training_mode()
    folded, own, state = deployed(plan, qstate, variables)
    name, first = plan.quantized[0].site.name, "params/Conv_0/kernel"
    inside = qj.tap(FOLDED, qj.path(name))
    training = jax.jit(qj.fake_quantize(inside, plan))(qstate, variables, CASE.x)[name]
    outside = qj.tap(CASE.f, qj.path(first))
    evaluation = jax.jit(qj.fake_quantize(outside, own))(state, folded, CASE.x)[first]
    assert_array_equal(training, evaluation)


def test_what_is_learned_goes_through_the_fold():
    """γ has a gradient by the quantized kernel, and each scale by its own channel."""
    plan, qstate, variables, _ = trained_in_evaluation_mode()
    quantized = qj.fake_quantize(folded_function, plan)
    gradient = jax.jit(
        jax.grad(lambda v, q: jnp.sum(quantized(q, v, CASE.x) ** 2), argnums=(0, 1))
    )(variables, qstate)
    norm = gradient[0]["params"]["BatchNorm_0"]
    assert (np.abs(norm["scale"]) > 0.0).all()
    assert (np.abs(norm["bias"]) > 0.0).any()
    scales = gradient[1][plan.quantized[0].site.name]["weight"].scale
    assert scales.shape == (1, 1, 1, 6)
    assert (scales != 0.0).any()


def test_qstates_of_other_programs_are_refused():
    plan, qstate, variables, _ = trained_in_evaluation_mode()
    folded, _, _ = deployed(plan, qstate, variables)
    table = qj.sites(CASE.f, folded, CASE.x)
    other = qj.plan(qj.uniform_policy(weight_bits=2, activation_bits=8), table)
    with refused(errors.PlanMismatchError, "not of one program", "params/Conv_0/kernel"):
        renamed(qstate, plan, other)
    fewer = qj.plan(qj.Policy([qj.rule(qj.path("*Conv*"), POLICY.rules[0].scheme)]), table)
    with refused(errors.PlanMismatchError, "3 planned products and 2"):
        renamed(qstate, plan, fewer)
    with refused(errors.CalibrationError, "no QParams"):
        renamed({}, plan, plan)
    models.assert_same_bits(renamed(qstate, plan, plan), qstate)


def test_programs_without_the_products_are_refused():
    one = models.Case(lambda v, x: x @ v["params"]["Dense_0"]["kernel"], CASE.params, CASE.x)
    with refused(errors.TrainingError, "another one", "no product of params", "found none"):
        folded_training(one.f, NORMS)(CASE.params, jnp.ones((2, 8)))
    norms = qj.batch_norms(train, CASE.params, CASE.x)
    with refused(errors.TrainingError, "none of the batch norms", "training mode"):
        folded_training(train, norms)
    with refused(errors.TrainingError, "no batch_stats/BatchNorm_0/mean"):
        FOLDED({"params": CASE.params["params"], "batch_stats": {}}, CASE.x)
