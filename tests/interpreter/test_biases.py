"""Biases found by dataflow: what is added to a product, with an entry a channel."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpreter import Carried, Outcome, evaluate, trace
from quantjax.interpreter.evaluate import Additions
from tests.models import assert_same_bits, linen, normal

X = normal(1, 4, 6)
P = {"w": normal(2, 6, 5), "b": normal(3, 5), "v": normal(4, 5, 5)}


def biases(f: Any, params: Any, *inputs: Any) -> dict[str, Any]:
    """Paths of the biases by site."""
    table = qj.sites(f, params, *inputs)
    return {site.name: site.bias.paths[0] for site in table if site.bias is not None}


FOUND = {
    "behind": lambda p, x: x @ p["w"] + p["b"][None],
    "before": lambda p, x: p["b"][None] + x @ p["w"],
    "cast": lambda p, x: (x @ p["w"]) + p["b"].astype(jnp.bfloat16).astype(jnp.float32)[None],
    "reshaped": lambda p, x: x @ p["w"] + p["b"].reshape(1, 5),
    "turned": lambda p, x: (p["w"].T @ x.T) + p["b"][:, None],
    "as it is": lambda p, x: x[0] @ p["w"] + p["b"],
    "as it is, first": lambda p, x: p["b"] + x[0] @ p["w"],
    "a row": lambda p, x: x[:1] @ p["w"] + p["row"],
    "mapped": lambda p, x: jax.vmap(lambda x: p["w"].T @ x + p["b"])(x),
    "mapped twice": lambda p, x: jax.vmap(jax.vmap(lambda x: p["w"].T @ x + p["b"]))(x[None]),
    "transposed result": lambda p, x: (p["w"].T @ x.T).T + p["b"][None],
    "cut result": lambda p, x: (x @ p["w"]).reshape(2, 2, 5) + p["b"][None, None],
    "a row cut off": lambda p, x: (x[:1] @ p["w"])[0].squeeze() + p["b"],
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    want = "row" if name == "a row" else "b"
    assert biases(FOUND[name], {**P, "row": P["b"][None]}, X) == {"w": want}


NONE = {
    "used twice": lambda p, x: (y := x @ p["w"]) + p["b"][None] + y,
    "something between": lambda p, x: jnp.tanh(x @ p["w"]) + p["b"][None],
    "computed": lambda p, x: x @ p["w"] + (2.0 * p["b"])[None],
    "data": lambda p, x: x @ p["w"] + x[:, :5],
    "one entry": lambda p, x: x @ p["w"] + p["b"][0],
    "handed out": lambda p, x: ((y := x @ p["w"]), y + p["b"][None]),
    "turned, used twice": lambda p, x: (y := (x @ p["w"]).T) + p["b"][:, None] + y,
    "handed out, turned": lambda p, x: ((y := (x @ p["w"]).T), y + p["b"][:, None]),
    "turned, handed out": lambda p, x: ((y := x @ p["w"]), y.T + p["b"][:, None]),
    "as it lies, a turned result": lambda p, x: (x[:, :4] @ p["square"]).T + p["four"][None],
    "as it lies along the rows": lambda p, x: x[:, :4] @ p["square"] + p["four"][:, None],
    "as it lies, turned": lambda p, x: (p["square"].T @ x[:, :4].T) + p["four"][None],
    "another half": lambda p, x: (x @ p["w"])[:2] + p["b"][None],
    "subtracted": lambda p, x: x @ p["w"] - p["b"][None],
}


@pytest.mark.parametrize("name", NONE)
def test_none(name):
    assert biases(NONE[name], {**P, "four": normal(14, 4), "square": normal(15, 4, 4)}, X) == {}


EACH = {"w": normal(16, 2, 6, 5), "b": normal(17, 2, 5), "shared": normal(18, 5)}
BATCH = normal(19, 2, 3, 6)
CONVOLVED = {"w": normal(20, 2, 3, 3, 6), "b": normal(21, 2, 6), "shared": normal(22, 6)}


def _convolved(groups: int) -> Any:
    numbers = ("NHC", "HIO", "NHC")

    def one(w: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
        kernel = w[:, : 6 // groups]
        y = lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        return y + b[None, None]

    return one


def _products(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("ebi,eio->ebo", x, p["w"])


BATCHED = {
    "experts": lambda p, x: _products(p, x) + p["b"][:, None],
    "turned": lambda p, x: jnp.einsum("ebi,eio->boe", x, p["w"]) + p["b"].T[None],
    "one bias for all": lambda p, x: _products(p, x) + p["shared"][None, None],
    "members": lambda p, x: jax.vmap(lambda w, b: x[0] @ w + b[None])(p["w"], p["b"]),
    "members, one bias for all": lambda p, x: jax.vmap(lambda w: x[0] @ w + p["shared"][None])(
        p["w"]
    ),
    "members, a row": lambda p, x: jax.vmap(lambda w, b, x: x @ w + b)(p["w"], p["b"], x[:, 0]),
}


@pytest.mark.parametrize("name", BATCHED)
def test_found_where_the_weight_is_batched(name):
    want = "shared" if "all" in name else "b"
    assert biases(BATCHED[name], EACH, BATCH) == {"w": want}


@pytest.mark.parametrize("mapped", [None, 0], ids=["one input", "an input each"])
def test_found_where_members_of_two_maps_share_them_along_one(mapped):
    """Seeds by members: a bias for each member, the same for all seeds, or the other way round."""
    each = lambda axis: jax.vmap(  # noqa: E731
        jax.vmap(lambda w, b, x: x @ w + b[None], (0, 0 if axis else None, mapped)),
        (0, None if axis else 0, mapped),
    )
    x = normal(25, *((2, 3) if mapped == 0 else ()), 4, 6)
    for axis, number in enumerate((2, 3)):
        params = {"w": normal(26, 2, 3, 6, 5), "b": normal(27, number, 5)}
        f = lambda p, x, axis=axis: each(axis)(p["w"], p["b"], x)  # noqa: E731
        assert biases(f, params, x) == {"w": "b"}


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("mapped", [None, 0], ids=["one input", "an input each"])
def test_found_where_kernels_are_mapped(groups, mapped):
    params = {**CONVOLVED, "w": CONVOLVED["w"].repeat(2, 2)}
    each = jax.vmap(_convolved(groups), (0, 0, mapped))
    f = lambda p, x: each(p["w"], p["b"], x if mapped == 0 else x[0])  # noqa: E731
    assert biases(f, params, normal(23, 2, 3, 4, 6)) == {"w": "b"}


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 1, 1), (2, 2, 1), (2, 2, 5)])
def test_what_is_no_bias_of_a_batched_product(shape):
    """Positions, as many as there are experts; a number for each expert; for each row."""
    params = {**EACH, "b": normal(24, *shape)}
    assert biases(lambda p, x: _products(p, x[:, :2]) + p["b"], params, BATCH) == {}


def test_an_embedding_of_positions_is_no_bias():
    params = {"w": normal(5, 6, 8), "positions": normal(6, 4, 8)}
    assert biases(lambda p, x: x @ p["w"] + p["positions"], params, X) == {}


def test_a_second_addition_is_no_bias():
    params = {**P, "c": normal(7, 5)}
    assert biases(lambda p, x: x @ p["w"] + p["b"][None] + p["c"][None], params, X) == {"w": "b"}


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3,))(x))
        x = nn.Conv(4, (3,), feature_group_count=4)(x)
        x = nn.ConvTranspose(3, (2,))(x)
        x = nn.DenseGeneral((2, 3), axis=(-1, -2))(x)
        return nn.Dense(5, use_bias=False)(x)


def test_linen_layers():
    case = linen(Layers(), normal(8, 2, 6, 3))
    found = biases(case.f, case.params, case.x)
    names = ["Conv_0", "Conv_1", "ConvTranspose_0", "DenseGeneral_0"]
    assert found == {f"params/{n}/kernel": f"params/{n}/bias" for n in names}


def test_stacked_layers_have_a_bias_each():
    params = {"w": normal(9, 3, 6, 6), "b": normal(10, 3, 6), "one": normal(11, 6)}

    def f(p: Any, x: jax.Array) -> jax.Array:
        step = lambda x, q: (jnp.tanh(x @ q["w"] + q["b"][None]), None)  # noqa: E731
        return lax.scan(step, x, {"w": p["w"], "b": p["b"]})[0]

    (site,) = qj.sites(f, params, X)
    assert (site.bias.paths, site.bias.shape, site.steps) == (("b",), (6,), (3,))

    def shared(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w + p["one"][None]), None), x, p["w"])[0]

    assert biases(shared, params, X) == {}, "one bias for all layers belongs to none of them"


def test_the_handler_meets_the_product_and_the_bias():
    """As they are added, under jit, in a scan; the state goes from one to the other."""
    params = {"w": normal(12, 3, 6, 6), "b": normal(13, 3, 6)}

    def f(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, q: (q["b"][None] + jnp.tanh(x) @ q["w"], None), x, p)[0]

    program = trace(f, params, X)
    (name,) = (site.name for site in program.sites.values())

    def product(visit: Any) -> Outcome:
        return Outcome(visit.product.bind(visit.lhs, visit.rhs), visit.state + 1, kept=visit.value)

    def addition(met: Any) -> Outcome:
        return Outcome(met.add(met.out, met.kept * met.bias), 10 * met.state)

    values = {name: jnp.array([1.0, 1.0, 1.0])}
    carried = Carried(values, {name: jnp.zeros(3, jnp.int32)})
    run = lambda carried, p, x: evaluate(  # noqa: E731
        program,
        product,
        frozenset([name]),
        carried,
        p,
        x,
        additions=Additions(addition, frozenset([name])),
    )
    result, states, _ = jax.jit(run)(carried, params, X)
    assert_same_bits(result, jax.jit(f)(params, X))
    assert states[name].tolist() == [10, 10, 10]
    doubled = carried._replace(values={name: jnp.array([2.0, 2.0, 2.0])})
    twice = jax.jit(run)(doubled, params, X).result
    expected = jax.jit(f)({**params, "b": 2.0 * params["b"]}, X)
    assert_same_bits(twice, expected)


def test_a_handler_of_another_shape_is_refused():
    program = trace(FOUND["behind"], P, X)
    product = lambda v: Outcome(v.product.bind(v.lhs, v.rhs))  # noqa: E731
    with pytest.raises(qj.errors.SiteError, match="returned float32"):
        evaluate(
            program,
            product,
            frozenset(["w"]),
            Carried({}, {}),
            P,
            X,
            additions=Additions(lambda met: Outcome(met.out[0]), frozenset(["w"])),
        )
