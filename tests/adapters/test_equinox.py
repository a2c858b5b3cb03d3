"""Equinox modules as functions: the module itself bit for bit, pure, through every verb."""

import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import storage
from quantjax.adapters import equinox as qeqx
from quantjax.errors import AdapterError
from tests.adapters.modules import names
from tests.models import assert_same_bits, normal

X = normal(1, 6, 8)
KEY = jax.random.key(0)


def mapped(module, x):
    return jax.vmap(module)(x)


def mlp():
    return eqx.nn.MLP(8, 4, 16, 1, key=KEY)


class Normed(eqx.Module):
    """Batch norm between two layers."""

    one: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    two: eqx.nn.Linear

    def __init__(self, key):
        self.one = eqx.nn.Linear(8, 16, key=key)
        self.norm = eqx.nn.BatchNorm(16, "batch", mode="ema")
        self.two = eqx.nn.Linear(16, 4, key=key)

    def __call__(self, x, state):
        x, state = self.norm(self.one(x), state)
        return self.two(jax.nn.relu(x)), state


def batched(module, x, state):
    run = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return run(x, state)


def cnn():
    layers = [
        eqx.nn.Conv2d(3, 6, 3, key=KEY),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Lambda(lambda x: x.mean(axis=(1, 2))),
        eqx.nn.Linear(6, 4, key=KEY),
    ]
    return eqx.nn.Sequential(layers)


class Tied(eqx.Module):
    """A weight in two places."""

    shared: eqx.nn.Shared

    def __init__(self):
        pair = eqx.nn.Linear(8, 8, key=KEY), eqx.nn.Linear(8, 8, use_bias=False, key=KEY)
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, x):
        one, two = self.shared()
        return two(jnp.tanh(one(x)))


CASES = {"mlp": (mlp, X), "cnn": (cnn, normal(2, 4, 3, 8, 8)), "tied": (Tied, X)}
ALL = pytest.mark.parametrize(("make", "x"), CASES.values(), ids=CASES)


@ALL
def test_a_call_is_one_of_the_module_bit_for_bit(make, x):
    module = make()
    f, params = qeqx.functional(module, method=mapped)
    assert_same_bits(f(params, x), mapped(module, x))
    assert_same_bits(jax.jit(f)(params, x), eqx.filter_jit(mapped)(module, x))


@ALL
def test_arrays_and_paths_are_those_of_the_module(make, x):
    module = make()
    f, params = qeqx.functional(module, method=mapped)
    arrays = eqx.filter(module, eqx.is_inexact_array)
    assert sorted(names(params)) == sorted(names(arrays))
    by_path = dict(zip(names(arrays), jax.tree.leaves(arrays), strict=True))
    for name, leaf in zip(names(params), jax.tree.leaves(params), strict=True):
        assert_same_bits(leaf, by_path[name])
    closed = jax.make_jaxpr(f)(params, x)
    assert sum(np.size(const) for const in closed.consts) == 0


@ALL
def test_gradients_are_those_of_equinox(make, x):
    module = make()
    f, params = qeqx.functional(module, method=mapped)
    ours = jax.jit(jax.grad(lambda params: jnp.mean(f(params, x) ** 2)))(params)
    theirs = eqx.filter_jit(eqx.filter_grad(lambda m, x: jnp.mean(mapped(m, x) ** 2)))(module, x)
    by_path = dict(zip(names(theirs), jax.tree.leaves(theirs), strict=True))
    for name, leaf in zip(names(ours), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(leaf, by_path[name], rtol=1e-5, atol=1e-7)
        assert jnp.any(leaf != 0), name


@ALL
def test_restore_gives_back_the_module(make, x):
    module = make()
    model = qeqx.functional(module, method=mapped)
    doubled = jax.tree.map(lambda w: 2 * w, model.params)
    restored = qeqx.restore(model, doubled)
    assert type(restored) is type(module)
    assert_same_bits(mapped(restored, x), model.f(doubled, x))
    assert_same_bits(mapped(module, x), model.f(model.params, x))  # untouched
    assert_same_bits(qeqx.functional(restored).params, doubled)


def test_indices_are_strings_and_order_is_that_of_the_module():
    layers = [eqx.nn.Linear(8, 8, key=jax.random.key(i)) for i in range(12)]
    module = eqx.nn.Sequential(layers)
    f, params = qeqx.functional(module, method=mapped)
    assert list(params["layers"])[:3] == ["0", "1", "2"]
    assert_same_bits(f(jax.tree.map(jnp.copy, params), X), mapped(module, X))
    expected = [f"layers/{i}/weight" for i in range(12)]
    assert [site.name for site in qj.sites(f, params, X)] == expected


def test_state_goes_in_and_out_and_may_be_used_again():
    module, state = eqx.nn.make_with_state(Normed)(KEY)
    f, params = qeqx.functional(module, method=batched)
    first = f(params, X, state)
    second = f(params, X, state)  # Equinox itself refuses a state that was written to
    assert_same_bits(first[0], second[0])
    want, after = batched(module, X, jax.tree.map(lambda leaf: leaf, state))
    assert_same_bits(first[0], want)
    assert_same_bits(jax.tree.leaves(first[1]), jax.tree.leaves(after))
    assert any(
        jnp.any(a != b)
        for a, b in zip(jax.tree.leaves(first[1]), jax.tree.leaves(state), strict=True)
    )


def test_state_is_the_carry_of_a_scan():
    module, state = eqx.nn.make_with_state(Normed)(KEY)
    f, params = qeqx.functional(module, method=batched)
    xs = normal(4, 3, 6, 8)
    last, ys = jax.jit(lambda state: jax.lax.scan(lambda s, x: f(params, x, s)[::-1], state, xs))(
        state
    )
    for x, y in zip(xs, ys, strict=True):
        want, state = f(params, x, state)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_stateful_module_is_observed_and_quantized():
    module, state = eqx.nn.make_with_state(Normed)(KEY)
    f, params = qeqx.functional(module, method=batched)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, X, state))
    assert [entry.site.name for entry in plan.quantized] == ["one/weight", "two/weight"]
    (y, after), seen = jax.jit(qj.observe(f, plan))(qj.init(plan), params, X, state)
    assert_same_bits(y, jax.jit(f)(params, X, state)[0])
    qstate = qj.calibrate(plan, seen, params)
    y8, after8 = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X, state)
    assert 0 < jnp.linalg.norm(y8 - y) / jnp.linalg.norm(y) < 0.03
    assert jax.tree.structure(after8) == jax.tree.structure(after)


