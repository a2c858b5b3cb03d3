"""What adapters are given by mistake: said where it is given, with what to give."""

from __future__ import annotations

import importlib
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import quantjax as qj
from quantjax import errors
from quantjax.adapters import equinox as qeqx
from quantjax.adapters import nnx as qnnx
from tests.models import assert_same_bits
from tests.refused import refused

X = jnp.ones((2, 8))
PERCEPTRON = eqx.nn.MLP(8, 3, 5, 1, key=jax.random.key(0))


class Encoder(nnx.Module):
    """A module with a method beside its call."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.encode(x)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.dense(x)


MODULE = Encoder(nnx.Rngs(0))


def test_a_class_is_no_module():
    with refused(errors.AdapterError, "Linear is a class", "adapters.nnx", "Linear(...)"):
        qnnx.functional(nnx.Linear)
    with refused(errors.AdapterError, "MLP is a class", "adapters.equinox", "MLP(...)"):
        qeqx.functional(eqx.nn.MLP)


@pytest.mark.parametrize("functional", [qnnx.functional, qeqx.functional], ids=["nnx", "equinox"])
def test_a_module_of_linen_needs_no_adapter(functional):
    with refused(errors.AdapterError, "a Dense of flax.linen", "module.apply"):
        functional(nn.Dense(3))


@pytest.mark.parametrize("method", [MODULE.encode, "encode"], ids=["bound", "text"])
def test_a_method_of_nnx_takes_the_module(method):
    with refused(
        errors.AdapterError, "method is", "lambda module, *inputs: module.encode(*inputs)"
    ):
        qnnx.functional(MODULE, method=method)
    followed = lambda module, *inputs: module.encode(*inputs)  # noqa: E731
    f, params, state = qnnx.functional(MODULE, method=followed)
    assert_same_bits(f(params, state, X)[0], MODULE(X))


def test_a_function_of_the_class_is_a_method():
    f, params, state = qnnx.functional(MODULE, method=Encoder.encode)
    assert_same_bits(f(params, state, X)[0], MODULE(X))


@pytest.mark.parametrize("method", [PERCEPTRON.__call__, "forward"], ids=["bound", "text"])
def test_a_method_of_equinox_takes_the_module(method):
    with refused(errors.AdapterError, "method is", "lambda module, *inputs: module."):
        qeqx.functional(PERCEPTRON, method=method)


def test_the_state_is_an_argument():
    f, params, state = qnnx.functional(MODULE)
    with refused(errors.AdapterError, "state is no dict", "f(params, state, *inputs)"):
        f(params, X)
    with refused(errors.AdapterError, "params is no dict", "f(params, state, *inputs)"):
        f(MODULE, state, X)


def test_frozen_parameters_are_executed():
    f, params, state = qnnx.functional(MODULE)
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, state, X))
    qstate = qj.calibrate(plan, qj.init(plan), params)
    frozen = qj.freeze(plan, qstate, params)
    with refused(errors.AdapterError, "parameters are frozen", "dense/kernel", "qj.execute"):
        f(frozen, state, X)
    y, _ = qj.execute(f, plan)(qstate, frozen, state, X)
    assert y.shape == (2, 4)


def test_a_module_is_no_tree_of_parameters():
    """Its activation is a leaf, and JAX's own error speaks of jitted functions."""
    with refused(errors.ArgumentError, "arrays are needed", "qj.sites, activation", "functional"):
        qj.sites(lambda module, x: jax.vmap(module)(x), PERCEPTRON, X)
    with refused(errors.ArgumentError, "params holds a str", "qj.sites, name"):
        qj.sites(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 3)), "name": "dense"}, X)


@pytest.mark.parametrize(("name", "library"), [("haiku", "Haiku"), ("equinox", "Equinox")])
def test_a_library_that_is_not_installed_is_said_with_its_extra(name, library, monkeypatch):
    module = f"quantjax.adapters.{name}"
    importlib.import_module(module)  # so that it comes back
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with refused(errors.MissingPackageError, f"needs {library}", f"quantjax[{name}]"):
        importlib.import_module(module)
