"""Time steps share a weight and its QParams; stacked layers have their own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex_core

import quantjax as qj
from tests.conformance.containers.case import LAYERS, TIMES, Case
from tests.conformance.containers.cases import CASES, build
from tests.conformance.containers.raw_cases import affine
from tests.conformance.test_identity import assert_close
from tests.models import assert_same_bits, normal, policy

pytestmark = pytest.mark.thinned(11)

SHORT, LONG = 5, 9
RECURRENT = sorted(name for name in CASES if name.split("/")[1].startswith("time"))
STACKED = [f"{framework}/layers" for framework in ("raw", "linen", "nnx")]
WEIGHTS_ONLY = policy(weights=qj.weight_quantizer())


def with_length(case: Case, length: int) -> tuple[Any, ...]:
    """Its inputs, the series one of ``length`` steps; later ones are no larger than the first."""
    *state, x = case.inputs
    short = normal(9, x.shape[0], SHORT, x.shape[2])
    return (*state, jnp.concatenate([short, 0.9 * short], axis=1)[:, :length])


@pytest.mark.parametrize("name", RECURRENT)
def test_a_network_calibrated_at_one_length_runs_at_another(name):
    case = build(name)
    short, long = with_length(case, SHORT), with_length(case, LONG)
    plan = qj.plan(qj.uniform_policy(), qj.sites(case.f, case.params, *short))
    _, state = jax.jit(qj.observe(case.f, plan))(qj.init(plan), case.params, *short)
    visits = {name: {s.batches.item() for s in site.values()} for name, site in state.items()}
    head = next(name for name in visits if "head" in name)
    assert visits == {name: {1 if name == head else SHORT} for name in visits}

    run = jax.jit(qj.fake_quantize(case.f, plan))
    qstate = qj.calibrate(plan, state, case.params)
    at_short = run(qstate, case.params, *short)
    at_long = run(qstate, case.params, *long)
    assert at_long.shape[1] == LONG
    assert_close(at_long[:, :SHORT], at_short)
    want = jax.jit(case.f)(case.params, *long)
    coarse = run(qj.calibrate(plan, state, case.params, weight_bits=3), case.params, *long)
    limit = 0.03 * float(jnp.abs(want).max())
    assert float(jnp.abs(at_long - want).mean()) < limit < float(jnp.abs(coarse - want).mean())
    # And goes on collecting there, into the same statistics.
    _, more = jax.jit(qj.observe(case.f, plan))(state, case.params, *long)
    assert {int(s.batches) for n, site in more.items() if n != head for s in site.values()} == {
        SHORT + LONG
    }


def divisions(jaxpr: jex_core.Jaxpr, loops: int = 0) -> list[tuple[int, tuple[int, ...]]]:
    """How many scans around it and the shape of each division by scales; one makes a code."""
    found = []
    for eqn in jaxpr.eqns:
        shape = eqn.outvars[0].aval.shape
        if eqn.primitive.name == "div" and shape and 1 not in shape:  # nor those of scales
            found.append((loops, shape))
        for inner in jex_core.jaxprs_in_params(eqn.params):
            found += divisions(inner, loops + (eqn.primitive.name == "scan"))
    return found


def coded(name: str, policy: qj.Policy) -> list[tuple[int, tuple[int, ...]]]:
    """Those of a quantized model."""
    case = build(name)
    plan = case.planned(policy)
    state = qj.init(plan)
    qstate = jax.eval_shape(lambda s, p: qj.calibrate(plan, s, p), state, case.params)
    fake = qj.fake_quantize(case.f, plan)
    return sorted(divisions(jax.make_jaxpr(fake)(qstate, case.params, *case.inputs).jaxpr))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_weight_of_all_steps_is_quantized_once_ahead_of_the_loop(name):
    table = build(name).table
    weights = sorted(site.weight.shape for site in table)
    assert coded(name, WEIGHTS_ONLY) == [(0, shape) for shape in weights]
    # The counting counts: activations are quantized inside.
    in_time = [site for site in table if "scan×4" in site.loops]
    inside = [shape for loops, shape in coded(name, qj.uniform_policy()) if loops == 1]
    assert inside == [(3, 6)] * len(in_time)
    assert len(in_time) >= 2


@pytest.mark.parametrize("name", STACKED)
def test_a_weight_of_one_step_is_quantized_in_it(name):
    assert [entry for entry in coded(name, WEIGHTS_ONLY) if entry[0]] == [(1, (6, 6))]


@pytest.mark.parametrize("name", ["raw/nested", "linen/nested", "nnx/nested"])
def test_weights_of_layers_of_time_steps_are_quantized_once_a_layer(name):
    weights = sorted(site.weight.shape for site in build(name).table)
    # Ahead of both loops, all layers in one; never inside the loop over time.
    assert coded(name, WEIGHTS_ONLY) == [(0, (LAYERS, *shape)) for shape in weights]
    both = coded(name, qj.uniform_policy())
    assert [shape for loops, shape in both if loops == 2] == [(3, 6)] * len(weights)


@pytest.mark.parametrize("name", STACKED)
def test_each_layer_takes_a_width_of_its_own(name):
    case = build(name)
    plan = case.planned(WEIGHTS_ONLY)
    (site,) = (entry.site.name for entry in plan.quantized if entry.site.steps)
    run = jax.jit(qj.fake_quantize(case.f, plan))

    def at(widths: Any) -> jax.Array:
        qstate = qj.calibrate(plan, qj.init(plan), case.params, weight_bits={site: widths})
        assert qstate[site]["weight"].bits.shape == (LAYERS,)
        return run(qstate, case.params, *case.inputs)

    assert_same_bits(at(jnp.full(LAYERS, 4.0)), at(4))
    mixed = [(2.0, 4.0, 8.0), (8.0, 4.0, 2.0), (0.0, 3.0, 0.0), (4.0, 4.0, 4.0)]
    outputs = [at(jnp.array(widths)) for widths in mixed]
    assert len({y.tobytes() for y in map(np.asarray, outputs)}) == len(mixed)

    def cell(widths: jax.Array, params: Any, *inputs: Any) -> jax.Array:
        qstate = qj.calibrate(plan, qj.init(plan), params, weight_bits={site: widths})
        return qj.fake_quantize(case.f, plan)(qstate, params, *inputs)

    axes = (0, None, *[None] * len(case.inputs))
    together = jax.jit(jax.vmap(cell, axes))(jnp.array(mixed), case.params, *case.inputs)
    assert_close(list(together), outputs)


def test_layers_in_a_scan_equal_the_same_layers_one_after_another():
    """Widths, statistics and outputs, with the layers as separate parameters."""
    case = build("raw/layers")
    stack = case.params["stack"]
    apart = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(LAYERS)}
    apart["head"] = case.params["head"]

    def unrolled(p: Any, x: jax.Array) -> jax.Array:
        for i in range(LAYERS):
            x = jnp.tanh(affine(p[str(i)], x))
        return affine(p["head"], x)

    widths = [2.0, 4.0, 3.0]
    plan = case.planned(qj.uniform_policy())
    other = qj.plan(qj.uniform_policy(), qj.sites(unrolled, apart, *case.inputs))
    _, state = jax.jit(qj.observe(case.f, plan))(qj.init(plan), case.params, *case.inputs)
    _, singles = jax.jit(qj.observe(unrolled, other))(qj.init(other), apart, *case.inputs)
    layers = [singles[f"{i}/w"] for i in range(LAYERS)]
    assert_close(state["stack/w"], jax.tree.map(lambda *each: jnp.stack(each), *layers))

    qstate = qj.calibrate(
        plan, state, case.params, weight_bits={"stack/w": jnp.array(widths)}, activation_bits=0
    )
    by_name = {f"{i}/w": bits for i, bits in enumerate(widths)}
    qsingle = qj.calibrate(other, singles, apart, weight_bits=by_name, activation_bits=0)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *(qsingle[n] for n in by_name))
    assert_same_bits(qstate["stack/w"]["weight"], stacked["weight"])
    got = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, *case.inputs)
    want = jax.jit(qj.fake_quantize(unrolled, other))(qsingle, apart, *case.inputs)
    assert_close(got, want)
    assert not np.allclose(got, case.f(case.params, *case.inputs), rtol=0.01)


def test_steps_of_a_case_are_what_the_tests_here_assume():
    assert TIMES == 4  # "scan×4"
