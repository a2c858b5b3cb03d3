"""Folding changes no output; training with it and the deployed model are one program."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.training import NormPair, by_part, fold_batch_norm, keep_positive, renamed
from tests import models
from tests.refused import refused
from tests.training import cases

PAIRS = (NormPair("Conv_0/kernel", "BatchNorm_0"), NormPair("Conv_1/kernel", "BatchNorm_1"))
CASE = models.cnn()
POLICY = qj.uniform_policy(weight_bits=4, activation_bits=8)


def folded_function(variables, x):
    return CASE.f(fold_batch_norm(variables, PAIRS), x)


@given(
    seed=st.integers(0, 999), epsilon=st.sampled_from([0.0, 1e-5, 1e-3, 0.1]), bias=st.booleans()
)
def test_the_formula_by_an_independent_model(seed, epsilon, bias):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    layer = {"kernel": normal(3, 2, 4)} | ({"bias": normal(4)} if bias else {})
    norm = {"scale": normal(4), "bias": normal(4)}
    stats = {"mean": normal(4), "var": jnp.abs(normal(4)) + 0.1}
    variables = {
        "params": {"layer": layer, "norm": norm, "other": {"kernel": normal(4, 4)}},
        "batch_stats": {"norm": stats},
    }
    after = fold_batch_norm(variables, [NormPair("layer/kernel", "norm", epsilon)])
    gamma, beta, mean, var = (
        np.float64(a) for a in (norm["scale"], norm["bias"], stats["mean"], stats["var"])
    )
    factor = gamma / np.sqrt(var + epsilon)
    params = after["params"]

    def close(found, want):
        return assert_allclose(found, want, rtol=1e-5, atol=1e-6)

    close(params["layer"]["kernel"], np.float64(layer["kernel"]) * factor)
    if bias:
        close(params["layer"]["bias"], np.float64(layer["bias"]) * factor)
    close(params["norm"]["bias"], beta - mean * factor)
    assert_array_equal(params["norm"]["scale"], jnp.ones(4))
    assert_array_equal(after["batch_stats"]["norm"]["mean"], jnp.zeros(4))
    # What the batch norm divides by is 1, exactly.
    assert_array_equal(after["batch_stats"]["norm"]["var"] + jnp.float32(epsilon), jnp.ones(4))
    assert params["other"]["kernel"] is variables["params"]["other"]["kernel"]


def test_outputs_stay():
    after = fold_batch_norm(CASE.params, PAIRS)
    assert_allclose(CASE.f(after, CASE.x), CASE.f(CASE.params, CASE.x), rtol=1e-4, atol=1e-5)
    before = jax.tree.leaves(CASE.params)
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [leaf.shape for leaf in before]
    assert jax.tree.structure(after) == jax.tree.structure(CASE.params)
    kernel = after["params"]["Conv_0"]["kernel"]
    assert not np.allclose(kernel, CASE.params["params"]["Conv_0"]["kernel"])


def test_folding_again_changes_nothing():
    once = fold_batch_norm(CASE.params, PAIRS)
    models.assert_same_bits(fold_batch_norm(once, PAIRS), once)
    models.assert_same_bits(fold_batch_norm(CASE.params, []), CASE.params)


def test_gradients_are_those_of_the_model():
    """To kernels, γ, β, means and variances, through the folding or not."""

    def loss(f):
        return jax.grad(lambda v: jnp.sum(f(v, CASE.x) ** 2))(CASE.params)

    cases.close(loss(folded_function), loss(CASE.f), rtol=2e-3, atol=2e-3)


class Parts(nn.Module):
    """A batch norm that lacks what the caller says."""

    use_scale: bool = True
    use_bias: bool = True
    layer_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, use_bias=self.layer_bias)(x)
        return nn.BatchNorm(
            use_running_average=True, use_scale=self.use_scale, use_bias=self.use_bias
        )(x)


@pytest.mark.parametrize("options", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 0)])
def test_batch_norms_without_scale_or_shift(options):
    module = Parts(*map(bool, options))
    case = models.linen(module, models.normal(0, 6, 4))
    stats = {"mean": models.normal(1, 5), "var": jnp.abs(models.normal(2, 5)) + 0.5}
    variables = {**case.params, "batch_stats": {"BatchNorm_0": stats}}
    after = fold_batch_norm(variables, [NormPair("Dense_0/kernel", "BatchNorm_0")])
    assert_allclose(case.f(after, case.x), case.f(variables, case.x), rtol=1e-4, atol=1e-5)
    assert_array_equal(after["batch_stats"]["BatchNorm_0"]["mean"], jnp.zeros(5))


def test_nothing_to_take_the_shift():
    case = models.linen(Parts(use_bias=False, layer_bias=False), models.normal(0, 6, 4))
    with refused(errors.TrainingError, "nothing can take the shift", "use_bias=True"):
        fold_batch_norm(case.params, [NormPair("Dense_0/kernel", "BatchNorm_0")])


def test_stacked_layers():
    """Layers along the first axis of kernels and statistics are folded each."""
    norm = {"scale": models.normal(0, 3, 4), "bias": models.normal(1, 3, 4)}
    stats = {"mean": models.normal(2, 3, 4), "var": jnp.abs(models.normal(3, 3, 4)) + 0.1}
    kernel = models.normal(4, 3, 5, 4)

    def tree(at):
        return {
            "params": {"layer": {"kernel": at(kernel)}, "norm": jax.tree.map(at, norm)},
            "batch_stats": {"norm": jax.tree.map(at, stats)},
        }

    pairs = [NormPair("layer/kernel", "norm")]
    together = fold_batch_norm(tree(lambda a: a), pairs)
    for i in range(3):
        alone = fold_batch_norm(tree(lambda a, i=i: a[i]), pairs)
        models.assert_same_bits(jax.tree.map(lambda a, i=i: a[i], together), alone)


def test_dtypes_stay():
    kernel = models.normal(0, 4, 3).astype(jnp.bfloat16)
    norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
    stats = {"mean": jnp.zeros(3), "var": jnp.full(3, 4.0)}
    tree = {
        "params": {"layer": {"kernel": kernel}, "norm": norm},
        "batch_stats": {"norm": stats},
    }
    after = fold_batch_norm(tree, [NormPair("layer/kernel", "norm", 0.0)])
    assert after["params"]["layer"]["kernel"].dtype == jnp.bfloat16
    assert_array_equal(
        after["params"]["layer"]["kernel"].astype(jnp.float32),
        0.5 * kernel.astype(jnp.float32),
    )


@functools.cache
def trained():
    """Quantization-aware training with folding: weights, and scales with them."""
    table = qj.sites(folded_function, CASE.params, CASE.x)
    plan = qj.plan(POLICY, table)
    _, state = jax.jit(qj.observe(folded_function, plan))(qj.init(plan), CASE.params, CASE.x)
    qstate = qj.calibrate(plan, state, CASE.params)
    quantized = qj.fake_quantize(folded_function, plan)
    stats = CASE.params["batch_stats"]
    labels = jnp.arange(4) % 4

    def loss(tree):
        params, qstate = tree
        logits = quantized(qstate, {"params": params, "batch_stats": stats}, CASE.x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    tree = CASE.params["params"], qstate
    scales = optax.chain(optax.sgd(1e-3), keep_positive())
    optimizer = by_part(weights=optax.sgd(0.05), scale=scales)
    optimizer_state, losses = optimizer.init(tree), []
    move = jax.jit(
        lambda tree, state: (cases.step(optimizer, jax.grad(loss)(tree), tree, state), loss(tree))
    )
    for _ in range(4):
        (tree, optimizer_state), value = move(tree, optimizer_state)
        losses.append(float(value))
    variables = {"params": tree[0], "batch_stats": stats}
    return plan, tree[1], variables, losses, quantized


def test_training_with_folding_and_what_is_deployed():
    """Simulation of the folded function, of the deployed tree, and its integer program: all one."""
    plan, qstate, variables, losses, quantized = trained()
    assert losses[-1] < losses[0]
    assert plan.quantized[0].site.name.startswith("f(")
    deployed = fold_batch_norm(variables, PAIRS)
    own = qj.plan(POLICY, qj.sites(CASE.f, deployed, CASE.x))
    names = [entry.site.name for entry in own.quantized]
    assert names == ["params/Conv_0/kernel", "params/Conv_1/kernel", "params/Dense_0/kernel"]
    state = renamed(qstate, plan, own)
    assert list(state) == names
    simulated = jax.jit(quantized)(qstate, variables, CASE.x)
    again = jax.jit(qj.fake_quantize(CASE.f, own))(state, deployed, CASE.x)
    assert_allclose(again, simulated, rtol=1e-5, atol=1e-6)
    frozen = qj.freeze(own, state, deployed)
    assert isinstance(frozen["params"]["Conv_0"]["kernel"], qj.QTensor)
    executed = jax.jit(qj.execute(CASE.f, own))(state, frozen, CASE.x)
    assert_array_equal(executed, again)
    # The kernels' own quantization would be another: folding does matter.
    plain = models.ready(CASE, POLICY)
    other = qj.fake_quantize(CASE.f, plain.plan)(plain.qstate, variables, CASE.x)
    assert np.abs(other - simulated).max() > 1e-3


def test_what_is_learned_goes_through_the_fold():
    """γ has a gradient by the quantized kernel, and each scale by its own channel."""
    plan, qstate, variables, _, quantized = trained()
    gradient = jax.grad(lambda v, q: jnp.sum(quantized(q, v, CASE.x) ** 2), argnums=(0, 1))(
        variables, qstate
    )
    norm = gradient[0]["params"]["BatchNorm_0"]
    assert (np.abs(norm["scale"]) > 0.0).all()
    assert (np.abs(norm["bias"]) > 0.0).any()
    scales = gradient[1][plan.quantized[0].site.name]["weight"].scale
    assert scales.shape == (1, 1, 1, 6)
    assert (scales != 0.0).any()


def test_qstates_of_other_programs_are_refused():
    plan, qstate, variables, _, _ = trained()
    deployed = fold_batch_norm(variables, PAIRS)
    table = qj.sites(CASE.f, deployed, CASE.x)
    other = qj.plan(qj.uniform_policy(weight_bits=2, activation_bits=8), table)
    with refused(errors.PlanMismatchError, "not of one program", "params/Conv_0/kernel"):
        renamed(qstate, plan, other)
    fewer = qj.plan(qj.Policy([qj.rule(qj.path("*Conv*"), POLICY.rules[0].scheme)]), table)
    with refused(errors.PlanMismatchError, "3 planned products and 2"):
        renamed(qstate, plan, fewer)
    with refused(errors.CalibrationError, "no QParams"):
        renamed({}, plan, plan)
    models.assert_same_bits(renamed(qstate, plan, plan), qstate)


@pytest.mark.parametrize(
    ("pairs", "fragments"),
    [
        ([NormPair("Conv_7/kernel", "BatchNorm_0")], ("no params/Conv_7/kernel", "Conv_0")),
        ([NormPair("Conv_0/kernel", "Norm")], ("no batch_stats/Norm/mean", "BatchNorm_1")),
        ([NormPair("Conv_0/kernel", "BatchNorm_1")], ("3x3x3x6", "statistics of 8")),
        ([PAIRS[0], PAIRS[0]], ("Conv_0/kernel is in two pairs",)),
        ([PAIRS[0], NormPair("Conv_1/kernel", "BatchNorm_0")], ("BatchNorm_0 is in two pairs",)),
    ],
)
def test_mistakes_are_refused(pairs, fragments):
    with refused(errors.TrainingError, *fragments):
        fold_batch_norm(CASE.params, pairs)
