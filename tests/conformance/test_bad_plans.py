"""Acceptance: a policy, a plan or a parameter tree that does not fit is an error.

It names the site, the shapes and one edit to try.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import quantjax as qj
from quantjax import errors
from tests.models import assert_same_bits, dense, mlp, ready
from tests.refused import refused

FIRST, SECOND = "params/Dense_0/kernel", "params/Dense_1/kernel"
MLP = mlp()
INT4 = qj.Scheme(weights=qj.weight_quantizer(bits=4))


@pytest.fixture(scope="module")
def mlp_ready() -> Any:
    return ready(MLP, qj.uniform_policy())


@jax.custom_vjp
def custom_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


custom_dot.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def in_custom_vjp(params: Any, x: jax.Array) -> jax.Array:
    return custom_dot(x, params["w"])


def in_condition(params: Any, x: jax.Array) -> jax.Array:
    return lax.while_loop(lambda c: jnp.sum(c @ params["w"]) < -1e9, lambda c: c + 1.0, x)


def in_custom_vjp_in_scan(params: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda c, row: (c, in_custom_vjp(params, row[None])), 0.0, x)[1]


def test_a_rule_that_matches_nothing_suggests_a_close_name():
    table = qj.sites(MLP.f, MLP.params, MLP.x)
    policy = qj.Policy([qj.rule(qj.path("params/Densee_1/kernel"), INT4)])
    with refused(errors.PolicyError, "params/Densee_1/kernel", f"qj.path('{SECOND}')", FIRST):
        qj.plan(policy, table)


def test_a_rule_that_matches_nothing_in_a_function_without_products():
    table = qj.sites(lambda p, x: x + p["b"], {"b": jnp.ones(3)}, jnp.ones(3))
    with refused(errors.PolicyError, "the function has no product", "optional=True"):
        qj.plan(qj.uniform_policy(), table)


@pytest.mark.parametrize(
    ("f", "container"),
    [
        (in_custom_vjp, "custom_vjp"),
        (in_custom_vjp_in_scan, "custom_vjp"),
        (in_condition, "condition of a while loop"),
    ],
)
def test_a_rule_whose_every_match_is_opaque(f, container):
    case = dense()
    table = qj.sites(f, case.params, case.x)
    with refused(errors.OpaqueSiteError, "dot_general", container, "optional=True"):
        qj.plan(qj.uniform_policy(), table)


def test_a_rule_that_decides_on_no_site():
    """An earlier rule matches all that it matches: the order is a mistake."""
    table = qj.sites(MLP.f, MLP.params, MLP.x)
    last = qj.rule(qj.path(SECOND), qj.Scheme())
    policy = qj.Policy([qj.rule(qj.weighted(), INT4), last])
    with refused(errors.PolicyError, "decides on no site", SECOND, "weighted: w=int4"):
        qj.plan(policy, table)
    optional = qj.Policy([policy.rules[0], qj.rule(qj.path(SECOND), qj.Scheme(), optional=True)])
    assert len(qj.plan(optional, table).quantized) == 2
    assert len(qj.plan(qj.Policy([last, policy.rules[0]]), table).quantized) == 1


def test_an_optional_rule_may_be_opaque_and_the_plan_says_so():
    case = dense()
    policy = qj.Policy([qj.rule(qj.weighted(), INT4, optional=True)])
    plan = qj.plan(policy, qj.sites(in_custom_vjp, case.params, case.x))
    assert plan.quantized == ()
    assert "custom_vjp" in str(plan)
    y = qj.fake_quantize(in_custom_vjp, plan)({}, case.params, case.x)
    assert_same_bits(y, in_custom_vjp(case.params, case.x))


def without(tree: Any, layer: str) -> Any:
    return {**tree, "params": {k: v for k, v in tree["params"].items() if k != layer}}


def reshaped(tree: Any, layer: str) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[:-1] if layer in str(path) and leaf.ndim == 2 else leaf, tree
    )


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (without, (SECOND, "16x4", "it is not there")),
        (reshaped, (SECOND, "planned with 16x4", "it has 15x4")),
    ],
)
def test_a_parameter_tree_that_was_not_planned_for(mlp_ready, change, fragments):
    plan, state, qstate = mlp_ready
    params = change(MLP.params, "Dense_1")
    calls = [
        lambda: qj.calibrate(plan, state, params),
        lambda: qj.observe(MLP.f, plan)(state, params, MLP.x),
        lambda: qj.fake_quantize(MLP.f, plan)(qstate, params, MLP.x),
        lambda: qj.compare(MLP.f, plan)(qstate, params, MLP.x),
    ]
    for call in calls:
        with refused(errors.PlanMismatchError, *fragments, "qj.plan(policy"):
            call()
    qj.fake_quantize(MLP.f, plan)(qstate, MLP.params, MLP.x)


def test_a_renamed_parameter_is_pointed_at(mlp_ready):
    params = {**MLP.params, "params": dict(MLP.params["params"])}
    params["params"]["Dense_10"] = params["params"].pop("Dense_1")
    with refused(errors.PlanMismatchError, SECOND, "closest path: params/Dense_10/kernel"):
        qj.calibrate(mlp_ready.plan, mlp_ready.state, params)


def one_more(params: Any, x: jax.Array) -> jax.Array:
    y = MLP.f(params, x)
    return y @ y.T


def one_less(params: Any, x: jax.Array) -> jax.Array:
    kernel = params["params"]["Dense_1"]["kernel"]
    return jnp.pad(x, ((0, 0), (0, 8))) @ kernel


def transposed(params: Any, x: jax.Array) -> jax.Array:
    first, second = (params["params"][k]["kernel"] for k in ("Dense_0", "Dense_1"))
    return (x @ first) @ second[:, :3]


@pytest.mark.parametrize(
    ("program", "fragments"),
    [
        (one_more, ("a site that was not planned", "dot_general", "6x6")),
        (one_less, (FIRST, "no such site")),
        (transposed, (SECOND, "16x4", "16x3")),
    ],
)
def test_another_program_than_the_planned_one(mlp_ready, program, fragments):
    plan, state, qstate = mlp_ready
    for call in (qj.fake_quantize(program, plan), qj.compare(program, plan)):
        with refused(errors.PlanMismatchError, *fragments, "qj.plan(policy"):
            call(qstate, MLP.params, MLP.x)
    with refused(errors.PlanMismatchError, *fragments):
        qj.observe(program, plan)(state, MLP.params, MLP.x)
