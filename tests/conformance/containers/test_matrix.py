"""Acceptance: every container in every framework, one cell a case, keeps what quantjax promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from tests.conformance.containers.case import Case, derivatives
from tests.conformance.containers.cases import CASES, build
from tests.conformance.test_identity import assert_close, fences_hold
from tests.models import assert_same_bits

pytestmark = pytest.mark.thinned(29)

IDENTITY = qj.Policy([])
EVERY_ROLE = qj.Scheme(
    weights=qj.weight_quantizer(bits=8),
    activations=qj.activation_quantizer(bits=8),
    gradients=qj.activation_quantizer(bits=8),
)
W8A8 = qj.Policy([qj.rule(qj.weighted(), EVERY_ROLE, optional=True)])


def widths(plan: qj.Plan, bits: Any) -> dict[str, Any]:
    """One width for every role that the plan quantizes."""
    differentiates = any(qj.backward().matches(entry.site) for entry in plan.quantized)
    extra = {"gradient_bits": bits} if differentiates else {}
    return {"weight_bits": bits, "activation_bits": bits, **extra}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return build(request.param)


@pytest.fixture(scope="module")
def plan(case) -> qj.Plan:
    plan = case.planned(W8A8)
    assert len(plan.quantized) == len(plan.sites) - case.opaque > 0
    return plan


class Own(NamedTuple):
    """What the model itself returns: value and derivatives, eagerly and jitted."""

    eager: Any
    jitted: Any


@pytest.fixture(scope="module")
def own(case) -> Own:
    run = derivatives(case, case.f)
    return Own(run(case.params, *case.inputs), jax.jit(run)(case.params, *case.inputs))


def at_width(case: Case, plan: qj.Plan) -> Callable[..., Any]:
    """``(bits, state, params, *inputs)``: the model with that width everywhere."""

    def run(bits: Any, state: Any, params: Any, *inputs: Any) -> Any:
        qstate = qj.calibrate(plan, state, params, **widths(plan, bits))
        return qj.fake_quantize(case.f, plan)(qstate, params, *inputs)

    return run


Jitted = Callable[..., Any]


@pytest.fixture(scope="module")
def alone(case, plan) -> Jitted:
    """:func:`at_width`, compiled once for all widths."""
    return jax.jit(at_width(case, plan))


@pytest.fixture(scope="module")
def quantized(case, plan) -> Jitted:
    """``(qstate, params, *inputs)``: value and derivatives of the model with these QParams."""
    fake = qj.fake_quantize(case.f, plan)
    return lambda qstate, *a: derivatives(case, lambda *b: fake(qstate, *b))(*a)


@pytest.fixture(scope="module")
def compiled(quantized) -> Jitted:
    return jax.jit(quantized)


def test_the_identity_plan_changes_no_bit(case, own):
    plan = case.planned(IDENTITY)
    assert plan.quantized == ()
    run = derivatives(case, lambda *a: qj.fake_quantize(case.f, plan)({}, *a))
    assert_same_bits(run(case.params, *case.inputs), own.eager)
    assert_same_bits(jax.jit(run)(case.params, *case.inputs), own.jitted)


def test_width_zero_changes_no_bit(case, plan, own, quantized, compiled):
    qstate = qj.calibrate(plan, qj.init(plan), case.params, **widths(plan, 0))
    got = quantized(qstate, case.params, *case.inputs)
    assert_same_bits(got[0], own.eager[0])
    assert_close(got[1], own.eager[1])
    assert_same_derivatives(case, got[1], own.eager[1])

    value, derivative = compiled(qstate, case.params, *case.inputs)
    assert_close((value, derivative), own.jitted)
    assert_same_bits(value, own.jitted[0])
    assert_same_derivatives(case, derivative, own.jitted[1])


def assert_same_derivatives(case: Case, got: Any, want: Any) -> None:
    """The same bits; close where inlining loses a derivative rule, or a sum is fused otherwise."""
    if case.inlined or case.last_places:
        assert_close(got, want)
    else:
        assert_same_bits(got, want)


class Observed(NamedTuple):
    """The two outputs of observing the two calibration batches, and the statistics."""

    outputs: list[Any]
    state: Any


@pytest.fixture(scope="module")
def observed(case, plan) -> Observed:
    observe, state, outputs = jax.jit(qj.observe(case.f, plan)), qj.init(plan), []
    for inputs in case.calibration():
        y, state = observe(state, case.params, *inputs)
        outputs.append(y)
    return Observed(outputs, state)


def test_observing_returns_the_models_own_output(case, plan, own, observed):
    y, _ = qj.observe(case.f, plan)(qj.init(plan), case.params, *case.inputs)
    assert_same_bits(y, own.eager[0])
    f = jax.jit(case.f)
    want = [f(case.params, *inputs) for inputs in case.calibration()]
    # JAX 0.10.2 vectorizes the body of a loop otherwise where it counts what it sees.
    loops = any(site.loops for site in case.table)
    (assert_close if loops and not fences_hold() else assert_same_bits)(observed.outputs, want)


def test_layers_have_statistics_of_their_own_and_time_steps_share_theirs(case, plan, observed):
    assert jax.tree.structure(observed.state) == jax.tree.structure(qj.init(plan))
    # A lookup has a weight and nothing to observe.
    products = [entry for entry in plan.quantized if not entry.site.op.is_lookup]
    assert sorted(observed.state) == sorted(entry.site.name for entry in products)
    for entry in products:
        name, expected = entry.site.name, case.expected(entry.site.name)
        assert entry.site.steps == expected.steps, name
        for key, statistics in observed.state[name].items():
            assert statistics.scale_shape[: len(expected.steps)] == expected.steps, (name, key)
            want = np.full(expected.steps, expected.batches)
            np.testing.assert_array_equal(statistics.batches, want, f"{name} {key}")
            assert (statistics.extremes.low < statistics.extremes.high).all(), (name, key)
    qstate = qj.calibrate(plan, observed.state, case.params)
    for entry in plan.quantized:
        steps = case.expected(entry.site.name).steps
        for qparams in qstate[entry.site.name].values():
            assert qparams.bits.shape == steps
            assert qparams.scale.shape[: len(steps)] == steps
            assert np.unique(qparams.scale).size >= max(steps, default=1), entry.site.name


def test_eight_bits_are_close_and_three_are_not(case, own, observed, alone):
    at = {
        bits: alone(jnp.float32(bits), observed.state, case.params, *case.inputs) for bits in (3, 8)
    }
    scale = float(jnp.abs(own.jitted[0]).max())
    error = {bits: float(jnp.abs(y - own.jitted[0]).max()) / scale for bits, y in at.items()}
    assert error[8] < 0.07 < error[3], error


def test_widths_in_one_program_equal_each_alone(case, plan, observed, alone):
    widths = jnp.array([0.0, 2.0, 3.0, 8.0])
    axes = (0, None, None, *[None] * len(case.inputs))
    together = jax.jit(jax.vmap(at_width(case, plan), axes))(
        widths, observed.state, case.params, *case.inputs
    )
    for bits, y in zip(widths, together, strict=True):
        want = alone(bits, observed.state, case.params, *case.inputs)
        if bits == 0.0 or case.opaque:  # float products: batching may change the order of a sum
            assert_close(y, want)
        else:
            assert_same_bits(y, want)
    assert len({y.tobytes() for y in np.asarray(together)}) == len(widths)


def test_derivatives_pass_quantized_products(case, plan, own, observed, compiled):
    """At 8 bits, the direction of the float model's; at 2 bits further from it."""
    want = jnp.concatenate([x.ravel() for x in jax.tree.leaves(own.jitted[1])])
    angles = {}
    for bits in (2, 8):
        qstate = qj.calibrate(plan, observed.state, case.params, **widths(plan, bits))
        _, derivative = compiled(qstate, case.params, *case.inputs)
        got = jnp.concatenate([x.ravel() for x in jax.tree.leaves(derivative)])
        cosine = jnp.vdot(got, want) / jnp.linalg.norm(got) / jnp.linalg.norm(want)
        angles[bits] = float(jnp.arccos(cosine))
    # A weight at the end of its range has no gradient: symmetric codes leave the largest one out.
    assert angles[8] < 0.5, angles
    assert angles[8] < 0.9 * angles[2], angles
