"""Acceptance: the float model is the same before, between and after quantized runs.

JAX keeps compiled programs by primitive and parameters. A library that changes what a primitive
does while it traces leaves its version behind for whoever asks next with the same shapes; 16x16 by
16x16 is where every float product in the process has the same key.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from tests.models import Case, assert_same_bits, normal, ready


def matmul(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


SQUARE = Case(matmul, {"w": normal(1, 16, 16)}, normal(2, 16, 16))


def everything_quantized(case: Case) -> list[Callable[[], Any]]:
    """One call of each verb that evaluates the model, eager and jitted."""
    plan, state, qstate = ready(case, qj.uniform_policy(weight_bits=2, activation_bits=2))
    fake, observe = qj.fake_quantize(case.f, plan), qj.observe(case.f, plan)
    arguments = (case.params, case.x)
    gradient = jax.grad(lambda params, x: fake(qstate, params, x).sum())
    return [
        lambda: fake(qstate, *arguments),
        lambda: jax.jit(fake)(qstate, *arguments),
        lambda: observe(state, *arguments)[0],
        lambda: qj.compare(case.f, plan)(qstate, *arguments)["w"].sqnr,
        lambda: jax.jit(gradient)(*arguments)["w"],
    ]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_float_model_never_changes(wrap):
    f = wrap(matmul)
    before = f(SQUARE.params, SQUARE.x)
    exact = np.asarray(SQUARE.x, np.float64) @ np.asarray(SQUARE.params["w"], np.float64)
    np.testing.assert_allclose(before, exact, rtol=0, atol=1e-4)
    for run in everything_quantized(SQUARE):
        jax.block_until_ready(run())
        assert_same_bits(f(SQUARE.params, SQUARE.x), before)
        # A function that JAX sees for the first time now, so nothing but primitives is cached.
        fresh = wrap(lambda params, x: x @ params["w"])
        assert_same_bits(fresh(SQUARE.params, SQUARE.x), before)


@pytest.mark.parametrize("first", ["float", "quantized"])
def test_the_order_of_float_and_quantized_runs_does_not_matter(first):
    case = SQUARE
    plan, _, qstate = ready(case, qj.uniform_policy(weight_bits=2, activation_bits=2))
    results: dict[str, Any] = {}
    order = ["float", "quantized"] if first == "float" else ["quantized", "float"]
    jax.clear_caches()
    for kind in order:
        f = jax.jit(matmul if kind == "float" else qj.fake_quantize(matmul, plan))
        arguments = (case.params, case.x)
        results[kind] = f(*arguments) if kind == "float" else f(qstate, *arguments)
    assert_same_bits(results["float"], matmul(case.params, case.x))
    error = jnp.abs(results["quantized"] - results["float"]).max()
    assert 0.5 < float(error) < 16.0  # two bits are coarse; had float leaked in, it would be 0


def test_one_program_that_holds_both_keeps_them_apart():
    plan, _, qstate = ready(SQUARE, qj.uniform_policy(weight_bits=2, activation_bits=2))

    @jax.jit
    def both(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        fake = qj.fake_quantize(matmul, plan)
        return matmul(params, x), fake(qstate, params, x), matmul(params, x)

    first, quantized, second = both(SQUARE.params, SQUARE.x)
    assert_same_bits(first, second)
    assert_same_bits(first, jax.jit(matmul)(SQUARE.params, SQUARE.x))
    alone = jax.jit(qj.fake_quantize(matmul, plan))(qstate, SQUARE.params, SQUARE.x)
    assert_same_bits(quantized, alone)


def test_two_plans_of_one_function_do_not_mix():
    coarse = ready(SQUARE, qj.uniform_policy(weight_bits=2, activation_bits=2))
    fine = ready(SQUARE, qj.uniform_policy(weight_bits=8, activation_bits=8))
    runs = [qj.fake_quantize(matmul, r.plan) for r in (coarse, fine)]
    alone = [
        run(r.qstate, SQUARE.params, SQUARE.x) for run, r in zip(runs, (coarse, fine), strict=True)
    ]
    again = [
        jax.jit(run)(r.qstate, SQUARE.params, SQUARE.x)
        for run, r in zip(runs[::-1], (fine, coarse), strict=True)
    ]
    assert_same_bits(again[::-1], alone)
    truth = matmul(SQUARE.params, SQUARE.x)
    errors = [float(jnp.abs(y - truth).max()) for y in alone]
    assert errors[0] > 10 * errors[1] > 0


def test_the_same_policy_made_twice_reuses_the_compiled_program():
    """Plans are values: a plan made again is a cache hit of ``jax.jit``, not a new compilation."""
    traces = []

    def counted(params: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return x @ params["w"]

    def run(plan: qj.Plan, qstate: Any, params: Any, x: jax.Array) -> jax.Array:
        return qj.fake_quantize(counted, plan)(qstate, params, x)

    jitted = jax.jit(run, static_argnums=0)
    outputs = []
    for _ in range(2):
        plan, _, qstate = ready(SQUARE, qj.uniform_policy())
        outputs.append(jitted(plan, qstate, SQUARE.params, SQUARE.x))
    assert len(traces) == 1
    assert_same_bits(*outputs)
