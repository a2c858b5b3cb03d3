"""Folding changes no output, and does what the formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.folding import BatchNorm, Place
from tests import models
from tests.folding import cases
from tests.refused import refused
from tests.training.cases import close

CASE = models.cnn()
NORMS = cases.found(CASE)


def of_vectors(epsilon, *, bias):
    """``w`` and a batch norm of four channels, without a trace."""

    def place(path):
        numbers = (0, 1, 2, 3)
        return Place(path, (4,), numbers, numbers)

    return BatchNorm(
        "w",
        kernel=Place("w", (1, 1, 4), (0, 1, 2, 3)),
        mean=place("mean"),
        variance=place("var"),
        scale=place("scale"),
        offset=place("offset"),
        bias=place("b") if bias else None,
        epsilon=epsilon,
        channels=4,
    )


@given(
    seed=st.integers(0, 999), epsilon=st.sampled_from([0.0, 1e-5, 1e-3, 0.1]), bias=st.booleans()
)
def test_the_formula_by_an_independent_model(seed, epsilon, bias):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    params = {
        "w": normal(3, 2, 4),
        "scale": normal(4),
        "offset": normal(4),
        "mean": normal(4),
        "var": jnp.abs(normal(4)) + 0.1,
        "other": normal(4, 4),
    } | ({"b": normal(4)} if bias else {})
    after = qj.fold_batch_norm(params, [of_vectors(epsilon, bias=bias)])
    gamma, beta, mean, var, kernel = (
        np.float64(params[name]) for name in ("scale", "offset", "mean", "var", "w")
    )
    factor = gamma / np.sqrt(var + epsilon)
    assert_allclose(after["w"], kernel * factor, rtol=1e-5, atol=1e-6)
    if bias:
        assert_allclose(after["b"], np.float64(params["b"]) * factor, rtol=1e-5, atol=1e-6)
    assert_allclose(after["offset"], beta - mean * factor, rtol=1e-5, atol=1e-6)
    assert_array_equal(after["scale"], jnp.ones(4))
    assert_array_equal(after["mean"], jnp.zeros(4))
    # What the batch norm divides by is 1, exactly.
    assert_array_equal(after["var"] + jnp.float32(epsilon), jnp.ones(4))
    assert after["other"] is params["other"]


@given(
    seed=st.integers(0, 99),
    form=st.sampled_from(cases.FORMS[:4]),
    zero_variance=st.booleans(),
    zero_scale=st.booleans(),
)
def test_the_function_stays_and_folding_again_changes_nothing(
    seed, form, zero_variance, zero_scale
):
    case = cases.dense(form, bias=True, seed=seed)
    norm = case.params["norm"]
    if zero_variance:
        norm["var"] = norm["var"].at[1].set(0.0)
    if zero_scale:
        norm["scale"] = norm["scale"].at[2].set(0.0)
    norms = cases.found(case)
    once = qj.fold_batch_norm(case.params, norms)
    before = case.f(case.params, case.x)
    reach = float(jnp.max(jnp.abs(before)))
    assert_allclose(case.f(once, case.x), before, rtol=1e-4, atol=1e-5 * reach)
    models.assert_same_bits(qj.fold_batch_norm(once, norms), once)
    assert cases.found(case._replace(params=once)) == norms


def test_outputs_stay():
    after = qj.fold_batch_norm(CASE.params, NORMS)
    assert_allclose(CASE.f(after, CASE.x), CASE.f(CASE.params, CASE.x), rtol=1e-4, atol=1e-5)
    cases.check_tree(CASE.params, after)
    kernel = after["params"]["Conv_0"]["kernel"]
    assert not np.allclose(kernel, CASE.params["params"]["Conv_0"]["kernel"])
    assert after["params"]["Dense_0"]["kernel"] is CASE.params["params"]["Dense_0"]["kernel"]


def test_the_same_sites_and_in_a_trace_as_well():
    """One call of the model can fold, under jit, and its table names the same products."""
    after = jax.jit(lambda tree: qj.fold_batch_norm(tree, NORMS))(CASE.params)
    close(after, qj.fold_batch_norm(CASE.params, NORMS), rtol=1e-5, atol=1e-6)
    before, now = (qj.sites(CASE.f, tree, CASE.x) for tree in (CASE.params, after))
    assert [site.name for site in before] == [site.name for site in now]


def test_many_trees_at_once():
    """The rows are static: a batch of models folds under vmap as each does alone."""
    trees = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), CASE.params)
    together = jax.vmap(lambda tree: qj.fold_batch_norm(tree, NORMS))(trees)
    alone = qj.fold_batch_norm(jax.tree.map(lambda a: a[1], trees), NORMS)
    close(jax.tree.map(lambda a: a[1], together), alone, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_model():
    """To kernels, γ, β, means and variances, through the folding or not."""

    def loss(f):
        return jax.grad(lambda v: jnp.sum(f(v, CASE.x) ** 2))(CASE.params)

    folded = loss(lambda v, x: CASE.f(qj.fold_batch_norm(v, NORMS), x))
    close(folded, loss(CASE.f), rtol=2e-3, atol=2e-3)


def test_none_and_some_of_the_norms():
    models.assert_same_bits(qj.fold_batch_norm(CASE.params, []), CASE.params)
    after = qj.fold_batch_norm(CASE.params, NORMS[:1])
    for name in ("Conv_1", "BatchNorm_1"):
        models.assert_same_bits(after["params"][name], CASE.params["params"][name])
    rest = qj.fold_batch_norm(after, NORMS[1:])
    models.assert_same_bits(rest, qj.fold_batch_norm(CASE.params, NORMS))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dtypes_stay(dtype):
    """Arithmetic is in float32; the kernel is rounded once."""
    params = {
        "w": models.normal(0, 3, 2, 4).astype(dtype),
        "scale": jnp.ones(4),
        "offset": jnp.ones(4),
        "mean": jnp.zeros(4),
        "var": jnp.full(4, 9.0),
    }
    after = qj.fold_batch_norm(params, [of_vectors(0.0, bias=False)])
    assert after["w"].dtype == dtype
    third = jnp.float32(1.0) / jnp.sqrt(jnp.float32(9.0))
    assert_array_equal(after["w"], (params["w"].astype(jnp.float32) * third).astype(dtype))


def test_float64():
    with jax.enable_x64():
        case = cases.dense(cases.standard)
        params = jax.tree.map(lambda a: jnp.asarray(np.float64(a)), case.params)
        wide = models.Case(case.f, params, jnp.asarray(np.float64(case.x)))
        cases.check_folds(wide, rtol=1e-11, atol=1e-11)


def without(tree, *path):
    """A copy of nested dicts without one entry."""
    first, *rest = path
    if not rest:
        return {key: value for key, value in tree.items() if key != first}
    return {**tree, first: without(tree[first], *rest)}


def test_mistakes_are_refused():
    params = CASE.params
    with refused(errors.TrainingError, "no params/Conv_1/kernel", "Conv_0/kernel", "find them"):
        qj.fold_batch_norm(without(params, "params", "Conv_1", "kernel"), NORMS)
    with refused(errors.TrainingError, "no batch_stats/BatchNorm_0/var", "batch_stats/BatchNorm_1"):
        qj.fold_batch_norm(without(params, "batch_stats", "BatchNorm_0", "var"), NORMS)
    with refused(errors.TrainingError, "belongs to two batch norms", "Conv_0/kernel"):
        qj.fold_batch_norm(params, [NORMS[0], NORMS[0]])
    other = jax.tree.map(lambda a: a, params)
    other["params"]["Conv_0"]["kernel"] = jnp.ones((3, 3, 3, 7))
    with refused(errors.TrainingError, "the shape 3x3x3x7", "found in 1x1x1x6"):
        qj.fold_batch_norm(other, NORMS)
    other["params"]["Conv_0"]["kernel"] = jnp.ones((5, 5, 2, 6))
    other["params"]["BatchNorm_0"]["scale"] = jnp.ones((1, 6))
    with refused(errors.TrainingError, "BatchNorm_0/scale has the shape 1x6"):
        qj.fold_batch_norm(other, NORMS)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 0.1])
def test_epsilon_is_what_the_program_has(epsilon):
    """In float64 with all its digits: rounded to float32 it left an error of 1e-8."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        params = {
            "w": jnp.asarray(draw.normal(size=(8, 6))),
            "mean": jnp.asarray(draw.normal(size=(1, 6))),
            "var": jnp.asarray(draw.uniform(1e-3, 2e-3, (1, 6))),
        }
        x = jnp.asarray(draw.normal(size=(16, 8)))

        def f(p, x):
            return (x @ p["w"] - p["mean"]) / jnp.sqrt(p["var"] + epsilon) + p["shift"]

        params["shift"] = params["mean"] + 1.0
        norms = qj.batch_norms(f, params, x)
        assert norms[0].epsilon == epsilon
        folded = qj.fold_batch_norm(params, norms)
        assert_allclose(f(folded, x), f(params, x), rtol=1e-12, atol=1e-12)