def test_inference_mode_counts_ahead_of_the_adapter():
    module, state = eqx.nn.make_with_state(Normed)(KEY)
    f, params = qeqx.functional(module, method=batched)
    _, state = f(params, X, state)
    g, same = qeqx.functional(eqx.nn.inference_mode(module), method=batched)
    assert_same_bits(same, params)
    y, after = g(params, X, state)
    assert_same_bits(jax.tree.leaves(after), jax.tree.leaves(state))
    assert jnp.any(y != f(params, X, state)[0])


def test_frozen_executed_and_stored(tmp_path):
    f, params = qeqx.functional(mlp(), method=mapped)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, X))
    y, seen = jax.jit(qj.observe(f, plan))(qj.init(plan), params, X)
    qstate = qj.calibrate(plan, seen, params)
    qparams = qj.freeze(plan, qstate, params)
    assert isinstance(qparams["layers"]["0"]["weight"], qj.QTensor)
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X)
    assert_same_bits(jax.jit(qj.execute(f, plan))(qstate, qparams, X), simulated)
    assert 0 < jnp.linalg.norm(simulated - y) / jnp.linalg.norm(y) < 0.02

    storage.save_params(tmp_path / "weights", qparams)
    assert_same_bits(storage.load_params(tmp_path / "weights"), qparams)
    with pytest.raises(AdapterError, match=r"frozen ones go through qj.execute\(f, plan\)"):
        f(qparams, X)
    restored = qeqx.restore(qeqx.functional(mlp(), method=mapped), qj.dequantize_params(qparams))
    assert isinstance(restored, eqx.nn.MLP)


def test_trained_quantized():
    f, params = qeqx.functional(mlp(), method=mapped)
    plan = qj.plan(qj.uniform_policy(weight_bits=4), qj.sites(f, params, X))
    _, seen = jax.jit(qj.observe(f, plan))(qj.init(plan), params, X)
    quantized = qj.fake_quantize(f, plan)
    optimizer = optax.chain(optax.sgd(0.1), qj.training.keep_positive())
    variables = params, qj.calibrate(plan, seen, params)

    @jax.jit
    def step(variables, moments):
        loss = lambda v: jnp.mean((quantized(v[1], v[0], X) - 1.0) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(variables)
        updates, moments = optimizer.update(gradient, moments, variables)
        return optax.apply_updates(variables, updates), moments, value

    moments, values = optimizer.init(variables), []
    for _ in range(30):
        variables, moments, value = step(variables, moments)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


class Scaled(eqx.Module):
    """A layer and a number."""

    dense: eqx.nn.Linear
    factor: float

    def __call__(self, x):
        return self.factor * self.dense(x)


def test_another_filter_and_what_is_no_array_of_jax():
    module = Scaled(eqx.nn.Linear(8, 4, key=KEY), 2.0)
    module = eqx.tree_at(lambda m: m.dense.weight, module, np.ones((4, 8), np.float32))
    f, params = qeqx.functional(module, method=mapped)
    assert sorted(names(params)) == ["dense/bias", "dense/weight"]
    assert isinstance(params["dense"]["weight"], jax.Array)
    g, more = qeqx.functional(module, method=mapped, wrt=eqx.is_inexact_array_like)
    assert sorted(names(more)) == ["dense/bias", "dense/weight", "factor"]
    assert_same_bits(g(more, X), f(params, X))
    assert_same_bits(g({**more, "factor": jnp.float32(4.0)}, X), 2 * f(params, X))


def test_integers_are_constants_and_no_parameters():
    class Permuted(eqx.Module):
        dense: eqx.nn.Linear
        order: jax.Array

        def __call__(self, x):
            return self.dense(x[self.order])

    module = Permuted(eqx.nn.Linear(8, 4, key=KEY), jnp.arange(8)[::-1])
    f, params = qeqx.functional(module, method=mapped)
    assert sorted(names(params)) == ["dense/bias", "dense/weight"]
    assert_same_bits(f(params, X), mapped(module.dense, X[:, ::-1]))


def test_arrays_of_another_module_are_refused():
    model = qeqx.functional(mlp(), method=mapped)
    f, params = model
    with pytest.raises(AdapterError, match=r"absent: \['layers/1/bias', 'layers/1/weight'\]"):
        f({"layers": {"0": params["layers"]["0"]}}, X)
    with pytest.raises(AdapterError, match=r"too many: \['more'\]"):
        qeqx.restore(model, {**params, "more": X})
    with pytest.raises(AdapterError, match="no parameter in Lambda"):
        qeqx.functional(eqx.nn.Lambda(jax.nn.relu))


def test_importing_quantjax_or_the_room_loads_no_equinox():
    code = "import quantjax, quantjax.adapters, sys; print('equinox' in sys.modules)"
    root = Path(qj.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, check=True, text=True
    )
    assert result.stdout.strip() == "False"
