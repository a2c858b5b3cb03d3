"""``qj.execute`` under transformations, with other trees and dtypes, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.products import Execution
from tests.integers.visiting import product_dtypes
from tests.models import Case, assert_same_bits, dense, linen, mlp, normal, policy, ready
from tests.refused import refused
from tests.transforms.integer_zoo import MODES, PER_TOKEN, raw_stack

W8A8 = policy(qj.weight_quantizer(), qj.activation_quantizer())
SYMMETRIC = policy(qj.weight_quantizer(), qj.activation_quantizer(symmetric=True))


class Run:
    """A case, frozen and executed under ``jit``."""

    def __init__(self, case: Case, rules: qj.Policy = W8A8) -> None:
        self.case, done = case, ready(case, rules)
        self.plan, self.qstate = done.plan, done.qstate
        self.frozen = qj.freeze(self.plan, self.qstate, case.params)
        self.execute = jax.jit(qj.execute(case.f, self.plan))
        self.simulate = jax.jit(qj.fake_quantize(case.f, self.plan))

    @property
    def out(self) -> Any:
        return self.execute(self.qstate, self.frozen, self.case.x)

    @property
    def simulated(self) -> Any:
        return self.simulate(self.qstate, self.case.params, self.case.x)


@pytest.fixture(scope="module")
def network() -> Run:
    return Run(mlp())


@pytest.fixture(scope="module")
def layer() -> Run:
    """``x @ w``; its site is ``w``."""
    return Run(dense())


def with_qparams(run: Run, key: str, **changes: Any) -> Any:
    """The qstate with other QParams at the one site."""
    qparams = run.qstate["w"][key]._replace(**changes)
    return {"w": {**run.qstate["w"], key: qparams}}


def test_eagerly(network):
    eager = qj.execute(network.case.f, network.plan)(network.qstate, network.frozen, network.case.x)
    np.testing.assert_allclose(eager, network.out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activations", [qj.activation_quantizer(), PER_TOKEN], ids=str)
def test_mapped_over_the_batch(activations):
    """One example at a time: neither a static range nor that of a row depends on the others."""
    rules = policy(qj.weight_quantizer(), activations)
    for make, same in ((dense, True), (mlp, False)):
        run = Run(make(), rules)
        one = lambda x, run=run: run.execute(run.qstate, run.frozen, x[None])[0]  # noqa: E731
        mapped = jax.jit(jax.vmap(one))(run.case.x)
        if same:
            assert_same_bits(mapped, run.out)
        np.testing.assert_allclose(mapped, run.out, rtol=1e-6, atol=1e-6)  # a batch norm is float


def test_mapped_over_qstates(layer):
    """Cells of a sweep over the activation's range, weights frozen once."""
    scale = layer.qstate["w"]["activation"].scale
    scales = jnp.stack([0.5 * scale, scale, 2.0 * scale])

    def one(scale: jax.Array) -> jax.Array:
        qstate = with_qparams(layer, "activation", scale=scale)
        return layer.execute(qstate, layer.frozen, layer.case.x)

    cells = jax.jit(jax.vmap(one))(scales)
    for cell, scale in zip(cells, scales, strict=True):
        assert_same_bits(cell, one(scale))
    assert_same_bits(cells[1], layer.out)


def test_other_batch_sizes(layer):
    x = jnp.concatenate([layer.case.x, 2.0 * layer.case.x])
    got = layer.execute(layer.qstate, layer.frozen, x)
    assert_same_bits(got, layer.simulate(layer.qstate, layer.case.params, x))
    assert_same_bits(got[:4], layer.out)


def test_the_programs_of_a_mode_compute_in_int8(network):
    jaxpr = jax.make_jaxpr(network.execute)(network.qstate, network.frozen, network.case.x).jaxpr
    assert product_dtypes(jaxpr) == [("dot_general", "int8", "int8", "int32")] * 2


class Half(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x))
        return nn.Dense(4, dtype=jnp.bfloat16)(x.mean(axis=(1, 2)))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", ["static_asymmetric", "live_per_token", "w4a8", "groups_static"])
def test_a_bfloat16_model(mode):
    """Sums are scaled in float32 and cast once."""
    run = Run(linen(Half(), normal(1, 2, 5, 5, 4).astype(jnp.bfloat16)), MODES[mode])
    assert run.out.dtype == jnp.bfloat16
    assert_same_bits(run.out, run.simulated)
    jaxpr = jax.make_jaxpr(run.execute)(run.qstate, run.frozen, run.case.x).jaxpr
    assert {types[1:] for types in product_dtypes(jaxpr)} == {("int8", "int8", "int32")}


