"""Sites are named by the parameter that flows in; which operand is the weight is dataflow."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpreter import Role, SiteStatus
from tests.models import normal

X = normal(0, 2, 5, 8)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(num_heads=2, name="mha")(x, x)


class TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(11, 6)
        return embed.attend(nn.Dense(6)(embed(ids)))


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.jit(nn.Dense)
        return layer(4, name="second")(layer(4, name="first")(x))


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.WeightNorm(nn.Dense(4, name="dense"))(x)


def rows(f: Any, params: Any, *inputs: Any) -> list[tuple[str, str | None]]:
    """Name of each site and on which side its weight is, in program order."""
    table = qj.sites(f, params, *inputs)
    sides = {None: None, 0: "left", 1: "right"}
    return [(s.name, sides[s.weight.side if s.weight else None]) for s in table]


def linen_names(module: nn.Module, x: Any) -> list[str]:
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return [name for name, _ in rows(module.apply, variables, x)]


@pytest.mark.parametrize(
    ("module", "x", "names"),
    [
        (nn.Dense(3), X, ["params/kernel"]),
        (nn.DenseGeneral((2, 3), axis=(-2, -1)), X, ["params/kernel"]),
        (nn.Conv(4, (3,)), X, ["params/kernel"]),
        (nn.Conv(4, (3, 3), feature_group_count=2), X[None], ["params/kernel"]),
        (nn.ConvTranspose(4, (3,), strides=(2,)), X, ["params/kernel"]),
        (nn.Einsum((8, 3), "abi,io->abo"), X, ["params/kernel"]),
        (Jitted(), X[0], ["params/first/kernel", "params/second/kernel"]),
        (
            TiedEmbedding(),
            jnp.arange(4),
            ["params/Embed_0/embedding", "params/Dense_0/kernel", "params/Embed_0/embedding#1"],
        ),
        (
            Attention(),
            X,
            [
                "params/mha/query/kernel",
                "params/mha/key/kernel",
                "params/mha/value/kernel",
                "Attention/mha/...qhd,...khd->...hqk/dot_general#0",
                "Attention/mha/...hqk,...khd->...qhd/dot_general#0",
                "params/mha/out/kernel",
            ],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_linen_modules(module, x, names):
    assert linen_names(module, x) == names


def test_weight_norm_is_a_function_of_its_parameters():
    variables = Normalized().init(jax.random.key(0), X[0])
    (site,) = qj.sites(Normalized().apply, variables, X[0])
    assert site.name.startswith("f(params/WeightNorm_0/")
    assert site.weight is not None
    assert len(site.weight.paths) == 2
    assert not site.weight.storable
    assert "not storable" in site.reason
    assert site.status is SiteStatus.REWRITABLE


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"a": {"w": 0}, "b": 1}, ["a/w", "b"]),
        ([0, 1], ["0", "1"]),
        ((0, [1]), ["0", "1/0"]),
        (Pair(0, {"w": 1}), ["first", "second/w"]),
    ],
)
def test_raw_trees(params, names):
    """The leaf 0 is the first layer's weight, 1 the second's, whatever holds them."""
    arrays = jax.tree.map(lambda i: (normal(1, 8, 6), normal(2, 6, 3))[i], params)

    def f(params: Any, x: jax.Array) -> jax.Array:
        first, second = jax.tree.leaves(params)
        return jnp.tanh(x @ first) @ second

    assert rows(f, arrays, X[0]) == [(name, "right") for name in names]


def test_a_bare_array_is_a_tree_too():
    assert rows(lambda w, x: x @ w, normal(1, 8, 6), X[0]) == [("", "right")]


W = {"w": normal(1, 8, 8), "v": normal(2, 8, 8)}


@pytest.mark.parametrize(
    ("f", "expected", "note"),
    [
        (lambda p, x: x @ p["w"].T, ("w", "right"), ""),
        (lambda p, x: p["w"] @ x.T, ("w", "left"), ""),
        (lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), ("w", "right"), ""),
        (lambda p, x: x @ p["w"].reshape(4, 16)[1:3].reshape(8, 4), ("w", "right"), "a part of"),
        (lambda p, x: x @ lax.dynamic_slice(p["w"], (0, 2), (8, 3)), ("w", "right"), "a part of"),
        (lambda p, x: x @ p["w"][:, ::-1], ("w", "right"), ""),
        (lambda p, x: x @ (2.0 * p["w"]), ("f(w)", "right"), "computed"),
        (lambda p, x: x @ (p["w"] + p["v"]), ("f(v,w)", "right"), "computed"),
        (
            lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], axis=1),
            ("f(v,w)", "right"),
            "computed",
        ),
        (lambda p, x: x @ jnp.where(p["w"] > 0, p["w"], 0.0), ("f(w)", "right"), "computed"),
    ],
)
def test_a_weight_on_its_way_to_the_product(f, expected, note):
    assert rows(f, W, X[0]) == [expected]
    (site,) = qj.sites(f, W, X[0])
    assert site.weight.storable == (note == "")
    assert note in site.reason
    assert site.reason.endswith("not storable") == (note != "")


def test_a_slice_at_a_position_from_the_data_is_a_lookup_and_then_an_activation():
    """Which rows are taken is data: a mixture of experts has no one weight in its product."""
    f = lambda p, x, i: x @ lax.dynamic_slice(p["w"], (0, i), (8, 3))  # noqa: E731
    assert rows(f, W, X[0], jnp.int32(1)) == [("w", "left"), ("dot_general#0", None)]


def test_reused_weights_are_numbered():
    def f(params: Any, x: jax.Array) -> jax.Array:
        for name in ("w", "v", "w", "w"):
            x = jnp.tanh(x @ params[name])
        return x

    assert [name for name, _ in rows(f, W, X[0])] == ["w", "v", "w#1", "w#2"]


def test_more_than_three_paths_are_cut_short_and_stay_apart():
    params = {k: normal(i, 8, 8) for i, k in enumerate("abcde")}

    def f(params: Any, x: jax.Array) -> jax.Array:
        return x @ sum(params.values()) + x @ jnp.tanh(sum(params.values()))

    names = [name for name, _ in rows(f, params, X[0])]
    assert names == ["f(a,b,c,...)", "f(a,b,c,...)#1"]
    assert len(qj.sites(f, params, X[0])[names[0]].weight.paths) == 5


def test_a_weight_that_the_function_closes_over():
    constant = normal(3, 8, 4)
    (site,) = qj.sites(lambda p, x: x @ constant + p["b"], {"b": jnp.zeros((1, 4))}, X[0])
    assert site.name == "dot_general"
    assert site.weight is not None
    assert (site.weight.side, site.weight.paths) == (1, ())
    assert "pass it in params" in site.reason


def test_a_product_of_two_parameters_stays_in_float():
    """LoRA's ``A @ B``: computed once; the product with the data is the site."""

    def f(params: Any, x: jax.Array) -> jax.Array:
        return x @ (params["w"] + params["v"][:, :2] @ params["w"][:2])

    table = qj.sites(f, W, X[0])
    inner, outer = table
    assert inner.status is SiteStatus.OPAQUE
    assert "both operands are known without the inputs" in inner.reason
    assert outer.name == "f(v,w)"
    assert outer.status is SiteStatus.REWRITABLE


