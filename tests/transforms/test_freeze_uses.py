"""What ``qj.freeze`` does with weights that are computed, parts, or used more than once."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax import errors
from tests.models import Case, Ready, assert_same_bits, linen, normal, policy, ready
from tests.refused import refused

PER_TENSOR = qj.weight_quantizer(granularity=qj.PerTensor())
W8A8 = policy(qj.weight_quantizer(), qj.activation_quantizer())
W, V, X = normal(1, 6, 6), normal(2, 6, 6), normal(3, 4, 6)


def quantized_paths(params: Any) -> set[str]:
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, qj.QTensor))
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}
    return {path for path, leaf in named.items() if isinstance(leaf, qj.QTensor)}


def executed_as_simulated(case: Case, done: Ready, frozen: Any) -> Any:
    """The output, which both have."""
    simulated = jax.jit(qj.fake_quantize(case.f, done.plan))(done.qstate, case.params, case.x)
    executed = jax.jit(qj.execute(case.f, done.plan))(done.qstate, frozen, case.x)
    assert_same_bits(executed, simulated)
    assert not np.array_equal(executed, jax.jit(case.f)(case.params, case.x))
    return executed


def weight_norm() -> Case:
    def f(p: Any, x: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(p["v"] ** 2, axis=0, keepdims=True))
        return jnp.tanh(x @ (p["v"] / norm * p["g"])) @ p["w"]

    return Case(f, {"v": V, "g": 1.0 + 0.1 * normal(4, 1, 6), "w": W}, X)


def lora() -> Case:
    f = lambda p, x: x @ (p["w"] + p["a"] @ p["b"])  # noqa: E731
    return Case(f, {"w": W, "a": normal(5, 6, 2), "b": normal(6, 2, 6)}, X)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(nn.RNN(nn.OptimizedLSTMCell(4))(x))


COMPUTED = {
    "weight_norm": (weight_norm, {"w"}),
    "lora": (lora, set()),
    "lstm": (lambda: linen(Recurrent(), normal(7, 2, 3, 4)), {"params/head/kernel"}),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_stay_in_float(name):
    """And are encoded when the model is executed."""
    make, stored = COMPUTED[name]
    case = make()
    done = ready(case, W8A8)
    assert "the weight is computed from parameters" in " ".join(str(done.plan).split())
    frozen = qj.freeze(done.plan, done.qstate, case.params)
    assert quantized_paths(frozen) == stored
    executed_as_simulated(case, done, frozen)


def part(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"][1]) @ p["v"]


@pytest.mark.parametrize(
    "f",
    [
        part,
        lambda p, x: jnp.tanh(x @ lax.dynamic_index_in_dim(p["w"], 0, keepdims=False)) @ p["v"],
        lambda p, x: jnp.tanh(x @ p["w"].reshape(12, 6)[3:9]) @ p["v"],
    ],
    ids=["index", "dynamic_index", "slice"],
)
def test_a_part_of_a_parameter_is_not_stored_and_the_table_says_so(f):
    case = Case(f, {"w": normal(1, 2, 6, 6), "v": V}, X)
    done = ready(case, W8A8)
    table = qj.sites(case.f, case.params, case.x)
    (site,) = [site for site in table if site.name == "w"]
    assert not site.weight.storable
    assert site.reason.startswith("a part of a parameter enters")
    assert "not storable" in site.reason
    assert site.reason in " ".join(str(done.plan).split())
    frozen = qj.freeze(done.plan, done.qstate, case.params)
    assert quantized_paths(frozen) == {"v"}
    executed_as_simulated(case, done, frozen)


def test_a_slice_of_everything_is_stored():
    case = Case(lambda p, x: x @ p["w"][0:6, :], {"w": W}, X)
    done = ready(case, W8A8)
    assert quantized_paths(qj.freeze(done.plan, done.qstate, case.params)) == {"w"}


def test_live_weights_are_not_stored():
    """Their range is that of the tensor as it comes, so there is nothing to hold on to."""
    live = dataclasses.replace(qj.weight_quantizer(), range=qj.RangeMode.LIVE)
    case = Case(lambda p, x: x @ p["w"], {"w": W}, X)
    done = ready(case, policy(live, qj.activation_quantizer()))
    frozen = qj.freeze(done.plan, done.qstate, case.params)
    assert quantized_paths(frozen) == set()
    executed_as_simulated(case, done, frozen)


def twice(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) @ p["w"]


def there_and_back(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) @ p["w"].T


@pytest.mark.parametrize(
    ("f", "weights"),
    [(twice, qj.weight_quantizer()), (twice, PER_TENSOR), (there_and_back, PER_TENSOR)],
    ids=["same_way", "same_way_per_tensor", "transposed_per_tensor"],
)
def test_a_tied_weight_is_stored_once(f, weights):
    case = Case(f, {"w": W}, X)
    done = ready(case, policy(weights, qj.activation_quantizer()))
    assert [entry.site.name for entry in done.plan.quantized] == ["w", "w#1"]
    frozen = qj.freeze(done.plan, done.qstate, case.params)
    assert quantized_paths(frozen) == {"w"}
    assert frozen["w"].codes.shape == (6, 6)
    executed_as_simulated(case, done, frozen)


def disagreeing() -> dict[str, tuple[Any, qj.Policy, Any]]:
    w4 = qj.Scheme(weights=qj.weight_quantizer(bits=4))
    w8 = qj.Scheme(weights=qj.weight_quantizer())
    narrow = qj.Scheme(weights=qj.weight_quantizer(format=qj.integer(narrow=True)))
    first = qj.path("w")
    return {
        "axes": (there_and_back, policy(qj.weight_quantizer()), None),
        "widths": (twice, qj.Policy([qj.rule(first, w4), qj.rule(qj.everything(), w8)]), None),
        "widths_of_the_call": (twice, policy(qj.weight_quantizer()), {"w": 4}),
        "formats": (twice, qj.Policy([qj.rule(first, narrow), qj.rule(qj.everything(), w8)]), None),
    }


@pytest.mark.parametrize("name", disagreeing())
def test_tied_weights_that_disagree_are_refused(name):
    f, rules, bits = disagreeing()[name]
    params = {"w": W.at[0, 0].set(8.0)}  # bfloat16 holds it: a cast alone does not move the range
    plan = qj.plan(rules, qj.sites(f, params, X))
    qstate = qj.calibrate(plan, {}, params, weight_bits=bits)
    width = "has the width 4 in one use, 8 in another"
    what = width if name.startswith("widths") else "two sets of QParams"
    with refused(errors.FreezeError, what, "site w (", "site w#1 ("):
        qj.freeze(plan, qstate, params)


def test_the_advice_for_a_weight_in_float_as_well_is_a_way_out():
    """Its own rule for the first use alone said what the plan's error then sent back."""
    params, weights = {"w": W}, qj.Scheme(weights=PER_TENSOR)
    table = qj.sites(there_and_back, params, X)
    plan = qj.plan(qj.Policy([qj.rule(qj.first(), weights)]), table)
    assert plan.bytes == W.size * 4  # what cannot be stored as codes is not counted so
    with refused(errors.FreezeError, "used in float as well", "qj.every_use(...)"):
        qj.freeze(plan, qj.calibrate(plan, {}, params), params)
    plan = qj.plan(qj.Policy([qj.rule(qj.every_use(qj.first()), weights)]), table)
    assert plan.bytes == W.size + 4
    qstate = qj.calibrate(plan, {}, params)
    frozen = qj.freeze(plan, qstate, params)
    assert_same_bits(
        jax.jit(qj.execute(there_and_back, plan))(qstate, frozen, X),
        jax.jit(qj.fake_quantize(there_and_back, plan))(qstate, params, X),
    )


