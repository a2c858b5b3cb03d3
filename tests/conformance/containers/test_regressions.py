"""What broke once, each with the smallest program that shows it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import quantjax as qj
from tests.conformance.containers.case import Case, derivatives
from tests.conformance.containers.raw_cases import dot
from tests.models import assert_same_bits, normal, policy

TWO = {"a": normal(1, 6, 6), "b": normal(2, 6, 6)}


@pytest.mark.parametrize(
    "product", [lambda x, w: x @ w, jnp.dot, lambda x, w: jnp.einsum("bti,ij->btj", x, w)]
)
def test_the_eager_gradient_of_a_product_of_three_axes(product):
    case = Case(lambda p, x: product(x, p["a"]), {"a": TWO["a"]}, (normal(0, 3, 4, 6),))
    plan = case.planned(qj.Policy([]))
    identity = lambda *a: qj.fake_quantize(case.f, plan)({}, *a)  # noqa: E731
    want = derivatives(case, case.f)(case.params, *case.inputs)
    got = derivatives(case, identity)(case.params, *case.inputs)
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])


def test_a_jitted_observation_of_an_activation_of_three_axes():
    def f(p: Any, x: jax.Array) -> jax.Array:
        return dot(jax.nn.gelu(dot(x, p["a"]) + 0.1), p["b"])

    x = normal(0, 5, 7, 6)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, TWO, x))
    y, _ = qj.observe(f, plan)(qj.init(plan), TWO, x)
    assert_same_bits(y, f(TWO, x))
    y, _ = jax.jit(qj.observe(f, plan))(qj.init(plan), TWO, x)
    assert_same_bits(y, jax.jit(f)(TWO, x))


def test_a_closed_over_random_key_under_jit():
    key = jax.random.key(0)

    def f(p: Any, x: jax.Array) -> jax.Array:
        return dot(x + jax.random.normal(key, x.shape), p["a"])

    x = normal(0, 3, 6)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, TWO, x))
    y, _ = qj.observe(f, plan)(qj.init(plan), TWO, x)  # eagerly it works
    assert_same_bits(y, f(TWO, x))
    jax.jit(qj.observe(f, plan))(qj.init(plan), TWO, x[:2])


def test_a_mapped_while_whose_rows_end_at_different_times():
    def row(p: Any, x: jax.Array) -> jax.Array:
        body = lambda c: 0.5 * jnp.tanh(dot(c, p["a"]))  # noqa: E731
        return lax.while_loop(lambda c: jnp.abs(c).sum() > 3.0, body, x)

    f, x = lambda p, x: jax.vmap(lambda r: row(p, r))(x), 5.0 * normal(0, 4, 3, 6)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, TWO, x))
    y, _ = qj.observe(f, plan)(qj.init(plan), TWO, x)
    assert_same_bits(y, f(TWO, x))


def test_a_mapped_cond_whose_rows_take_different_branches():
    def row(p: Any, x: jax.Array) -> jax.Array:
        return lax.cond(x.sum() > 0.0, lambda x: dot(x, p["a"]), lambda x: x, x)

    f = lambda p, x: jax.vmap(lambda r: row(p, r))(x)  # noqa: E731
    (site,) = qj.sites(f, TWO, normal(0, 4, 3, 6))
    assert site.weight is not None
    assert site.weight.paths == ("a",)


def test_an_empty_product_of_the_model_itself():
    def f(p: Any, x: jax.Array) -> jax.Array:
        return lax.associative_scan(jnp.matmul, jnp.tanh(dot(x, p["a"])))

    x = normal(0, 4, 6, 6)
    everywhere = policy(qj.weight_quantizer(), qj.activation_quantizer())
    plan = qj.plan(everywhere, qj.sites(f, TWO, x))
    y, _ = qj.observe(f, plan)(qj.init(plan), TWO, x)
    assert_same_bits(y, f(TWO, x))
