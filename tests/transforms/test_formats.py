"""Every family of formats through the verbs: simulated, frozen, executed, stored, swept."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import formats, ranges, storage
from quantjax.qtensor import QTensor, is_quantized
from quantjax.ranges import MIN_MAX
from tests import models
from tests.refused import refused

pytestmark = pytest.mark.thinned(23)

LAYERS, WIDTH = 3, 32


def network(params, x):
    """Two layers of their own, and a stack in a scan between them."""

    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = lax.scan(layer, x @ params["first"], params["stack"])
    return h @ params["last"]


PARAMS = {
    "first": models.normal(1, 16, WIDTH),
    "stack": 0.3 * models.normal(2, LAYERS, WIDTH, WIDTH),
    "last": models.normal(3, WIDTH, 8),
}
X = models.normal(4, 5, 16)


class Kind(NamedTuple):
    """A format with the rule and granularity that its paper has."""

    format: formats.Format
    rule: ranges.RangeRule | ranges.FitRule = MIN_MAX
    granularity: qj.Granularity = qj.PerChannel()


KINDS = {
    "int4": Kind(qj.integer(max_bits=4)),
    "fixed point": Kind(qj.integer(scale_rule=formats.POWER_OF_TWO), granularity=qj.PerTensor()),
    "binary": Kind(qj.integer(max_bits=1), ranges.XNOR),
    "ternary": Kind(formats.TERNARY, ranges.TWN),
    "learned ternary": Kind(formats.ternary(learned=True), ranges.TTQ),
    "lognet": Kind(formats.lognet()),
    "inq": Kind(formats.inq()),
    "apot": Kind(formats.apot(max_bits=4)),
    "nf4": Kind(formats.NF4, granularity=qj.PerGroup(16)),
    "k-means": Kind(formats.learned_codebook(max_bits=3), ranges.K_MEANS, qj.PerTensor()),
    "e4m3fn": Kind(formats.E4M3FN),
    "e5m2": Kind(formats.E5M2),
    "bfloat16": Kind(formats.BFLOAT16),
    "mxfp4": Kind(formats.MXFP4, granularity=qj.PerGroup(16)),
    "mxint8": Kind(formats.MXINT8, granularity=qj.PerGroup(16)),
    "nvfp4": Kind(formats.NVFP4, granularity=qj.PerGroup(16)),
    "blocks": Kind(formats.E4M3FN, granularity=qj.PerBlock(16, 8)),
}


def planned(kind: Kind, *, activations: qj.Quantizer | None = None) -> qj.Plan:
    format, rule, granularity = kind
    weights = qj.weight_quantizer(format=format, rule=rule, granularity=granularity)
    scheme = qj.Scheme(weights=weights, activations=activations)
    policy = qj.Policy([qj.rule(qj.weighted(), scheme)])
    return qj.plan(policy, qj.sites(network, PARAMS, X))


def quantized(tree) -> list[QTensor]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(leaf)]


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    kind = KINDS[request.param]
    plan = planned(kind)
    qstate = jax.jit(lambda params: qj.calibrate(plan, {}, params))(PARAMS)
    simulated = jax.jit(qj.fake_quantize(network, plan))(qstate, PARAMS, X)
    return kind, plan, qstate, simulated


def test_the_simulation_is_quantized(case):
    _, _, _, simulated = case
    own = network(PARAMS, X)
    error = float(jnp.linalg.norm(simulated - own) / jnp.linalg.norm(own))
    assert 1e-4 < error < 1.3  # binary and ternary layers are far from the float ones, untrained


def test_weights_are_simulated_as_one_tensor_alone(case):
    kind, plan, qstate, _ = case
    frozen = qj.freeze(plan, qstate, PARAMS)
    format = kind.format
    for name in ("first", "last"):
        tensor = frozen[name]
        # By other parameters the same values: those of the leaf itself, dequantized.
        levels = np.asarray(tensor.dequantize())
        again = qj.encode(jnp.asarray(levels), tensor.qparams, format)
        if formats.Law.IDEMPOTENT in format.laws:
            assert_array_equal(again.codes, tensor.codes)
        assert levels.std() > 0.2 * float(PARAMS[name].std())


def test_execution_equals_the_simulation(case):
    _, plan, qstate, simulated = case
    frozen = jax.jit(lambda qstate, params: qj.freeze(plan, qstate, params))(qstate, PARAMS)
    executed = jax.jit(qj.execute(network, plan))(qstate, frozen, X)
    assert_array_equal(executed, simulated)
    floats = network(qj.dequantize_params(frozen), X)
    np.testing.assert_allclose(floats, simulated, rtol=2e-5, atol=2e-5 * float(abs(floats).max()))


def test_narrow_containers_share_bytes(case):
    kind, plan, qstate, _ = case
    frozen = qj.freeze(plan, qstate, PARAMS)
    bits = kind.format.code_bits
    for name, tensor in zip(("first", "last", "stack"), quantized(frozen), strict=True):
        assert tensor.stored.nbytes == PARAMS[name].size * bits // 8
        assert (tensor.packing is None) == (bits >= 8)
        assert tensor.shape == PARAMS[name].shape


def test_all_of_it_goes_to_disk(case, tmp_path):
    _, plan, qstate, simulated = case
    frozen = qj.freeze(plan, qstate, PARAMS)
    storage.save_params(tmp_path / "weights", frozen)
    storage.save_quantization(tmp_path / "plan.json", plan=plan, qstate=qstate)
    back = storage.load_quantization(tmp_path / "plan.json")
    again = storage.plan_from(back, qj.sites(network, PARAMS, X))
    assert str(again) == str(plan)
    weights = storage.load_params(tmp_path / "weights")
    assert_array_equal(jax.jit(qj.execute(network, again))(back.qstate, weights, X), simulated)


def test_gradients_are_finite_and_reach_every_parameter(case):
    _, plan, qstate, _ = case
    fake = qj.fake_quantize(network, plan)

    def loss(qstate, params):
        return jnp.sum(fake(qstate, params, X) ** 2)

    to_qstate, to_params = jax.jit(jax.grad(loss, argnums=(0, 1)))(qstate, PARAMS)
    for leaf in jax.tree.leaves((to_qstate, to_params)):
        assert jnp.isfinite(leaf).all()
    for site in to_qstate.values():
        for qparams in site.values():
            assert qparams.scale.any()
            for name, leaf in (qparams.theta or {}).items():
                assert leaf.any() == (name != "threshold")  # no code moves with a threshold


def test_packed_codes_shrink_and_run_the_same():
    # A plan has containers of 8 bits, so that a sweep can go there; what is kept shrinks.
    plan = planned(Kind(qj.integer()))
    qstate = qj.calibrate(plan, {}, PARAMS, weight_bits=4)
    frozen = qj.freeze(plan, qstate, PARAMS)
    small = qj.pack_params(frozen)
    assert [2 * b.stored.nbytes for b in quantized(small)] == [
        a.stored.nbytes for a in quantized(frozen)
    ]
    for wide, narrow in zip(quantized(frozen), quantized(small), strict=True):
        assert_array_equal(wide.codes, narrow.codes)
    run = jax.jit(qj.execute(network, plan))
    assert_array_equal(run(qstate, small, X), run(qstate, frozen, X))
    with pytest.raises(qj.errors.BitsError, match="traced"):
        jax.jit(qj.pack_params)(frozen)


def test_packed_layers_are_sliced_mapped_and_scanned():
    frozen = qj.freeze(plan := planned(KINDS["int4"]), qj.calibrate(plan, {}, PARAMS), PARAMS)
    stack = frozen["stack"]
    assert stack.packing is not None
    whole = stack.dequantize()
    take = jax.tree.map(lambda leaf: leaf[1], stack)
    assert_array_equal(take.dequantize(), whole[1])
    assert_array_equal(jax.vmap(lambda layer: layer.dequantize())(stack), whole)
    _, scanned = lax.scan(lambda carry, layer: (carry, layer.dequantize()), 0.0, stack)
    assert_array_equal(scanned, whole)


def eight_bits() -> qj.Quantizer:
    power = qj.integer(scale_rule=formats.POWER_OF_TWO)
    return qj.activation_quantizer(bits=8, format=power, symmetric=True)


@pytest.mark.parametrize("weight_bits", [8, 4, 2])
@pytest.mark.parametrize("granularity", [qj.PerTensor(), qj.PerChannel(), qj.PerGroup(16)])
def test_scales_that_are_powers_of_two_are_integers_bit_for_bit(weight_bits, granularity):
    plan = planned(KINDS["fixed point"]._replace(granularity=granularity), activations=eight_bits())
    assert "int8" in str(plan)
    _, state = jax.jit(qj.observe(network, plan))(qj.init(plan), PARAMS, X)
    qstate = qj.calibrate(plan, state, PARAMS, weight_bits=weight_bits)
    for site in qstate.values():
        for qparams in site.values():
            assert (np.frexp(qparams.scale)[0] == 0.5).all()
    frozen = qj.freeze(plan, qstate, PARAMS)
    executed = jax.jit(qj.execute(network, plan))(qstate, frozen, X)
    simulated = jax.jit(qj.fake_quantize(network, plan))(qstate, PARAMS, X)
    assert_array_equal(executed, simulated)
    # And both equal the float program of dequantized values: every product and sum is exact.
    floats = first_layer(qstate, frozen)
    site = qstate["first"]
    x = qj.encode(X, site["activation"], eight_bits().format).dequantize()
    exact = np.asarray(x, np.float64) @ np.asarray(frozen["first"].dequantize(), np.float64)
    assert_array_equal(floats, exact)


def first_layer(qstate, frozen) -> np.ndarray:
    """What the first product gives in integers."""
    f = lambda params, x: x @ params["first"]  # noqa: E731
    only = {"first": PARAMS["first"]}
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(
            format=KINDS["fixed point"].format, granularity=granularity_of(frozen["first"])
        ),
        activations=eight_bits(),
    )
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, only, X))
    states = {"first": qstate["first"]}
    out = jax.jit(qj.execute(f, plan))(states, {"first": frozen["first"]}, X)
    return np.asarray(out, np.float64)


def granularity_of(tensor: QTensor) -> qj.Granularity:
    rows, columns = tensor.qparams.scale.shape
    if columns == 1:
        return qj.PerTensor()
    return qj.PerChannel() if rows == 1 else qj.PerGroup(tensor.shape[0] // rows)


def test_exponent_bits_are_swept_in_one_program():
    plan = planned(Kind(formats.E4M3FN))
    traces = []

    def error(exponent, mantissa):
        traces.append(1)
        qstate = qj.calibrate(plan, {}, PARAMS, weight_bits=qj.FloatBits(exponent, mantissa))
        return qj.fake_quantize(network, plan)(qstate, PARAMS, X)

    exponents = jnp.arange(1.0, 7.0)
    grid = jax.jit(jax.vmap(error))(exponents, 7.0 - exponents)
    assert len(traces) == 1
    for exponent in (1, 4, 6):
        cell = grid[exponent - 1]
        alone = planned(
            Kind(formats.minifloat(exponent, 7 - exponent, specials=formats.Specials.FN))
        )
        qstate = qj.calibrate(alone, {}, PARAMS)
        static = jax.jit(qj.fake_quantize(network, alone))(qstate, PARAMS, X)
        np.testing.assert_allclose(cell, static, rtol=1e-5, atol=1e-5)
        codes = qj.freeze(alone, qstate, PARAMS)["last"].dequantize()
        state = qj.calibrate(plan, {}, PARAMS, weight_bits=qj.FloatBits(exponent, 7 - exponent))
        assert_array_equal(qj.freeze(plan, state, PARAMS)["last"].dequantize(), codes)


def test_levels_too_large_for_sums_are_refused_and_the_fix_works():
    wide = formats.minifloat(8, 7, specials=formats.Specials.IEEE)
    with refused(qj.errors.QuantizerError, "too large for sums", "UNIT"):
        qj.weight_quantizer(format=wide)
    qj.weight_quantizer(format=formats.BFLOAT16)
    plan = planned(KINDS["bfloat16"])
    qstate = qj.calibrate(plan, {}, PARAMS)
    cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), PARAMS)
    frozen = qj.freeze(plan, qstate, PARAMS)
    models.assert_same_bits(qj.dequantize_params(frozen), cast)


@pytest.mark.parametrize("name", ["e4m3fn", "lognet", "apot", "mxfp4"])
def test_activations_with_a_live_range(name):
    format = KINDS[name].format
    live = qj.activation_quantizer(format=format, range=qj.RangeMode.LIVE)
    plan = planned(KINDS[name], activations=live)
    qstate = qj.calibrate(plan, {}, PARAMS)
    simulated = jax.jit(qj.fake_quantize(network, plan))(qstate, PARAMS, X)
    frozen = qj.freeze(plan, qstate, PARAMS)
    assert_array_equal(jax.jit(qj.execute(network, plan))(qstate, frozen, X), simulated)
    assert not np.array_equal(
        simulated, jax.jit(qj.fake_quantize(network, planned(KINDS[name])))(qstate, PARAMS, X)
    )


def test_a_width_for_each_layer_of_a_stack():
    plan = planned(Kind(formats.lognet(max_bits=4)))
    widths = {"stack": jnp.array([2.0, 3.0, 4.0])}
    qstate = qj.calibrate(plan, {}, PARAMS, weight_bits=widths)
    tensor = qj.freeze(plan, qstate, PARAMS)["stack"].dequantize()
    for layer, bits in enumerate((2, 3, 4)):
        assert len(np.unique(np.abs(tensor[layer, :, 0]))) <= 2 ** (bits - 1)


@pytest.mark.parametrize(
    "format", [f for f in formats.BUILT_IN if f.signed], ids=lambda f: f.label(f.max_bits)
)
def test_every_format_of_weights_is_frozen_as_it_is_simulated(format):
    f, params = (lambda params, x: x @ params["first"]), {"first": PARAMS["first"]}
    rule = ranges.K_MEANS if format == formats.learned_codebook(max_bits=4) else MIN_MAX
    weights = qj.weight_quantizer(format=format, rule=rule, granularity=qj.PerGroup(16))
    scheme = qj.Scheme(weights=weights)
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, X))
    qstate = qj.calibrate(plan, {}, params)
    frozen = qj.freeze(plan, qstate, params)
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X)
    assert_array_equal(jax.jit(qj.execute(f, plan))(qstate, frozen, X), simulated)


def layers_on_axis_1(params, x):
    stack = jnp.moveaxis(params["w"], 1, 0)
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]


def planned_on_axis_1(quantizer: qj.Quantizer):
    params = {"w": models.normal(5, WIDTH, LAYERS, WIDTH)}
    x = models.normal(6, 4, WIDTH)
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=quantizer))])
    return qj.plan(policy, qj.sites(layers_on_axis_1, params, x)), params, x


@pytest.mark.parametrize("format", [formats.normal_float(max_bits=4), formats.apot(max_bits=8)])
def test_codes_that_depend_on_the_width_are_not_mixed(format):
    plan, params, _ = planned_on_axis_1(qj.weight_quantizer(format=format))
    qstate = qj.calibrate(plan, {}, params, weight_bits=jnp.array([2.0, 3.0, 4.0]))
    with refused(qj.errors.FreezeError, "not stacked along the first axis"):
        qj.freeze(plan, qstate, params)


def test_codes_that_do_not_depend_on_it_are():
    plan, params, x = planned_on_axis_1(qj.weight_quantizer(format=formats.E4M3FN))
    qstate = qj.calibrate(plan, {}, params, weight_bits=jnp.array([6.0, 7.0, 8.0]))
    frozen = qj.freeze(plan, qstate, params)
    executed = jax.jit(qj.execute(layers_on_axis_1, plan))(qstate, frozen, x)
    assert_array_equal(
        executed, jax.jit(qj.fake_quantize(layers_on_axis_1, plan))(qstate, params, x)
    )
