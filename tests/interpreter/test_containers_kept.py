"""What a rebuilt container keeps: policies, recomputation, name stacks, tracers, records."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex_core

import quantjax as qj
from quantjax.interpreter import NOTHING, Outcome, ProgramCache, Visit, evaluate, trace
from tests.interpreter.test_containers import (
    ALL,
    SERIES,
    STACK,
    TURNS,
    L,
    N,
    T,
    V,
    W,
    X,
    dot,
    layers_of_steps,
    loop,
    scan_of_changing_weight,
    scan_of_constants,
    scan_of_layers,
    steps_of_layers,
    switch,
)
from tests.models import assert_same_bits, normal, policy


def as_it_is(visit: Visit) -> Outcome:
    return Outcome(visit.product.bind(visit.lhs, visit.rhs), record=visit.lhs)


def rebuilt(f: Callable[..., Any], params: Any, *inputs: Any) -> Callable[..., Any]:
    """``f`` with every site handled, none changed."""
    program = trace(f, params, *inputs)
    names = frozenset(site.name for site in program.sites.values())
    assert names
    return lambda *a: evaluate(program, as_it_is, names, NOTHING, *a).result


def equations(jaxpr: jex_core.Jaxpr) -> Iterator[jex_core.JaxprEqn]:
    """All of a program, those of its containers included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def count(f: Callable[..., Any], *arguments: Any) -> collections.Counter[str]:
    """How often each primitive occurs."""
    return collections.Counter(
        eqn.primitive.name for eqn in equations(jax.make_jaxpr(f)(*arguments).jaxpr)
    )


def remats(f: Callable[..., Any], *arguments: Any) -> list[tuple[Any, ...]]:
    """Policy, barrier and role of each rematerialized block."""
    return [
        (eqn.params["policy"], eqn.params["prevent_cse"], eqn.params["differentiated"])
        for eqn in equations(jax.make_jaxpr(f)(*arguments).jaxpr)
        if eqn.primitive.name in ("remat2", "checkpoint")
    ]


def two(p: Any, x: jax.Array) -> jax.Array:
    return dot(dot(x, p["w"]), p["v"])


POLICIES = {
    "none": {},
    "nothing": {"policy": jax.checkpoint_policies.nothing_saveable},
    "dots": {"policy": jax.checkpoint_policies.dots_saveable},
    "everything": {"policy": jax.checkpoint_policies.everything_saveable},
    "no_barrier": {"prevent_cse": False},
}

RECOMPUTED = {"dots": 0, "everything": 0}


@pytest.mark.parametrize("name", POLICIES)
def test_remat_keeps_its_policy_and_recomputes_as_much(name):
    f = jax.checkpoint(two, **POLICIES[name])
    again = rebuilt(f, ALL, X)
    assert remats(again, ALL, X) == remats(f, ALL, X)
    assert len(remats(f, ALL, X)) == 1
    gradients = [jax.grad(lambda p, x, g=g: g(p, x).sum()) for g in (f, again)]
    own, kept = (count(g, ALL, X) for g in gradients)
    assert own["dot_general"] == kept["dot_general"]
    # Two forward, three backward (none by x), and those that are computed a second time.
    assert own["dot_general"] == 5 + RECOMPUTED.get(name, 2)
    quantized = quantized_like(f, ALL, X)
    assert remats(quantized, ALL, X) == remats(f, ALL, X)


def quantized_like(f: Callable[..., Any], params: Any, x: jax.Array) -> Callable[..., Any]:
    """``f`` at 8 bits."""
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    _, state = qj.observe(f, plan)(qj.init(plan), params, x)
    qstate = qj.calibrate(plan, state, params)
    return lambda p, x: qj.fake_quantize(f, plan)(qstate, p, x)


def test_a_policy_by_name_saves_the_named_value():
    def named(p: Any, x: jax.Array) -> jax.Array:
        hidden = lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))
        return dot(lax.tanh(checkpoint_name(hidden, "hidden")), p["v"])

    save = jax.checkpoint_policies.save_only_these_names("hidden")
    f = jax.checkpoint(named, policy=save)
    again = rebuilt(f, ALL, X)
    own, kept, without = (
        count(jax.grad(lambda p, x, g=g: g(p, x).sum()), ALL, X)["dot_general"]
        for g in (f, again, jax.checkpoint(named))
    )
    assert own == kept < without


