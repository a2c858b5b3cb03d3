"""The networks of experiments: sizes as published, shapes, and shortcuts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments.models.resnet import Block, resnet20, resnet32, resnet56
from tests.experiments.models.oracles import variables_of


@pytest.mark.parametrize(
    ("model", "parameters"),
    [(resnet20(), 269_722), (resnet32(), 464_154), (resnet56(), 853_018)],
    ids=["resnet20", "resnet32", "resnet56"],
)
def test_sizes_are_those_published(model, parameters):
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])]
    assert sum(sizes) == parameters
    assert jax.eval_shape(model.apply, variables, x).shape == (2, 10)


def test_a_shortcut_halves_pixels_and_pads_channels():
    """With the scales and biases of batch norm zero, a block is the ReLU of its shortcut."""
    block = Block(8, stride=2)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    variables = variables_of(block, x)
    params = variables["params"]
    params = {**params, "bn2": {"scale": jnp.zeros(8), "bias": jnp.zeros(8)}}
    y = jax.jit(block.apply)({**variables, "params": params}, x)
    assert y.shape == (1, 2, 2, 8)
    np.testing.assert_array_equal(y[..., 2:6], jnp.maximum(x[:, ::2, ::2], 0.0))
    np.testing.assert_array_equal(y[..., :2], 0.0)
    np.testing.assert_array_equal(y[..., 6:], 0.0)


def test_every_layer_of_resnet20_is_a_site():
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(resnet20().init, jax.random.key(0), x)
    sites = qj.sites(resnet20().apply, variables, x)
    assert len(sites) == 20
    assert all("conv" in site.name for site in list(sites)[:19])
