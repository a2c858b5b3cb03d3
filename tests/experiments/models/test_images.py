"""MobileNetV2, ViT and the nnx ResNet: sizes as published, and NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quantjax as qj
from experiments.models import resnet_nnx
from experiments.models.errors import ModelShapeError
from experiments.models.mobilenet import (
    CIFAR_STAGES,
    IMAGENET_STAGES,
    InvertedResidual,
    MobileNetV2,
    Stage,
    small_mobilenet,
)
from experiments.models.resnet import ResNet, resnet20
from experiments.models.vit import ViT, ViTShape, vit_tiny
from quantjax.adapters import nnx as qnnx
from quantjax.interpreter import Op
from tests.experiments.models.oracles import (
    batch_norm,
    conv,
    images,
    in_double,
    variables_of,
    vit,
)

CIFAR_IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
IMAGENET_IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def size_of(model, image) -> int:
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("model", "image", "parameters"),
    [
        (MobileNetV2(IMAGENET_STAGES, 1000, stem_stride=2), IMAGENET_IMAGE, 3_504_872),
        (small_mobilenet(), CIFAR_IMAGE, 258_826),
        (ViT(ViTShape(patch=16, classes=1000)), IMAGENET_IMAGE, 5_717_416),
        (vit_tiny(), CIFAR_IMAGE, 5_362_762),
    ],
    ids=["mobilenet-v2", "small-mobilenet", "vit-ti-16", "vit-ti-4"],
)
def test_sizes_are_those_published(model, image, parameters):
    """3,504,872 is torchvision's mobilenet_v2; 5,717,416 timm's vit_tiny_patch16_224."""
    assert size_of(model, image) == parameters


@pytest.mark.parametrize(
    ("stages", "stem_stride", "pixels", "out"),
    [(IMAGENET_STAGES, 2, 224, 7), (CIFAR_STAGES, 1, 32, 4)],
    ids=["imagenet", "cifar"],
)
def test_strides_leave_as_many_pixels_as_published(stages, stem_stride, pixels, out):
    model = MobileNetV2(stages, stem_stride=stem_stride)
    image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    sites = {site.name: site for site in qj.sites(model.apply, variables, image)}
    head = next(site for name, site in sites.items() if name.endswith("head/kernel"))
    assert head.out_shape[1:3] == (out, out)


def test_depthwise_convolutions_are_sites():
    model = small_mobilenet()
    variables = jax.eval_shape(model.init, jax.random.key(0), CIFAR_IMAGE)
    sites = list(qj.sites(model.apply, variables, CIFAR_IMAGE))
    blocks = sum(stage.blocks for stage in model.stages)
    assert sum(site.op is Op.CONV for site in sites) == 2 + 3 * blocks - 1
    assert sum("depthwise" in site.name for site in sites) == blocks


@pytest.mark.parametrize(
    ("stage", "stride", "channels"),
    [(Stage(1, 4, 1, 1), 1, 4), (Stage(3, 4, 1, 1), 1, 4), (Stage(2, 6, 1, 2), 2, 4)],
    ids=["not-expanded", "added", "strided"],
)
def test_an_inverted_residual_is_that_of_numpy(stage, stride, channels):
    block, x = InvertedResidual(stage, stride), images(1, 2, 6, 6, channels)
    variables = variables_of(block, x)
    params, stats = (in_double(variables[name]) for name in ("params", "batch_stats"))

    def normed(name, y):
        part, seen = params[name], stats[name]
        return batch_norm(y, part["scale"], part["bias"], seen["mean"], seen["var"])

    def kernel(name):
        return params[name]["kernel"].transpose(3, 2, 0, 1)

    inputs = y = np.asarray(x, np.float64).transpose(0, 3, 1, 2)
    if stage.expansion > 1:
        y = np.clip(normed("expand_norm", conv(y, kernel("expand"))), 0, 6)
    y = np.clip(normed("depthwise_norm", conv(y, kernel("depthwise"), stride, 1)), 0, 6)
    y = normed("project_norm", conv(y, kernel("project")))
    expected = inputs + y if y.shape == inputs.shape else y
    actual = jax.jit(block.apply)(variables, x)
    np.testing.assert_allclose(actual, expected.transpose(0, 2, 3, 1), atol=2e-5)


def test_the_last_convolution_of_a_block_is_linear():
    """Half the images are the others' mirror below zero in what the block adds."""
    block, x = InvertedResidual(Stage(2, 5, 1, 1), 1), images(2, 1, 4, 4, 4)
    out = jax.jit(block.apply)(variables_of(block, x), x)
    assert (np.asarray(out) < 0).any()


