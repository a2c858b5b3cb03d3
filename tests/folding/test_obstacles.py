"""What cannot be folded is a row with its reason, and folding leaves it alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.folding import FoldStatus
from tests import models
from tests.folding import cases
from tests.refused import refused

NORM = cases.norm_params(4)
X = models.normal(9, 3, 4)
W = models.normal(8, 4, 4)


def one(f, params=None, x=X):
    """The only row, of ``f(params, x)``."""
    params = {"w": W, "v": models.normal(7, 4, 4), "norm": NORM} if params is None else params
    return cases.only(models.Case(f, params, x))


def norm(p, z):
    return cases.standard(p["norm"], z)


def precedes(p, x):
    return nn.relu(norm(p, x)) @ p["w"]


def follows_a_sum(p, x):
    return norm(p, x @ p["w"] + x)


def two_products(p, x):
    return norm(p, x @ p["w"] + x @ p["v"])


def relu_between(p, x):
    return norm(p, nn.relu(x @ p["w"]))


def norm_between(p, x):
    z = x @ p["w"]
    first = {"mean": z[0], "var": z[1] ** 2, "scale": z[2], "offset": z[0]}
    return norm(p, cases.standard(first, z))


def first_token(p, x):
    return norm(p, (x @ p["w"])[:2])


def output_used(p, x):
    z = x @ p["w"]
    return norm(p, z), z.sum()


def output_returned(p, x):
    z = x @ p["w"]
    return norm(p, z), z


def output_used_outside_of_the_jit(p, x):
    z = x @ p["w"]
    return cases.jitted(p["norm"], z) + nn.relu(z)


def output_used_inside_of_the_jit(p, x):
    return jax.jit(output_used)(p, x)


def biased_output_used(p, x):
    z = x @ p["w"] + p["norm"]["mean"][None]
    return norm({"norm": NORM}, z), z


def two_norms_of_one_product(p, x):
    z = x @ p["w"]
    return norm(p, z) + cases.standard({**p["norm"], "mean": p["v"][0]}, z)


def kernel_shared(p, x):
    return norm(p, x @ p["w"]) @ p["w"]


def kernel_penalized(p, x):
    return norm(p, x @ p["w"]), jnp.sum(p["w"] ** 2)


def kernel_returned(p, x):
    return norm(p, x @ p["w"]), p["w"].T


def scale_returned(p, x):
    return norm(p, x @ p["w"]), p["norm"]["scale"]


def with_part(name, change):
    """A batch norm of ``change(parameter)`` in place of one parameter."""

    def f(p, x):
        return norm({"norm": p["norm"] | {name: change(p["norm"][name])}}, x @ p["w"])

    return f


def kernel_normalized(p, x):
    return norm(p, x @ (p["w"] / jnp.linalg.norm(p["w"])))


def kernel_sliced(p, x):
    return norm(p, x @ jnp.tile(p["w"], (1, 2))[:, :4])


def kernel_constant(p, x):
    return norm(p, x @ W)


def norm_shared(p, x):
    return norm(p, nn.relu(norm(p, x @ p["w"])) @ p["v"])


def norm_parameter_used(p, x):
    return norm(p, x @ p["w"]) * p["norm"]["scale"].sum()


def variance_tied_to_the_scale(p, x):
    return norm({"norm": p["norm"] | {"scale": p["norm"]["var"]}}, x @ p["w"])


def no_shift(p, x):
    return (x @ p["w"] - p["norm"]["mean"][None]) / jnp.sqrt(p["norm"]["var"][None] + 1e-3)


def part_of_a_vector(p, x):
    long = {k: jnp.concatenate([v, v]) for k, v in NORM.items()} if p is None else p["norm"]
    return norm({"norm": {k: v[:4] for k, v in long.items()}}, x @ p["w"])


def squared_scale(p, x):
    k = p["norm"]["scale"] ** 2 / jnp.sqrt(p["norm"]["var"] + 1e-3)
    return (x @ p["w"] - p["norm"]["mean"][None]) * k[None] + p["norm"]["offset"][None]


def scaled_before(p, x):
    return norm(p, 0.5 * (x @ p["w"]))


CASES = {
    precedes: (FoldStatus.PRECEDES, "it precedes w, and comes after an input"),
    follows_a_sum: (FoldStatus.NO_PRODUCT, "it comes after add, not a product"),
    two_products: (FoldStatus.NO_PRODUCT, "it comes after add, not a product"),
    relu_between: (FoldStatus.BETWEEN, "max lies between it and w"),
    norm_between: (FoldStatus.BETWEEN, "lies between it and w"),
    first_token: (FoldStatus.BETWEEN, "slice lies between it and w"),
    output_used: (FoldStatus.OUTPUT_USED, "what the product returns is used elsewhere"),
    output_returned: (FoldStatus.OUTPUT_USED, "what the product returns is used elsewhere"),
    output_used_outside_of_the_jit: (FoldStatus.OUTPUT_USED, "used elsewhere"),
    output_used_inside_of_the_jit: (FoldStatus.OUTPUT_USED, "used elsewhere"),
    kernel_shared: (FoldStatus.KERNEL_SHARED, "its kernel is that of w#1 too"),
    kernel_returned: (FoldStatus.KERNEL_SHARED, "w is read elsewhere"),
    scale_returned: (FoldStatus.NORM_SHARED, "norm/scale is read elsewhere"),
    kernel_penalized: (FoldStatus.KERNEL_SHARED, "w is read elsewhere"),
    kernel_normalized: (FoldStatus.KERNEL_COMPUTED, "not one parameter"),
    kernel_sliced: (FoldStatus.KERNEL_COMPUTED, "not one parameter"),
    kernel_constant: (FoldStatus.KERNEL_COMPUTED, "not one parameter"),
    norm_parameter_used: (FoldStatus.NORM_SHARED, "norm/scale is read elsewhere"),
    no_shift: (FoldStatus.NO_SHIFT, "nothing can take its shift: it has no offset or bias"),
    squared_scale: (FoldStatus.OTHER_FORM, "norm/scale is neither"),
    scaled_before: (FoldStatus.OTHER_FORM, "norm/mean is neither"),
}


@pytest.mark.parametrize("f", CASES)
def test_reasons(f):
    status, reason = CASES[f]
    row = one(f)
    assert (row.status, reason in row.reason) == (status, True), row
    assert not row.foldable
    assert reason.split()[-1] in repr(qj.folding.BatchNorms((row,))).replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scale", jnp.abs),
        ("scale", nn.relu),
        ("scale", lambda g: jnp.sqrt(g * g)),
        ("scale", lambda g: jnp.minimum(g, 2.0)),
        ("mean", jnp.abs),
        ("offset", nn.relu),
        ("offset", lambda b: jnp.maximum(b, -2.0)),
    ],
    ids=["|γ|", "relu γ", "√γ²", "γ below 2", "|μ|", "relu β", "β above -2"],
)
def test_a_function_of_a_parameter_that_is_the_same_for_some_values_is_seen(name, change):
    """Trial values of one sign and size are what such a function leaves alone."""
    row = one(with_part(name, change))
    assert not row.foldable
    assert row.status in (FoldStatus.OTHER_FORM, FoldStatus.NO_SHIFT)


@pytest.mark.parametrize("change", [jnp.abs, nn.relu, lambda v: jnp.maximum(v, 1e-9)])
def test_what_leaves_variances_alone_folds(change):
    f = with_part("var", change)
    params = {"w": W, "norm": NORM | {"scale": jnp.float32([1.0, -2.0, 0.5, -0.1])}}
    rows = cases.found(models.Case(f, params, X))
    assert [row.reason for row in rows] == [""]
    after = qj.fold_batch_norm(params, rows)
    np.testing.assert_allclose(f(after, X), f(params, X), rtol=1e-4, atol=1e-5)


def test_a_variance_that_folding_would_leave_below_a_floor():
    """σ² becomes 1 - ε, which is negative here."""

    def f(p, x):
        m, v, g, b = (p["norm"][name][None] for name in ("mean", "var", "scale", "offset"))
        return (x @ p["w"] - m) / jnp.sqrt(nn.relu(v) + 2.0) * g + b

    assert one(f).status is FoldStatus.OTHER_FORM


@pytest.mark.parametrize("f", [two_norms_of_one_product, norm_shared])
def test_both_rows_say_why(f):
    params = {"w": W, "v": models.normal(7, 4, 4), "norm": NORM}
    rows = cases.found(models.Case(f, params, X))
    assert [row.foldable for row in rows] == [False, False]


def test_a_second_norm_right_behind_the_first():
    def f(p, x):
        return cases.divided(p["again"], norm(p, x @ p["w"]))

    params = {"w": W, "norm": NORM, "again": cases.norm_params(4, 5)}
    case = models.Case(f, params, X)
    first, second = cases.found(case)
    assert first.foldable
    assert second.reason == "another batch norm lies between it and w"
    after = qj.fold_batch_norm(params, [first, second])
    np.testing.assert_allclose(f(after, X), f(params, X), rtol=1e-4, atol=1e-5)
    models.assert_same_bits(after["again"], params["again"])


def test_layers_with_norms_of_their_own_behind_a_kernel_that_they_share():
    def f(p, x):
        def body(x, own):
            return jnp.tanh(cases.standard(own, x @ p["w"])), None

        return jax.lax.scan(body, x, p["norm"])[0]

    row = one(f, {"w": W, "norm": cases.norm_params(4, 0, (3, 4))})
    assert row.status is FoldStatus.KERNEL_SHARED
    assert "several steps" in row.reason


def test_an_offset_with_too_few_entries():
    def f(p, x):
        z = x @ p["w"] - p["mean"][None]
        return z / jnp.sqrt(p["var"][None] + 1e-3) + p["offset"]

    params = {"w": W, "mean": NORM["mean"], "var": NORM["var"], "offset": jnp.float32(1.0)}
    row = one(f, params)
    assert row.status is FoldStatus.NO_SHIFT
    assert "offset has too few entries" in row.reason


def test_a_scale_with_entries_of_other_channels():
    params = {"w": W, "norm": NORM | {"scale": models.normal(3, 8)}}

    def f(p, x):
        return norm({"norm": p["norm"] | {"scale": p["norm"]["scale"][:4]}}, x @ p["w"])

    row = one(f, params)
    assert (row.status, "of other channels" in row.reason) == (FoldStatus.NORM_SHARED, True)


def test_training_mode():
    """linen's, and one by hand; each product has its row."""
    case = models.linen_training(models.CNN(train=True), models.normal(2, 4, 8, 8, 3))
    rows = cases.found(case)
    assert [row.site for row in rows] == ["params/Conv_0/kernel", "params/Conv_1/kernel"]
    for row in rows:
        assert row.status is FoldStatus.BATCH_STATISTICS
        assert "training mode" in row.reason
    with refused(errors.TrainingError, "none of the batch norms can be folded", "training mode"):
        qj.fold_batch_norm(case.params, rows)