@pytest.mark.parametrize("saved", [None, jax.checkpoint_policies.dots_saveable])
def test_a_function_that_computes_a_gradient_of_remat_recomputes_still(saved):
    """Its trace holds the block as it is differentiated; XLA must not merge what it recomputes."""
    f = jax.grad(lambda p, x: jax.checkpoint(two, policy=saved)(p, x).sum())
    again = rebuilt(f, ALL, X)
    own = remats(f, ALL, X)
    assert [entry[2] for entry in own] == [True]
    assert remats(again, ALL, X) == own
    assert count(f, ALL, X)["dot_general"] == count(again, ALL, X)["dot_general"]
    for wrap in (lambda g: g, jax.jit):
        assert_same_bits(wrap(again)(ALL, X), wrap(f)(ALL, X))
    table = qj.sites(f, ALL, X)
    assert all("remat" in site.loops for site in table if "#" in site.name and site.weight)


def test_unroll_and_reverse_are_kept():
    for options in ({"reverse": True}, {"unroll": 3}, {"reverse": True, "unroll": 2}):
        f = lambda p, x, o=options: scan_of_layers(p, x, **o)  # noqa: E731
        programs = [jax.make_jaxpr(g)({"w": STACK}, X) for g in (f, rebuilt(f, {"w": STACK}, X))]
        own, kept = (
            [
                (e.params["reverse"], e.params["unroll"], e.params["length"])
                for e in equations(p.jaxpr)
                if e.primitive.name == "scan"
            ]
            for p in programs
        )
        assert own == kept == [(options.get("reverse", False), options.get("unroll", 1), L)]


def stacks(jaxpr: jex_core.Jaxpr, prefix: str = "") -> list[str]:
    """Full name stack of each product."""
    found = []
    for eqn in jaxpr.eqns:
        here = "/".join(part for part in (prefix, str(eqn.source_info.name_stack)) if part)
        if eqn.primitive.name == "dot_general":
            found.append(here)
        for inner in jex_core.jaxprs_in_params(eqn.params):
            found += stacks(inner, here)
    return found


def test_name_stacks_are_kept_through_containers():
    def f(p: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: Any) -> Any:
            with jax.named_scope("step"):
                return jax.checkpoint(two)(p, x), None

        with jax.named_scope("model"):
            x = lax.scan(step, x, None, length=2)[0]
            with jax.named_scope("choice"):
                return lax.cond(x.sum() > 0.0, lambda x: dot(x, p["w"]), lambda x: x, x)

    own = stacks(jax.make_jaxpr(f)(ALL, X).jaxpr)
    kept = stacks(jax.make_jaxpr(rebuilt(f, ALL, X))(ALL, X).jaxpr)
    assert kept == own
    assert len(own) == 3
    assert all(stack.startswith("model") for stack in own)
    assert "step" in own[0]
    assert "choice" in own[-1]


def with_captured(captured: jax.Array) -> Callable[..., jax.Array]:
    """A scan, a branch and a loop that close over an array that is no argument."""

    def f(p: Any, x: jax.Array) -> jax.Array:
        x = lax.scan(lambda x, w: (dot(x, w) * captured, None), x, p["w"])[0]
        x = lax.cond(captured > 0.0, lambda x: dot(x, p["v"]) + captured, lambda x: x, x)
        return lax.fori_loop(0, jnp.int32(captured), lambda i, x: dot(x, p["v"]) - captured, x)

    return f


def test_tracers_that_the_function_captured_are_used_and_not_kept():
    """Under an outer ``jit``, ``vmap`` or ``grad``, what ``f`` closes over is a tracer."""
    params, numbers = {"w": STACK, "v": V}, jnp.array([1.0, 2.0, 3.0])

    def run(captured: jax.Array) -> jax.Array:
        f = with_captured(captured)
        programs = ProgramCache(f)
        program = programs(params, X)
        names = frozenset(site.name for site in program.sites.values())
        assert names == {"w", "v", "v#1"}
        assert programs(params, X) is not program or not isinstance(captured, jax.core.Tracer)
        return evaluate(program, as_it_is, names, NOTHING, params, X).result

    want = [with_captured(n)(params, X) for n in numbers]
    for got in (
        [run(n) for n in numbers],
        [jax.jit(run)(n) for n in numbers],
        jax.vmap(run)(numbers),
    ):
        np.testing.assert_allclose(jnp.stack(list(got)), jnp.stack(want), rtol=1e-5, atol=1e-6)
    got, slope = jax.jvp(run, (numbers[1],), (numbers[0],))
    own = jax.jvp(lambda n: with_captured(n)(params, X), (numbers[1],), (numbers[0],))
    assert_same_bits((got, slope), own)


def records(f: Callable[..., Any], params: Any, x: jax.Array) -> Any:
    """What came into each site."""
    program = trace(f, params, x)
    names = frozenset(site.name for site in program.sites.values())
    return evaluate(program, as_it_is, names, NOTHING, params, x, collect=True).records


