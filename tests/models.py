"""Small models and helpers that the tests share: linen with batch norm, and raw functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj


class MLP(nn.Module):
    """Two layers, batch norm between them; ``train`` uses the batch's own statistics."""

    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not self.train)(x)
        return nn.Dense(4)(nn.relu(x))


class CNN(nn.Module):
    """Two convolutions with batch norm, a pool and a head."""

    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        x = nn.Conv(8, (3, 3), strides=(2, 2))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        return nn.Dense(4)(x.mean(axis=(1, 2)))


class Case(NamedTuple):
    """A function of ``(params, x)`` with arguments for it."""

    f: Callable[..., Any]
    params: Any
    x: jax.Array


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal float32 numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shuffled(params: Any) -> Any:
    """The same tree with no leaf at its initial 0 or 1, so that each of them matters."""
    leaves, tree = jax.tree.flatten(params)
    moves = [np.float32(0.1) * np.abs(normal(i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    # In NumPy: each operation on each shape would be a program to compile.
    moved = [np.asarray(leaf) + move for leaf, move in zip(leaves, moves, strict=True)]
    return jax.tree.unflatten(tree, [jnp.asarray(leaf) for leaf in moved])


def linen(module: nn.Module, x: jax.Array) -> Case:
    """A linen model in evaluation mode; variables are its params."""
    variables = shuffled(module.init(jax.random.key(0), x))
    return Case(module.apply, variables, x)


def linen_training(module: nn.Module, x: jax.Array) -> Case:
    """A linen model in training mode: it returns its new batch statistics too."""
    variables = shuffled(module.init(jax.random.key(0), x))
    return Case(lambda v, x: module.apply(v, x, mutable=["batch_stats"]), variables, x)


def mlp() -> Case:
    return linen(MLP(), normal(1, 6, 8))


def cnn() -> Case:
    return linen(CNN(), normal(2, 4, 8, 8, 3))


def dense(seed: int = 3, rows: int = 4, features: int = 6, out: int = 5) -> Case:
    """``x @ w``, nothing else."""
    return Case(_dense, {"w": normal(seed, features, out)}, normal(seed + 1, rows, features))


def _dense(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def planned(case: Case, policy: qj.Policy) -> qj.Plan:
    """The plan of a policy for a case."""
    return qj.plan(policy, qj.sites(case.f, case.params, case.x))


class Ready(NamedTuple):
    """What comes before ``qj.fake_quantize``."""

    plan: qj.Plan
    state: Any
    qstate: Any


def ready(case: Case, policy: qj.Policy) -> Ready:
    """Planned, observed once and calibrated at the policy's own widths."""
    plan = planned(case, policy)
    observe = jax.jit(qj.observe(case.f, plan))
    _, state = observe(qj.init(plan), case.params, case.x)
    return Ready(plan, state, qj.calibrate(plan, state, case.params))


def policy(
    weights: qj.Quantizer | None = None, activations: qj.Quantizer | None = None
) -> qj.Policy:
    """These quantizers at every site."""
    return qj.Policy(
        [qj.rule(qj.everything(), qj.Scheme(weights=weights, activations=activations))]
    )


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Equal structure, dtypes, shapes and bit patterns; signs of zero count, NaN equals itself."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, left), right in pairs:
        left, right = (np.ascontiguousarray(side) for side in (left, right))
        name = jax.tree_util.keystr(path)
        assert left.dtype == right.dtype, name
        assert left.shape == right.shape, name
        if left.tobytes() != right.tobytes():
            differ = np.sum((left != right) & ~(np.isnan(left) & np.isnan(right)))
            raise AssertionError(f"{name}: {differ} of {left.size} entries differ")
