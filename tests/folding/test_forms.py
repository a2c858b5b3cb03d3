"""Whatever way a batch norm is written, it is found, and each parameter for what it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantjax as qj
from tests import models
from tests.folding import cases

NORM = {
    "mean": "norm/mean",
    "variance": "norm/var",
    "scale": "norm/scale",
    "offset": "norm/offset",
}
KERNEL, BIAS = {"kernel": "layer/w"}, {"bias": "layer/b"}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", cases.FORMS)
def test_forms(form, bias):
    case = cases.dense(form, bias=bias)
    (norm,) = cases.check_folds(case)
    assert cases.paths(norm) == KERNEL | NORM | (BIAS if bias else {})
    assert (norm.site, norm.channels, norm.steps) == ("layer/w", 4, ())
    assert norm.epsilon == np.float32(cases.EPSILON)
    assert norm.kernel.axes == (1,)
    assert norm.mean.entries == norm.mean.channels == (0, 1, 2, 3)


@pytest.mark.parametrize("left_out", ["scale", "mean", "offset", "scale mean", "scale offset"])
def test_parts_that_are_missing(left_out):
    """With a bias ahead of it, which takes the shift where there is no offset."""

    def norm(p, z):
        z = z - cases.wide(p["mean"], z) if "mean" in p else z
        k = jax.lax.rsqrt(p["var"] + cases.EPSILON) * p.get("scale", jnp.ones(4))
        z = z * cases.wide(k, z)
        return z + cases.wide(p["offset"], z) if "offset" in p else z

    case = cases.dense(norm, bias=True)
    for name in left_out.split():
        del case.params["norm"][name]
    (row,) = cases.check_folds(case)
    expected = {k: v for k, v in NORM.items() if k not in left_out.split()}
    assert cases.paths(row) == KERNEL | BIAS | expected


def test_without_a_mean_nothing_has_to_take_a_shift():
    def norm(p, z):
        return z * cases.wide(p["scale"] / jnp.sqrt(p["var"] + cases.EPSILON), z)

    case = cases.dense(norm)
    assert cases.paths(cases.check_folds(case)[0]) == KERNEL | {
        "variance": "norm/var",
        "scale": "norm/scale",
    }


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1e-3, 0.1, 1.0])
def test_epsilon_is_that_of_the_program(epsilon):
    def f(p, x):
        return (x @ p["w"] - p["m"][None]) / jnp.sqrt(p["v"][None] + epsilon) + p["o"][None]

    vectors = {k: jnp.abs(models.normal(i, 3)) for i, k in enumerate("mvo")}
    case = models.Case(f, {"w": models.normal(4, 5, 3)} | vectors, models.normal(5, 2, 5))
    assert cases.check_folds(case)[0].epsilon == np.float32(epsilon)


def test_names_and_order_of_the_parameters_do_not_matter():
    """The mean is called scale, the scale offset: what they do decides."""

    def f(p, x):
        k = p["mean"] / jnp.sqrt(p["offset"] + 1e-3)
        return (x @ p["var"] - p["scale"][None]) * k[None] + p["kernel"][None]

    params = {k: jnp.abs(models.normal(i, 3)) for i, k in enumerate(["mean", "offset", "scale"])}
    params |= {"kernel": models.normal(4, 3), "var": models.normal(5, 6, 3)}
    (norm,) = cases.check_folds(models.Case(f, params, models.normal(6, 2, 6)))
    assert cases.paths(norm) == {
        "kernel": "var",
        "mean": "scale",
        "variance": "offset",
        "scale": "mean",
        "offset": "kernel",
    }


def conv(spec, *, groups=1, strides=(1, 1), dilation=(1, 1)):
    """A convolution with these dimension numbers, and a batch norm over its channels."""

    def f(params, x):
        z = jax.lax.conv_general_dilated(
            x,
            params["layer"]["w"],
            strides,
            ((1, 1), (1, 1)),
            lhs_dilation=dilation,
            dimension_numbers=spec,
            feature_group_count=groups,
        )
        shape = [1] * 4
        shape[spec[2].index("C")] = -1
        m, v, g, b = (params["norm"][k].reshape(shape) for k in ("mean", "var", "scale", "offset"))
        return (z - m) / jnp.sqrt(v + cases.EPSILON) * g + b

    return f


@pytest.mark.parametrize(
    ("spec", "options", "shape", "x"),
    [
        (("NHWC", "HWIO", "NHWC"), {}, (3, 3, 4, 6), (2, 5, 5, 4)),
        (("NCHW", "OIHW", "NCHW"), {}, (6, 4, 3, 3), (2, 4, 5, 5)),
        (("NHWC", "OHWI", "NHWC"), {"strides": (2, 2)}, (6, 3, 3, 4), (2, 5, 5, 4)),
        (("NHWC", "HWIO", "NHWC"), {"groups": 2}, (3, 3, 2, 6), (2, 5, 5, 4)),
        (("NHWC", "HWIO", "NHWC"), {"groups": 6}, (3, 3, 1, 6), (2, 5, 5, 6)),
        (("NHWC", "HWIO", "NHWC"), {"groups": 3}, (3, 3, 1, 6), (2, 5, 5, 3)),
        (("NHWC", "HWIO", "NHWC"), {"dilation": (2, 2)}, (3, 3, 4, 6), (2, 4, 4, 4)),
        (("NHWC", "HWIO", "HWNC"), {}, (3, 3, 4, 6), (2, 5, 5, 4)),
    ],
)
def test_convolutions(spec, options, shape, x):
    """Plain, channels first, grouped, depthwise with a multiplier, transposed, turned round."""
    params = {"layer": {"w": models.normal(0, *shape)}, "norm": cases.norm_params(6)}
    (norm,) = cases.check_folds(models.Case(conv(spec, **options), params, models.normal(1, *x)))
    assert norm.kernel.axes == (spec[1].index("O"),)
    assert cases.paths(norm) == KERNEL | NORM


@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_convolutions(transposed):
    def f(params, x):
        z = jax.lax.conv_transpose(
            x,
            params["layer"]["w"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=transposed,
        )
        return cases.standard(params["norm"], z)

    shape = (3, 3, 6, 4) if transposed else (3, 3, 4, 6)
    params = {"layer": {"w": models.normal(0, *shape)}, "norm": cases.norm_params(6)}
    (norm,) = cases.check_folds(models.Case(f, params, models.normal(1, 2, 4, 4, 4)))
    assert norm.kernel.axes == ((2,) if transposed else (3,))


@pytest.mark.parametrize(
    ("equation", "kernel", "axes"),
    [
        ("nti,io->nto", (5, 4), (1,)),
        ("nti,oi->nto", (4, 5), (0,)),
        ("io,nti->nto", (5, 4), (1,)),
        ("ntgi,gio->ntgo", (2, 5, 4), (0, 2)),
        ("nti,iho->ntho", (5, 2, 4), (1, 2)),
        ("nti,hio->nhto", (2, 5, 4), (0, 2)),
        ("ntij,ijo->nto", (3, 5, 4), (2,)),
    ],
)
def test_products(equation, kernel, axes):
    """The kernel on either side, with several channel axes, with a batch of its own."""
    first, second = equation.split("->")[0].split(",")
    of_input = first if "n" in first else second
    sizes = dict(zip(second if of_input is first else first, kernel, strict=True))
    x = models.normal(1, *[({"n": 3, "t": 2} | sizes)[c] for c in of_input])
    out = equation.split("->")[1]
    channels = [c for c in out if c in sizes]
    shape = tuple(sizes.get(c, 1) for c in out)

    def f(params, x):
        pair = (x, params["layer"]["w"]) if of_input is first else (params["layer"]["w"], x)
        z = jnp.einsum(equation, *pair)
        p = {k: v.reshape(shape) for k, v in params["norm"].items()}
        return (z - p["mean"]) / jnp.sqrt(p["var"] + cases.EPSILON) * p["scale"] + p["offset"]

    own = tuple(sizes[c] for c in channels)
    params = {"layer": {"w": models.normal(0, *kernel)}, "norm": cases.norm_params(0, 0, own)}
    (norm,) = cases.check_folds(models.Case(f, params, x))
    assert norm.kernel.axes == axes
    assert norm.channels == np.prod(own)


def test_one_entry_for_several_channels():
    """A norm over the last of two channel axes: heads share its entries."""

    def f(params, x):
        return cases.standard(params["norm"], jnp.einsum("ni,iho->nho", x, params["layer"]["w"]))

    params = {"layer": {"w": models.normal(0, 5, 2, 4)}, "norm": cases.norm_params(4)}
    (norm,) = cases.check_folds(models.Case(f, params, models.normal(1, 3, 5)))
    assert norm.mean.entries == (0, 1, 2, 3, 0, 1, 2, 3)
    assert norm.mean.channels == (0, 1, 2, 3)


def test_scalars():
    def f(p, x):
        return (x @ p["w"] - p["m"]) / jnp.sqrt(p["v"] + 0.5) + p["o"]

    params = {"w": models.normal(0, 5, 3), "m": jnp.float32(2.0), "v": jnp.float32(3.0)}
    case = models.Case(f, params | {"o": jnp.float32(-1.0)}, models.normal(1, 2, 5))
    assert cases.check_folds(case)[0].mean.entries == (0, 0, 0)


def test_stacked_layers():
    """Each layer of a scan has its own, and remat and jit change nothing."""

    @jax.checkpoint
    def layer(p, x):
        return cases.jitted(p["norm"], x @ p["layer"]["w"])

    def f(params, x):
        return jax.lax.scan(lambda x, p: (jnp.tanh(layer(p, x)), None), x, params)[0]

    norm = cases.norm_params(4, 0, (3, 4))
    case = models.Case(
        f, {"layer": {"w": models.normal(1, 3, 4, 4)}, "norm": norm}, models.normal(2, 5, 4)
    )
    (row,) = cases.check_folds(case)
    assert (row.steps, row.channels, row.kernel.axes) == ((3,), 4, (0, 2))
    assert row.kernel.channels == row.mean.entries == tuple(range(12))
    after = qj.fold_batch_norm(case.params, [row])
    for i in range(3):
        params = jax.tree.map(lambda a, i=i: a[i], case.params)
        one = models.Case(lambda p, x: layer(p, x), params, case.x)
        alone = qj.fold_batch_norm(params, cases.found(one))
        models.assert_same_bits(jax.tree.map(lambda a, i=i: a[i], after), alone)


def test_layers_stacked_along_another_axis():
    """The parameters have their layers last; the scan has them first."""

    def f(params, x):
        turned = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), params)

        def body(x, p):
            return jnp.tanh(cases.divided(p["norm"], x @ p["layer"]["w"])), None

        return jax.lax.scan(body, x, turned)[0]

    norm = cases.norm_params(4, 0, (4, 3))
    params = {"layer": {"w": models.normal(1, 4, 4, 3)}, "norm": norm}
    (row,) = cases.check_folds(models.Case(f, params, models.normal(2, 5, 4)))
    assert row.kernel.axes == (1, 2)
    assert row.mean.entries == (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)


def test_layers_that_share_a_norm_and_time_steps_that_share_all():
    def f(params, x):
        def body(x, w):
            return jnp.tanh(cases.standard(params["norm"], x @ w)), None

        return jax.lax.scan(body, x, params["layer"]["w"])[0]

    params = {"layer": {"w": models.normal(1, 3, 4, 4)}, "norm": cases.norm_params(4)}
    (row,) = cases.check_folds(models.Case(f, params, models.normal(2, 5, 4)))
    assert row.mean.entries == (0, 1, 2, 3) * 3

    def g(params, x):
        def body(x, _):
            return jnp.tanh(cases.standard(params["norm"], x @ params["layer"]["w"])), None

        return jax.lax.scan(body, x, None, length=3)[0]

    params = {"layer": {"w": models.normal(1, 4, 4)}, "norm": cases.norm_params(4)}
    assert cases.check_folds(models.Case(g, params, models.normal(2, 5, 4)))[0].steps == ()


def test_branches():
    def f(params, x):
        case = cases.dense(cases.standard)
        return jax.lax.cond(x.sum() > 0, case.f, lambda p, x: x[..., :4], params, x)

    case = cases.dense(cases.standard)
    for sign in (1.0, -1.0):
        cases.check_folds(models.Case(f, case.params, sign * jnp.abs(case.x)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_parameters_in_half_precision(dtype):
    """The kernel is rounded again, and the function differs by as much."""
    case = cases.dense(cases.standard)
    params = jax.tree.map(lambda a: a.astype(dtype), case.params)

    def f(p, x):
        return case.f(jax.tree.map(lambda a: a.astype(jnp.float32), p), x)

    unit = float(jnp.finfo(dtype).eps)
    (norm,) = cases.check_folds(models.Case(f, params, case.x), rtol=8 * unit, atol=16 * unit)
    assert cases.paths(norm) == KERNEL | NORM


def test_what_is_printed():
    text = repr(cases.found(cases.dense(cases.standard, bias=True)))
    assert_array_equal(
        [len(line) <= 120 for line in text.splitlines()], [True] * len(text.splitlines())
    )
    for fragment in ("layer/w", "0.001", "mean norm/mean", "bias b"):
        assert fragment in text
    none = repr(qj.batch_norms(lambda p, x: x @ p, jnp.ones((2, 2)), jnp.ones((1, 2))))
    assert none.startswith("no batch norm: its running statistics have to be among the parameters")


def test_what_is_found_is_a_value():
    """Equal from trace to trace, hashable, and found in shapes alone."""
    case = cases.dense(cases.standard)
    norms = cases.found(case)
    shapes = jax.eval_shape(lambda: (case.params, case.x))
    assert qj.batch_norms(case.f, *shapes) == norms
    assert hash(qj.batch_norms(case.f, *shapes)) == hash(norms)
    assert norms.foldable == norms
    assert norms[:1] == norms
    assert norms[0] is norms.rows[0]


@pytest.mark.parametrize("turned", [False, True])
def test_a_kernel_that_a_reshape_turns(turned):
    """Column by column: the channels of the product lie elsewhere in the parameter."""

    def f(p, x):
        w = p["w"]
        kernel = jax.lax.reshape(w, (4, 6), dimensions=(1, 0)) if turned else w.reshape(4, 6)
        z = (x @ kernel - p["mean"][None]) * jax.lax.rsqrt(p["var"] + 1e-5)[None]
        return jax.nn.relu(z * p["scale"][None] + p["offset"][None])

    p = {
        "w": models.normal(0, 6, 4),
        "mean": models.normal(1, 6),
        "var": 1.0 + models.normal(2, 6) ** 2,
        "scale": models.normal(3, 6),
        "offset": models.normal(4, 6),
    }
    x = models.normal(5, 3, 4)
    folded = qj.fold_batch_norm(p, qj.batch_norms(f, p, x))
    assert float(jnp.abs(folded["scale"] - 1.0).max()) < 1e-4
    np.testing.assert_allclose(f(folded, x), f(p, x), rtol=1e-4, atol=1e-5)