def test_a_scan_stacks_what_its_steps_record():
    h, inputs = jnp.zeros_like(X), []
    for x in SERIES:
        inputs.append(h + x)
        h = dot(h + x, W)
    got = records(scan_of_constants, {"w": W}, SERIES)["w"]
    np.testing.assert_allclose(got, jnp.stack(inputs), rtol=1e-5, atol=1e-6)

    backwards = records(lambda p, x: scan_of_layers(p, x, reverse=True), {"w": STACK}, X)["w"]
    assert_same_bits(backwards[-1], X)  # in the order of the layers, not of time
    np.testing.assert_allclose(backwards[-2], dot(X, STACK[-1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("f", "shape"), [(layers_of_steps, (L, T)), (steps_of_layers, (T, L))])
def test_nested_scans_stack_outermost_first(f, shape):
    got = records(f, {"w": STACK}, SERIES)["w"]
    assert got.shape == (*shape, *X.shape)
    assert_same_bits(got[0, 0], SERIES[0])


def test_a_branch_that_is_not_taken_records_nan_and_a_loop_its_last_turn():
    got = records(switch, ALL, X)
    assert jnp.isnan(got["w"]).all()
    assert jnp.isnan(got["u"]).all()
    assert_same_bits(got["v"], X)
    np.testing.assert_allclose(got["w#1"], dot(X, V), rtol=1e-5)

    x = X
    for _ in range(TURNS - 1):
        x = dot(x, W)
    np.testing.assert_allclose(records(loop, {"w": W}, X)["w"], x, rtol=1e-5, atol=1e-6)
    never = -jnp.abs(X)  # no positive entry: no turn
    assert jnp.isnan(records(loop, {"w": W}, never)["w"]).all()
    assert_same_bits(rebuilt(loop, {"w": W}, never)({"w": W}, never), never)


def test_a_product_without_weight_follows_the_weights_of_its_scan():
    """Among layers it has a state for each; among time steps one for all of them."""

    def attention(x: jax.Array) -> jax.Array:
        return lax.tanh(lax.dot_general(x, x, (((1,), (1,)), ((), ()))))

    def layers(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (lax.tanh(attention(x) @ dot(x, w)), None), x, p["w"])[0]

    def steps(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda h, x: (lax.tanh(attention(h) @ dot(x, p["w"])), None), x[0], x)[0]

    def both(p: Any, x: jax.Array) -> jax.Array:
        step = lambda h, x: (layers(p, attention(h) @ x), None)  # noqa: E731
        return lax.scan(step, x[0], x)[0]

    series = normal(7, T, N, N)
    cases = [
        (layers, {"w": STACK}, X, [(L,)] * 3),
        (steps, {"w": W}, series, [()] * 3),
        (both, {"w": STACK}, series, [(), (), (L,), (L,), (L,)]),
    ]
    for f, params, x, expected in cases:
        table = qj.sites(f, params, x)
        weightless = [site for site in table if site.weight is None]
        assert [site.steps for site in table] == expected, f.__name__
        assert len(weightless) == len(expected) - 1
        plan = qj.plan(policy(qj.weight_quantizer(), qj.activation_quantizer()), table)
        _, state = qj.observe(f, plan)(qj.init(plan), params, x)
        for site in weightless:
            turns = T if x is series else 1
            for key in ("lhs", "rhs"):
                want = np.full(site.steps, turns)
                np.testing.assert_array_equal(state[site.name][key].batches, want)


def test_a_weight_that_changes_from_step_to_step_is_observed():
    """It cannot be recomputed from the parameters alone; its statistics hold all steps."""
    f, params = scan_of_changing_weight, {"w": W}
    (site,) = qj.sites(f, params, X)
    assert "changes from step to step" in site.reason
    plan = qj.plan(qj.uniform_policy(weight_bits=8, activation_bits=8), qj.sites(f, params, X))
    state = qj.init(plan)
    assert sorted(state[site.name]) == ["activation", "weight"]
    y, state = qj.observe(f, plan)(state, params, X)
    assert_same_bits(y, f(params, X))
    assert int(state[site.name]["weight"].batches) == T
    largest = state[site.name]["weight"].extremes.high
    np.testing.assert_array_equal(largest, jnp.maximum(W, 0.9 ** (T - 1) * W).max(0, keepdims=True))
    qstate = qj.calibrate(plan, state, params)
    assert float(jnp.abs(qj.fake_quantize(f, plan)(qstate, params, X) - y).max()) < 0.05
