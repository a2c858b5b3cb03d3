"""Masks by hand, exact numbers by rank, groups, gradients, grids, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors, pruning
from quantjax.pruning import MaskGradient, NOfM, Scope, structures
from tests import models
from tests.refused import refused

BY_HAND = jnp.array([[0.1, -0.5, 0.3, 0.0], [-2.0, 0.2, 0.4, -0.6]])
TREE = {"a": {"kernel": BY_HAND, "bias": jnp.ones(4)}, "b": {"kernel": 10.0 * BY_HAND[:, :2]}}


def counts(mask) -> list[int]:
    """How many go, kernel by kernel."""
    return [int((~np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(mask) if np.ndim(leaf)]


def numpy_mask(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """All but the lowest, of equal ones the first: independent of the implementation."""
    away = int(np.round(np.float32(sparsity) * np.float32(scores.size)))
    lowest = sorted(range(scores.size), key=lambda i: (scores.ravel()[i], i))[:away]
    mask = np.ones(scores.size, bool)
    mask[lowest] = False
    return mask.reshape(scores.shape)


def test_masks_by_hand():
    mask = qj.prune_mask(TREE, 0.5)
    assert_array_equal(
        mask["a"]["kernel"], [[False, True, False, False], [True, False, True, True]]
    )
    assert_array_equal(mask["b"]["kernel"], [[False, True], [True, False]])
    assert mask["a"]["bias"].shape == ()
    everywhere = qj.prune_mask(TREE, 0.5, scope=Scope.GLOBAL)
    # Of a the two largest stay, 2.0 and 0.6; of b 5, 20 and 2, and its 1 ranks above all else.
    assert_array_equal(everywhere["a"]["kernel"], [[False] * 4, [True, False, False, True]])
    assert_array_equal(everywhere["b"]["kernel"], [[True, True], [True, True]])
    two_of_four = qj.prune_mask(TREE, 0.5, structure=NOfM(4, axis=-1), select=qj.path("a/*"))
    assert_array_equal(
        two_of_four["a"]["kernel"], [[False, True, True, False], [True, False, False, True]]
    )
    assert two_of_four["b"]["kernel"].shape == ()


@given(
    seed=st.integers(0, 999),
    sparsity=st.floats(0, 1),
    levels=st.sampled_from([2, 5, 1000]),
)
def test_the_number_is_exact_whatever_is_equal(seed, sparsity, levels):
    """Few levels make many ties, which a threshold would get wrong."""
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, levels, (6, 7)).astype(np.float32)
    mask = jax.jit(lambda w, s: qj.prune_mask({"w": w}, s))(scores, jnp.float32(sparsity))["w"]
    assert_array_equal(mask, numpy_mask(np.abs(scores), sparsity))


@given(seed=st.integers(0, 999), sparsity=st.floats(0, 1))
def test_all_kernels_together_are_one_ranking(seed, sparsity):
    draw = np.random.default_rng(seed)
    tree = {
        "a": np.float32(draw.normal(size=(3, 4))),
        "b": np.float32(3 * draw.normal(size=(5, 2))),
    }
    masks = qj.prune_mask(tree, jnp.float32(sparsity), scope=Scope.GLOBAL)
    flat = np.abs(np.concatenate([tree["a"].ravel(), tree["b"].ravel()]))
    want = numpy_mask(flat, sparsity)
    assert_array_equal(np.concatenate([masks["a"].ravel(), masks["b"].ravel()]), want)


@given(seed=st.integers(0, 999), m=st.sampled_from([2, 4, 8]), kept=st.integers(0, 8))
def test_every_group_keeps_as_many(seed, m, kept):
    kept = min(kept, m)
    w = np.float32(np.random.default_rng(seed).normal(size=(3, 16, 5)))
    mask = np.asarray(qj.prune_mask({"w": w}, 1 - kept / m, structure=NOfM(m))["w"])
    groups = mask.transpose(0, 2, 1).reshape(3, 5, -1, m)
    assert (groups.sum(-1) == kept).all()
    scores = np.abs(w).transpose(0, 2, 1).reshape(3, 5, -1, m)
    if 0 < kept < m:
        lowest_kept = np.where(groups, scores, np.inf).min(-1)
        assert (np.where(groups, -np.inf, scores).max(-1) <= lowest_kept).all()


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("m", [2, 4, 16, 32])
def test_of_equal_neighbours_the_first_go_compared_or_sorted(m, axis):
    """Few neighbours are compared with one another, many are sorted; NaN goes first."""
    draw = np.random.default_rng(m)
    scores = np.float32(draw.integers(-2, 3, size=(32, 64, 32)))
    scores[draw.uniform(size=scores.shape) < 0.1] = np.nan
    order = np.moveaxis(np.where(np.isnan(scores), -np.inf, scores), axis, -1)
    groups = order.reshape(*order.shape[:-1], -1, m)
    ranks = np.argsort(np.argsort(groups, axis=-1, kind="stable"), axis=-1)
    want = np.moveaxis((ranks >= m // 2).reshape(order.shape), -1, axis)
    assert_array_equal(NOfM(m, axis=axis).mask(jnp.asarray(scores), 0.5, "here"), want)
    assert NOfM(m, axis=axis).mask(jnp.ones((0, m, m)), 0.5, "here").shape == (0, m, m)


def test_masks_are_nested_and_a_grid_is_one_program():
    case = models.cnn()
    traced = []

    @jax.jit
    def grid(params, sparsities):
        traced.append(1)
        return jax.vmap(lambda s: qj.prune_mask(params, s))(sparsities)

    sparsities = jnp.linspace(0.0, 1.0, 11)
    masks = grid(case.params, sparsities)
    grid(case.params, sparsities[::-1])
    assert len(traced) == 1
    for leaf in jax.tree.leaves(masks):
        assert not (np.asarray(leaf)[1:] & ~np.asarray(leaf)[:-1]).any()
    alone = qj.prune_mask(case.params, 0.3)
    models.assert_same_bits(jax.tree.map(lambda leaf: leaf[3], masks), alone)


def test_what_is_no_array_or_held_as_codes_stays_inside_a_trace_too():
    """Activations among the leaves of an Equinox module; a table that is quantized already."""
    scheme = qj.Scheme(weights=qj.weight_quantizer(granularity=qj.PerTensor()))
    codes = qj.quantize_params(
        {"table": models.normal(8, 4, 4)}, qj.Policy([qj.rule(qj.everything(), scheme)])
    )
    arrays = {"w": models.normal(9, 6, 4), "b": jnp.ones(4), **codes}

    def pruned(arrays):
        tree = {**arrays, "activation": jax.nn.relu}
        found = qj.apply_mask(tree, qj.prune_mask(tree, 0.5))
        assert found.pop("activation") is jax.nn.relu
        return found

    alone, traced = pruned(arrays), jax.jit(pruned)(arrays)
    models.assert_same_bits(traced, alone)
    assert (np.asarray(alone["w"]) == 0.0).sum() == 12


def test_only_kernels_are_touched():
    case = models.cnn()
    mask = qj.prune_mask(case.params, 0.9)
    pruned = qj.apply_mask(case.params, mask)
    for before, after in zip(*map(jax.tree.leaves, (case.params, pruned)), strict=True):
        if before.ndim < 2:
            assert after is before
        else:
            assert (np.asarray(after) == 0).mean() == pytest.approx(0.9, abs=0.51 / before.size)
    assert float(pruning.sparsity_of(mask)) == pytest.approx(0.9, abs=0.01)


def test_random_masks_come_from_their_key_alone():
    key = jax.random.key(3)
    tree = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    one, again = (qj.prune_mask(tree, 0.5, criterion=pruning.random(key)) for _ in range(2))
    models.assert_same_bits(one, again)
    assert not np.array_equal(one["a"], one["b"])
    other = qj.prune_mask(tree, 0.5, criterion=pruning.random(jax.random.key(4)))
    assert not np.array_equal(one["a"], other["a"])
    assert counts(one) == [32, 32]


def test_scores_from_elsewhere_decide():
    scores = jax.tree.map(lambda leaf: -jnp.abs(leaf), TREE)
    mask = qj.prune_mask(TREE, 0.25, criterion=pruning.scored(scores))
    assert_array_equal(mask["a"]["kernel"], [[True, True, True, True], [False, True, True, False]])
    with refused(errors.PruningError, "no scores of 2x4", "parameter a/kernel"):
        qj.prune_mask(TREE, 0.25, criterion=pruning.scored({"b": TREE["b"]}))
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), TREE)
    assert not qj.prune_mask(TREE, 0.125, criterion=pruning.scored(broken))["a"]["kernel"][0, 0]


def test_float64_weights_are_ranked_as_they_are():
    """Also next to float32 ones, in one ranking; scores of one's own as well."""
    with jax.enable_x64(True):
        tree = {"w": jnp.array([[1.0, 2.0, 1.0 - 1e-9, 1e-50]]), "v": jnp.ones((1, 2), jnp.float32)}
        for scope, kept in ((Scope.LOCAL, [False, True]), (Scope.GLOBAL, [True, True])):
            for criterion in (pruning.magnitude(), pruning.scored(tree)):
                mask = qj.prune_mask(
                    tree, 0.5 if scope is Scope.LOCAL else 1 / 3, scope=scope, criterion=criterion
                )
                assert_array_equal(mask["w"], [[True, True, False, False]])
                assert_array_equal(mask["v"], [kept])


