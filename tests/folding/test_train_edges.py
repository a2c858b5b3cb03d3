"""Folding while training where models do more than once through: two passes, casts, biases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.training import fold_batch_norm, folded_training, refolded, renamed
from tests import models
from tests.refused import refused

X = models.normal(0, 32, 8)


def normed(p, x, *, train, product=lambda p, x: x @ p["w"]):
    """A product and its batch norm."""
    z = product(p, x)
    mean, variance = (z.mean(0), z.var(0)) if train else (p["mean"], p["var"])
    return (z - mean[None]) * jax.lax.rsqrt(variance + 1e-3)[None] * p["gain"] + p["shift"][None]


def variables(**more):
    draw = np.random.default_rng(1)
    return {
        "w": models.normal(2, 8, 6),
        "mean": jnp.zeros(6),
        "var": jnp.asarray(draw.uniform(4, 160, 6), jnp.float32),
        "gain": jnp.asarray(draw.uniform(0.5, 2, (1, 6)), jnp.float32),
        "shift": jnp.zeros(6),
        **more,
    }


def folding(p=None, **how):
    """Evaluation, its batch norms, and training with folded kernels."""
    evaluate = functools.partial(normed, train=False, **how)
    norms = qj.batch_norms(evaluate, p or variables(), X)
    return evaluate, norms, folded_training(functools.partial(normed, train=True, **how), norms)


def weights_of(bits, **settings):
    scheme = qj.Scheme(weights=qj.weight_quantizer(bits=bits, **settings))
    return qj.Policy([qj.rule(qj.weighted(), scheme)])


def test_all_passes_have_the_folded_kernel():
    """A loss over two views: the kernel of the second one was left as it is."""
    p, norms = variables(), folding()[1]
    views = lambda p, a, b: tuple(normed(p, x, train=True) for x in (a, b))  # noqa: E731
    g = folded_training(views, norms)
    for found, wanted in zip(g(p, X, 2.0 * X), views(p, X, 2.0 * X), strict=True):
        assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    table = qj.sites(g, p, X, X)
    assert [site.name for site in table] == ["f(gain,var,w)", "f(gain,var,w)#1"]
    plan = qj.plan(weights_of(3, granularity=qj.PerTensor()), table)
    first, second = qj.fake_quantize(g, plan)(qj.calibrate(plan, {}, p), p, X, X)
    assert_array_equal(first, second)


def test_a_product_of_the_kernel_with_itself_stays():
    """What a penalty computes is no pass of the model."""
    p, norms = variables(), folding()[1]
    penalized = lambda p, x: (normed(p, x, train=True), p["w"].T @ p["w"])  # noqa: E731
    _, gram = folded_training(penalized, norms)(p, X)
    assert_array_equal(gram, p["w"].T @ p["w"])


def tied(p, x):
    """A decoder with the transposed kernel, whose channels are its inputs."""
    h = jnp.tanh(normed(p, x, train=True))
    return h, h @ p["w"].T


def forces(p, x):
    """The gradient by the inputs, which multiplies with the transposed kernel."""
    return jax.value_and_grad(lambda x: jnp.sum(jnp.tanh(normed(p, x, train=True)) ** 2))(x)


def turned(p, x):
    """Two uses whose channels are numbered otherwise."""
    w = p["w"].reshape(8, 2, 3)
    again = jnp.einsum("ni,idh->ndh", x, w.transpose(0, 2, 1))
    return normed(p, x, train=True), again


@pytest.mark.parametrize(
    ("f", "outputs"), [(tied, 6), (tied, 8), (forces, 6), (forces, 8), (turned, 6)]
)
def test_other_products_of_the_kernel_are_left_alone(f, outputs):
    """Square kernels were divided along the wrong axis, others refused."""
    draw = np.random.default_rng(3)
    p = {
        **variables(),
        "w": models.normal(2, 8, outputs),
        "mean": jnp.zeros(outputs),
        "var": jnp.asarray(draw.uniform(0.1, 9, outputs), jnp.float32),
        "gain": jnp.asarray(draw.uniform(0.5, 2, (1, outputs)), jnp.float32),
        "shift": jnp.zeros(outputs),
    }
    norms = folding(p)[1]
    jax.tree.map(
        lambda got, want: assert_allclose(got, want, rtol=1e-3, atol=1e-4),
        folded_training(f, norms)(p, X),
        f(p, X),
    )


def test_a_stopped_kernel_stops_no_factor():
    """γ has the gradient that it has without folding."""
    p = variables(w=0.02 * models.normal(2, 8, 6), var=jnp.full(6, 4e-4))
    stopped = lambda p, x: x @ jax.lax.stop_gradient(p["w"])  # noqa: E731
    _, _, g = folding(p, product=stopped)
    f = functools.partial(normed, train=True, product=stopped)
    found, wanted = (jax.grad(lambda p, f=f: jnp.sum(jnp.tanh(f(p, X))))(p) for f in (g, f))
    assert_allclose(found["gain"], wanted["gain"], rtol=1e-3, atol=1e-4)
    assert not np.any(found["w"])


def test_statistics_of_a_float64_model_move_float32_scales():
    with jax.enable_x64(True):
        p = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), variables())
        x = jnp.asarray(np.asarray(X), jnp.float64)
        evaluate = functools.partial(normed, train=False)
        norms = qj.batch_norms(evaluate, p, x)
        own = qj.plan(weights_of(4), qj.sites(evaluate, p, x))
        qstate = qj.calibrate(own, {}, fold_batch_norm(p, norms))
        after = {**p, "var": 9.0 * p["var"]}
        moved = refolded(qstate, own, norms, p, after)
        assert qj.check(moved, own) == []
        codes = [
            qj.freeze(own, state, fold_batch_norm(tree, norms))["w"].codes
            for state, tree in ((qstate, p), (moved, after))
        ]
        assert np.mean(codes[0] == codes[1]) > 0.98


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_mixed_precision_are_those_deployed(bits):
    """``W k`` is rounded to float32 and then cast, as the folded parameter is; a bfloat16 ``W``
    times ``k`` was another code in a twentieth of all entries at 8 bits."""

    def product(p, x):
        pair = x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16)
        return jax.lax.dot(*pair, preferred_element_type=jnp.float32)

    p = variables(w=models.normal(3, 8, 6) * 3.0)
    evaluate, norms, g = folding(p, product=product)
    rows = jnp.eye(8)  # the product is the kernel itself
    plan, own = (qj.plan(weights_of(bits), qj.sites(f, p, rows)) for f in (g, evaluate))
    qstate = qj.calibrate(plan, {}, p)
    moved = renamed(qstate, plan, own)
    name = plan.quantized[0].site.name
    inside = qj.tap(g, qj.path(name))
    trained = qj.fake_quantize(inside, plan)(qstate, p, rows)[name]
    frozen = qj.freeze(own, moved, fold_batch_norm(p, norms))["w"]
    assert_array_equal(np.round(trained / moved["w"]["weight"].scale), frozen.codes)


@pytest.mark.parametrize("gain", [0.0, 1e-37, 1e-20, 1e-19, 1e-13, 1e-10])
def test_gradients_are_finite_however_small_a_factor_is(gain):
    p = variables()
    p["gain"] = p["gain"].at[0, 2].set(gain)
    _, _, g = folding(p)
    plan = qj.plan(qj.uniform_policy(weight_bits=8, activation_bits=None), qj.sites(g, p, X))
    qstate = qj.calibrate(plan, {}, p)
    for f in (g, functools.partial(qj.fake_quantize(g, plan), qstate)):
        gradient = jax.grad(lambda p, f=f: jnp.sum(jnp.tanh(f(p, X)) ** 2))(p)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    wanted = jax.grad(lambda p: jnp.sum(jnp.tanh(normed(p, X, train=True)) ** 2))(p)
    got = jax.grad(lambda p: jnp.sum(jnp.tanh(g(p, X)) ** 2))(p)
    assert_allclose(got["gain"], wanted["gain"], rtol=1e-3, atol=1e-4)


def test_a_factor_that_is_no_number_stays_one():
    p = variables(var=jnp.full(6, jnp.nan))
    assert np.isnan(folding()[2](p, X)).all()


BEHIND = {
    "outputs": {"outputs": qj.activation_quantizer()},
    "biases": {"biases": qj.bias_quantizer(bits=8)},
    "at the sums": {"biases": qj.AccumulatorBias()},
}


@pytest.mark.parametrize("which", BEHIND)
def test_a_range_behind_a_bias_is_another_one_in_training(which):
    """Where the product has a bias, the folded one is divided ahead of it."""
    biased = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    p = variables(b=jnp.full((1, 6), 20.0), mean=jnp.full(6, 20.0))
    evaluate, norms, g = folding(p, product=biased)
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(), activations=qj.activation_quantizer(), **BEHIND[which]
    )
    policy = qj.Policy([qj.rule(qj.weighted(), scheme)])
    plan, own = (qj.plan(policy, qj.sites(f, p, X)) for f in (g, evaluate))
    qstate = qj.calibrate(plan, qj.observe(g, plan)(qj.init(plan), p, X)[1], p)
    with refused(errors.PlanMismatchError, "output or bias", "f(gain,var,w) and w"):
        renamed(qstate, plan, own)
    # Without a bias both are the product's.
    evaluate, norms, g = folding()
    plan, own = (qj.plan(policy, qj.sites(f, variables(), X)) for f in (g, evaluate))
    qstate = qj.calibrate(plan, qj.observe(g, plan)(qj.init(plan), p, X)[1], p)
    moved = renamed(qstate, plan, own)
    assert moved.keys() == {"w"}
    folded = fold_batch_norm(variables(), norms)
    out = jax.jit(qj.execute(evaluate, own))(moved, qj.freeze(own, moved, folded), X)
    assert_allclose(out, evaluate(variables(), X), atol=0.1)


def test_statistics_move_under_the_plan_of_the_deployed_model():
    """With that of training nothing moved, and nothing was said."""
    p, (_, norms, g) = variables(), folding()
    plan = qj.plan(weights_of(4), qj.sites(g, p, X))
    qstate = qj.calibrate(plan, {}, p)
    after = {**p, "var": 9.0 * p["var"]}
    with refused(errors.PlanMismatchError, "no site of the plan is w", "f(gain,var,w)", "renamed"):
        refolded(qstate, plan, norms, p, after)


def test_what_is_no_batch_norm_or_plan_is_refused():
    p, (evaluate, _, g) = variables(), folding()
    table = qj.sites(evaluate, p, X)
    plan = qj.plan(weights_of(4), table)
    qstate = qj.calibrate(plan, {}, p)
    with refused(errors.ArgumentError, "norms is a SiteTable", "qj.batch_norms"):
        folded_training(evaluate, table)
    with refused(errors.ArgumentError, "one of the norms is a str"):
        fold_batch_norm(p, ["w"])
    with refused(errors.ArgumentError, "other is a SiteTable"):
        renamed(qstate, plan, table)
    with refused(errors.ArgumentError, "plan of a qstate is a SiteTable", "qj.plan"):
        renamed(qstate, table, plan)
    with refused(errors.ArgumentError, "qstate is None", "qj.calibrate"):
        renamed(None, plan, plan)
    assert g(p, X).shape == (32, 6)
