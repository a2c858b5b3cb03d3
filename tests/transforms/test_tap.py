"""``qj.tap``: what the products of a model return, in whatever they lie."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax import errors
from tests.models import assert_same_bits, cnn, mlp, normal, policy, ready
from tests.refused import refused
from tests.transforms.integer_zoo import MODELS

W, V = normal(1, 4, 4), normal(2, 4, 4)
X = normal(3, 2, 4)
STACK = normal(4, 3, 4, 4)
ALL = qj.everything()


def two_layers(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(x @ p["w"] + 1.0) @ p["v"])


PAIR = {"w": W, "v": V}


def test_outputs_before_the_bias():
    taps = qj.tap(two_layers, ALL)(PAIR, X)
    assert list(taps) == ["w", "v"]
    assert_same_bits(taps["w"], X @ W)
    assert_same_bits(taps["v"], jnp.tanh(X @ W + 1.0) @ V)


def test_only_what_is_selected():
    taps = qj.tap(two_layers, qj.path("v"))(PAIR, X)
    assert list(taps) == ["v"]


def test_jitted():
    taps = jax.jit(qj.tap(two_layers, ALL))(PAIR, X)
    np.testing.assert_allclose(taps["w"], X @ W, rtol=1e-6)
    np.testing.assert_allclose(taps["v"], jnp.tanh(X @ W + 1.0) @ V, rtol=1e-5)


def test_inside_jit():
    """A jitted function inside the model is entered."""
    inner = jax.jit(lambda w, x: x @ w)
    taps = qj.tap(lambda p, x: inner(p["v"], inner(p["w"], x)), ALL)(PAIR, X)
    np.testing.assert_allclose(taps["w"], X @ W, rtol=1e-6)
    np.testing.assert_allclose(taps["v"], X @ W @ V, rtol=1e-5)


def test_mapped():
    rows = jax.vmap(qj.tap(two_layers, ALL), in_axes=(None, 0))(PAIR, X[:, None])
    whole = qj.tap(two_layers, ALL)(PAIR, X)
    for name in whole:
        np.testing.assert_allclose(rows[name][:, 0], whole[name], rtol=1e-6)


def test_what_taps_do_not_need_is_not_computed():
    jaxpr = jax.make_jaxpr(jax.jit(qj.tap(two_layers, qj.path("w"))))(PAIR, X)
    compiled = jax.jit(qj.tap(two_layers, qj.path("w"))).lower(PAIR, X).compile().as_text()
    assert "tanh" in str(jaxpr)
    assert "tanh" not in compiled


@pytest.mark.parametrize("make", [mlp, cnn])
def test_a_flax_model(make):
    """Each tap is the input of what follows; the last, with its bias, is the output."""
    case = make()
    taps = jax.jit(qj.tap(case.f, ALL))(case.params, case.x)
    table = qj.sites(case.f, case.params, case.x)
    assert {name: out.shape for name, out in taps.items()} == {s.name: s.out_shape for s in table}
    *_, last = taps
    bias = case.params["params"][last.split("/")[1]]["bias"]
    want = jax.jit(case.f)(case.params, case.x)
    np.testing.assert_allclose(taps[last] + bias[None], want, rtol=1e-6, atol=1e-6)


def layers(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def by_hand(x: jax.Array, stack: jax.Array) -> list[np.ndarray]:
    """The product of each layer."""
    outs = []
    for w in stack:
        outs.append(np.asarray(x @ w))
        x = jnp.tanh(x @ w)
    return outs


def test_layers_of_a_scan_are_stacked():
    taps = jax.jit(qj.tap(layers, ALL))({"w": STACK}, X)
    assert taps["w"].shape == (3, 2, 4)
    np.testing.assert_allclose(taps["w"], by_hand(X, STACK), rtol=1e-5, atol=1e-6)


def test_a_reversed_scan_keeps_the_order_of_its_layers():
    f = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"], reverse=True)[0]  # noqa: E731
    taps = qj.tap(f, ALL)({"w": STACK}, X)
    np.testing.assert_allclose(taps["w"][::-1], by_hand(X, STACK[::-1]), rtol=1e-5, atol=1e-6)


def test_time_steps_are_stacked():
    """The steps share the weight, and each of them is seen."""
    f = lambda p, x: lax.scan(lambda h, x: (jnp.tanh((h + x) @ p["w"]), None), x[0], x)[0]  # noqa: E731
    x = normal(5, 5, 2, 4)
    taps = jax.jit(qj.tap(f, ALL))({"w": W}, x)
    h, want = x[0], []
    for step in x:
        want.append(np.asarray((h + step) @ W))
        h = jnp.tanh((h + step) @ W)
    assert taps["w"].shape == (5, 2, 4)
    np.testing.assert_allclose(taps["w"], want, rtol=1e-4, atol=1e-5)


def test_nested_scans_outermost_first():
    def f(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (layers({"w": w}, x), None), x, p["w"])[0]

    grid = normal(6, 2, 3, 4, 4)
    taps = jax.jit(qj.tap(f, ALL))({"w": grid}, X)
    assert taps["w"].shape == (2, 3, 2, 4)
    flat = by_hand(X, grid.reshape(6, 4, 4))
    np.testing.assert_allclose(taps["w"].reshape(6, 2, 4), flat, rtol=1e-4, atol=1e-5)


def test_a_transformer_in_scan_and_remat():
    case = MODELS["transformer"]()
    taps = jax.jit(qj.tap(case.f, ALL))(case.params, case.x)
    shapes = {name: out.shape for name, out in taps.items()}
    assert shapes["params/layers/up/kernel"] == (4, 2, 4, 16)
    assert shapes["params/head/kernel"] == (2, 4, 4)
    head = case.params["params"]["head"]["bias"]
    want = jax.jit(case.f)(case.params, case.x)
    np.testing.assert_allclose(
        taps["params/head/kernel"] + head[None, None], want, rtol=1e-5, atol=1e-5
    )


def test_rematerialized():
    f = jax.checkpoint(two_layers)
    taps = jax.jit(qj.tap(f, ALL))(PAIR, X)
    np.testing.assert_allclose(taps["w"], X @ W, rtol=1e-6)


def branches(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(x[0, 0] > 0.0, lambda x: x @ p["w"], lambda x: jnp.tanh(x @ p["v"]), x)


@pytest.mark.parametrize("positive", [True, False])
def test_a_branch_that_is_not_taken_leaves_nan(positive):
    x = X.at[0, 0].set(1.0 if positive else -1.0)
    taken, other = ("w", "v") if positive else ("v", "w")
    taps = jax.jit(qj.tap(branches, ALL))(PAIR, x)
    np.testing.assert_allclose(taps[taken], x @ PAIR[taken], rtol=1e-6)
    assert np.isnan(taps[other]).all()
    assert taps[other].shape == (2, 4)


def test_a_branch_in_a_scan_leaves_nan_in_the_steps_that_do_not_take_it():
    def step(x: jax.Array, layer: Any) -> Any:
        index, w = layer
        return lax.cond(index % 2 == 0, lambda x: jnp.tanh(x @ w), lambda x: x, x), None

    f = lambda p, x: lax.scan(step, x, (jnp.arange(3), p["w"]))[0]  # noqa: E731
    taps = jax.jit(qj.tap(f, ALL))({"w": STACK}, X)
    assert np.isnan(taps["w"]).all(axis=(1, 2)).tolist() == [False, True, False]
    np.testing.assert_allclose(taps["w"][0], X @ STACK[0], rtol=1e-6)


def loop(p: Any, count: jax.Array, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, count, lambda i, x: jnp.tanh(x @ p["w"]), x)


@pytest.mark.parametrize("count", [1, 3])
def test_a_while_keeps_its_last_iteration(count):
    taps = jax.jit(qj.tap(loop, ALL))({"w": W}, jnp.int32(count), X)
    want = by_hand(X, jnp.stack([W] * count))[-1]
    np.testing.assert_allclose(taps["w"], want, rtol=1e-5, atol=1e-6)


def test_a_while_that_never_runs_leaves_nan():
    taps = qj.tap(loop, ALL)({"w": W}, jnp.int32(0), X)
    assert np.isnan(taps["w"]).all()


@pytest.mark.parametrize("jitted", [True, False])
def test_gradient_through_a_tap(jitted):
    def loss(p: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(qj.tap(two_layers, qj.path("w"))(p, x)["w"] ** 2)

    own = jax.grad(lambda p, x: jnp.sum((x @ p["w"]) ** 2))(PAIR, X)
    got = (jax.jit if jitted else lambda f: f)(jax.grad(loss))(PAIR, X)
    np.testing.assert_allclose(got["w"], own["w"], rtol=1e-5)
    assert not np.any(got["v"])  # behind the tap


def test_gradient_through_the_taps_of_a_scan():
    def of_taps(p: Any) -> jax.Array:
        return jnp.sum(jnp.sin(qj.tap(layers, ALL)(p, X)["w"]))

    def of_layers(p: Any) -> jax.Array:
        step = lambda x, w: (jnp.tanh(x @ w), x @ w)  # noqa: E731
        return jnp.sum(jnp.sin(lax.scan(step, X, p["w"])[1]))

    got, want = (jax.jit(jax.grad(f))({"w": STACK}) for f in (of_taps, of_layers))
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-4, atol=1e-5)


def test_gradient_by_the_input():
    got = jax.grad(lambda x: jnp.sum(qj.tap(two_layers, ALL)(PAIR, x)["w"]))(X)
    np.testing.assert_allclose(got, jnp.ones((2, 4)) @ W.T, rtol=1e-5)


def test_products_without_a_weight():
    f = lambda p, x: jnp.sum((x @ p["w"]) @ x.T)  # noqa: E731
    taps = qj.tap(f, ALL)({"w": W}, X)
    assert list(taps) == ["w", "dot_general#0"]
    np.testing.assert_allclose(taps["dot_general#0"], X @ W @ X.T, rtol=1e-5)


@pytest.mark.parametrize("jitted", [True, False])
def test_a_quantized_model(jitted):
    """Its products are sites again, and the last one, with its bias, is its output."""
    case = mlp()
    done = ready(case, policy(qj.weight_quantizer(bits=4), qj.activation_quantizer()))
    fake = qj.fake_quantize(case.f, done.plan)
    f = lambda p, x: fake(done.qstate, p, x)  # noqa: E731
    wrap = jax.jit if jitted else lambda f: f
    taps = wrap(qj.tap(f, ALL))(case.params, case.x)
    assert len(taps) == 2
    assert all(np.array_equal(out, np.rint(out)) for out in taps.values())  # sums of codes
    plain = qj.tap(case.f, ALL)(case.params, case.x)
    assert [out.shape for out in taps.values()] == [out.shape for out in plain.values()]
    scale = [done.qstate["params/Dense_0/kernel"][key].scale for key in ("activation", "weight")]
    first = np.asarray(next(iter(taps.values()))) * np.asarray(scale[0] * scale[1])
    want = np.asarray(plain["params/Dense_0/kernel"])
    assert 0 < np.abs(first - want).max() < 0.2 * np.abs(want).max()


def test_an_executed_model_has_no_floats_to_tap():
    """The products of ``qj.execute`` are integers, opaque to another transformation but tapped."""
    case = mlp()
    done = ready(case, policy(qj.weight_quantizer(), qj.activation_quantizer()))
    execute = qj.execute(case.f, done.plan)
    frozen = qj.freeze(done.plan, done.qstate, case.params)
    taps = qj.tap(lambda p, x: execute(done.qstate, p, x), ALL)(frozen, case.x)
    assert {out.dtype for out in taps.values()} == {jnp.dtype(jnp.int32)}


def test_a_selector_that_matches_nothing():
    with refused(errors.PolicyError, "'u' matches no site", "sites: w, v"):
        qj.tap(two_layers, qj.path("u"))(PAIR, X)
    with refused(errors.PolicyError, "none: the function has no product"):
        qj.tap(lambda p, x: x + p["w"][0, 0], ALL)(PAIR, X)


def test_a_site_that_cannot_be_entered():
    @jax.custom_vjp
    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ w

    product.defvjp(lambda w, x: (x @ w, None), lambda _, g: (g, g))
    f = lambda p, x: product(p["v"], x @ p["w"])  # noqa: E731
    with refused(errors.OpaqueSiteError, "cannot be tapped", "site v", "custom_vjp"):
        qj.tap(f, ALL)(PAIR, X)
    assert list(qj.tap(f, qj.path("w"))(PAIR, X)) == ["w"]