def test_gradients_of_what_is_pruned():
    mask = qj.prune_mask(TREE, 0.5)

    def loss(params, gradient):
        pruned = qj.apply_mask(params, mask, gradient=gradient)
        return sum(jnp.sum(leaf * (leaf + 1.0)) for leaf in jax.tree.leaves(pruned))

    masked, through = (jax.grad(loss)(TREE, gradient) for gradient in MaskGradient)
    models.assert_same_bits(*(qj.apply_mask(TREE, mask, gradient=g) for g in MaskGradient))
    kernel, stays = TREE["a"]["kernel"], mask["a"]["kernel"]
    assert_array_equal(masked["a"]["kernel"], jnp.where(stays, 2 * kernel + 1, 0.0))
    assert_array_equal(through["a"]["kernel"], jnp.where(stays, 2 * kernel + 1, 1.0))
    assert_array_equal(masked["a"]["bias"], through["a"]["bias"])


def test_a_pruned_model_is_quantized_and_stays_sparse():
    """Mask, then plan, calibrate and freeze: zero is a level of symmetric codes."""
    case = models.mlp()
    pruned = qj.apply_mask(case.params, qj.prune_mask(case.params, 0.5))
    plan = models.planned(case, qj.uniform_policy(weight_bits=4))
    _, state = qj.observe(case.f, plan)(qj.init(plan), pruned, case.x)
    frozen = qj.freeze(plan, qj.calibrate(plan, state, pruned), pruned)
    tensors = [
        t
        for t in jax.tree.leaves(frozen, is_leaf=lambda t: isinstance(t, qj.QTensor))
        if isinstance(t, qj.QTensor)
    ]
    assert tensors
    for tensor in tensors:
        assert (np.asarray(tensor.codes) == 0).mean() >= 0.5


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"sparsity": 80}, "a sparsity of 80"),
        ({"sparsity": -0.1}, "a sparsity of -0.1"),
        ({"sparsity": 0.4, "structure": NOfM(4)}, "of 4 weights leaves no whole number"),
        ({"sparsity": 0.5, "structure": NOfM(4)}, "groups of 4 along axis -2 of 2x4"),
        ({"sparsity": 0.5, "structure": NOfM(2, axis=5)}, "along axis 5"),
        ({"sparsity": 0.5, "structure": NOfM(2), "scope": Scope.GLOBAL}, "a global scope"),
        ({"sparsity": 0.5, "select": qj.path("c/*")}, "selects no kernel"),
    ],
)
def test_what_cannot_be_made_is_refused(options, problem):
    with refused(errors.PruningError, problem):
        qj.prune_mask(TREE, options.pop("sparsity"), **options)


