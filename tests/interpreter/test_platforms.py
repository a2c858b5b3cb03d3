"""``lax.platform_dependent`` in a model: the branch of the backend in use is the model's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpreter import SiteStatus
from tests.models import Case, assert_same_bits, normal, ready

PARAMS = {"w": normal(1, 6, 4), "v": normal(2, 6, 4)}
X = normal(0, 3, 6)


def own(p: Any, x: jax.Array) -> jax.Array:
    """A branch for the platforms of tests, another for no platform there is."""
    here = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    other = lambda p, x: x @ p["v"]  # noqa: E731
    return lax.platform_dependent(p, x, cpu=here, cuda=here, tpu=here, rocm=here, default=other)


def by_default(p: Any, x: jax.Array) -> jax.Array:
    """The default, beside a branch of a platform that is not in use."""
    other = lambda p, x: x @ p["v"]  # noqa: E731
    return lax.platform_dependent(p, x, oneapi=other, default=lambda p, x: jnp.tanh(x @ p["w"]))


def in_a_scan(p: Any, x: jax.Array) -> jax.Array:
    def step(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y = by_default(p, carry)
        return carry + 0.1 * jnp.pad(y, ((0, 0), (0, 2))), y

    return lax.scan(step, x, None, length=2)[1]


def plain(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"])


@pytest.mark.parametrize("f", [own, by_default, in_a_scan], ids=lambda f: f.__name__)
def test_its_product_is_a_site_of_the_branch_in_use(f):
    (site,) = qj.sites(f, PARAMS, X)
    assert site.name == "w"
    assert site.status is SiteStatus.REWRITABLE
    assert "platform_dependent" in site.reason
    state = ready(Case(f, PARAMS, X), qj.uniform_policy())
    floats = qj.calibrate(state.plan, state.state, PARAMS, weight_bits=0, activation_bits=0)
    simulated = qj.fake_quantize(f, state.plan)
    assert_same_bits(simulated(floats, PARAMS, X), f(PARAMS, X))
    assert (simulated(state.qstate, PARAMS, X) != f(PARAMS, X)).any()


@pytest.mark.parametrize("f", [own, by_default], ids=lambda f: f.__name__)
def test_it_is_quantized_as_the_branch_alone(f):
    results = []
    for model in (f, plain):
        done = ready(Case(model, PARAMS, X), qj.uniform_policy())
        frozen = qj.freeze(done.plan, done.qstate, PARAMS)
        simulated = qj.fake_quantize(model, done.plan)(done.qstate, PARAMS, X)
        executed = qj.execute(model, done.plan)(done.qstate, frozen, X)
        results.append((simulated, executed))
    assert_same_bits(*results)


def test_a_branch_without_products_is_left_alone():
    def f(p: Any, x: jax.Array) -> jax.Array:
        x = lax.platform_dependent(x, cpu=lambda x: 2.0 * x, default=lambda x: x + x)
        return x @ p["w"]

    assert [site.name for site in qj.sites(f, PARAMS, X)] == ["w"]
    done = ready(Case(f, PARAMS, X), qj.uniform_policy())
    text = str(jax.make_jaxpr(qj.fake_quantize(f, done.plan))(done.qstate, PARAMS, X))
    assert "platform_index" in text


def test_a_lookup_in_it_has_a_row():
    table = {"e": normal(3, 7, 6), **PARAMS}

    def f(p: Any, i: jax.Array) -> jax.Array:
        take = lambda e, i: e[i]  # noqa: E731
        return lax.platform_dependent(p["e"], i, cpu=take, default=take) @ p["w"]

    assert [site.name for site in qj.sites(f, table, jnp.arange(3))] == ["e", "w"]
