"""What the interpreter does not rewrite is a row with a reason, and is computed as it was."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

import quantjax as qj
from quantjax import errors
from quantjax.interpreter import NOTHING, Outcome, SiteStatus, Visit, evaluate, trace
from tests.models import assert_same_bits, normal
from tests.refused import refused

PARAMS = {"w": normal(1, 6, 6), "v": normal(2, 6, 6)}
X = normal(0, 3, 6)


@jax.custom_vjp
def with_custom_vjp(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


with_custom_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


def in_pallas(p: Any, x: jax.Array) -> jax.Array:
    def kernel(x_ref: Any, w_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...] @ w_ref[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, p["w"])


def in_shard_map(p: Any, x: jax.Array) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()[:1]), ("i",))
    spec = PartitionSpec()
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=spec, out_specs=spec)(p["w"], x)


def in_the_condition_of_while(p: Any, x: jax.Array) -> jax.Array:
    return lax.while_loop(lambda c: jnp.sum(c @ p["w"]) < -1e9, lambda c: c + 1.0, x)


def in_custom_vjp_in_scan(p: Any, x: jax.Array) -> jax.Array:
    step = lambda h, _: (jnp.tanh(with_custom_vjp(p["w"], h)), None)  # noqa: E731
    return lax.scan(step, x, None, length=2)[0]


CONTAINERS = {
    "custom_vjp": (lambda p, x: with_custom_vjp(p["w"], x), "inside custom_vjp", 1),
    "custom_vjp_in_scan": (in_custom_vjp_in_scan, "inside custom_vjp", 1),
    "pallas": (in_pallas, "inside pallas_call", 1),
    "shard_map": (in_shard_map, "inside shard_map", 1),
    "condition": (in_the_condition_of_while, "in the condition of a while loop", 1),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_it_is_a_row_with_a_reason(name):
    f, reason, rows = CONTAINERS[name]
    table = qj.sites(f, PARAMS, X)
    assert len(table) == rows
    for site in table:
        assert site.status is SiteStatus.OPAQUE
        assert reason in site.reason
        assert site.reason.endswith("which is not rewritten")
        assert site.loops
    with refused(errors.OpaqueSiteError, "matches only sites that cannot be rewritten", reason):
        qj.plan(qj.Policy([qj.rule(qj.everything(), scheme())]), table)


def in_custom_root(p: Any, x: jax.Array) -> jax.Array:
    """A fixed point. Its program lies in an object in JAX 0.12, in a ``custom_jvp`` before."""
    solve = lambda f, start: lax.fori_loop(0, 5, lambda _, y: y - f(y), start)  # noqa: E731
    inverse = lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y)  # noqa: E731
    rows = lambda x: lax.custom_root(  # noqa: E731
        lambda y: y - 0.1 * jnp.tanh(y @ p["w"] + x), x, solve, inverse
    )
    return jnp.stack([rows(row) for row in x[:1]])


def test_a_root_has_a_row_and_its_value():
    (site,) = qj.sites(in_custom_root, PARAMS, X)
    assert site.status is not SiteStatus.OPAQUE or site.reason.endswith("which is not rewritten")

    def f(p: Any, x: jax.Array) -> jax.Array:
        return in_custom_root(p, x) @ p["v"]

    table = qj.sites(f, PARAMS, X)
    assert len(table) == 2
    if site.status is SiteStatus.OPAQUE:
        plan = qj.plan(qj.uniform_policy(activation_bits=None), table)
        assert [entry.site.name for entry in plan.quantized] == ["v"]
        qstate = qj.calibrate(plan, {}, PARAMS, weight_bits=0)
        assert_same_bits(qj.fake_quantize(f, plan)(qstate, PARAMS, X), f(PARAMS, X))


def scheme() -> qj.Scheme:
    return qj.Scheme(weights=qj.weight_quantizer(), activations=qj.activation_quantizer())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_plan_leaves_it_as_it_is(name):
    """Next to a site that is rewritten, the value of the container is the model's own."""
    inner = CONTAINERS[name][0]

    def f(p: Any, x: jax.Array) -> jax.Array:
        return inner(p, x) @ p["v"]

    table = qj.sites(f, PARAMS, X)
    plan = qj.plan(qj.uniform_policy(weight_bits=2, activation_bits=2), table)
    (entry,) = plan.quantized
    opaque = [site for site in plan.sites if site.status.value == "opaque"]
    assert len(opaque) == len(table) - 1 > 0
    seen: list[jax.Array] = []

    def handler(visit: Visit) -> Outcome:
        assert visit.site.name == entry.site.name
        seen.append(visit.lhs)
        return Outcome(visit.product.bind(visit.lhs, visit.rhs))

    program = trace(f, PARAMS, X)
    out, *_ = evaluate(program, handler, frozenset({entry.site.name}), NOTHING, PARAMS, X)
    assert len(seen) == 1
    assert_same_bits(seen[0], inner(PARAMS, X))
    assert_same_bits(out, f(PARAMS, X))
    qstate = qj.calibrate(plan, observed(f, plan), PARAMS)
    got = jax.jit(qj.fake_quantize(f, plan))(qstate, PARAMS, X)
    want = jax.jit(f)(PARAMS, X)
    assert not np.array_equal(got, want)


def test_a_tap_of_it_is_refused():
    with refused(errors.OpaqueSiteError, "cannot be tapped", "inside custom_vjp"):
        qj.tap(CONTAINERS["custom_vjp"][0], qj.weighted())(PARAMS, X)


def test_a_container_without_sites_is_bound_whole():
    """Not unrolled, not inlined, not traced again: the same equations with the same parameters."""

    def f(p: Any, x: jax.Array) -> jax.Array:
        x = lax.scan(lambda c, row: (c + row, None), jnp.zeros(6), x)[0][None]
        x = lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)
        x = lax.while_loop(lambda c: c.sum() > 9.0, lambda c: c / 2.0, x)
        x = jax.checkpoint(jnp.tanh)(x)
        x = jax.jit(lambda a: a * 2.0)(x)
        return jax.nn.relu(x @ p["w"])

    plan = qj.plan(qj.uniform_policy(), qj.sites(f, PARAMS, X))
    qstate = qj.calibrate(plan, observed(f, plan), PARAMS)
    before = jax.make_jaxpr(f)(PARAMS, X)
    after = jax.make_jaxpr(qj.fake_quantize(f, plan))(qstate, PARAMS, X)
    kept = {"scan", "cond", "while", "checkpoint", "remat2", "custom_jvp_call"}
    own = [e for e in before.eqns if e.primitive.name in kept]
    rewritten = [e for e in after.eqns if any(str(e.params) == str(other.params) for other in own)]
    names = [e.primitive.name for e in rewritten if e.primitive.name in kept]
    assert names == [e.primitive.name for e in own]
    assert len(own) == 5


def observed(f: Any, plan: qj.Plan) -> Any:
    return jax.jit(qj.observe(f, plan))(qj.init(plan), PARAMS, X)[1]