def late(p: Any, i: jax.Array) -> jax.Array:
    """A lookup and logits by one table, each with a cast of its own, to the other dtype."""
    dtype = jnp.bfloat16 if p["w"].dtype == jnp.float32 else jnp.float32
    return p["w"][i].astype(dtype) @ p["w"].T.astype(dtype)


def test_uses_that_round_a_tied_weight_otherwise_are_refused():
    """The lookup's rows are cast, the product's table is; a cast ahead of both is the way."""
    plan = qj.plan(policy(PER_TENSOR), qj.sites(late, {"w": W}, jnp.arange(3)))
    qstate = qj.calibrate(plan, {}, {"w": W})
    words = "rounded to nothing narrower ahead of one use, to bfloat16", "w.astype(jnp.bfloat16)"
    with refused(errors.FreezeError, *words, "site w (", "site w#1 ("):
        qj.freeze(plan, qstate, {"w": W})


def test_casts_that_lose_nothing_are_no_difference():
    case = Case(late, {"w": W.astype(jnp.bfloat16)}, jnp.arange(3))
    done = ready(case, policy(PER_TENSOR, qj.activation_quantizer()))
    frozen = qj.freeze(done.plan, done.qstate, case.params)
    assert quantized_paths(frozen) == {"w"}
    executed_as_simulated(case, done, frozen)


