"""Where a weight comes from, and recomputing it from the parameters alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.interpreter import (
    Origin,
    OriginKind,
    Program,
    evaluate_origin,
    leaves_by_path,
    trace,
)
from tests.models import Case, assert_same_bits, mlp, normal, planned, ready
from tests.refused import refused

PARAMS = {"w": normal(1, 6, 4), "v": normal(2, 6, 4), "g": jnp.abs(normal(3, 1, 4)) + 0.5}
X = normal(0, 3, 6)
TABLE = normal(4, 6, 4)


def only_origin(program: Program) -> Origin:
    (origin,) = program.weights.values()
    return origin


def norm(w: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(w * w, axis=0, keepdims=True))


WEIGHTS = {
    "leaf": (lambda p: p["w"], OriginKind.LEAF),
    "cast": (lambda p: p["w"].astype(jnp.bfloat16).astype(jnp.float32), OriginKind.LEAF),
    "moved": (lambda p: p["w"].reshape(4, 6).T[:, ::-1], OriginKind.LEAF),
    "sliced": (lambda p: lax.dynamic_slice(p["w"], (0, 1), (6, 2)), OriginKind.LEAF),
    "split": (lambda p: jnp.split(p["w"], 2, axis=1)[1], OriginKind.LEAF),
    "unstacked": (lambda p: jnp.unstack(p["w"].reshape(6, 2, 2), axis=1)[1], OriginKind.LEAF),
    "normalized": (lambda p: p["g"] * p["w"] / norm(p["w"]), OriginKind.FUNCTION),
    "low_rank": (lambda p: p["w"] + p["v"][:, :2] @ p["w"][:2], OriginKind.FUNCTION),
    "joined": (lambda p: jnp.concatenate([p["w"], p["v"]], axis=1), OriginKind.FUNCTION),
    "with_constant": (lambda p: p["w"] * TABLE, OriginKind.FUNCTION),
    "jitted": (lambda p: jax.jit(lambda w: jnp.tanh(w))(p["w"]), OriginKind.FUNCTION),
    "scanned": (
        lambda p: lax.scan(lambda c, row: (c + row, c + row), jnp.zeros(4), p["w"])[1],
        OriginKind.FUNCTION,
    ),
    "many_outputs": (lambda p: jnp.linalg.qr(p["w"])[0], OriginKind.FUNCTION),
    "constant": (lambda p: TABLE, OriginKind.CONSTANT),
    "made": (lambda p: 2.0 * TABLE + jnp.ones((6, 4)), OriginKind.CONSTANT),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_recomputed_from_the_parameters(name):
    """Bit for bit what enters the product, for other parameters than those of the trace too."""
    make, kind = WEIGHTS[name]
    program = trace(lambda p, x: x @ make(p), PARAMS, X)
    origin = next(reversed(program.weights.values()))
    assert origin.kind is kind
    assert origin.derivable
    other = jax.tree.map(lambda leaf: leaf + 0.25, PARAMS)
    for params in (PARAMS, other):
        want = jax.jit(make)(params)
        got = jax.jit(lambda p: evaluate_origin(origin, leaves_by_path(p)))(params)
        assert_same_bits(got, want)


@pytest.mark.parametrize("name", ["normalized", "low_rank", "joined", "jitted"])
def test_a_computed_weight_is_calibrated_and_quantized_as_a_whole(name):
    """Its scale is that of the result, and nothing has to be observed for it."""
    make, _ = WEIGHTS[name]
    case = Case(lambda p, x: x @ make(p), PARAMS, X)
    policy = qj.uniform_policy(weight_bits=4, activation_bits=None)
    plan, state, qstate = ready(case, policy)
    assert state == {}
    (entry,) = plan.quantized
    weight = np.asarray(make(PARAMS))
    scale = qstate[entry.site.name]["weight"].scale
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=0, keepdims=True) / 8, rtol=1e-6)
    got = qj.fake_quantize(case.f, plan)(qstate, PARAMS, X)
    rounded = np.clip(np.rint(weight / np.asarray(scale)), -8, 7) * np.asarray(scale)
    np.testing.assert_allclose(got, np.asarray(X) @ rounded, rtol=1e-4, atol=1e-4)


def shared(p: Any, x: jax.Array) -> jax.Array:
    base = jnp.tanh(p["w"])
    twice = base + base
    return x @ (twice * twice + base)


def test_shared_steps_run_once():
    origin = only_origin(trace(shared, PARAMS, X))
    steps = jax.make_jaxpr(lambda p: evaluate_origin(origin, leaves_by_path(p)))(PARAMS)
    names = [eqn.primitive.name for eqn in steps.eqns]
    assert sorted(names) == ["add", "add", "mul", "tanh"]
    got = evaluate_origin(origin, PARAMS)
    base = jnp.tanh(PARAMS["w"])
    np.testing.assert_allclose(got, 4 * base**2 + base, rtol=1e-6)


def test_a_chain_that_doubles_at_each_step_is_no_exponential_walk():
    def deep(p: Any, x: jax.Array) -> jax.Array:
        w = p["w"]
        for _ in range(40):
            w = 0.5 * (w + w)
        return x @ w

    origin = only_origin(trace(deep, PARAMS, X))
    assert len(origin.signature) < 400
    assert_same_bits(evaluate_origin(origin, PARAMS), PARAMS["w"])


def test_one_jitted_function_of_two_weights_is_two_recipes():
    """The inner program is one object; what it was called with tells the weights apart."""
    half = jax.jit(lambda w: 0.5 * w)
    program = trace(lambda p, x: (x @ half(p["w"]), x @ half(p["v"])), PARAMS, X)
    for key, origin in zip(("w", "v"), program.weights.values(), strict=True):
        assert origin.paths == (key,)
        assert_same_bits(evaluate_origin(origin, PARAMS), 0.5 * PARAMS[key])
    both = only_origin(trace(lambda p, x: x @ (half(p["w"]) + half(p["v"])), PARAMS, X))
    assert_same_bits(evaluate_origin(both, PARAMS), 0.5 * PARAMS["w"] + 0.5 * PARAMS["v"])


def signature(f: Any) -> str:
    return only_origin(trace(f, PARAMS, X)).signature


def test_recipes_are_equal_where_derivations_are():
    """The identity of a recipe: equal when traced again, different for another derivation."""
    f = lambda p, x: x @ (2.0 * p["w"])  # noqa: E731
    assert signature(f) == signature(lambda p, x: x @ (2.0 * p["w"]))
    others = [
        lambda p, x: x @ (3.0 * p["w"]),
        lambda p, x: x @ (2.0 * p["v"]),
        lambda p, x: x @ (2.0 + p["w"]),
        lambda p, x: x @ (p["w"] * TABLE),
        lambda p, x: x @ (p["w"] * (TABLE + 1.0)),
        lambda p, x: x @ (2.0 * p["w"])[:, ::-1],
        lambda p, x: x @ (2.0 * p["w"]).reshape(4, 6).T,
    ]
    assert len({signature(f), *map(signature, others)}) == 8


@pytest.mark.parametrize(
    "f",
    [
        lambda p, x: x @ (p["w"] + x.sum()),
        lambda p, x: x @ jnp.where(x.sum() > 0, p["w"], p["v"]),
        lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["v"]),
    ],
)
def test_what_the_data_touches_is_no_weight(f):
    program = trace(f, PARAMS, X)
    assert program.weights == {}
    assert all(site.weight is None for site in program.sites.values())


def test_random_numbers_from_a_parameter_key_are_a_function_of_it():
    params = {"key": jax.random.key(3), "w": PARAMS["w"]}
    f = lambda p, x: x @ (p["w"] + jax.random.normal(p["key"], (6, 4)))  # noqa: E731
    origin = only_origin(trace(f, params, X))
    assert origin.paths == ("key", "w")
    want = params["w"] + jax.random.normal(params["key"], (6, 4))
    assert_same_bits(evaluate_origin(origin, params), want)


def test_the_kinds_are_ordered():
    assert OriginKind.CONSTANT < OriginKind.LEAF < OriginKind.FUNCTION < OriginKind.DATA


def test_dense_weights_need_no_observation():
    plan = planned(mlp(), qj.uniform_policy())
    assert {key for site in qj.init(plan).values() for key in site} == {"activation"}


def test_a_choice_between_tracers_depends_on_what_chooses():
    """Arrays of an outer trace have no signature; two of them are not one value."""

    def choosing(x: jax.Array, one: jax.Array, other: jax.Array) -> qj.SiteTable:
        f = lambda p, x: (x @ jnp.where(x.sum() > 0, one, other)) @ p["w"].T  # noqa: E731
        return qj.sites(f, {"w": PARAMS["w"]}, x)

    def rows(table: qj.SiteTable) -> list[Any]:
        return [(site.name, [operand.role for operand in site.operands]) for site in table]

    found: list[Any] = []

    def traced(x: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
        found.append(rows(choosing(x, one, other)))
        return x

    jax.jit(traced)(X, TABLE, 2.0 * TABLE)
    assert found == [rows(choosing(X, TABLE, 2.0 * TABLE))]
    assert found[0][0][0] == "dot_general#0"


def test_names_are_unique_whatever_parameters_are_called():
    params = {"w": PARAMS["w"], "w#1": PARAMS["v"].T}
    table = qj.sites(lambda p, x: x @ p["w"] @ p["w#1"] @ p["w"], params, X)
    assert [site.name for site in table] == ["w", "w#1", "w#2"]
    table = qj.sites(lambda p, x: x @ p["w"] @ p["w"].T @ p["w"] @ p["w#1"], params, X)
    assert [site.name for site in table] == ["w", "w#1", "w#2", "w#1#1"]
    plan = qj.plan(qj.uniform_policy(), table)
    assert len(qj.calibrate(plan, qj.init(plan), params, activation_bits=0)) == 4


def test_a_weak_type_is_no_other_derivation():
    """``jnp.full(4, 1.0)`` is weakly typed; one step of an optimizer makes it strong."""
    f = lambda p, x: x @ (p["w"] * p["s"])  # noqa: E731
    weak = {"w": jnp.eye(4), "s": jnp.full((4, 1), 2.0)}
    strong = jax.tree.map(lambda a: jnp.asarray(a, a.dtype), weak)
    assert weak["s"].weak_type
    assert not strong["s"].weak_type
    x = jnp.ones((2, 4))
    tables = [qj.sites(f, params, x) for params in (weak, strong)]
    assert tables[0] == tables[1]
    plan = qj.plan(qj.uniform_policy(weight_bits=4, activation_bits=None), tables[0])
    qstate = qj.calibrate(plan, {}, weak)
    found = [qj.fake_quantize(f, plan)(qstate, params, x) for params in (weak, strong)]
    assert_array_equal(*found)


def test_a_cast_is_another_derivation():
    x = jnp.ones((2, 4), jnp.bfloat16)
    params = {"w": jnp.eye(4, dtype=jnp.bfloat16), "s": jnp.ones((4, 1), jnp.bfloat16)}
    plain = lambda p, x: x @ (p["w"] * p["s"])  # noqa: E731

    def through_float32(p, x):
        return x @ (p["w"] * p["s"]).astype(jnp.float32).astype(jnp.bfloat16)

    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(plain, params, x))
    qstate = qj.calibrate(plan, {}, params)
    with refused(errors.PlanMismatchError, "computed otherwise"):
        qj.fake_quantize(through_float32, plan)(qstate, params, x)


def test_a_parameter_with_a_name_is_that_parameter():
    """``checkpoint_name``, by which policies of ``jax.checkpoint`` know what to keep."""
    f = lambda p, x: x @ checkpoint_name(p["w"], "kernel")  # noqa: E731
    params, x = {"w": normal(0, 4, 4)}, jnp.ones((2, 4))
    (site,) = qj.sites(f, params, x)
    assert (site.name, site.weight.storable) == ("w", True)
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, x))
    qstate = qj.calibrate(plan, {}, params)
    frozen = qj.freeze(plan, qstate, params)
    assert isinstance(frozen["w"], qj.QTensor)
    simulated = qj.fake_quantize(f, plan)(qstate, params, x)
    assert_array_equal(qj.execute(f, plan)(qstate, frozen, x), simulated)
