"""Tracing once: what a program is kept for, and what is never kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.interpreter import ProgramCache, leaves_by_path, trace
from tests.models import Case, assert_same_bits, dense, normal, ready

W = {"w": normal(1, 6, 4)}
X = normal(0, 3, 6)


class Counted:
    """``x @ w``, and how often it was traced."""

    def __init__(self) -> None:
        self.traces = 0

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        self.traces += 1
        return x @ params["w"].astype(x.dtype)


def test_a_program_is_traced_once_for_its_shapes():
    f = Counted()
    programs = ProgramCache(f)
    first = programs(W, X)
    assert programs(W, X + 1.0) is first
    assert programs({"w": 2.0 * W["w"]}, X) is first
    assert f.traces == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (W, X[:2]),
        (W, X.astype(jnp.bfloat16)),
        ({"w": W["w"][:, :2]}, X),
        ({"w": W["w"], "unused": X}, X),
        (W, np.asarray(X, np.int32)),
    ],
)
def test_another_structure_shape_or_dtype_is_another_program(arguments):
    f = Counted()
    programs = ProgramCache(f)
    first = programs(W, X)
    assert programs(*arguments) is not first
    assert programs(*arguments) is programs(*arguments)
    assert f.traces == 2


def test_another_trace_context_is_another_program():
    """JAX would trace again, so does this: promotion rules and precision are part of a trace."""
    f = Counted()
    programs = ProgramCache(f)
    first = programs(W, X)
    with jax.default_matmul_precision("highest"):
        second = programs(W, X)
        assert programs(W, X) is second
    assert second is not first
    assert programs(W, X) is first
    assert f.traces == 2
    precisions = [
        next(e.params["precision"] for e in p.jaxpr.eqns if e.primitive.name == "dot_general")
        for p in (first, second)
    ]
    assert precisions[0] != precisions[1]


def test_wider_numbers_are_another_program():
    f = Counted()
    programs = ProgramCache(f)
    programs(W, np.ones((3, 6)))
    with jax.enable_x64(True):
        program = programs(W, np.ones((3, 6)))
    assert program.jaxpr.out_avals[0].dtype == np.float64
    assert f.traces == 2


def test_a_closed_over_tracer_is_never_kept():
    """Inside ``jit``, a function of an outer value has that value's tracer for a constant."""
    case = dense()
    plan, _, qstate = ready(case, qj.uniform_policy())

    @jax.jit
    def outer(shift: jax.Array, params: Any, x: jax.Array) -> jax.Array:
        shifted = lambda p, x: (x + shift) @ p["w"]  # noqa: E731
        return qj.fake_quantize(shifted, plan)(qstate, params, x)

    first, second = (outer(jnp.float32(s), case.params, case.x) for s in (0.0, 1.0))
    want = [
        qj.fake_quantize(lambda p, x, s=s: (x + s) @ p["w"], plan)(qstate, case.params, case.x)
        for s in (0.0, 1.0)
    ]
    assert_same_bits((first, second), tuple(want))
    assert (first != second).any()


def test_a_program_with_tracers_is_made_anew_each_time():
    @jax.jit
    def outer(shift: jax.Array, x: jax.Array) -> jax.Array:
        programs = ProgramCache(lambda p, x: (x + shift) @ p["w"])
        assert programs(W, x) is not programs(W, x)
        kept = ProgramCache(lambda p, x: (x + X) @ p["w"])
        assert kept(W, x) is kept(W, x)
        return x

    outer(jnp.float32(1), X)


def test_a_weight_that_is_a_closed_over_tracer_is_observed():
    """It cannot be recomputed from the parameters, so its range comes from running the model."""
    x = normal(5, 4, 6)

    @jax.jit
    def outer(w: jax.Array) -> Any:
        f = lambda p, x: x @ w + p["b"]  # noqa: E731
        params = {"b": jnp.zeros((1, 4))}
        plan = qj.plan(qj.uniform_policy(weight_bits=4), qj.sites(f, params, x))
        state = qj.init(plan)
        assert set(state["dot_general"]) == {"weight", "activation"}
        _, state = qj.observe(f, plan)(state, params, x)
        qstate = qj.calibrate(plan, state, params)
        return qstate, qj.fake_quantize(f, plan)(qstate, params, x)

    for scale in (1.0, 3.0):
        w = scale * W["w"]
        qstate, got = outer(w)
        named = ready(Case(lambda p, x: x @ p["w"], {"w": w}, x), qj.uniform_policy(weight_bits=4))
        weight = named.qstate["w"]["weight"]
        assert_same_bits(qstate["dot_general"]["weight"].scale, weight.scale)
        want = qj.fake_quantize(lambda p, x: x @ p["w"], named.plan)(named.qstate, {"w": w}, x)
        assert_same_bits(got, want + 0.0)


def test_value_dependent_branches_fail_as_under_jit():
    def branching(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] if x.sum() > 0 else x

    with pytest.raises(jax.errors.TracerBoolConversionError):
        trace(branching, W, X)


def test_paths_join_keys_of_every_kind():
    tree = {"a": [1, (2, {"b": 3})], "c": None}
    assert leaves_by_path(tree) == {"a/0": 1, "a/1/0": 2, "a/1/1/b": 3}