@pytest.mark.parametrize("mode", ["static_asymmetric", "live_per_token", "groups_weight_only"])
def test_a_bfloat16_product_that_is_averaged(mode):
    """XLA would average what is not rounded yet, in one of the two programs."""

    def f(params: Any, x: jax.Array) -> jax.Array:
        return (x @ params["w"]).mean(axis=1) @ params["v"]

    params = {"w": normal(1, 16, 16), "v": normal(2, 16, 8)}
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    run = Run(Case(f, params, normal(3, 4, 64, 16).astype(jnp.bfloat16)), MODES[mode])
    assert_same_bits(run.out, run.simulated)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", ["static_asymmetric", "unsigned_weights", "groups_static", "w4a8"])
def test_floats_are_encoded_when_it_runs(mode):
    """``qparams`` may be the model's own parameters, in whole or in part."""
    run = Run(mlp(), MODES[mode])
    assert_same_bits(run.execute(run.qstate, run.case.params, run.case.x), run.out)
    mixed = jax.tree.map(lambda leaf: leaf, run.frozen)
    mixed["params"]["Dense_0"]["kernel"] = run.case.params["params"]["Dense_0"]["kernel"]
    assert_same_bits(run.execute(run.qstate, mixed, run.case.x), run.out)


def test_floats_of_stacked_layers_are_encoded_when_it_runs():
    run = Run(raw_stack())
    assert_same_bits(run.execute(run.qstate, run.case.params, run.case.x), run.out)
    assert_same_bits(run.out, run.simulated)


def test_frozen_parameters_are_a_tree_of_arrays(network):
    leaves, structure = jax.tree.flatten(network.frozen)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}
    moved = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    placed = jax.device_put(jax.tree.map(lambda leaf: leaf + 0, moved), jax.devices()[0])
    assert_same_bits(network.execute(network.qstate, placed, network.case.x), network.out)


def test_an_ensemble_of_frozen_parameters():
    """Stacked leaf by leaf, mapped over: each member as it is alone."""
    members = [dense(seed) for seed in (3, 8)]
    runs = [Run(member) for member in members]
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), *((r.qstate, r.frozen) for r in runs))
    x = members[0].x
    out = jax.jit(jax.vmap(lambda pair: qj.execute(members[0].f, runs[0].plan)(*pair, x)))(pair)
    for one, run in zip(out, runs, strict=True):
        assert_same_bits(one, run.execute(run.qstate, run.frozen, x))


def test_the_qstate_needs_no_weights_of_frozen_parameters(layer):
    qstate = {"w": {"activation": layer.qstate["w"]["activation"]}}
    assert_same_bits(layer.execute(qstate, layer.frozen, layer.case.x), layer.out)
    with refused(errors.CalibrationError, "no QParams", "weight"):
        layer.execute(qstate, layer.case.params, layer.case.x)


def test_a_16_bit_container_is_executed_as_simulated_and_the_plan_says_so():
    wide = qj.activation_quantizer(bits=12, format=qj.integer(max_bits=16, signed=False))
    run = Run(dense(), policy(qj.weight_quantizer(), wide))
    (entry,) = run.plan.quantized
    assert entry.form.execution is Execution.SIMULATED
    assert "as simulated" in str(run.plan)
    assert "containers of 16 bits have no integer product" in " ".join(str(run.plan).split())
    assert_same_bits(run.out, run.simulated)
    jaxpr = jax.make_jaxpr(run.execute)(run.qstate, run.frozen, run.case.x).jaxpr
    assert product_dtypes(jaxpr) == [("dot_general", "float32", "float32", "float32")]


def test_a_scale_for_each_entry_of_a_sum_is_executed_as_simulated():
    features = qj.activation_quantizer(granularity=qj.PerChannel())
    run = Run(dense(), policy(qj.weight_quantizer(), features))
    assert run.plan.quantized[0].form.execution is Execution.SIMULATED
    assert "a scale varies from one product" in " ".join(str(run.plan).split())
    assert_same_bits(run.out, run.simulated)


def test_another_qstate_than_that_of_freezing(layer):
    scale = layer.qstate["w"]["weight"].scale
    other = with_qparams(layer, "weight", scale=scale.at[0, 0].multiply(1.001))
    with refused(errors.FreezeError, "frozen with other QParams", "site w"):
        qj.execute(layer.case.f, layer.plan)(other, layer.frozen, layer.case.x)


def test_another_format_than_that_of_freezing():
    run = Run(dense(), policy(qj.weight_quantizer(), qj.activation_quantizer()))
    narrow = policy(qj.weight_quantizer(format=qj.integer(narrow=True)), qj.activation_quantizer())
    other = Run(dense(), narrow)
    with refused(errors.FreezeError, "frozen as int8", "site w", "int-narrow8"):
        other.execute(other.qstate, run.frozen, run.case.x)


