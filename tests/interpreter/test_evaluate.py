"""Evaluating a program with a handler in place of some of its products."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax import errors
from quantjax.interpreter import NOTHING, Carried, Outcome, Program, Visit, evaluate, trace
from tests.models import assert_same_bits, cnn, mlp, normal
from tests.refused import refused

PARAMS = {"a": normal(1, 6, 6), "b": normal(2, 6, 6)}
X = normal(0, 3, 6)


def two_layers(p: Any, x: jax.Array) -> jax.Array:
    with jax.named_scope("model"):
        return nested(p, jnp.tanh(x @ p["a"]))


@jax.jit
def nested(p: Any, x: jax.Array) -> jax.Array:
    with jax.named_scope("inner"):
        return {"out": innermost(p["b"], x) + 1.0, "again": innermost(p["b"], x)}


@jax.jit
def innermost(w: jax.Array, x: jax.Array) -> jax.Array:
    with jax.named_scope("deep"):
        return jnp.tanh(x @ w)


NAMES = frozenset({"a", "b", "b#1"})


def as_it_is(visit: Visit) -> Outcome:
    return Outcome(visit.product.bind(visit.lhs, visit.rhs))


def doubled(visit: Visit) -> Outcome:
    return Outcome(2.0 * visit.product.bind(visit.lhs, visit.rhs))


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(two_layers, PARAMS, X)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_handler_that_binds_the_equation_changes_nothing(program, wrap):
    run = wrap(lambda p, x: evaluate(program, as_it_is, NAMES, NOTHING, p, x)[0])
    assert_same_bits(run(PARAMS, X), wrap(two_layers)(PARAMS, X))


@pytest.mark.parametrize("case", [mlp(), cnn()], ids=["mlp", "cnn"])
def test_a_handler_sees_each_site_once_with_its_operands(case):
    """Counting: as many calls as sites, in program order, operands as in the float model."""
    program = trace(case.f, case.params, case.x)
    seen: list[str] = []
    taps = []

    def counting(visit: Visit) -> Outcome:
        site, product, lhs, rhs = visit[:4]
        assert visit.value is visit.state is visit.shared is None
        assert tuple(lhs.shape) == tuple(product.lhs.shape) == site.operands[0].shape
        assert tuple(rhs.shape) == tuple(product.rhs.shape) == site.operands[1].shape
        seen.append(site.name)
        taps.append(rhs)
        return Outcome(product.bind(lhs, rhs))

    names = [site.name for site in program.sites.values()]
    out, states, records = evaluate(
        program, counting, frozenset(names), NOTHING, case.params, case.x
    )
    assert seen == names
    assert states == records == {}
    assert_same_bits(out, case.f(case.params, case.x))
    leaves = {k: v["kernel"] for k, v in case.params["params"].items() if "kernel" in v}
    for name, rhs in zip(names, taps, strict=True):
        assert_same_bits(rhs, leaves[name.split("/")[1]])


def test_only_the_handled_sites_are_replaced(program):
    out, *_ = evaluate(program, doubled, frozenset({"b#1"}), NOTHING, PARAMS, X)
    own = two_layers(PARAMS, X)
    assert_same_bits(out["out"], own["out"])
    w, hidden = PARAMS["b"], jnp.tanh(X @ PARAMS["a"])
    np.testing.assert_allclose(out["again"], jnp.tanh(2.0 * (hidden @ w)), rtol=1e-6)


def test_values_go_to_their_own_site_and_records_come_back(program):
    values = {"a": {"n": jnp.float32(1)}, "b#1": {"n": jnp.float32(3)}, "unknown": None}
    states = {"b": jnp.float32(10), "b#1": jnp.float32(20)}

    def handler(visit: Visit) -> Outcome:
        record = None if visit.value is None else (visit.value["n"], visit.lhs.sum())
        state = None if visit.state is None else visit.state + visit.shared
        return Outcome(visit.product.bind(visit.lhs, visit.rhs), state, record)

    for wrap in (lambda f: f, jax.jit):
        carried = Carried(values, states, jnp.float32(0.5))
        run = wrap(lambda *a: evaluate(program, handler, NAMES, *a, collect=True))
        _, after, records = run(carried, PARAMS, X)
        assert {name: float(state) for name, state in after.items()} == {"b": 10.5, "b#1": 20.5}
        assert sorted(records) == ["a", "b#1"]  # no entry where the record is None
        assert [float(records[name][0]) for name in sorted(records)] == [1.0, 3.0]
        np.testing.assert_allclose(records["a"][1], X.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda out: out.astype(jnp.bfloat16), "bfloat16(3, 6)"),
        (lambda out: out.T, "float32(6, 3)"),
        (lambda out: out[None], "float32(1, 3, 6)"),
    ],
)
@pytest.mark.parametrize("site", ["a", "b#1"])
def test_a_result_of_another_type_is_refused(program, wrong, found, site):
    def handler(visit: Visit) -> Outcome:
        return Outcome(wrong(visit.product.bind(visit.lhs, visit.rhs)))

    with refused(errors.SiteError, found, f"site {site} (dot_general)", "float32[3,6]"):
        evaluate(program, handler, frozenset({site}), NOTHING, PARAMS, X)


def stacks(jaxpr: Any, prefix: str = "") -> list[str]:
    """Full name stack of each product, through jit calls."""
    found = []
    for eqn in jaxpr.eqns:
        here = "/".join(s for s in (prefix, str(eqn.source_info.name_stack)) if s)
        if eqn.primitive.name == "dot_general":
            found.append(here)
        if "jaxpr" in eqn.params:
            found += stacks(eqn.params["jaxpr"].jaxpr, here)
    return found


def test_name_stacks_are_kept(program):
    """Profiles of the quantized program show the model's own scopes."""
    own = stacks(jax.make_jaxpr(two_layers)(PARAMS, X).jaxpr)
    assert own == ["model", "model/inner/deep", "model/inner/deep"]
    for handler in (as_it_is, doubled):
        run = lambda p, x, h=handler: evaluate(program, h, NAMES, NOTHING, p, x)  # noqa: E731
        assert stacks(jax.make_jaxpr(run)(PARAMS, X).jaxpr) == own