def test_scales_of_a_tied_weight_that_training_moved_apart():
    """The error says how to share them, and doing so freezes."""
    f = lambda p, x: (x @ p["w"]) @ p["w"]  # noqa: E731
    plan = qj.plan(policy(PER_TENSOR), qj.sites(f, {"w": W}, X))
    qstate = qj.calibrate(plan, {}, {"w": W})
    qj.freeze(plan, qstate, {"w": W})
    second = qstate["w#1"]["weight"]
    moved = {**qstate, "w#1": {"weight": second._replace(scale=1.01 * second.scale)}}
    shared = "qstate['w#1']['weight'] = qstate['w']['weight']"
    with refused(errors.FreezeError, "training may have moved its scales apart", shared):
        qj.freeze(plan, moved, {"w": W})
    moved["w#1"]["weight"] = moved["w"]["weight"]
    qj.freeze(plan, moved, {"w": W})


ELSEWHERE = {
    "sum": lambda p, x: x @ p["w"] + jnp.sum(p["w"]),
    "embedding": lambda p, x: (jnp.take(p["w"], jnp.arange(4), axis=0) + x) @ p["w"].T,
    "output": lambda p, x: (x @ p["w"], p["w"]),
    "transposed_output": lambda p, x: (x @ p["w"], p["w"].T),
    "computed": lambda p, x: (x @ p["w"]) @ (2.0 * p["w"]),
    "part": lambda p, x: x @ p["w"] + x[:, :3] @ p["w"][:3],
    "regularizer_in_a_scan": lambda p, x: lax.scan(
        lambda h, _: (h @ p["w"] + jnp.max(p["w"]), None), x, length=2
    )[0],
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_weight_that_is_used_in_float_as_well_is_refused(name):
    f, params = ELSEWHERE[name], {"w": W}
    plan = qj.plan(policy(qj.weight_quantizer()), qj.sites(f, params, X))
    qstate = qj.calibrate(plan, {}, params)
    with refused(errors.FreezeError, "the parameter w is used in float as well", "also used by"):
        qj.freeze(plan, qstate, params)


def test_a_tied_site_that_is_kept_in_float_is_refused():
    params, keep = {"w": W}, qj.rule(qj.path("w#1"), qj.Scheme())
    rules = qj.Policy([keep, *policy(qj.weight_quantizer()).rules])
    plan = qj.plan(rules, qj.sites(twice, params, X))
    with refused(errors.FreezeError, "used in float as well", "w#1"):
        qj.freeze(plan, qj.calibrate(plan, {}, params), params)


def test_the_edit_that_the_error_names_helps():
    """Kept in float by a rule of its own, the parameter stays as it is."""
    f, params = ELSEWHERE["sum"], {"w": W, "v": V}
    g = lambda p, x: f(p, x) @ p["v"]  # noqa: E731
    rules = [qj.rule(qj.path("w"), qj.Scheme()), *policy(qj.weight_quantizer()).rules]
    plan = qj.plan(qj.Policy(rules), qj.sites(g, params, X))
    assert quantized_paths(qj.freeze(plan, qj.calibrate(plan, {}, params), params)) == {"v"}


def test_an_opaque_use_is_a_use_in_float():
    @jax.custom_vjp
    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ w

    product.defvjp(lambda w, x: (x @ w, None), lambda _, g: (g, g))
    f, params = lambda p, x: product(p["w"], x @ p["w"]), {"w": W}
    plan = qj.plan(policy(qj.weight_quantizer()), qj.sites(f, params, X))
    with refused(errors.FreezeError, "used in float as well"):
        qj.freeze(plan, qj.calibrate(plan, {}, params), params)


def test_a_weight_shared_by_the_steps_of_a_loop_is_stored_once():
    f = lambda p, x: lax.scan(lambda h, _: (jax.nn.relu(h @ p["w"]), None), x, length=3)[0]  # noqa: E731
    case = Case(f, {"w": W}, X)
    done = ready(case, W8A8)
    frozen = qj.freeze(done.plan, done.qstate, case.params)
    assert frozen["w"].qparams.scale.shape == (1, 6)
    executed_as_simulated(case, done, frozen)


def expert(p: Any, x: jax.Array, index: jax.Array) -> jax.Array:
    """One expert of one, chosen by data, and a layer that has its weight too."""
    chosen = lax.dynamic_index_in_dim(p["w"], index, 0, keepdims=False)
    return x @ chosen + jnp.tanh(x @ p["w"].reshape(6, 6))


def integers_read(p: Any, x: jax.Array, index: jax.Array) -> jax.Array:
    read = lax.dynamic_slice_in_dim(p["w"][0].astype(jnp.int32), index, 2)
    return jnp.tanh(x @ p["w"][0]) + jnp.sum(read).astype(jnp.float32)


@pytest.mark.parametrize("f", [expert, integers_read], ids=["expert", "integers"])
def test_a_parameter_that_data_choose_from_is_used_in_float(f):
    """Simulation reads the parameter there, and execution would read its levels."""
    params, index = {"w": 3.0 * W[None]}, jnp.int32(0)
    plan = qj.plan(qj.uniform_policy(weight_bits=3), qj.sites(f, params, X, index))
    _, state = qj.observe(f, plan)(qj.init(plan), params, X, index)
    qstate = qj.calibrate(plan, state, params)
    with refused(errors.FreezeError, "the parameter w is used in float as well"):
        qj.freeze(plan, qstate, params)


def test_an_estimators_parameters_may_be_those_of_each_entry():
    """As AdaRound's: added to the weight ahead of rounding, also where the weight is turned."""
    own = qj.estimators.Estimator(
        "own-round",
        lambda point: jnp.ones_like(point.scaled),
        parameters=("v",),
        start=lambda qparams, format: {"v": jnp.zeros_like(qparams.scale)},
        transform=lambda x, qparams, own, format: x + own["v"] * qparams.scale,
    )

    def f(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"]) @ p["v"].T

    case = Case(f, {"w": W, "v": V[:3]}, X)
    done = ready(case, policy(qj.weight_quantizer(bits=4, estimator=own), None))
    for name, seed in (("w", 5), ("v", 6)):
        qparams = done.qstate[name]["weight"]
        entry = next(e for e in done.plan.sites if e.site.name == name)
        shape = entry.site.weight.shape
        theta = {"v": jax.random.uniform(jax.random.key(seed), shape) - 0.5}
        done.qstate[name]["weight"] = qparams._replace(theta=theta)
    frozen = qj.freeze(done.plan, done.qstate, case.params)
    assert quantized_paths(frozen) == {"w", "v"}
    executed_as_simulated(case, done, frozen)