@pytest.mark.parametrize("key", ["weight", "activation"])
def test_width_zero_cannot_be_executed(layer, key):
    widths = {f"{key}_bits": 0}
    done = ready(layer.case, W8A8)
    qstate = qj.calibrate(layer.plan, done.state, layer.case.params, **widths)
    with refused(errors.FreezeError, "0 bits", f"w (dot_general), {key}"):
        qj.execute(layer.case.f, layer.plan)(qstate, layer.case.params, layer.case.x)


def test_a_zero_point_of_a_symmetric_quantizer():
    run = Run(dense(), SYMMETRIC)
    moved = with_qparams(run, "activation", zero_point=jnp.ones((1, 1)))
    with refused(errors.FreezeError, "symmetric quantizer with a zero point", "activation"):
        qj.execute(run.case.f, run.plan)(moved, run.frozen, run.case.x)
    assert np.isnan(run.execute(moved, run.frozen, run.case.x)).all()
    small = with_qparams(run, "activation", zero_point=jnp.full((1, 1), 0.4))
    with refused(errors.FreezeError, "symmetric quantizer with a zero point", "activation"):
        qj.execute(run.case.f, run.plan)(small, run.frozen, run.case.x)
    for run_it, params in ((run.execute, run.frozen), (run.simulate, run.case.params)):
        assert np.isnan(run_it(small, params, run.case.x)).all()


@pytest.mark.parametrize("zero_point", [-1.0, 256.0, 300.0])
def test_a_zero_point_that_int8_does_not_hold_is_nan_under_a_trace(layer, zero_point):
    moved = with_qparams(layer, "activation", zero_point=jnp.full((1, 1), zero_point))
    assert np.isnan(layer.execute(moved, layer.frozen, layer.case.x)).all()


@pytest.mark.parametrize("zero_point", [0.0, 255.0])
def test_zero_points_at_both_ends(layer, zero_point):
    moved = with_qparams(layer, "activation", zero_point=jnp.full((1, 1), zero_point))
    got = layer.execute(moved, layer.frozen, layer.case.x)
    assert_same_bits(got, layer.simulate(moved, layer.case.params, layer.case.x))
    assert np.isfinite(got).all()


def test_a_known_zero_point_that_int8_does_not_hold_is_refused(layer):
    moved = with_qparams(layer, "activation", zero_point=jnp.full((1, 1), 300.0))
    with refused(errors.FreezeError, "zero point"):
        qj.execute(layer.case.f, layer.plan)(moved, layer.frozen, layer.case.x)


@pytest.mark.parametrize("field", ["scale", "zero_point"])
@pytest.mark.parametrize("mode", ["static_asymmetric", "groups_static"])
def test_nan_in_qparams_is_nan_in_the_output(mode, field):
    run = Run(dense(), MODES[mode])
    faulty = with_qparams(run, "activation", **{field: jnp.full((1, 1), jnp.nan)})
    assert np.isnan(run.execute(faulty, run.frozen, run.case.x)).all()


def test_nan_in_one_channel_stays_there(layer):
    scale = layer.qstate["w"]["weight"].scale.at[0, 2].set(jnp.nan)
    faulty = with_qparams(layer, "weight", scale=scale)
    got = np.asarray(layer.execute(faulty, layer.case.params, layer.case.x))
    assert np.isnan(got[:, 2]).all()
    kept = [0, 1, 3, 4]
    assert_same_bits(got[:, kept], np.asarray(layer.out)[:, kept])


@pytest.mark.parametrize("mode", ["static_asymmetric", "static_symmetric", "groups_static"])
def test_nan_in_an_activation_has_the_code_of_zero(mode):
    """Integers cannot carry it; the simulation does."""
    run = Run(dense(), MODES[mode])
    bad = run.case.x.at[1, 2].set(jnp.nan)
    got = run.execute(run.qstate, run.frozen, bad)
    assert_same_bits(got, run.execute(run.qstate, run.frozen, run.case.x.at[1, 2].set(0.0)))
    simulated = run.simulate(run.qstate, run.case.params, bad)
    assert np.isnan(simulated[1]).all()
    assert_same_bits(np.asarray(got)[[0, 2, 3]], np.asarray(simulated)[[0, 2, 3]])


def test_infinities_saturate(layer):
    x = layer.case.x.at[0, 0].set(jnp.inf).at[1, 1].set(-jnp.inf)
    got = layer.execute(layer.qstate, layer.frozen, x)
    assert np.isfinite(got).all()
    assert_same_bits(got, layer.simulate(layer.qstate, layer.case.params, x))


