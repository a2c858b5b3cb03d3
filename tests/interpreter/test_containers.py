"""Containers in functions written by hand: what is found in them, and what travels through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from quantjax.interpreter import (
    Carried,
    Outcome,
    Program,
    Visit,
    evaluate,
    evaluate_origin,
    leaves_by_path,
    trace,
)
from tests.conformance.test_identity import assert_close, fences_hold
from tests.models import assert_same_bits, normal

N, L, T = 6, 3, 4
W, V, U = (0.5 * normal(seed, N, N) for seed in (1, 2, 3))
STACK = 0.5 * normal(4, L, N, N)
GRID = 0.5 * normal(5, 2, L, N, N)
X = normal(0, 3, N)
SERIES = normal(6, T, 3, N)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """A layer; ``lax`` alone, so that a trace has all of it."""
    return lax.tanh(lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))))


def scan_of_constants(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, x: (dot(h + x, p["w"]), None), jnp.zeros_like(x[0]), x)[0]


def scan_of_carried_weight(p: Any, x: jax.Array) -> jax.Array:
    """Handed on unchanged, and used again behind the loop."""
    (w, h), _ = lax.scan(lambda c, _: ((c[0], dot(c[1], c[0])), None), (p["w"], x), length=T)
    return dot(h, w)


def scan_of_changing_weight(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda c, _: ((0.9 * c[0], dot(c[1], c[0])), None), (p["w"], x), length=T)[0][1]


def scan_of_layers(p: Any, x: jax.Array, **options: Any) -> jax.Array:
    return lax.scan(lambda x, w: (dot(x, w), None), x, p["w"], **options)[0]


def scan_of_indices(p: Any, x: jax.Array) -> jax.Array:
    """The layers are closed over; each step takes its own."""

    def step(x: jax.Array, index: jax.Array) -> Any:
        return dot(x, lax.dynamic_index_in_dim(p["w"], index, keepdims=False)), None

    return lax.scan(step, x, jnp.arange(L))[0]


def scan_that_hands_out(p: Any, x: jax.Array) -> jax.Array:
    """The layers come out as they went in, and the second one is used."""
    x, stack = lax.scan(lambda x, w: (x + 1.0, w), x, p["w"])
    return dot(x, stack[1])


def layers_of_steps(p: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> Any:
        return lax.scan(lambda h, x: (dot(h + x, w),) * 2, jnp.zeros_like(x[0]), x)[1], None

    return lax.scan(layer, x, p["w"])[0]


def steps_of_layers(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, x: (scan_of_layers(p, h + x), None), jnp.zeros_like(x[0]), x)[0]


def layers_of_layers(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (scan_of_layers({"w": w}, x), None), x, p["w"])[0]


def loop(p: Any, x: jax.Array) -> jax.Array:
    """As many turns as there are positive entries in the first row."""
    turns = jnp.sum(x[0] > 0.0)
    return lax.fori_loop(0, turns, lambda i, x: dot(x, p["w"]), x)


def switch(p: Any, x: jax.Array) -> jax.Array:
    """The second branch of three; the first weight is used behind it as well."""
    branches = [lambda x: dot(x, p["w"]), lambda x: dot(x, p["v"]), lambda x: dot(x, p["u"]) + 1.0]
    return dot(lax.switch(jnp.sum(x > -9.0) * 0 + 1, branches, x), p["w"])


def deep(p: Any, x: jax.Array) -> jax.Array:
    """``cond`` in ``scan`` in ``remat``: every other layer."""

    @jax.checkpoint
    def run(p: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, layer: Any) -> Any:
            index, w = layer
            return lax.cond(index % 2 == 0, lambda x: dot(x, w), lambda x: dot(x, p["v"]), x), None

        return lax.scan(step, x, (jnp.arange(L), p["w"]))[0]

    return run(p, x)


@jax.custom_jvp
def with_own_jvp(w: jax.Array, x: jax.Array) -> jax.Array:
    return dot(x, w)


with_own_jvp.defjvp(lambda p, t: jax.jvp(lambda w, x: dot(x, w), p, t))


@jax.custom_batching.custom_vmap
def with_own_vmap(w: jax.Array, x: jax.Array) -> jax.Array:
    return dot(x, w)


with_own_vmap.def_vmap(lambda size, batched, w, x: (jnp.matmul(x, w), True))


class Expected(NamedTuple):
    """Of a site: its layers, how often each is visited, and the scans around it."""

    visits: Any
    steps: tuple[int, ...] = ()
    scans: tuple[int, ...] = ()
    repeated: bool = False


class Known(NamedTuple):
    """A function with arguments and what has to be found in it."""

    f: Callable[..., Any]
    params: Any
    x: jax.Array
    sites: dict[str, Expected]
    reverse: bool = True


def of(f: Callable[..., Any], w: jax.Array, x: jax.Array, *expected: Any, **options: Any) -> Known:
    """One weight at one site."""
    return Known(f, {"w": w}, x, {"w": Expected(*expected)}, **options)


EACH, ALL = np.ones(L), {"w": W, "v": V, "u": U}
TURNS = int(jnp.sum(X[0] > 0.0))
KNOWN = {
    "jit": of(jax.jit(lambda p, x: dot(x, p["w"])), W, X, 1),
    "remat": of(jax.checkpoint(lambda p, x: dot(x, p["w"])), W, X, 1),
    "custom_jvp": of(lambda p, x: with_own_jvp(p["w"], x), W, X, 1),
    "custom_vmap": of(lambda p, x: with_own_vmap(p["w"], x), W, X, 1, reverse=False),
    "constants": of(scan_of_constants, W, SERIES, T, (), (T,), True),
    "carried": Known(
        scan_of_carried_weight,
        {"w": W},
        X,
        {"w": Expected(T, (), (T,), repeated=True), "w#1": Expected(1)},
    ),
    "changing": Known(scan_of_changing_weight, {"w": W}, X, {"f(w)": Expected(T, (), (T,))}),
    "layers": of(scan_of_layers, STACK, X, EACH, (L,), (L,)),
    "reverse": of(lambda p, x: scan_of_layers(p, x, reverse=True), STACK, X, EACH, (L,), (L,)),
    "unroll": of(lambda p, x: scan_of_layers(p, x, unroll=2), STACK, X, EACH, (L,), (L,)),
    "indices": of(scan_of_indices, STACK, X, EACH, (L,), (L,)),
    "handed_out": of(scan_that_hands_out, STACK, X, 1),
    "layers_of_steps": of(layers_of_steps, STACK, SERIES, T * EACH, (L,), (L, T), True),
    "steps_of_layers": of(steps_of_layers, STACK, SERIES, T * EACH, (L,), (T, L), True),
    "layers_of_layers": of(layers_of_layers, GRID, X, np.ones((2, L)), (2, L), (2, L)),
    "while": of(loop, W, X, TURNS, (), (), True, reverse=False),
    "switch": Known(
        switch, ALL, X, {"w": Expected(0), "v": Expected(1), "u": Expected(0), "w#1": Expected(1)}
    ),
    "deep": Known(
        deep,
        {"w": STACK, "v": V},
        X,
        {"w": Expected([1, 0, 1], (L,), (L,)), "v": Expected(1, (), (L,), repeated=True)},
    ),
}


@pytest.fixture(scope="module", params=KNOWN)
def known(request) -> Known:
    return KNOWN[request.param]


@pytest.fixture(scope="module")
def program(known) -> Program:
    return trace(known.f, known.params, known.x)


def counting(visit: Visit) -> Outcome:
    """The product as it is; counts visits, and records the sum of what came in."""
    state = None if visit.state is None else visit.state + 1
    return Outcome(visit.product.bind(visit.lhs, visit.rhs), state, visit.lhs.sum())


def test_the_sites_are_found_with_their_loops(known, program):
    found = {site.name: site for site in program.sites.values()}
    assert set(found) == set(known.sites)
    for name, expected in known.sites.items():
        assert found[name].steps == expected.steps, name
        assert len(program.scans[name]) == len(expected.scans), name
        assert len(program.stacked[name]) == len(expected.steps), name
        assert set(program.stacked[name]) <= set(program.scans[name]), name
        assert (name in program.repeated) == expected.repeated, name


def test_weights_are_recomputed_from_the_parameters(known, program):
    """Bit for bit, with a leading axis for each of their scans."""
    leaves = leaves_by_path(known.params)
    for name, origin in program.weights.items():
        if not origin.derivable:
            assert name == "f(w)"
            continue
        want = leaves[name.split("#")[0]]
        want = want[1] if known.f is scan_that_hands_out else want
        assert_same_bits(evaluate_origin(origin, leaves), want)


def derivatives(known: Known, f: Callable[..., Any]) -> Callable[..., Any]:
    """Value and gradient, or directional derivative where there is no gradient."""

    def run(p: Any, x: jax.Array) -> Any:
        if not known.reverse:
            return jax.jvp(f, (p, x), (p, x))
        y, pull = jax.vjp(f, p, x)
        return y, pull(y)

    return run


@pytest.mark.thinned(3)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rebuilding_changes_no_bit_and_counts_every_visit(known, program, wrap):
    names = frozenset(known.sites)
    states = {name: jnp.zeros(expected.steps) for name, expected in known.sites.items()}

    def rebuilt(p: Any, x: jax.Array) -> Any:
        return evaluate(program, counting, names, Carried({}, states), p, x, collect=True)

    got = wrap(derivatives(known, lambda *a: rebuilt(*a).result))(known.params, known.x)
    want = wrap(derivatives(known, known.f))(known.params, known.x)
    # JAX 0.10.2 vectorizes the body of a loop otherwise where it counts its turns.
    in_loops = any(expected.scans for expected in known.sites.values())
    (assert_close if in_loops and not fences_hold() else assert_same_bits)(got, want)
    _, after, records = wrap(rebuilt)(known.params, known.x)
    assert set(after) == set(records) == names
    for name, expected in known.sites.items():
        np.testing.assert_array_equal(after[name], expected.visits, name)
        assert after[name].shape == expected.steps
        assert records[name].shape == expected.scans
        # A branch that is not taken, in this step or at all, leaves NaN.
        taken = np.prod(expected.scans, dtype=int) if TURNS else 0
        missing = int(jnp.isnan(records[name]).sum())
        is_branch = "cond" in {s.name: s.loops for s in program.sites.values()}[name]
        assert missing == (taken - int(np.sum(expected.visits)) if is_branch else 0)


def spread(numbers: jax.Array, w: jax.Array) -> jax.Array:
    """With as many axes as the weight that they multiply."""
    return numbers.reshape(numbers.shape + (1,) * (w.ndim - numbers.ndim))


def test_values_reach_their_own_step(known, program):
    """Scaling the product of each layer by its own number equals scaling its weight."""
    if known.f is scan_of_changing_weight:
        known = known._replace(sites={"w": known.sites["f(w)"]})
    numbers = {
        name: 2.0 ** -jnp.arange(1.0, 1.0 + np.prod(e.steps, dtype=int)).reshape(e.steps)
        for name, e in known.sites.items()
    }
    scaled = {path: w * spread(numbers[path], w) for path, w in known.params.items()}
    names = {site.name: site.weight.paths[0] for site in program.sites.values()}
    values = {name: numbers[path] for name, path in names.items()}

    def handler(visit: Visit) -> Outcome:
        assert visit.value.shape == ()
        return Outcome(visit.value * visit.product.bind(visit.lhs, visit.rhs))

    carried = Carried(values, {})
    got = evaluate(program, handler, frozenset(names), carried, known.params, known.x).result
    np.testing.assert_allclose(got, known.f(scaled, known.x), rtol=1e-5, atol=1e-6)
    assert not np.allclose(got, known.f(known.params, known.x), rtol=1e-3)