@pytest.mark.parametrize(
    ("number", "sparsity", "away"),
    [
        ((1 << 24) + 1, 1.0, (1 << 24) + 1),
        ((1 << 24) + 1, 0.0, 0),
        (25_502_912, 0.9, 22_952_621),
        (100_000_001, 0.5, 50_000_000),
    ],
)
def test_counts_are_exact_above_what_float32_counts(number, sparsity, away):
    assert int(structures._gone(sparsity, number)) == away
    traced = int(jax.jit(structures._gone, static_argnums=1)(jnp.float32(sparsity), number))
    assert abs(traced - away) <= 2
    if sparsity in (0.0, 1.0):
        assert traced == away


def test_counts_are_the_same_eagerly_and_under_jit():
    sparsities = np.arange(0, 201) * 0.005
    traced = jax.jit(jax.vmap(lambda s: structures._gone(s, 100)))(jnp.float32(sparsities))
    for share, count in zip(sparsities.tolist(), traced.tolist(), strict=True):
        assert int(structures._gone(share, 100)) == count
        assert int(structures._gone(jnp.float32(share), 100)) == count


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: {}, "no scores"),
        (lambda s: {"w": s["w"][0]}, "scores of 4"),
        (lambda s: {**s, "other": s["w"]}, "no kernel at hand"),
    ],
    ids=["missing", "shape", "more"],
)
def test_a_criterion_scores_every_kernel_and_nothing_else(change, problem):
    own = pruning.Criterion("own", lambda kernels: change(jax.tree.map(jnp.abs, kernels)))
    with refused(errors.PruningError, problem, "parameter"):
        qj.prune_mask({"w": models.normal(0, 3, 4), "b": jnp.zeros(2)}, 0.5, criterion=own)