@pytest.mark.parametrize("axes", [(0,), (0, 1)])
def test_training_mode_by_hand(axes):
    def f(p, x):
        z = x @ p["w"]
        mean = jnp.mean(z, axes, keepdims=True)
        var = jnp.mean((z - mean) ** 2, axes, keepdims=True)
        return (z - mean) / jnp.sqrt(var + 1e-3) * cases.wide(p["norm"]["scale"], z)

    x = X if len(axes) == 1 else models.normal(1, 2, 3, 4)
    assert one(f, x=x).status is FoldStatus.BATCH_STATISTICS


def test_training_mode_over_a_mapped_axis():
    def f(p, x):
        def one(x):
            z = x @ p["w"]
            mean = lax.pmean(z, "batch")
            var = lax.pmean((z - mean) ** 2, "batch")
            return (z - mean) / jnp.sqrt(var + 1e-3) * p["norm"]["scale"]

        return jax.vmap(one, axis_name="batch")(x)

    assert one(f).status is FoldStatus.BATCH_STATISTICS


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, lambda: nn.GroupNorm(2)])
def test_other_normalizations_are_no_batch_norms(kind):
    class Module(nn.Module):
        @nn.compact
        def __call__(self, x):
            return kind()(nn.Conv(4, (3,))(x))

    assert len(cases.found(models.linen(Module(), models.normal(0, 2, 5, 4)))) == 0


