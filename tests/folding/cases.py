"""Batch norms as people write them, and one with every parameter away from where it starts."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

import quantjax as qj
from tests import models

EPSILON = 1e-3


def norm_params(channels, seed=0, shape=None):
    """Mean, variance, scale (one of them negative) and offset."""
    shape = (channels,) if shape is None else shape
    draw = np.random.default_rng(seed)
    scale = draw.normal(size=shape)
    scale.flat[0] = -1.5
    arrays = {
        "mean": draw.normal(size=shape),
        "var": draw.uniform(0.1, 2.0, shape),
        "scale": scale,
        "offset": draw.normal(size=shape),
    }
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def wide(vector, x):
    """Along the last axis."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def standard(p, z):
    m, v, g, b = (wide(p[k], z) for k in ("mean", "var", "scale", "offset"))
    return (z - m) * jax.lax.rsqrt(v + EPSILON) * g + b


def divided(p, z):
    m, v, g, b = (wide(p[k], z) for k in ("mean", "var", "scale", "offset"))
    return g * ((z - m) / jnp.sqrt(v + EPSILON)) + b


def multiplied_out(p, z):
    k = p["scale"] / jnp.sqrt(p["var"] + EPSILON)
    return z * wide(k, z) + wide(p["offset"] - p["mean"] * k, z)


def offset_first(p, z):
    k = wide(p["scale"] * (p["var"] + EPSILON) ** -0.5, z)
    return wide(p["offset"], z) + k * z - k * wide(p["mean"], z)


def turned_round(p, z):
    m, v, g, b = (wide(p[k], z) for k in ("mean", "var", "scale", "offset"))
    return b - (m - z) * g / jnp.sqrt(EPSILON + v)


def negated(p, z):
    m, v, g, b = (wide(p[k], z) for k in ("mean", "var", "scale", "offset"))
    centred = jnp.negative(m - z)
    return jnp.negative(-centred * (g * jnp.power(v + EPSILON, -0.5))) + b


def jitted(p, z):
    return jax.jit(standard)(p, z)


def clamped(p, z):
    return standard({**p, "var": jnp.maximum(p["var"], 0.0)}, z)


def channels_first(p, z):
    """The channels in front of the features of each example, and behind them again."""
    turned = jnp.moveaxis(z, -1, 1)
    shape = (1, -1, *(1,) * (z.ndim - 2))
    m, v, g, b = (p[k].reshape(shape) for k in ("mean", "var", "scale", "offset"))
    return jnp.moveaxis((turned - m) / jnp.sqrt(v + EPSILON) * g + b, 1, -1)


def broadcast_by_hand(p, z):
    m, v, g, b = (jnp.broadcast_to(p[k], z.shape) for k in ("mean", "var", "scale", "offset"))
    return (z - m) / jnp.sqrt(v + EPSILON) * g + b


def in_one_row(p, z):
    """Examples and pixels in one axis."""
    return standard(p, z.reshape(-1, z.shape[-1])).reshape(z.shape)


FORMS = (
    standard,
    divided,
    multiplied_out,
    offset_first,
    turned_round,
    negated,
    jitted,
    clamped,
    channels_first,
    broadcast_by_hand,
    in_one_row,
)


def dense(norm, *, bias=False, seed=0):
    """``norm(x @ w + b)`` of 3 x 5 rows."""

    def f(params, x):
        z = x @ params["layer"]["w"]
        z = z + wide(params["layer"]["b"], z) if bias else z
        return norm(params["norm"], z)

    layer = {"w": models.normal(seed, 6, 4)} | ({"b": models.normal(seed + 1, 4)} if bias else {})
    params = {"layer": layer, "norm": norm_params(4, seed)}
    return models.Case(f, params, models.normal(seed + 2, 3, 5, 6))


def made_up(module, x):
    """Made-up variables, without a compilation; a tenth of the scales is negative."""
    draw = np.random.default_rng(0)

    def value(path, shape):
        name, size = path[-1].key, shape.shape
        if name == "var":
            values = draw.uniform(0.5, 2.0, size)
        elif name == "scale":
            values = draw.uniform(0.5, 1.5, size) * draw.choice([-1.0, 1.0], size, p=[0.1, 0.9])
        elif name == "kernel":
            values = draw.normal(size=size) / np.sqrt(np.prod(size[:-1]))
        else:
            values = 0.3 * draw.normal(size=size)
        return jnp.asarray(values, jnp.float32)

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    variables = jax.tree_util.tree_map_with_path(value, shapes)
    return models.Case(jax.jit(lambda v, x: module.apply(v, x)), variables, x)


def found(case):
    """Its batch norms."""
    return qj.batch_norms(case.f, case.params, case.x)


def only(case):
    """Its only batch norm."""
    (norm,) = found(case)
    return norm


def paths(norm):
    """The paths of a row, by part; parts without one are left out."""
    parts = ("kernel", "mean", "variance", "scale", "offset", "bias")
    places = {part: getattr(norm, part) for part in parts}
    return {part: place.path for part, place in places.items() if place is not None}


def check_folds(case, count=1, rtol=1e-4, atol=1e-5):
    """Its batch norms fold, the function stays, and kernels and statistics do not; the norms."""
    norms = found(case)
    assert [norm.reason for norm in norms] == [""] * count, norms
    after = qj.fold_batch_norm(case.params, norms)
    check_tree(case.params, after)
    before, now = (jax.tree.leaves(case.f(tree, case.x)) for tree in (case.params, after))
    for left, right in zip(before, now, strict=True):
        assert_allclose(np.float32(right), np.float32(left), rtol=rtol, atol=atol)
    leaves = qj_leaves(case.params), qj_leaves(after)
    for norm in norms:
        assert not np.array_equal(*(tree[norm.kernel.path] for tree in leaves)), norm.site
        assert not np.any(leaves[1][norm.mean.path]) if norm.mean else True
    return norms


def check_tree(before, after):
    """Equal structure, shapes and dtypes."""
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def qj_leaves(tree):
    """By path, as the rows have them."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in flat}
