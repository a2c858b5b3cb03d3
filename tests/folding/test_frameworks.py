"""Batch norms of linen, nnx, haiku and equinox: found and folded as their programs have them."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

import quantjax as qj
from quantjax import errors
from quantjax.adapters import nnx as qnnx
from quantjax.folding import FoldStatus
from tests import models
from tests.folding import cases
from tests.refused import refused

IMAGES = models.normal(0, 2, 5, 5, 3)


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


@pytest.mark.parametrize(
    "options", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 0), (1, 1, 0)]
)
def test_linen_without_scale_offset_or_bias(options):
    module = Parts(*map(bool, options))
    (norm,) = cases.check_folds(models.linen(module, models.normal(0, 6, 4)))
    names = {
        "kernel": "params/Dense_0/kernel",
        "mean": "batch_stats/BatchNorm_0/mean",
        "variance": "batch_stats/BatchNorm_0/var",
    }
    optional = {
        "scale": "params/BatchNorm_0/scale",
        "offset": "params/BatchNorm_0/bias",
        "bias": "params/Dense_0/bias",
    }
    there = dict(zip(optional, options, strict=True))
    assert cases.paths(norm) == names | {k: v for k, v in optional.items() if there[k]}


def test_linen_with_nothing_to_take_the_shift():
    module = Parts(use_bias=False, layer_bias=False)
    norm = cases.only(models.linen(module, models.normal(0, 6, 4)))
    assert norm.status is FoldStatus.NO_SHIFT


class Layers(nn.Module):
    """Every layer that has a kernel."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        def norm(axis=-1):
            return nn.BatchNorm(use_running_average=True, axis=axis, dtype=self.dtype)

        x = nn.relu(norm()(nn.Conv(6, (3, 3), strides=2, dtype=self.dtype)(x)))
        x = nn.relu(norm()(nn.Conv(6, (3, 3), feature_group_count=6, dtype=self.dtype)(x)))
        x = nn.relu(norm()(nn.Conv(4, (3, 3), feature_group_count=2, dtype=self.dtype)(x)))
        x = nn.relu(norm()(nn.ConvTranspose(6, (3, 3), strides=(2, 2), dtype=self.dtype)(x)))
        x = nn.ConvTranspose(4, (2, 2), transpose_kernel=True, dtype=self.dtype)(x)
        x = nn.relu(norm()(x)).mean(axis=(1, 2))
        x = nn.relu(norm()(nn.DenseGeneral((2, 3), dtype=self.dtype)(x)))
        x = nn.relu(norm((1, 2))(nn.DenseGeneral((3, 2), axis=(-2, -1), dtype=self.dtype)(x)))
        return norm()(nn.DenseGeneral(4, axis=(-2, -1), use_bias=False, dtype=self.dtype)(x))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_linen_layers(dtype):
    """Kernels with their channels in other places; one norm for the heads of a layer, or each."""
    tolerance = 1e-4 if dtype is None else 0.1
    with jax.numpy_dtype_promotion("standard"):  # flax.linen adds a float32 bias to bfloat16
        case = cases.made_up(Layers(dtype), IMAGES)
        norms = cases.check_folds(case, 8, rtol=tolerance, atol=tolerance)
    assert [norm.kernel.axes for norm in norms] == [(3,)] * 4 + [(2,)] + [(1, 2)] + [(2, 3), (2,)]
    assert [norm.channels for norm in norms] == [6, 6, 4, 6, 4, 6, 6, 4]


class Stack(nn.Module):
    """Layers in a scan, rematerialized."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                z = nn.Dense(4, use_bias=False)(x)
                return x + nn.tanh(nn.BatchNorm(use_running_average=True)(z)), None

        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers()(x, None)[0]


def test_linen_scan():
    (norm,) = cases.check_folds(cases.made_up(Stack(), models.normal(0, 6, 4)))
    assert (norm.steps, norm.channels) == ((3,), 4)


class Net(nnx.Module):
    """A convolution and a dense layer, a batch norm each."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.conv_norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
        self.dense_norm = nnx.BatchNorm(5, use_running_average=True, use_scale=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv_norm(self.conv(x)))
        return self.dense_norm(self.dense(x.mean(axis=(1, 2))))


def test_nnx():
    """Parameters and statistics in one tree, since folding changes both."""
    g, params, state = qnnx.functional(Net(nnx.Rngs(0)))
    tree = models.shuffled({"params": params, "state": state})

    def f(tree, x):
        return g(tree["params"], tree["state"], x)[0]

    conv, dense = cases.check_folds(models.Case(f, tree, IMAGES), 2)
    assert cases.paths(conv) == {
        "kernel": "params/conv/kernel",
        "mean": "state/conv_norm/mean",
        "variance": "state/conv_norm/var",
        "scale": "params/conv_norm/scale",
        "offset": "params/conv_norm/bias",
        "bias": "params/conv/bias",
    }
    assert (dense.scale, dense.bias, dense.offset.path) == (None, None, "params/dense_norm/bias")