def test_groups_of_one_and_trees_without_kernels_are_refused():
    with refused(errors.PruningError, "groups of 1"):
        NOfM(1)
    with refused(errors.PruningError, "selects no kernel"):
        qj.prune_mask({"bias": jnp.ones(3)}, 0.5)


def test_masks_that_do_not_fit_are_refused():
    mask = qj.prune_mask(TREE, 0.5)
    with refused(errors.PruningError, "another structure", "a/bias"):
        qj.apply_mask(TREE, {"a": {"kernel": mask["a"]["kernel"]}, "b": mask["b"]})
    with refused(errors.PruningError, "a mask of bool, 4x2", "a/kernel"):
        qj.apply_mask(TREE, {**mask, "a": {**mask["a"], "kernel": mask["a"]["kernel"].T}})
    with refused(errors.PruningError, "a mask of float32"):
        qj.apply_mask(TREE, jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * 0.5, mask))
    frozen = qj.quantize_params(
        TREE,
        qj.Policy(
            [
                qj.rule(
                    qj.everything(),
                    qj.Scheme(weights=qj.weight_quantizer(granularity=qj.PerTensor())),
                )
            ]
        ),
    )
    with refused(errors.PruningError, "prune before qj.freeze"):
        qj.apply_mask(frozen, mask)


