"""What the interpreter does not rewrite is a row with a reason, and is computed as it was."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpreter import SiteStatus, evaluate, trace
from tests.models import assert_same_bits, normal

PARAMS = {"w": normal(1, 6, 6), "v": normal(2, 6, 6), "stack": normal(3, 4, 6, 6)}
X = normal(0, 3, 6)


@jax.custom_vjp
def with_custom_vjp(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


with_custom_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


@jax.custom_jvp
def with_custom_jvp(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


with_custom_jvp.defjvp(lambda p, t: (p[1] @ p[0], p[1] @ t[0] + t[1] @ p[0]))


def scan_over_time(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, row: (jnp.tanh(h + row @ p["w"]), None), jnp.zeros(6), x)[0]


def scan_over_layers(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0]


def in_while(p: Any, x: jax.Array) -> jax.Array:
    return lax.while_loop(lambda c: jnp.sum(c) < 0, lambda c: jnp.tanh(c @ p["w"]), x)


def in_fori(p: Any, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"]), x)


def in_cond(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x @ p["v"])


def in_switch(p: Any, x: jax.Array) -> jax.Array:
    branches = [lambda x: x @ p["w"], lambda x: x, lambda x: (x @ p["w"]) @ p["v"]]
    return lax.switch(jnp.int32(x.sum()), branches, x)


def in_remat(p: Any, x: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x)


def in_scan_of_remat(p: Any, x: jax.Array) -> jax.Array:
    step = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return lax.scan(step, x, p["stack"])[0]


CONTAINERS = {
    "scan_over_time": (scan_over_time, ["w"], ("scan",)),
    "scan_over_layers": (scan_over_layers, ["stack"], ("scan",)),
    "while": (in_while, None, ("while",)),
    "fori": (in_fori, None, None),
    "cond": (in_cond, ["v", "w"], ("cond",)),
    "switch": (in_switch, ["w", "w#1", "v"], ("cond",)),
    "remat": (in_remat, ["w"], None),
    "scan_of_remat": (in_scan_of_remat, ["stack"], None),
    "custom_vjp": (lambda p, x: with_custom_vjp(p["w"], x), ["w"], None),
    "custom_jvp": (lambda p, x: with_custom_jvp(p["w"], x), ["w"], None),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_product_in_a_container_is_a_row_with_a_reason(name):
    f, names, loops = CONTAINERS[name]
    table = qj.sites(f, PARAMS, X)
    assert len(table) > 0
    if names is not None:
        assert sorted(site.name for site in table) == sorted(names)
    for site in table:
        assert site.status is SiteStatus.OPAQUE
        assert "which is not rewritten" in site.reason
        assert site.loops[0] in site.reason
        assert loops is None or site.loops == loops


def test_loops_are_listed_from_the_outside_in():
    (site,) = qj.sites(in_scan_of_remat, PARAMS, X)
    assert site.loops[0] == "scan"
    assert len(site.loops) == 2
    assert site.reason == "inside scan, which is not rewritten"


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_plan_leaves_it_as_it_is(name):
    """Next to a site that is rewritten, value and gradient of the container are the model's own."""
    inner, _, _ = CONTAINERS[name]

    def f(p: Any, x: jax.Array) -> jax.Array:
        return inner(p, x) @ p["v"]

    table = qj.sites(f, PARAMS, X)
    policy = qj.uniform_policy(weight_bits=2, activation_bits=2)
    plan = qj.plan(policy, table)
    (entry,) = plan.quantized
    opaque = [site for site in plan.sites if site.status.value == "opaque"]
    assert len(opaque) == len(table) - 1 > 0
    seen: list[jax.Array] = []

    def handler(site: Any, product: Any, lhs: Any, rhs: Any, value: Any) -> Any:
        assert site.name == entry.site.name
        seen.append(lhs)
        return product.bind(lhs, rhs), None

    program = trace(f, PARAMS, X)
    out, _ = evaluate(program, handler, frozenset({entry.site.name}), {}, PARAMS, X)
    assert len(seen) == 1
    assert_same_bits(seen[0], inner(PARAMS, X))
    assert_same_bits(out, f(PARAMS, X))


def test_a_container_without_sites_is_bound_whole():
    """Not unrolled, not inlined, not traced again: the same equations with the same parameters."""

    def f(p: Any, x: jax.Array) -> jax.Array:
        x = lax.scan(lambda c, row: (c + row, None), jnp.zeros(6), x)[0][None]
        x = lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)
        x = lax.while_loop(lambda c: c.sum() > 9.0, lambda c: c / 2.0, x)
        x = jax.checkpoint(jnp.tanh)(x)
        x = jax.jit(lambda a: a * 2.0)(x)
        return jax.nn.relu(x @ p["w"])

    plan = planned_on(f)
    qstate = qj.calibrate(plan, observed(f, plan), PARAMS)
    before = jax.make_jaxpr(f)(PARAMS, X)
    after = jax.make_jaxpr(qj.fake_quantize(f, plan))(qstate, PARAMS, X)
    kept = {"scan", "cond", "while", "checkpoint", "remat2", "custom_jvp_call"}
    own = [e for e in before.eqns if e.primitive.name in kept]
    rewritten = [e for e in after.eqns if any(str(e.params) == str(other.params) for other in own)]
    names = [e.primitive.name for e in rewritten if e.primitive.name in kept]
    assert names == [e.primitive.name for e in own]
    assert len(own) == 5


def planned_on(f: Any) -> qj.Plan:
    return qj.plan(qj.uniform_policy(), qj.sites(f, PARAMS, X))


def observed(f: Any, plan: qj.Plan) -> Any:
    return qj.observe(f, plan)(qj.init(plan), PARAMS, X)[1]


def test_both_branches_of_cond_have_a_row():
    """One location in each branch: neither hides the other."""
    f = lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x @ p["w"])  # noqa: E731
    assert [site.name for site in qj.sites(f, PARAMS, X)] == ["w", "w#1"]
