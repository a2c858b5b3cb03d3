"""Stored codes are unpacked and decoded at their product: a layer, or the rows of a lookup."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax import formats
from tests.models import assert_same_bits, normal

pytestmark = pytest.mark.thinned(5)

LAYERS, FEATURES, ROWS = 16, 64, 1000


def weights(**settings: Any) -> qj.Policy:
    return qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=qj.weight_quantizer(**settings)))])


POLICIES = {
    "int4": weights(bits=4, granularity=qj.PerGroup(32)),
    "twn": weights(format=formats.TERNARY, bits=2, rule=qj.ranges.TWN),
    "e4m3": weights(format=formats.E4M3FN),
    "float-bits": weights(format=formats.minifloat(exponent_bits=3, mantissa_bits=2), bits=6),
    "lognet": weights(format=formats.lognet(), bits=4),
    "apot": weights(format=formats.apot(), bits=4),
    "nf4": weights(format=formats.NF4, granularity=qj.PerGroup(32)),
    "mxfp4": weights(format=formats.MXFP4, granularity=qj.PerGroup(32)),
    "k-means": weights(format=formats.learned_codebook(), bits=4, rule=qj.ranges.K_MEANS),
    "ttq": weights(format=formats.ternary(learned=True), bits=2, rule=qj.ranges.TTQ),
}


def stacked(params, x):
    step = lambda x, w: (jax.nn.gelu(x @ w), None)  # noqa: E731
    return jax.lax.scan(step, x, params)[0]


def steps(params, x):
    """A cell, whose steps share a weight, around a lookup of each token's row."""

    def step(state, token):
        return jnp.tanh(state @ params["w"] + params["e"][token]), None

    return jax.lax.scan(step, jnp.zeros(FEATURES), x)[0]


def lookup(params, x):
    return params[x]


CASES = {
    "stacked": (stacked, normal(0, LAYERS, FEATURES, FEATURES), normal(1, 2, FEATURES)),
    "steps": (
        steps,
        {"w": 0.1 * normal(0, FEATURES, FEATURES), "e": normal(1, ROWS, FEATURES)},
        jnp.array([3, 999, 0, 3]),
    ),
    "lookup": (lookup, normal(0, ROWS, FEATURES), jnp.array([[5, 7]])),
}


def prepared(case: str, policy: qj.Policy, **widths: Any) -> Any:
    f, params, x = CASES[case]
    plan = qj.plan(policy, qj.sites(f, params, x))
    qstate = qj.calibrate(plan, {}, params, **widths)
    return f, plan, qstate, params, x


@pytest.mark.parametrize("packed", [False, True], ids=["as-frozen", "packed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", POLICIES)
def test_executed_is_simulated(name, case, packed):
    f, plan, qstate, params, x = prepared(case, POLICIES[name])
    frozen = qj.freeze(plan, qstate, params)
    frozen = qj.pack_params(frozen) if packed else frozen
    executed = jax.jit(qj.execute(f, plan))(qstate, frozen, x)
    assert_same_bits(executed, jax.jit(qj.fake_quantize(f, plan))(qstate, params, x))


@pytest.mark.parametrize("packed", [False, True], ids=["as-frozen", "packed"])
@pytest.mark.parametrize("name", ["lognet", "apot", "k-means"])
def test_layers_have_widths_each(name, packed):
    """Levels are those of the layer's own width, of which the codes may be read alone, too."""
    widths = jnp.float32([4, 3, 4, 2, 3, 4, 2, 3] * 2)
    f, plan, qstate, params, x = prepared("stacked", POLICIES[name], weight_bits=widths)
    frozen = qj.freeze(plan, qstate, params)
    frozen = qj.pack_params(frozen) if packed else frozen
    want = jax.jit(qj.fake_quantize(f, plan))(qstate, params, x)
    execute = jax.jit(qj.execute(f, plan))
    assert_same_bits(execute(qstate, frozen, x), want)
    assert_same_bits(execute({}, frozen, x), want)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "ttq"])
@pytest.mark.parametrize("case", ["stacked", "lookup"])
def test_codes_of_all_layers_or_rows_are_not_written_out(case, name):
    """Neither as floats nor, of layers, as a byte each; TTQ has levels for each group."""
    f, plan, qstate, params, x = prepared(case, POLICIES[name])
    frozen = qj.pack_params(qj.freeze(plan, qstate, params))
    program = jax.jit(qj.execute(f, plan)).lower({}, frozen, x).compile()
    memory = program.memory_analysis().temp_size_in_bytes
    layer = params.nbytes / LAYERS  # in float32
    assert memory < (3 * layer if case == "stacked" else params.nbytes / 2)


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_of_frozen_weights_may_be_left_out_of_a_qstate(bits):
    """They are in the frozen tree; those of a qstate are compared with them in every call."""
    f, params, x = CASES["stacked"]
    plan = qj.plan(qj.uniform_policy(weight_bits=bits), qj.sites(f, params, x))
    _, state = jax.jit(qj.observe(f, plan))(qj.init(plan), params, x)
    qstate = qj.calibrate(plan, state, params)
    frozen, execute = qj.freeze(plan, qstate, params), jax.jit(qj.execute(f, plan))
    rest = {name: {"activation": own["activation"]} for name, own in qstate.items()}
    assert_same_bits(execute(rest, frozen, x), execute(qstate, frozen, x))