def test_haiku():
    def net(x, *, is_training):
        for channels, groups in ((6, 1), (6, 2)):
            x = hk.Conv2D(channels, 3, feature_group_count=groups)(x)
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training=is_training))
        x = hk.Linear(4, with_bias=False)(x.mean(axis=(1, 2)))
        return hk.BatchNorm(False, True, 0.9)(x, is_training=is_training)

    model = hk.without_apply_rng(hk.transform_with_state(net))
    params, state = model.init(jax.random.key(0), IMAGES, is_training=True)
    floats = models.shuffled({"params": params})
    state = jax.tree.map(lambda a: a if a.dtype == jnp.int32 else a + 0.3, state)

    def f(tree, x):
        return model.apply(tree["params"], tree["state"], x, is_training=False)[0]

    case = models.Case(f, floats | {"state": state}, IMAGES)
    first, second, last = cases.check_folds(case, 3)
    assert cases.paths(first) == {
        "kernel": "params/conv2_d/w",
        "mean": "state/batch_norm/~/mean_ema/average",
        "variance": "state/batch_norm/~/var_ema/average",
        "scale": "params/batch_norm/scale",
        "offset": "params/batch_norm/offset",
        "bias": "params/conv2_d/b",
    }
    assert (second.kernel.axes, last.kernel.axes, last.scale) == ((3,), (1,), None)


def equinox_case(mode, *, training=False):
    """Convolution and batch norm of one example, mapped over the batch."""
    conv = eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0))
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode=mode)
    images = models.normal(0, 2, 3, 5, 5)
    _, state = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        jax.vmap(conv)(images), state
    )
    norm = eqx.nn.inference_mode(norm, value=not training)
    arrays, static = eqx.partition({"conv": conv, "norm": norm, "state": state}, eqx.is_array)
    moved = [leaf for leaf in jax.tree.leaves(arrays) if leaf.dtype == jnp.float32]
    moved = iter(jax.tree.leaves(models.shuffled(moved)))
    arrays = jax.tree.map(lambda a: next(moved) if a.dtype == jnp.float32 else a, arrays)

    def f(arrays, x):
        model = eqx.combine(arrays, static)

        def one(x):
            return model["norm"](model["conv"](x), model["state"])[0]

        return jax.vmap(one, axis_name="batch")(x)

    return models.Case(f, arrays, images)


def test_equinox():
    (norm,) = cases.check_folds(equinox_case("ema"))
    assert norm.kernel.path == "conv/weight"
    assert norm.kernel.axes == (0,)
    assert norm.bias.path == "conv/bias"
    assert (norm.scale.path, norm.offset.path) == ("norm/weight", "norm/bias")
    assert norm.mean.path.startswith("state/")


def test_equinox_with_averages_that_correct_their_start():
    """Statistics over ``1 - momentum^n`` with n in the state: a row that says so."""
    case = equinox_case("batch")
    row = cases.only(case)
    assert row.site == "conv/weight"
    assert row.status is FoldStatus.OTHER_FORM
    with refused(errors.TrainingError, "none of the batch norms", "which says why"):
        qj.fold_batch_norm(case.params, cases.found(case))


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_equinox_in_training_mode(mode):
    """Means over the axis of a ``vmap``, which are sums of another kind."""
    case = equinox_case(mode, training=True)
    row = cases.only(case)
    assert (row.site, row.status) == ("conv/weight", FoldStatus.BATCH_STATISTICS)
    with refused(errors.TrainingError, "none of the batch norms", "in evaluation mode"):
        qj.fold_batch_norm(case.params, cases.found(case))


def test_variables_of_one_framework_by_the_names_of_another():
    """The same numbers in linen and by hand are folded alike."""
    case = models.cnn()
    after = qj.fold_batch_norm(case.params, cases.found(case))
    norm, stats = case.params["params"]["BatchNorm_0"], case.params["batch_stats"]["BatchNorm_0"]
    factor = np.float64(norm["scale"]) / np.sqrt(np.float64(stats["var"]) + 1e-5)
    kernel = np.float64(case.params["params"]["Conv_0"]["kernel"])
    assert_allclose(after["params"]["Conv_0"]["kernel"], kernel * factor, rtol=1e-5)
    shift = np.float64(norm["bias"]) - np.float64(stats["mean"]) * factor
    assert_allclose(after["params"]["BatchNorm_0"]["bias"], shift, rtol=1e-5, atol=1e-6)