def test_biases_and_norms_of_any_rank_stay():
    tree = {
        "attention": {"kernel": models.normal(0, 8, 2, 4), "bias": models.normal(1, 2, 4)},
        "norm": {"scale": jnp.ones((3, 8)), "bias": jnp.zeros((3, 8))},
        "stats": {"mean": jnp.ones((3, 8)), "var": jnp.ones((3, 8))},
        "batch_norm/~/var_ema": {"average": jnp.ones((1, 8)), "hidden": jnp.ones((1, 8))},
    }
    mask = qj.prune_mask(tree, 0.5)
    assert counts(mask) == [32]
    assert mask["attention"]["bias"].shape == mask["norm"]["scale"].shape == ()
    assert counts(qj.prune_mask({"hidden": jnp.ones((4, 4))}, 0.5)) == [8]  # a layer of that name
    with refused(errors.PruningError, "selects no kernel"):
        qj.prune_mask(tree, 0.5, select=qj.path("norm/*"))
    weights = qj.weight_quantizer(granularity=qj.PerTensor())
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    quantized = qj.quantize_params(tree, policy)
    assert isinstance(quantized["attention"]["kernel"], qj.QTensor)
    assert_array_equal(quantized["norm"]["scale"], tree["norm"]["scale"])


def test_straight_through_takes_infinities_and_all_derivatives():
    params = {"w": jnp.array([[jnp.inf, 2.0], [3.0, 4.0]])}
    mask = {"w": jnp.array([[False, True], [True, True]])}
    straight = lambda p: qj.apply_mask(p, mask, gradient=MaskGradient.STRAIGHT_THROUGH)  # noqa: E731
    assert_array_equal(straight(params)["w"], [[0.0, 2.0], [3.0, 4.0]])
    gradient = jax.jit(jax.grad(lambda p: (straight(p)["w"] ** 2).sum()))(params)
    assert_array_equal(gradient["w"], [[0.0, 4.0], [6.0, 8.0]])
    ones = jax.grad(lambda p: straight(p)["w"].sum())(params)
    assert_array_equal(ones["w"], jnp.ones((2, 2)))


def test_a_vector_of_sparsities_names_vmap():
    with refused(errors.PruningError, "sparsities of shape (2,)", "jax.vmap"):
        qj.prune_mask(TREE, jnp.array([0.5, 0.6]))
    with refused(errors.PruningError, "sparsity=0.75"):
        qj.prune_mask({"w": jnp.ones((8, 2))}, 0.99, structure=NOfM(4))


@pytest.mark.parametrize(
    "given",
    [{"scope": "global"}, {"structure": "2:4"}, {"criterion": "magnitude"}, {"select": "w"}],
    ids=lambda given: next(iter(given)),
)
def test_text_stands_for_nothing(given):
    """It was taken for the default: a local mask where a global one was asked for."""
    (name,) = given
    with refused(errors.ArgumentError, f"{name} is a str", "qj.prune_mask"):
        qj.prune_mask(TREE, 0.5, **given)


def test_a_gradient_is_no_text():
    with refused(errors.ArgumentError, "gradient is a str", "qj.apply_mask"):
        qj.apply_mask(TREE, qj.prune_mask(TREE, 0.5), gradient="straight_through")


@pytest.mark.parametrize("wrong", [{"m": 4.0}, {"m": "4"}, {"axis": 1.5}, {"m": True}])
def test_groups_have_whole_lengths_and_axes(wrong):
    with refused(errors.ArgumentError, next(iter(wrong)), "whole number", "NOfM(m=4, axis=-2)"):
        NOfM(**wrong)


def test_a_share_is_of_masks():
    with refused(errors.PruningError, "a/kernel is float32", "True and False"):
        qj.pruning.sparsity_of({"a": {"kernel": jnp.ones((2, 2))}})


def test_kernels_without_entries_have_masks_without_entries():
    """Beside others: a layer of no inputs, or of no outputs."""
    tree = {"none": jnp.zeros((8, 0)), "no": jnp.zeros((0, 8)), "some": models.normal(1, 4, 4)}
    for structure in (structures.ELEMENTS, NOfM(4)):
        mask = qj.prune_mask(tree, 0.5, structure=structure)
        assert mask["none"].shape == (8, 0)
        assert counts({"some": mask["some"]}) == [8]