def test_a_handlers_own_equations_carry_the_sites_scope(program):
    run = lambda p, x: evaluate(program, doubled, frozenset({"a"}), NOTHING, p, x)  # noqa: E731
    jaxpr = jax.make_jaxpr(run)(PARAMS, X)
    (mul,) = [e for e in jaxpr.eqns if e.primitive.name == "mul"]
    assert str(mul.source_info.name_stack) == "model"


def jit_names(jaxpr: Any) -> list[str]:
    names = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            names += [eqn.params["name"], *jit_names(eqn.params["jaxpr"].jaxpr)]
    return names


def test_jit_calls_with_sites_keep_their_name_and_nesting(program):
    run = lambda p, x: evaluate(program, as_it_is, NAMES, NOTHING, p, x)  # noqa: E731
    own = jit_names(jax.make_jaxpr(two_layers)(PARAMS, X).jaxpr)
    assert own == ["nested", "innermost", "innermost"]
    assert jit_names(jax.make_jaxpr(run)(PARAMS, X).jaxpr) == own


def test_a_jit_call_without_a_handled_site_is_bound_whole(program):
    run = lambda p, x: evaluate(program, doubled, frozenset({"a"}), NOTHING, p, x)  # noqa: E731
    jaxpr = jax.make_jaxpr(run)(PARAMS, X)
    own = [e.params["jaxpr"] for e in program.jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    new = [e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    assert [id(j) for j in own] == [id(j) for j in new]


@pytest.mark.parametrize("mode", ["custom_jvp", "custom_vjp", "remat"])
def test_rules_of_functions_around_the_sites_survive(mode):
    """A gradient that is not that of the forward pass is still what comes out."""
    if mode == "custom_jvp":
        odd = jax.custom_jvp(lambda x: x * 1.0)
        odd.defjvp(lambda p, t: (p[0] * 1.0, 7.0 * t[0]))
    elif mode == "custom_vjp":
        odd = jax.custom_vjp(lambda x: x * 1.0)
        odd.defvjp(lambda x: (x * 1.0, None), lambda _, g: (7.0 * g,))
    else:
        odd = jax.checkpoint(lambda x: 7.0 * x)
    f = lambda p, x: odd(x @ p["a"])  # noqa: E731
    program = trace(f, PARAMS, X)
    run = lambda p, x: evaluate(program, as_it_is, frozenset({"a"}), NOTHING, p, x)[0]  # noqa: E731
    got = jax.grad(lambda x: run(PARAMS, x).sum())(X)
    assert_same_bits(got, jax.grad(lambda x: f(PARAMS, x).sum())(X))
    np.testing.assert_allclose(got, 7.0 * jnp.tile(PARAMS["a"].sum(axis=1), (3, 1)), rtol=1e-5)


def test_outputs_that_are_inputs_or_literals_come_through():
    f = lambda p, x: (x, 3.0, p["a"], x @ p["a"])  # noqa: E731
    program = trace(f, PARAMS, X)
    out, *_ = evaluate(program, as_it_is, frozenset({"a"}), NOTHING, PARAMS, X)
    assert_same_bits(out, f(PARAMS, X))
    run = lambda p, x: evaluate(program, as_it_is, frozenset({"a"}), NOTHING, p, x)[0]  # noqa: E731
    assert_same_bits(jax.jit(run)(PARAMS, X), jax.jit(f)(PARAMS, X))


def test_sites_of_one_program_differ_by_location():
    """The same jitted function twice: one inner program, two sites, each with its own value."""
    program = trace(lambda p, x: innermost(p["b"], innermost(p["b"], x)), PARAMS, X)
    assert [site.name for site in program.sites.values()] == ["b", "b#1"]

    def handler(visit: Visit) -> Outcome:
        return Outcome(visit.value * visit.product.bind(visit.lhs, visit.rhs))

    values = {"b": jnp.float32(0.5), "b#1": jnp.float32(2.0)}
    out, *_ = evaluate(program, handler, frozenset(values), Carried(values, {}), PARAMS, X)
    w = PARAMS["b"]
    np.testing.assert_allclose(out, jnp.tanh(2.0 * (jnp.tanh(0.5 * (X @ w)) @ w)), rtol=1e-5)
