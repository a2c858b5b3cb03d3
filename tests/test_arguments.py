"""What a stranger gets wrong first is refused by name, ahead of any work."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quantjax as qj
from quantjax import errors
from quantjax.arguments import expect, expect_function, expect_key, why_unwritable

PARAMS = {"w": jnp.eye(4)}
X = jnp.ones((2, 4))
SCHEME = qj.Scheme(weights=qj.weight_quantizer(bits=4))
RULE = qj.rule(qj.weighted(), SCHEME)
POLICY = qj.Policy([RULE])


def f(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


@pytest.fixture(scope="module")
def plan() -> qj.Plan:
    return qj.plan(qj.uniform_policy(), qj.sites(f, PARAMS, X))


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(errors.ArgumentError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: qj.rule(qj.weighted(), POLICY), ("scheme is a Policy", "Scheme is needed")),
        (lambda: qj.rule("*/Dense_0/*", SCHEME), ("selector is a str", "qj.path(")),
        (lambda: qj.rule(SCHEME, qj.weighted()), ("selector is a Scheme",)),
        (lambda: qj.Policy([SCHEME]), ("one of the rules is a Scheme", "qj.rule(")),
        (lambda: qj.Policy(RULE), ("rules is a Rule", "Iterable")),
        (lambda: qj.Scheme(weights=8), ("weights is an int", "Quantizer")),
        (lambda: qj.Scheme(activations=POLICY), ("activations is a Policy",)),
        (lambda: qj.Scheme(biases=qj.integer()), ("biases is an IntegerFormat", "AccumulatorBias")),
        (lambda: qj.plan(SCHEME, qj.sites(f, PARAMS, X)), ("policy is a Scheme", "qj.Policy([")),
        (lambda: qj.plan(POLICY, f), ("table is a function", "qj.sites(f, params, x)")),
        (lambda: qj.sites(PARAMS, f, X), ("f is a dict", "f(params, *inputs)")),
        (lambda: qj.tap(f, "w"), ("selector is a str",)),
        (lambda: qj.quantize_params(PARAMS, 8), ("policy is an int",)),
        (lambda: qj.weight_quantizer(bits="4"), ("bits is a str",)),
        (lambda: qj.weight_quantizer(bits=jnp.float32(4)), ("bits is a", "qj.calibrate's")),
        (lambda: qj.weight_quantizer(format="int8"), ("format is a str", "E4M3FN")),
        (lambda: qj.weight_quantizer(format=qj.IntegerFormat), ("the class IntegerFormat",)),
        (lambda: qj.weight_quantizer(granularity="channel"), ("granularity is a str",)),
        (lambda: qj.weight_quantizer(rounding="floor"), ("rounding is a str",)),
        (lambda: qj.weight_quantizer(estimator="lsq"), ("estimator is a str",)),
        (lambda: qj.fake_quant(X, 1.0, rounding="floor"), ("rounding is a str",)),
        (
            lambda: qj.fake_quant(X, qj.QParams(*map(jnp.float32, (1, 0, 8)))),
            ("scale is QParams", "qj.fake_quant(x, qparams.scale"),
        ),
        (lambda: qj.fake_quant(X, 1.0, rounding=jnp.round), ("rounding is a",)),
        (lambda: qj.fake_quant(X, 1.0, format="e4m3"), ("format is a str",)),
        (lambda: qj.fake_quant(X, 1.0, estimator=lambda at: 1), ("estimator is a function",)),
        (lambda: qj.encode(X, qj.QParams(1.0, 0.0, 8.0), "int8"), ("format is a str",)),
        (lambda: qj.encode(X, 1.0, qj.integer()), ("qparams is a float",)),
        (lambda: qj.path(1), ("pattern is an int",)),
        (lambda: qj.scope(None), ("pattern is None",)),
        (lambda: qj.prune_mask(PARAMS, "0.5"), ("sparsity is a str", "sparsity=0.5")),
        (lambda: qj.pruning.random(0), ("key is an int", "key=jax.random.key(0)")),
        (
            lambda: qj.fake_quant(X, 1.0, rounding=qj.rounding.STOCHASTIC, key=3),
            ("key is an int", "key=jax.random.key(3)"),
        ),
        (
            lambda: qj.kd_loss(X, X, temperature="4", alpha=0.5),
            ("temperature is a str", "temperature=4.0"),
        ),
    ],
)
def test_parts_of_a_plan(call: Callable[[], object], words: tuple[str, ...]) -> None:
    refused(call, *words)


def seen(plan: qj.Plan) -> Any:
    return qj.observe(f, plan)(qj.init(plan), PARAMS, X)[1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda plan: qj.init(plan.policy), ("plan is a Policy", "qj.init")),
        (lambda plan: qj.observe(f, plan.policy), ("plan is a Policy", "qj.observe")),
        (lambda plan: qj.observe(plan, f), ("f is a Plan", "qj.observe(f, plan)")),
        (lambda plan: qj.fake_quantize(plan, f), ("f is a Plan", "qj.fake_quantize(f, plan)")),
        (lambda plan: qj.execute(f, None), ("plan is None",)),
        (lambda plan: qj.compare(f, plan.policy), ("plan is a Policy",)),
        (lambda plan: qj.freeze(f, {}, PARAMS), ("plan is a function",)),
        (lambda plan: qj.calibrate(f, {}, PARAMS), ("plan is a function",)),
        (lambda plan: qj.observe(f, plan)(None, PARAMS, X), ("state is None", "qj.init(plan)")),
        (
            lambda plan: qj.observe(f, plan)(dict.fromkeys(qj.init(plan)), PARAMS, X),
            ("an entry of the state is None", "qj.init(plan)"),
        ),
        (lambda plan: qj.merge_states(qj.init(plan), None), ("a state is None", "qj.init(plan)")),
        (
            lambda plan: qj.merge_states(*[qj.calibrate(plan, seen(plan), PARAMS)] * 2),
            ("an entry of a state is a QParams",),
        ),
    ],
)
def test_verbs(plan: qj.Plan, call: Callable[[qj.Plan], object], words: tuple[str, ...]) -> None:
    refused(lambda: call(plan), *words)


@pytest.mark.parametrize(
    "key",
    [jax.random.split(jax.random.key(0)), jax.random.split(jax.random.PRNGKey(0)), 0, X, None],
)
def test_a_key_is_one_key(key: Any) -> None:
    many = key is not None and jnp.size(key) in (2, 4)
    what = "an array of keys" if many else "a random key is needed"
    refused(lambda: expect_key(key, where="here"), what, "here", "try:")


def test_keys_of_both_kinds_and_traced_ones_pass() -> None:
    for make in (jax.random.key, jax.random.PRNGKey):
        expect_key(make(0), where="here")
        jax.vmap(lambda key: expect_key(key, where="here"))(jax.random.split(make(0), 3))


def test_a_plan_that_rounds_at_random_names_the_site_of_a_bad_key() -> None:
    weights = qj.weight_quantizer(rounding=qj.rounding.STOCHASTIC)
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    plan = qj.plan(policy, qj.sites(f, PARAMS, X))
    qstate = qj.calibrate(plan, {}, PARAMS)
    refused(lambda: qj.fake_quantize(f, plan)(qstate, PARAMS, X, key=1), "site w", "key(1)")


def test_a_qstate_without_its_types_asks_for_a_template(plan: qj.Plan) -> None:
    """What a checkpoint that is restored without one returns."""
    _, state = qj.observe(f, plan)(qj.init(plan), PARAMS, X)
    qstate = qj.calibrate(plan, state, PARAMS)
    plain = jax.tree.map(lambda q: q._asdict(), qstate, is_leaf=lambda q: isinstance(q, qj.QParams))
    refused(lambda: qj.fake_quantize(f, plan)(plain, PARAMS, X), "is a dict", "as the template")


def test_a_state_is_no_qstate_nor_the_other_way_round(plan: qj.Plan) -> None:
    _, state = qj.observe(f, plan)(qj.init(plan), PARAMS, X)
    qstate = qj.calibrate(plan, state, PARAMS)
    refused(
        lambda: qj.fake_quantize(f, plan)(state, PARAMS, X),
        "an entry of the qstate is a Statistics",
        "qj.calibrate",
    )
    refused(
        lambda: qj.calibrate(plan, qstate, PARAMS),
        "an entry of the state is a QParams",
        "qj.observe",
    )
    refused(
        lambda: qj.calibrate(plan, state, PARAMS, weight_bits="4"),
        "a width is a str",
        "site w, weight",
    )


def test_widths_of_all_kinds_pass(plan: qj.Plan) -> None:
    _, state = qj.observe(f, plan)(qj.init(plan), PARAMS, X)
    for bits in (4, 4.0, jnp.float32(4), jnp.asarray(4), {"w": 4}):
        qstate = qj.calibrate(plan, state, PARAMS, weight_bits=bits)
        assert float(qstate["w"]["weight"].bits) == 4.0


@pytest.mark.parametrize(
    "bits",
    [
        True,
        np.True_,
        jnp.asarray(True),
        np.array(True),
        [True],
        {"w": True},
        qj.FloatBits(True, 3),
        qj.FloatBits(4, jnp.asarray(True)),
        np.array("4"),
        ["4"],
    ],
    ids=str,
)
def test_true_and_text_are_no_widths_of_calibrate(plan: qj.Plan, bits: Any) -> None:
    state = qj.observe(f, plan)(qj.init(plan), PARAMS, X)[1]
    refused(lambda: qj.calibrate(plan, state, PARAMS, weight_bits=bits), "a width is", "site w")
    calibrate = jax.jit(lambda bits: qj.calibrate(plan, state, PARAMS, weight_bits=bits))
    if isinstance(bits, jax.Array):
        refused(lambda: calibrate(bits), "an array of bool", "site w")


def test_true_is_no_number() -> None:
    for make in (qj.weight_quantizer, qj.activation_quantizer, qj.gradient_quantizer):
        for bits in (True, False, np.True_, jnp.asarray(True)):
            refused(lambda make=make, bits=bits: make(bits=bits), "bits is a")  # type: ignore[misc]
    refused(lambda: qj.bias_quantizer(bits=True), "bits is a bool")
    with pytest.raises(errors.ArgumentError, match="n is a bool, and a whole number or str"):
        expect(True, (numbers.Integral, str), argument="n", where="here", fix="n=1")
    expect(True, (numbers.Integral, bool), argument="n", where="here", fix="n=1")


def test_a_width_that_helps_is_named(plan: qj.Plan) -> None:
    state = qj.observe(f, plan)(qj.init(plan), PARAMS, X)[1]
    for bits, helps in ((9, True), (17, False), (-1, False), (float("nan"), False), (2.5, False)):
        with pytest.raises(errors.BitsError, match="outside the format int") as caught:
            qj.calibrate(plan, state, PARAMS, weight_bits=bits)
        assert caught.value.fix.startswith("8 bits")
        assert ("max_bits=16" in caught.value.fix) == helps


def test_a_width_for_a_site_that_is_not_there_names_those_that_are() -> None:
    params = {f"w{n}": jnp.eye(4) for n in range(8)}
    chain = lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), p.values(), x)  # noqa: E731
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(chain, params, X))
    for asked, near in (("zz", "w0"), ("w55", "w5"), (7, "w7")):
        with pytest.raises(errors.PolicyError) as caught:
            qj.calibrate(plan, {}, params, weight_bits={asked: 3})
        assert f"site {asked}; it is at w0, w1," in caught.value.what
        edit = caught.value.fix.split(", or")[0]
        assert edit == f"weight_bits={{'{near}': 4}}"
        qj.calibrate(plan, {}, params, weight_bits=eval(edit.removeprefix("weight_bits=")))
    with pytest.raises(errors.PolicyError, match="at no site of the plan"):
        qj.calibrate(plan, {}, params, activation_bits=3)


@pytest.mark.parametrize("size", [2.5, "32", None])
def test_groups_have_a_whole_size(size: Any) -> None:
    with pytest.raises(errors.GranularityError, match="groups of"):
        qj.PerGroup(size)


def test_a_module_of_flax_is_no_function_of_its_parameters() -> None:
    model = nn.Dense(3)
    refused(lambda: qj.sites(model, {}, X), "a Dense", "model.apply(params, x)")
    split = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    refused(lambda: qj.sites(split, {}, X), "a Linear", "quantjax.adapters.nnx")

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(x)

    refused(lambda: qj.sites(Own(), {}, X), "an Own")
    qj.sites(lambda params, x: model.apply(params, x), model.init(jax.random.key(0), X), X)


def test_a_module_of_equinox_is_no_function_of_its_parameters() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    refused(lambda: qj.sites(model, {}, X), "MLP", "quantjax.adapters.equinox.functional")

    class Own(eqx.Module):
        weight: jax.Array

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.weight

    refused(lambda: qj.sites(Own(PARAMS["w"]), {}, X), "an Own", "quantjax.adapters.equinox")
    assert len(qj.sites(eqx.filter_jit(f), PARAMS, X)) == 1


def test_params_that_are_one_object_have_no_path_to_name() -> None:
    @dataclasses.dataclass
    class Own:
        w: jax.Array

    with pytest.raises(errors.ArgumentError) as caught:
        qj.sites(lambda p, x: x @ p.w, Own(PARAMS["w"]), X)
    assert "params holds a Own" in str(caught.value)
    assert "where: qj.sites\n" in str(caught.value)


def test_any_callable_is_a_function() -> None:
    class Model:
        def __call__(self, params: Any, x: jax.Array) -> jax.Array:
            return f(params, x)

    expect_function(Model(), where="here", fix="this")
    expect_function(jax.jit(f), where="here", fix="this")
    assert len(qj.sites(Model(), PARAMS, X)) == 1


def test_kinds_are_named() -> None:
    expect(None, (int, type(None)), argument="n", where="here", fix="this")
    with pytest.raises(errors.ArgumentError) as caught:
        expect("a", (int, float, type(None)), argument="n", where="here", fix="n=1")
    assert str(caught.value) == (
        "n is a str, and an int or float is needed\n  where: here\n  try:   n=1"
    )


@pytest.mark.parametrize("parent", ["there", "not there"])
def test_names_that_are_too_long_cannot_be_written(tmp_path, parent):
    """Asking whether it exists was an error of its own, where the folder around it does."""
    (tmp_path / "there").mkdir()
    why = why_unwritable(tmp_path / parent / ("n" * 300), files=["a"], folders=["b"])
    assert "too long" in why
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