def test_products_of_activations_are_named_by_scope_and_position():
    def f(params: Any, x: jax.Array) -> jax.Array:
        del params
        with jax.named_scope("scores"):
            first = x @ x.T
        with jax.named_scope("scores"):
            second = (x + 1.0) @ x.T
        return first @ second

    table = qj.sites(f, {}, X[0])
    assert [site.name for site in table] == [
        "scores/dot_general#0",
        "scores/dot_general#1",
        "dot_general#0",
    ]
    assert [o.key for o in table["dot_general#0"].operands] == ["lhs", "rhs"]
    assert all(o.role is Role.ACTIVATION for site in table for o in site.operands)


@jax.jit
def layer(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def test_products_inside_jit_and_nested_jit():
    outer = jax.jit(lambda p, x: layer(p["v"], jax.jit(layer)(p["w"], x)))
    assert rows(outer, W, X[0]) == [("w", "right"), ("v", "right")]


def test_one_jitted_function_called_twice_is_two_sites():
    f = lambda p, x: layer(p["w"], layer(p["v"], layer(p["w"], x)))  # noqa: E731
    assert [name for name, _ in rows(f, W, X[0])] == ["w", "v", "w#1"]


def test_a_weight_computed_inside_jit_keeps_its_parameters():
    f = lambda p, x: x @ jax.jit(lambda w, v: (w + v, w.T))(p["w"], p["v"])[1]  # noqa: E731
    assert rows(f, W, X[0]) == [("w", "right")]
    f = lambda p, x: x @ jax.jit(lambda w, v: (w + v, w.T))(p["w"], p["v"])[0]  # noqa: E731
    assert rows(f, W, X[0]) == [("f(v,w)", "right")]


def test_shapes_alone_are_enough():
    spec = jax.ShapeDtypeStruct
    table = qj.sites(
        lambda p, x: x @ p["w"], {"w": spec((8, 3), jnp.float32)}, spec((4, 8), jnp.float32)
    )
    (site,) = table
    assert (site.name, site.out_shape, site.multiply_adds) == ("w", (4, 3), 96)
    assert table.shapes == (("w", (8, 3)),)


def test_python_numbers_among_the_parameters():
    params = {"w": normal(1, 8, 3), "temperature": 2.0}
    table = qj.sites(lambda p, x: x @ p["w"] / p["temperature"], params, X[0])
    assert table.shapes == (("temperature", ()), ("w", (8, 3)))
    plan = qj.plan(qj.uniform_policy(weight_bits=4, activation_bits=None), table)
    qstate = qj.calibrate(plan, qj.init(plan), params)
    f = qj.fake_quantize(lambda p, x: x @ p["w"] / p["temperature"], plan)
    assert f(qstate, params, X[0]).shape == (5, 3)


def test_integer_products_are_rows_that_stay_as_they_are():
    params = {"w": jnp.ones((8, 3), jnp.int32)}
    (site,) = qj.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 8), jnp.int32))
    assert site.status is SiteStatus.OPAQUE
    assert "not a product of real floating-point numbers" in site.reason


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_random_keys_may_be_closed_over(key):
    def dropped(params: Any, x: jax.Array) -> jax.Array:
        return (x @ params["w"]) * jax.random.bernoulli(key, 0.5, (5, 8)).astype(jnp.float32)

    assert rows(dropped, W, X[0]) == [("w", "right")]
