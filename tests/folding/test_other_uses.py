"""Parameters that leave through branches and loops, or decide them, keep their layers as they are.

And training mode as frameworks write it, over an axis of a map; what is behind other programs.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax import errors
from quantjax.adapters import nnx as qnnx
from quantjax.folding import FoldStatus
from quantjax.training import folded_training
from tests import models
from tests.folding import cases
from tests.refused import refused

X = models.normal(9, 3, 4)
PARAMS = {"w": models.normal(8, 4, 4), **cases.norm_params(4)}
LAYERS = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), PARAMS)
KERNEL, NORM = FoldStatus.KERNEL_SHARED, FoldStatus.NORM_SHARED


def layer(p, x):
    return cases.standard(p, x @ p["w"])


def rows(f, params=PARAMS, x=X):
    return cases.found(models.Case(f, params, x))


def beside(value):
    """The layer, and what else is returned."""
    return lambda p, x: (layer(p, x), value(p, x))


def decided_by(branches, index):
    return lambda p, x: lax.switch(index(p), branches, layer(p, x))


DOUBLED = [lambda y: y, lambda y: 2.0 * y]


def counted_by_a_parameter(p, x):
    return lax.while_loop(
        lambda state: state[1] < jnp.sum(p["scale"]),
        lambda state: (2.0 * state[0], state[1] + 1.0),
        (layer(p, x), -10.0),
    )[0]


@pytest.mark.parametrize(
    ("f", "status"),
    [
        (decided_by(DOUBLED, lambda p: (jnp.sum(p["scale"]) > 0.0).astype(int)), NORM),
        (decided_by(DOUBLED, lambda p: jnp.argmax(p["w"][:2, 0])), KERNEL),
        (counted_by_a_parameter, NORM),
        (beside(lambda p, x: lax.map(lambda entry: 2.0 * entry, p["scale"])), NORM),
        (beside(lambda p, x: lax.cond(x[0, 0] > 0, lambda: jnp.sum(p["w"]), lambda: 0.0)), KERNEL),
        (beside(lambda p, x: lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["w"].T)), KERNEL),
        (beside(lambda p, x: lax.fori_loop(0, 3, lambda i, c: p["w"][0], x[0])), KERNEL),
        (beside(lambda p, x: lax.fori_loop(0, 3, lambda i, c: p["var"], x[0])), NORM),
    ],
    ids=["index", "index of w", "count", "map", "branch", "branches", "carry", "carried variance"],
)
def test_parameters_of_control_flow_are_read_there(f, status):
    (row,) = rows(f)
    assert (row.status, row.foldable) == (status, False), row
    assert "is read elsewhere" in row.reason


@pytest.mark.parametrize(
    ("beside_it", "status"),
    [
        (lambda p: jnp.sum(p["w"] ** 2), KERNEL),
        (lambda p: p["scale"], NORM),
    ],
    ids=["penalty", "scale"],
)
@pytest.mark.parametrize("is_carried", [False, True], ids=["stacked", "carried"])
def test_layers_of_a_scan_that_return_more(beside_it, status, is_carried):
    """An L2 penalty of each layer, for one: folding would change its value."""

    def stacked(p, x):
        return lax.scan(lambda h, q: (jnp.tanh(layer(q, h)), 2.0 * beside_it(q)), x, p)

    def carried(p, x):
        def step(carry, q):
            return (jnp.tanh(layer(q, carry[0])), beside_it(q)), None

        first = jnp.zeros_like(beside_it(jax.tree.map(lambda leaf: leaf[0], p)))
        return lax.scan(step, (x, first), p)[0]

    (row,) = rows(carried if is_carried else stacked, LAYERS)
    assert row.status is status, row


def test_what_branches_and_loops_hand_on_alike_is_not_read():
    def f(p, x):
        kept = lax.cond(x[0, 0] > 0, lambda: p["mean"], lambda: p["mean"])
        carried = lax.fori_loop(0, 2, lambda i, c: c, p["var"])
        return layer({**p, "mean": kept, "var": carried}, x)

    cases.check_folds(models.Case(f, PARAMS, X))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_a_cast_that_drops_fractions_is_not_passed_over(dtype):
    def f(p, x):
        whole = p["scale"].astype(dtype).astype(jnp.float32)
        return layer({**p, "scale": whole}, x)

    assert not any(row.foldable for row in rows(f))


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (lambda g: 1.0 + g, "scale is neither its mean"),
        (jnp.exp, "scale is neither its mean"),
        (nn.softplus, "scale enters by a function that is not read"),
    ],
)
def test_a_computed_scale_is_named(scale, reason):
    (row,) = rows(lambda p, x: layer({**p, "scale": scale(p["scale"])}, x))
    assert row.status is FoldStatus.NO_SHIFT
    assert f"no offset or bias up to where {reason}" in row.reason


def by_hand(parts):
    """Both moments in one reduction over a map's axis, as frameworks write it."""

    def f(p, x):
        def one(x):
            z = x @ p["w"]
            mean, square = parts(lax.pmean(jnp.stack([z.mean(0), (z * z).mean(0)]), "batch"))
            return (z - mean[None]) * lax.rsqrt(square - mean**2 + 1e-3)[None] * p["scale"][None]

        return jax.vmap(one, axis_name="batch")(x)

    return f