def variance_of_two(p, x):
    var = p["norm"]["var"] + p["norm"]["scale"]
    return (x @ p["w"] - p["norm"]["mean"][None]) / jnp.sqrt(var + 1e-3)[None]


def test_a_root_of_two_parameters_is_no_standard_deviation():
    assert len(cases.found(models.Case(variance_of_two, {"w": W, "norm": NORM}, X))) == 0


def test_what_is_only_scaled_and_shifted_is_no_batch_norm():
    def f(p, x):
        return jnp.tanh(x @ p["w"] * p["norm"]["scale"][None] + p["norm"]["offset"][None]) ** 2

    assert len(cases.found(models.Case(f, {"w": W, "norm": NORM}, X))) == 0


class PreActivation(nn.Module):
    """Batch norm and relu ahead of each convolution, and one behind the last."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = x + nn.Conv(4, (3, 3))(y)
        x = nn.Conv(4, (3, 3))(x)
        return nn.BatchNorm(use_running_average=True)(x)


def test_batch_norms_ahead_of_their_convolutions():
    case = models.linen(PreActivation(), models.normal(0, 2, 5, 5, 4))
    first, second, last = cases.found(case)
    assert [row.status for row in (first, second)] == [FoldStatus.PRECEDES] * 2
    assert first.reason == "it precedes params/Conv_0/kernel, and comes after an input"
    assert second.reason == "it precedes params/Conv_1/kernel, and comes after add"
    assert (last.site, last.foldable) == ("params/Conv_2/kernel", True)
    after = qj.fold_batch_norm(case.params, cases.found(case))
    np.testing.assert_allclose(
        case.f(after, case.x), case.f(case.params, case.x), rtol=1e-4, atol=1e-5
    )
    for name in ("BatchNorm_0", "BatchNorm_1"):
        for collection in ("params", "batch_stats"):
            models.assert_same_bits(after[collection][name], case.params[collection][name])


def test_returned_statistics_do_not_count_as_another_use():
    """As of an evaluation step that hands its state on."""

    def f(p, x):
        return norm(p, x @ p["w"]), {name: p["norm"][name] for name in ("mean", "var")}

    params = {"w": W, "norm": NORM}
    rows = cases.found(models.Case(f, params, X))
    assert [row.reason for row in rows] == [""]
    y, stats = f(qj.fold_batch_norm(params, rows), X)
    np.testing.assert_allclose(y, f(params, X)[0], rtol=1e-4, atol=1e-5)
    assert_array_equal(stats["mean"], jnp.zeros(4))
