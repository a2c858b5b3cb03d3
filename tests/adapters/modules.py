"""NNX modules and helpers that the tests of the adapter share."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.models import assert_same_bits, normal

X = normal(1, 6, 8)


class MLP(nnx.Module):
    """Batch norm and dropout between two layers."""

    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.linear1 = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear2 = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.linear2(self.features(x))

    def features(self, x):
        return self.dropout(nnx.relu(self.norm(self.linear1(x))))


class CNN(nnx.Module):
    """Two convolutions, one without bias, and a head."""

    def __init__(self):
        rngs = nnx.Rngs(1)
        self.conv1 = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.conv2 = nnx.Conv(6, 8, (3, 3), strides=(2, 2), rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        return self.head(nnx.relu(self.conv2(x)).mean(axis=(1, 2)))


class Deep(nnx.Module):
    """A list of more than ten layers, so that the order of keys as text is another."""

    def __init__(self):
        rngs = nnx.Rngs(2)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(12)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


class Tied(nnx.Module):
    """An embedding whose table is the kernel of the head too."""

    def __init__(self):
        self.embed = nnx.Embed(10, 8, rngs=nnx.Rngs(3))
        self.head = nnx.Linear(10, 8, use_bias=False, rngs=nnx.Rngs(4))
        self.head.kernel = self.embed.embedding

    def __call__(self, tokens):
        return self.embed(tokens) @ self.head.kernel[...].T


class Block(nnx.Module):
    """One residual layer with dropout."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.tanh(self.linear(x)))


class Stacked(nnx.Module):
    """Three blocks made by ``nnx.vmap``, run by ``nnx.scan``."""

    def __init__(self):
        create = nnx.vmap(Block, in_axes=(0,), out_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(create)(nnx.Rngs(5))

    def __call__(self, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.blocks)


class Remat(nnx.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self):
        self.block = Block(nnx.Rngs(6))

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


def recurrent():
    return nnx.RNN(nnx.LSTMCell(4, 5, rngs=nnx.Rngs(7)))


CASES = {
    "mlp": (MLP, X),
    "cnn": (CNN, normal(2, 4, 8, 8, 3)),
    "list": (Deep, X),
    "tied": (Tied, jnp.arange(6)),
    "scan": (Stacked, X),
    "remat": (Remat, X),
    "rnn": (recurrent, normal(3, 2, 7, 4)),
}
ALL = pytest.mark.parametrize(("make", "x"), CASES.values(), ids=CASES)


def loss(outputs):
    return jnp.mean(outputs**2)


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def plain(state):
    """Flax's own nested dict of a state, keys as text."""

    def text(tree):
        return {str(k): text(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return text(nnx.to_pure_dict(state))


def arrays(module):
    """The parameters and the state that a module holds now."""
    _, params, state = nnx.split(module, nnx.Param, ...)
    return plain(params), plain(state)


def data(tree):
    """Keys as their bits, so that NumPy compares them."""

    def bits(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(bits, tree)


def assert_same(actual, expected):
    assert_same_bits(data(actual), data(expected))
