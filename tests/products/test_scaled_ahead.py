"""Group scales of products without integers: codes are scaled ahead of one product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.products import Execution
from tests.integers.visiting import equations
from tests.models import Case, Ready, assert_same_bits, normal, ready

PARAMS = {"w": normal(1, 48, 5)}
X = normal(2, 6, 48)


def f(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def case(**weights: Any) -> Ready:
    """Weights alone, in groups along the sum."""
    scheme = qj.Scheme(weights=qj.weight_quantizer(**weights))
    return ready(Case(f, PARAMS, X), qj.Policy([qj.rule(qj.weighted(), scheme)]))


GROUPS = qj.PerGroup(16)
WEIGHT_ONLY = {
    "int4": {"bits": 4, "granularity": GROUPS},
    "asymmetric": {"bits": 3, "granularity": GROUPS, "symmetric": False},
    "nf4": {"format": qj.formats.NF4, "granularity": GROUPS},
    "nvfp4": {"format": qj.formats.NVFP4, "granularity": GROUPS},
    "remainder": {"bits": 4, "granularity": qj.PerGroup(20, remainder=qj.Remainder.SHORTER)},
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_it_is_one_product_of_what_the_codes_stand_for(name):
    done = case(**WEIGHT_ONLY[name])
    (site,) = done.plan.quantized
    assert site.form.execution is Execution.CODES
    frozen = qj.freeze(done.plan, done.qstate, PARAMS)
    simulated = jax.jit(qj.fake_quantize(f, done.plan))
    executed = jax.jit(qj.execute(f, done.plan))
    floats = np.asarray(qj.dequantize_params(frozen)["w"], np.float64)
    want = np.asarray(X, np.float64) @ floats
    got = simulated(done.qstate, PARAMS, X)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    assert_same_bits(executed(done.qstate, frozen, X), got)
    for run, params in ((simulated, PARAMS), (executed, frozen)):
        jaxpr = jax.make_jaxpr(run)(done.qstate, params, X).jaxpr
        names = [eqn.primitive.name for eqn in equations(jaxpr)]
        assert names.count("dot_general") == 1
        assert "scan" not in names


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_gradients_are_those_of_the_product_by_what_the_codes_stand_for(name):
    done = case(**WEIGHT_ONLY[name])
    cotangent = normal(3, 6, 5)
    simulated = qj.fake_quantize(f, done.plan)
    loss = lambda p, x: jnp.vdot(simulated(done.qstate, p, x), cotangent)  # noqa: E731
    to_params, to_x = jax.jit(jax.grad(loss, (0, 1)))(PARAMS, X)
    floats = qj.dequantize_params(qj.freeze(done.plan, done.qstate, PARAMS))["w"]
    np.testing.assert_allclose(to_x, cotangent @ floats.T, rtol=2e-5, atol=2e-5)
    straight = X.T @ cotangent
    inside = jnp.abs(to_params["w"]) > 0
    assert inside.mean() > 0.8
    np.testing.assert_allclose(to_params["w"], jnp.where(inside, straight, 0), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_bypass_is_the_float_model(name):
    done = case(**WEIGHT_ONLY[name])
    floats = qj.calibrate(done.plan, {}, PARAMS, weight_bits=0)
    assert_same_bits(
        jax.jit(qj.fake_quantize(f, done.plan))(floats, PARAMS, X), jax.jit(f)(PARAMS, X)
    )


def test_integers_by_group_are_summed_group_by_group():
    """Where both operands have integer codes the order of sums is that of execution."""
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=4, granularity=GROUPS),
        activations=qj.activation_quantizer(bits=8),
    )
    done = ready(Case(f, PARAMS, X), qj.Policy([qj.rule(qj.weighted(), scheme)]))
    (site,) = done.plan.quantized
    assert site.form.execution is Execution.GROUPED
    frozen = qj.freeze(done.plan, done.qstate, PARAMS)
    got = jax.jit(qj.fake_quantize(f, done.plan))(done.qstate, PARAMS, X)
    assert_same_bits(jax.jit(qj.execute(f, done.plan))(done.qstate, frozen, X), got)