def test_a_tiny_mobilenet_runs_and_trains():
    model = MobileNetV2((Stage(1, 4, 1, 1), Stage(2, 6, 2, 2)), 3, stem=4, head=8)
    x = images(3, 2, 8, 8, 3)
    variables = variables_of(model, x)
    logits, new = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, x
    )
    assert logits.shape == (2, 3)
    assert jax.tree.structure(new) == jax.tree.structure({"batch_stats": variables["batch_stats"]})
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), new["batch_stats"], variables["batch_stats"]
    )
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("stages", [(), (Stage(6, 8, 0, 1),), (Stage(0, 8, 1, 1),)], ids=str)
def test_stages_without_anything_are_refused(stages):
    with pytest.raises(ModelShapeError, match="try:"):
        jax.eval_shape(MobileNetV2(stages).init, jax.random.key(0), CIFAR_IMAGE)


SMALL_VIT = ViT(ViTShape(patch=2, width=12, layers=2, heads=3, hidden=20, classes=5))


def test_a_vision_transformer_is_that_of_numpy():
    x = images(4, 2, 6, 4, 3)
    variables = variables_of(SMALL_VIT, x)
    expected = vit(in_double(variables["params"]), np.asarray(x, np.float64), 2, 2)
    np.testing.assert_allclose(jax.jit(SMALL_VIT.apply)(variables, x), expected, atol=2e-5)


def test_without_positions_the_order_of_patches_is_nothing():
    x = images(4, 2, 6, 4, 3)
    variables = variables_of(SMALL_VIT, x)
    params = {**variables["params"], "positions": jnp.zeros((1, 7, 12))}
    swapped = jnp.concatenate([x[:, 2:4], x[:, :2], x[:, 4:]], axis=1)
    apply = jax.jit(SMALL_VIT.apply)
    same = [apply({"params": params}, image) for image in (x, swapped)]
    np.testing.assert_allclose(*same, atol=1e-5)
    assert not np.allclose(apply(variables, x), apply(variables, swapped), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 7, 4, 3), (1, 6, 5, 3), (6, 4, 3)], ids=str)
def test_images_that_patches_do_not_fill_are_refused(shape):
    with pytest.raises(ModelShapeError, match="try:"):
        SMALL_VIT.init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("sizes", [{"heads": 5}, {"layers": 0}], ids=str)
def test_sizes_of_a_vision_transformer_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ModelShapeError, match="try:"):
        ViTShape(**sizes)


@pytest.mark.parametrize(
    ("linen", "module_of"),
    [
        (ResNet(1, 5, 4), lambda rngs: resnet_nnx.ResNet(1, 5, 4, rngs=rngs)),
        pytest.param(
            resnet20(), lambda rngs: resnet_nnx.resnet20_nnx(rngs=rngs), marks=pytest.mark.slow
        ),
    ],
    ids=["resnet8", "resnet20"],
)
def test_the_nnx_resnet_is_the_linen_one(linen, module_of):
    x = images(5, 2, 8, 8, 3)
    variables = variables_of(linen, x)
    module = nnx.eval_shape(lambda: module_of(nnx.Rngs(0)))  # without arrays
    module.eval()
    f, params, state = qnnx.functional(module)
    converted = resnet_nnx.from_linen(variables)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, (params, state))
    logits, after = jax.jit(f)(*converted, x)
    expected = jax.jit(linen.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, converted[1])


def test_the_nnx_resnet_trains_alike():
    x = images(6, 4, 4, 4, 3)
    model = ResNet(1, 5, channels=4)
    variables = variables_of(model, x)
    module = nnx.eval_shape(lambda: resnet_nnx.ResNet(1, 5, 4, rngs=nnx.Rngs(0)))
    f, _, _ = qnnx.functional(module)
    logits, state = jax.jit(f)(*resnet_nnx.from_linen(variables), x)
    expected, new = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, x
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        state,
        dict(new["batch_stats"]),
    )