@pytest.mark.parametrize(
    "parts",
    [tuple, lambda both: (both[0], both[1])],
    ids=["unpacked", "indexed"],
)
def test_moments_of_a_mapped_batch_that_are_averaged_together(parts):
    (row,) = rows(by_hand(parts), x=models.normal(1, 2, 5, 4))
    assert row.status is FoldStatus.BATCH_STATISTICS


def test_the_first_example_is_no_statistic():
    def f(p, x):
        z = x @ p["w"]
        return (z - z[:1]) * lax.rsqrt(p["var"] + 1e-3)[None]

    assert all(row.status is not FoldStatus.BATCH_STATISTICS for row in rows(f))


class Normed(nn.Module):
    """linen's; in training mode over the axis of a map."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        axis_name = "batch" if self.train else None
        return nn.BatchNorm(not self.train, axis_name=axis_name)(nn.Conv(4, (3, 3))(x))


class NormedNNX(nnx.Module):
    """The same of NNX."""

    def __init__(self):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, axis_name="batch", rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.conv(x))


def test_frameworks_over_a_mapped_axis():
    x = models.normal(1, 2, 3, 6, 6, 3)
    variables = cases.made_up(Normed(), x[0]).params
    apply = functools.partial(Normed(train=True).apply, mutable=["batch_stats"])
    (row,) = rows(
        lambda v, x: jax.vmap(lambda x: apply(v, x)[0], axis_name="batch")(x), variables, x
    )
    assert row.status is FoldStatus.BATCH_STATISTICS

    g, params, state = qnnx.functional(NormedNNX())
    mapped = lambda tree, x: jax.vmap(  # noqa: E731
        lambda x: g(tree["params"], tree["state"], x)[0], axis_name="batch"
    )(x)
    (row,) = rows(mapped, {"params": params, "state": state}, x)
    assert row.status is FoldStatus.BATCH_STATISTICS


@jax.custom_vjp
def opaque(x, w):
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def in_training(product):
    def f(p, x):
        z = product(x, p["w"])
        normal = (z - z.mean(0)[None]) / jnp.sqrt(z.var(0) + 1e-3)[None]
        return normal * p["scale"][None] + p["offset"][None]

    return f


def test_products_out_of_sight_are_left_alone():
    """A second use of the kernel in a program that is not rewritten: the first one is folded."""

    def f(p, x):
        return in_training(jnp.matmul)(p, x), opaque(x, p["w"])

    folded = folded_training(f, rows(layer))
    for run in (jax.jit, lambda g: g):
        for got, want in zip(run(folded)(PARAMS, X), f(PARAMS, X), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert "f(scale,var,w)" in [site.name for site in qj.sites(folded, PARAMS, X)]


def test_no_product_but_those_out_of_sight_is_refused():
    norms = rows(layer)
    with refused(errors.TrainingError, "no product of w has its 4 channels", "custom_vjp"):
        folded_training(in_training(opaque), norms)(PARAMS, X)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    train = in_training(jnp.matmul)
    for run in (jax.jit, lambda g: g):
        with refused(errors.TrainingError, "inside shard_map", "shard_map(folded, ...)"):
            run(folded_training(spread(train), norms))(PARAMS, X)
    got = jax.jit(spread(folded_training(train, norms)))(PARAMS, X)
    np.testing.assert_allclose(got, train(PARAMS, X), rtol=1e-4, atol=1e-4)


def test_a_quantized_tree_is_folded_too_late():
    policy = qj.uniform_policy(weight_bits=8, activation_bits=None)
    plan = qj.plan(policy, qj.sites(layer, PARAMS, X))
    frozen = qj.freeze(plan, qj.calibrate(plan, qj.init(plan), PARAMS), PARAMS)
    with refused(errors.TrainingError, "w is quantized", "fold first, qj.freeze"):
        qj.fold_batch_norm(frozen, rows(layer))