def test_other_parameters_and_other_programs(layer):
    with refused(errors.PlanMismatchError, "it is not there"):
        layer.execute(layer.qstate, {"v": layer.frozen["w"]}, layer.case.x)
    with refused(errors.PlanMismatchError, "not planned"):
        f = lambda p, x: x @ p["w"] @ p["v"]  # noqa: E731
        params = {**layer.frozen, "v": jnp.ones((5, 5))}
        qj.execute(f, layer.plan)(layer.qstate, params, layer.case.x)


def test_the_identity_plan_executes_the_model():
    case = dense()
    plan = qj.plan(qj.Policy([]), qj.sites(case.f, case.params, case.x))
    assert_same_bits(qj.freeze(plan, {}, case.params), case.params)
    assert_same_bits(qj.execute(case.f, plan)({}, case.params, case.x), case.f(case.params, case.x))


def _column_major(params, x):
    return x @ jnp.reshape(params["w"], (4, 6), order="F")


def _turned_and_split(params, x):
    kernel = jax.lax.reshape(params["w"], (4, 6), dimensions=(1, 0))
    return x @ kernel


def _members(params, x):
    """Kernels of an ensemble: JAX maps a convolution by turning and merging their axes."""
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.vmap(conv, (None, 0))(x, params["w"])


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("f", "kernel", "x"),
    [
        (_column_major, (6, 4), (3, 4)),
        (_turned_and_split, (6, 4), (3, 4)),
        (_members, (2, 3, 3, 4, 2), (1, 4, 4, 4)),
    ],
    ids=["column-major", "turned", "members"],
)
@pytest.mark.parametrize(
    "granularity", [qj.PerTensor(), qj.PerChannel(), qj.PerGroup(2)], ids=lambda g: g.name
)
def test_reshapes_that_turn_axes_first(f, kernel, x, granularity):
    params, x = {"w": normal(0, *kernel)}, normal(1, *x)
    policy = qj.uniform_policy(weight_granularity=granularity)
    plan = qj.plan(policy, qj.sites(f, params, x))
    _, state = qj.observe(f, plan)(qj.init(plan), params, x)
    qstate = qj.calibrate(plan, state, params)
    frozen = qj.freeze(plan, qstate, params)
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, x)
    executed = jax.jit(qj.execute(f, plan))(qstate, frozen, x)
    np.testing.assert_allclose(executed, simulated, rtol=1e-5, atol=1e-5)
    weights = qj.plan(
        qj.uniform_policy(weight_granularity=granularity, activation_bits=None),
        qj.sites(f, params, x),
    )
    alone = qj.fake_quantize(f, weights)(qj.calibrate(weights, {}, params), params, x)
    np.testing.assert_allclose(f(qj.dequantize_params(frozen), x), alone, rtol=1e-4, atol=1e-5)


def test_a_gradient_through_integer_products_is_refused():
    """It would be 0 everywhere, and adapters in front of frozen layers would not learn."""
    run = Run(mlp())

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(qj.execute(run.case.f, run.plan)(run.qstate, run.frozen, x))

    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.jacfwd(loss)):
        with refused(errors.FreezeError, "no derivative", "qj.dequantize_params"):
            gradient(run.case.x)
    simulated = qj.fake_quantize(run.case.f, run.plan)
    floats = qj.dequantize_params(run.frozen)
    y = jax.jit(simulated)(run.qstate, floats, run.case.x)
    assert_same_bits(y, run.out)
    slope = jax.grad(lambda x: jnp.sum(simulated(run.qstate, floats, x)))(run.case.x)
    assert np.abs(slope).max() > 0.0


def test_what_comes_behind_integer_products_is_trained():
    run = Run(mlp())

    def loss(head: jax.Array) -> jax.Array:
        return jnp.sum(head * qj.execute(run.case.f, run.plan)(run.qstate, run.frozen, run.case.x))

    assert_same_bits(jax.jit(jax.grad(loss))(jnp.float32(2.0)), jnp.sum(run.out))


@pytest.mark.parametrize("verb", ["fake_quantize", "observe", "calibrate", "freeze"])
def test_frozen_parameters_are_refused_where_floats_are_read(verb):
    run = Run(mlp())
    calls = {
        "fake_quantize": lambda: run.simulate(run.qstate, run.frozen, run.case.x),
        "observe": lambda: qj.observe(run.case.f, run.plan)(
            qj.init(run.plan), run.frozen, run.case.x
        ),
        "calibrate": lambda: qj.calibrate(run.plan, qj.init(run.plan), run.frozen),
        "freeze": lambda: qj.freeze(run.plan, run.qstate, run.frozen),
    }
    with refused(errors.PlanMismatchError, "frozen", "qj.dequantize_params"):
        calls[verb]()
