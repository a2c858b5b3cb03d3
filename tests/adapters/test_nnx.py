"""NNX modules as functions: the module itself bit for bit, pure, through every transformation."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import quantjax as qj
from quantjax.adapters import nnx as qnnx
from quantjax.errors import AdapterError
from tests.adapters.modules import (
    ALL,
    MLP,
    Deep,
    Stacked,
    Tied,
    X,
    arrays,
    assert_same,
    loss,
    names,
    plain,
)
from tests.models import normal

pytestmark = pytest.mark.thinned(2)


@ALL
def test_arrays_are_those_of_the_module(make, x):
    module = make()
    _, params, state = qnnx.functional(module)
    assert_same((params, state), arrays(module))
    assert not any(isinstance(leaf, nnx.Variable) for leaf in jax.tree.leaves((params, state)))
    assert not any("value" in name for name in names((params, state)))


@pytest.mark.parametrize("is_jitted", [False, True])
@ALL
def test_two_calls_are_two_calls_of_the_module_bit_for_bit(make, x, is_jitted):
    module = make()
    f, params, state = qnnx.functional(module)
    call = nnx.jit(lambda module, x: module(x)) if is_jitted else lambda module, x: module(x)
    f = jax.jit(f) if is_jitted else f
    for _ in range(2):
        y, state = f(params, state, x)
        assert_same(y, call(module, x))
        assert_same((params, state), arrays(module))


@ALL
def test_neither_the_module_nor_the_arguments_change(make, x):
    module = make()
    f, params, state = qnnx.functional(module)
    before = jax.tree.map(jnp.copy, (params, state))
    first = f(params, state, x)
    assert_same((params, state), before)
    assert_same(arrays(module), before)
    assert_same(f(params, state, x), first)


@ALL
def test_gradients_are_those_of_nnx(make, x):
    module = make()
    f, params, state = qnnx.functional(module)
    ours = jax.jit(jax.grad(lambda params: loss(f(params, state, x)[0])))(params)
    theirs = nnx.jit(nnx.grad(lambda module, x: loss(module(x))))(module, x)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, ours, plain(theirs))
    kernels = [
        leaf
        for name, leaf in zip(names(ours), jax.tree.leaves(ours), strict=True)
        if "kernel" in name or "embedding" in name
    ]
    assert kernels
    assert all(jnp.any(kernel != 0) for kernel in kernels)


@ALL
def test_the_program_holds_no_array(make, x):
    f, params, state = qnnx.functional(make())
    closed = jax.make_jaxpr(f)(params, state, x)
    assert sum(np.size(const) for const in closed.consts) == 0


def test_paths_are_those_in_the_module():
    _, params, state = qnnx.functional(MLP())
    assert names(params) == [
        "linear1/bias",
        "linear1/kernel",
        "linear2/bias",
        "linear2/kernel",
        "norm/bias",
        "norm/scale",
    ]
    assert names(state) == ["dropout/rngs/count", "dropout/rngs/key", "norm/mean", "norm/var"]
    assert jnp.issubdtype(state["dropout"]["rngs"]["key"].dtype, jax.dtypes.prng_key)
    deep = qnnx.functional(Deep())
    assert deep.params["layers"]["10"]["kernel"].shape == (8, 8)
    assert deep.state == {}


def test_shared_variables_appear_once_and_stay_shared():
    tokens = jnp.arange(6)
    f, params, state = qnnx.functional(Tied())
    assert names(params) == ["embed/embedding"]
    doubled = jax.tree.map(lambda w: 2 * w, params)
    np.testing.assert_array_equal(f(doubled, state, tokens)[0], 4 * f(params, state, tokens)[0])
    module = qnnx.restore(qnnx.functional(Tied()), doubled, state)
    assert module.head.kernel is module.embed.embedding


def test_training_moves_the_state_and_evaluation_does_not():
    module = MLP()
    f, params, state = qnnx.functional(module)
    first, once = f(params, state, X)
    second, twice = f(params, once, X)
    assert jnp.any(first != second)
    assert int(twice["dropout"]["rngs"]["count"]) == 2
    assert jnp.any(once["norm"]["mean"] != twice["norm"]["mean"])

    module.eval()
    f_eval, params_eval, state_eval = qnnx.functional(module)
    y, after = f_eval(params_eval, state_eval, X)
    assert_same(after, state_eval)
    assert_same(y, module(X))
    # What was made before goes on training.
    assert_same(f(params, state, X), (first, once))


def test_another_method_and_another_filter():
    module = MLP()
    f, params, state = qnnx.functional(module, method=MLP.features)
    assert f(params, state, X)[0].shape == (6, 16)
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("norm")))
    g, some, rest = qnnx.functional(module, wrt=frozen)
    assert names(rest)[2:] == ["norm/bias", "norm/mean", "norm/scale", "norm/var"]
    assert_same(g(some, rest, X)[0], qnnx.functional(module).f(params, state, X)[0])


def test_several_inputs_and_outputs_of_any_structure():
    module = MLP()
    model = qnnx.functional(module, method=lambda m, x, extra: {"y": m(x), "z": [extra["a"]]})
    outputs, _ = model.f(model.params, model.state, X, {"a": 1})
    assert outputs["z"] == [1]
    assert outputs["y"].shape == (6, 4)


def test_vmap_over_seeds_of_dropout():
    f, params, state = qnnx.functional(MLP())

    def run(seed):
        rngs = {**state["dropout"]["rngs"], "key": jax.random.key(seed)}
        return f(params, {**state, "dropout": {"rngs": rngs}}, X)

    ys, states = jax.jit(jax.vmap(run))(jnp.arange(3))
    assert states["dropout"]["rngs"]["key"].shape == (3,)
    for seed in range(3):
        y, after = run(seed)
        np.testing.assert_allclose(ys[seed], y, rtol=1e-5, atol=1e-6)
        assert int(states["dropout"]["rngs"]["count"][seed]) == 1
        np.testing.assert_allclose(states["norm"]["var"][seed], after["norm"]["var"], rtol=1e-5)
    assert jnp.any(ys[0] != ys[1])


def test_state_is_the_carry_of_a_scan():
    f, params, state = qnnx.functional(MLP())
    xs = normal(4, 3, 6, 8)
    scanned, ys = jax.jit(
        lambda state: jax.lax.scan(lambda s, x: f(params, s, x)[::-1], state, xs)
    )(state)
    for x, y in zip(xs, ys, strict=True):
        expected, state = f(params, state, x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert int(scanned["dropout"]["rngs"]["count"]) == 3


@pytest.mark.parametrize("make", [MLP, Stacked, Deep])
def test_restore_gives_back_the_trained_module(make):
    model = qnnx.functional(make())
    f, params, state = model
    optimizer = optax.sgd(0.1)

    @jax.jit
    def step(params, state, moments):
        def objective(params):
            y, after = f(params, state, X)
            return loss(y), after

        gradients, after = jax.grad(objective, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), after, moments

    moments = optimizer.init(params)
    for _ in range(2):
        params, state, moments = step(params, state, moments)
    module = qnnx.restore(model, params, state)
    assert type(module) is make
    assert_same(arrays(module), (params, state))
    assert_same(module(X), f(params, state, X)[0])
    assert_same(qnnx.functional(qnnx.restore(model, params, state))[1:], (params, state))


def test_gradients_go_into_the_optimizer_of_nnx():
    module = MLP()
    module.eval()
    model = qnnx.functional(module)
    plan = qj.plan(qj.uniform_policy(), qj.sites(model.f, model.params, model.state, X))
    observe, quantized = qj.observe(model.f, plan), qj.fake_quantize(model.f, plan)
    _, seen = observe(qj.init(plan), model.params, model.state, X)
    qstate = qj.calibrate(plan, seen, model.params)
    grads = jax.grad(lambda p: (quantized(qstate, p, model.state, X)[0] ** 2).sum())(model.params)
    updates, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(model.params), model.params)
    expected = optax.apply_updates(model.params, updates)
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(module, qnnx.as_state(model, grads))
    assert_same(qnnx.functional(module).params, expected)
    with pytest.raises(AdapterError):
        qnnx.as_state(model, {"other": X})


def test_importing_quantjax_or_the_room_loads_no_flax():
    code = "import quantjax, quantjax.adapters, sys; print('flax' in sys.modules)"
    root = Path(qj.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, check=True, text=True
    )
    assert result.stdout.strip() == "False"
