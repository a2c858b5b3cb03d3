"""The page on pieces of one's own: its blocks run, and do what is said of them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from tests.refused import refused

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def after():
    """The names behind each block, by the first name that it makes."""
    names: dict = {"__name__": "extending"}
    done = []
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"extending.md, block {number}", "exec"), names)
        done.append(dict(names))
    return done


def behind(after, text):
    """The names behind the block with this text."""
    (number,) = (number for number, block in enumerate(BLOCKS) if text in block)
    return after[number]


def test_rules_and_their_errors(after):
    names = behind(after, "def without_the_outermost")
    plan, state, params = names["w8a8"], names["state"], names["params"]
    alone = [
        names["error"](plan, qj.calibrate(plan, state, params, activation_rule=rule.rules[0]))
        for rule in map(qj.ranges.stack, ([r] for r in names["rules"].rules))
    ]
    assert_allclose(names["errors_by_rule"], alone, rtol=1e-4)
    assert np.max(alone) < 0.01


def test_a_fit_and_a_scale_rule_have_powers_of_two(after):
    for text, plan, base in (("def halves", "fitted", 1.0), ("even_powers", "sparse_scales", 2.0)):
        names = behind(after, text)
        qstate = qj.calibrate(names[plan], {}, names["params"])
        exponents = np.log2(qstate["a"]["weight"].scale) / base
        assert_array_equal(exponents, np.round(exponents))
        assert qj.check(qstate, names[plan]) == []


def test_the_levels_are_powers_and_learn_their_exponent(after):
    names = behind(after, "class Powers")
    weight = names["qstate"]["a"]["weight"]
    scale, codes = np.float64(weight.scale), names["frozen"]["a"].dequantize() / weight.scale
    levels = np.sign(u := np.arange(-8, 8) / 8.0) * np.abs(u) ** 1.5
    near = np.abs(np.float64(codes)[..., None] - levels).min(-1)
    assert near.max() < 1e-6
    w = np.float64(names["params"]["a"]) / scale
    assert_allclose(codes, levels[np.abs(w[..., None] - levels).argmin(-1)], atol=1e-6)
    assert float(names["gradient"]["a"]["weight"].theta["gamma"]) != 0.0


def test_roundings_and_estimators(after):
    names = behind(after, "toward_zero =")
    assert np.isfinite(names["drawn"]).all()
    x = jnp.array([-1.6, 1.6, 0.4])
    assert qj.fake_quant(x, 1.0, bits=4, rounding=names["toward_zero"]).tolist() == [-1, 1, 0]
    names = behind(after, "log_scale = Estimator")
    assert np.any(names["gradient"]["a"]["weight"].theta["log_scale"] != 0.0)
    slope = jax.grad(lambda x: qj.fake_quant(x, 1.0, bits=2, estimator=names["leaky"]).sum())
    assert_allclose(slope(jnp.array([0.2, 9.0])), [1.0, 0.1])


def test_a_granularity_is_simulated_executed_and_refused_where_it_does_not_divide(after):
    names = behind(after, "class PerHead")
    assert names["scales"].shape == (1, 4)
    own, f, params, x = (names[name] for name in ("PerHead", "f", "params", "x"))
    weights = qj.weight_quantizer(bits=4, granularity=own(4))
    plan = names["planned"](weights, qj.activation_quantizer(bits=8))
    assert "int4/head" in str(plan)
    _, state = qj.observe(f, plan)(qj.init(plan), params, x)
    qstate = qj.calibrate(plan, state, params)
    run = qj.execute(f, plan)(qstate, qj.freeze(plan, qstate, params), x)
    assert_array_equal(run, qj.fake_quantize(f, plan)(qstate, params, x))
    plan = names["planned"](qj.weight_quantizer(granularity=own(64)))
    with refused(errors.GranularityError, "a scale of shape (1, 64)"):
        qj.calibrate(plan, {}, params)


def test_selectors_and_observers(after):
    names = behind(after, "class Wide")
    assert [entry.site.name for entry in names["wide"].quantized] == ["b"]
    names = behind(after, "features = planned")
    x = np.asarray(names["x"])
    assert_array_equal(names["low"][0], x.min(0))
    assert_array_equal(names["high"][0], x.max(0))
    names = behind(after, "load_params")
    assert names["state"]["a"]["activation"].batches == 1


def test_smoothing_changes_no_function(after):
    names = behind(after, "weight_reach")
    want = names["f"](names["params"], names["x"])
    assert_allclose(names["g"](names["smoothed"], names["x"]), want, rtol=1e-4, atol=1e-4)
    assert len(names["smoothed_plan"].quantized) == 2


def test_corrected_products_have_the_mean_of_the_float_ones(after):
    names = behind(after, "corrections =")
    for name, correction in names["corrections"].items():
        quantized, want = names["quantized"][name], names["in_float"][name]
        assert_allclose((quantized + correction[None]).mean(0), want.mean(0), atol=1e-5)
        assert np.abs(correction).max() > 1e-3


def test_learned_rounding_is_better_than_the_nearest_and_keeps_its_codes(after):
    names = behind(after, "binary = ")
    plan, qstate, learned = names["w3"], names["qstate"], names["learned_codes"]
    h, params = names["h"], names["params"]
    frozen = qj.freeze(plan, qstate, learned)["b"].dequantize()
    assert_allclose(frozen, learned["b"], rtol=1e-6, atol=1e-7)
    nearest = qj.freeze(plan, qstate, params)["b"].dequantize()
    before, after_learning = (
        float(jnp.mean((h @ w - h @ params["b"]) ** 2)) for w in (nearest, frozen)
    )
    assert after_learning < 0.8 * before


def test_the_best_share_is_that_of_a_loop(after):
    names = behind(after, "def loss_at")
    losses = [float(jax.jit(names["loss_at"])(share)) for share in names["shares"]]
    assert float(names["best"]) == float(names["shares"][int(np.argmin(losses))])
    assert float(names["best"]) < 1.0


def test_a_sensitivity_scan_is_a_loop_over_static_plans(after):
    names = behind(after, "sensitivity =")
    f, params, x = names["f"], names["params"], names["x"]
    for i, layer in enumerate(names["layers"]):
        for j, bits in enumerate((2, 3, 4)):
            policy = qj.Policy(
                [qj.rule(qj.path(layer), qj.Scheme(weights=qj.weight_quantizer(bits=bits)))]
            )
            plan = qj.plan(policy, names["table"])
            qstate = qj.calibrate(plan, {}, params)
            alone = jnp.mean((qj.fake_quantize(f, plan)(qstate, params, x) - f(params, x)) ** 2)
            assert_allclose(names["sensitivity"][i, j], alone, rtol=1e-5)


def test_low_rank_updates_make_up_for_codes_that_stay(after):
    names = behind(after, "def adapted")
    assert all(isinstance(leaf, qj.QTensor) for leaf in names["codes"].values())
    assert all("base" in entry.site.name for entry in names["base_plan"].quantized)
    before, behind_training = (
        names["distance"](low) for low in (names["tree"]["low"], names["low"])
    )
    assert behind_training < 0.6 * before


def test_equalized_layers_are_the_same_function_with_less_error(after):
    names = behind(after, "equalized =")
    f, params, x = names["f"], names["params"], names["x"]
    equalized = names["equalized"]
    assert_allclose(f(equalized, x), f(params, x), rtol=1e-4, atol=1e-5)
    reach = [np.abs(equalized["a"]).max(0), np.abs(equalized["b"]).max(1)]
    assert_allclose(reach[0], reach[1], rtol=1e-5)
    plan = names["planned"](qj.weight_quantizer(bits=4, granularity=qj.PerTensor()))
    errors = [
        float(names["error"](plan, qj.calibrate(plan, {}, p), p)) for p in (params, equalized)
    ]
    assert errors[1] < errors[0]


def test_a_stored_program_serves_what_is_executed(after):
    names = behind(after, "stored =")
    want = names["serve"](names["x"][:5])
    assert_array_equal(names["served"], want)
    assert isinstance(names["stored"], bytes | bytearray)
