"""All range rules: one program for all of them and all widths, and a user's own in ten lines."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors, ranges, statistics
from quantjax.quantizer import Quantizer
from quantjax.ranges import Range, RangeRule, derive, derive_many
from quantjax.storage.codec import decode, encode
from tests import models
from tests.ranges import cases
from tests.ranges.cases import ASYMMETRIC, RULES, SYMMETRIC, at_hand, drawn, observed
from tests.refused import refused

FITS = (
    ranges.ADMM,
    ranges.HQO_SCALE,
    ranges.HQO_ZERO_POINT,
    ranges.K_MEANS,
    ranges.LEAST_SQUARES,
    ranges.TTQ,
    ranges.XNOR,
)

pytestmark = pytest.mark.thinned(9)

ANY_RULE = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
WIDTHS = jnp.float32([2, 3, 4, 8])


def close(got: Range, want: Range) -> None:
    """Up to last places, which another fusion may leave; here they decide between no two ranges."""
    assert_allclose(got.low, want.low, rtol=1e-6, atol=1e-7)
    assert_allclose(got.high, want.high, rtol=1e-6, atol=1e-7)
    assert_array_equal(*np.broadcast_arrays(got.calibrated, want.calibrated))


@ANY_RULE
def test_traced_widths_are_static_widths(rule):
    target = SYMMETRIC if rule is ranges.SQNR else ASYMMETRIC
    seen = observed(*drawn("laplacian", 1).reshape(4, -1))

    def at(bits):
        return derive(rule, seen, target._replace(bits=bits))

    together = jax.jit(jax.vmap(at))(WIDTHS)
    mapped = jax.jit(lambda widths: lax.map(at, widths))(WIDTHS)
    for index, bits in ((1, 3), (3, 8)):
        static = jax.jit(lambda b=bits: at(jnp.float32(b)))()
        for many in (together, mapped):
            close(jax.tree.map(lambda leaf, i=index: leaf[i], many), static)
        close(at(WIDTHS[index]), static)


CLOSED_FORMS = [rule for rule in RULES if not rule.reads_distribution]


def test_closed_forms_are_the_same_bits_over_any_axis():
    """Widths under ``vmap``: SAWB's sum of two products was one rounding less there, and the zero
    point of its range, which is a tie, another code."""
    seen = observed(*drawn("gaussian", 5).reshape(4, -1))
    widths = jnp.arange(2.0, 9.0)
    for rule in CLOSED_FORMS:
        at = lambda bits, seen, rule=rule: derive(rule, seen, ASYMMETRIC._replace(bits=bits))  # noqa: E731
        together = jax.jit(jax.vmap(at, (0, None)))(widths, seen)
        mapped = jax.jit(lambda w, s, at=at: lax.map(lambda b: at(b, s), w))(widths, seen)
        models.assert_same_bits(together, mapped)
        alone = [jax.jit(at)(bits, seen) for bits in widths]
        models.assert_same_bits(mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))


def test_all_rules_and_widths_are_one_program():
    """One compilation, and each cell is its own rule at its own width."""
    seen = observed(*drawn("gaussian", 2).reshape(4, -1))
    stacked, compiled = ranges.stack(RULES), []

    @jax.jit
    def grid(seen, indices, widths):
        compiled.append(len(compiled))

        def cell(index_and_bits):
            index, bits = index_and_bits
            return derive(stacked[index], seen, ASYMMETRIC._replace(bits=bits))

        return lax.map(cell, (indices, widths))

    indices, widths = (
        a.ravel() for a in jnp.meshgrid(jnp.arange(len(RULES)), WIDTHS, indexing="ij")
    )
    found = grid(seen, indices, widths)
    again = grid(observed(drawn("student", 3)), indices[::-1], widths[::-1])
    assert compiled == [0]
    assert not np.array_equal(found.high, again.high[::-1])
    for place in range(0, len(indices), 3):
        rule, bits = RULES[int(indices[place])], float(widths[place])
        want = derive(rule, seen, ASYMMETRIC._replace(bits=jnp.float32(bits)))
        close(jax.tree.map(lambda leaf, i=place: leaf[i], found), want)


@ANY_RULE
def test_many_operands_together_are_each_alone(rule):
    """Groups, widths and samples of several lengths and formats in one program."""
    x = drawn("gaussian", 4).reshape(-1, 4)
    groups = cases.updated(statistics.init((1, 4)), jnp.asarray(x))
    one = observed(drawn("relu", 5))
    jobs = [(groups, ASYMMETRIC), (one, ASYMMETRIC._replace(bits=jnp.float32(3)))]
    kept = ((100, np.float32), (300, np.float32), (200, jnp.bfloat16))
    jobs += [(at_hand(drawn("laplacian", 6, n).astype(dtype)), ASYMMETRIC) for n, dtype in kept]
    if rule is ranges.MOVING_AVERAGE:
        jobs = jobs[:2]
    found = derive_many(rule, jobs)
    for got, (seen, target) in zip(found, jobs, strict=True):
        assert got.low.shape == seen.scale_shape
        close(got, derive(rule, seen, target))


@ANY_RULE
def test_layers_of_a_scan_are_each_alone(rule):
    """A leading axis of layers, each with its own width."""
    layers = [observed(drawn("gaussian", seed)) for seed in (7, 8)]
    seen = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    widths = jnp.float32([[3], [8]])
    target = ASYMMETRIC._replace(bits=widths[:, 0])
    found = derive(rule, seen, target)
    assert found.low.shape == (2, 1)
    for index, layer in enumerate(layers):
        want = derive(rule, layer, ASYMMETRIC._replace(bits=widths[index, 0]))
        close(jax.tree.map(lambda leaf, i=index: leaf[i], found), want)


def test_a_rule_of_ones_own_is_ten_lines():
    """Twice the mean magnitude; it stacks, sweeps and is written like the library's."""

    def twice(seen, target, factor):
        del target
        reach = factor * seen.moments.magnitude
        return Range(-reach, reach, seen.batches > 0)

    rule = RangeRule("mean_magnitude", twice, parameters=(2.0,))
    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=8, activation_bits=8))
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    own = qj.calibrate(plan, state, case.params, activation_rule=rule)
    seen = state[plan.quantized[0].site.name]["activation"]
    scale = own[plan.quantized[0].site.name]["activation"].scale
    assert_allclose(scale, 4 * seen.moments.magnitude / 255, rtol=1e-5)
    stacked = ranges.stack([ranges.MIN_MAX, rule])[1]
    same = qj.calibrate(plan, state, case.params, activation_rule=stacked)
    models.assert_same_bits(jax.device_get(own), jax.device_get(same))

    plain = RangeRule("mean_magnitude", lambda seen, target: twice(seen, target, 2.0))
    assert decode(encode(plain), extra=(plain,)) is plain
    assert decode(encode(rule), extra=(rule,)) is rule
    with refused(errors.StorageError, "mean_magnitude", "cannot be written"):
        encode(rule._replace(parameters=(jnp.arange(2.0),)))
    with refused(errors.StorageError, "mean_magnitude", "cannot be written"):
        jax.jit(lambda x: encode(rule._replace(parameters=(x,))))(2.0)


def test_weights_and_activations_have_rules_of_their_own():
    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=4, activation_bits=4))
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)

    def calibrated(**rules):
        return jax.device_get(qj.calibrate(plan, state, case.params, **rules))

    both, neither = calibrated(rule=ranges.MSE), calibrated()
    mixed = calibrated(weight_rule=ranges.MSE, activation_rule=ranges.MIN_MAX)
    before = calibrated(rule=ranges.KL_TENSORRT, weight_rule=ranges.MSE)
    fitted = calibrated(weight_rule=ranges.LEAST_SQUARES)
    for name in both:
        models.assert_same_bits(mixed[name]["weight"], both[name]["weight"])
        models.assert_same_bits(before[name]["weight"], both[name]["weight"])
        models.assert_same_bits(mixed[name]["activation"], neither[name]["activation"])
        models.assert_same_bits(fitted[name]["activation"], neither[name]["activation"])
        assert (fitted[name]["weight"].scale != neither[name]["weight"].scale).any()
        assert (both[name]["activation"].scale != neither[name]["activation"].scale).any()


def test_a_rule_that_reads_a_histogram_that_was_left_out_is_named():
    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=8, activation_bits=8))
    state = qj.init(plan, histogram_bins=None)
    _, state = qj.observe(case.f, plan)(state, case.params, case.x)
    qj.calibrate(plan, state, case.params, activation_rule=ranges.ACIQ_GAUSSIAN)
    with refused(errors.CalibrationError, "kl_tensorrt reads a histogram", "histogram_bins=None"):
        qj.calibrate(plan, state, case.params, activation_rule=ranges.KL_TENSORRT)


def test_live_ranges_take_rules_that_read_the_values():
    """Dynamic quantization: the range of each tensor as it comes, by its own values."""
    case = models.mlp()
    activations = qj.activation_quantizer(bits=4, rule=ranges.MSE, range=qj.RangeMode.LIVE)
    weights = qj.weight_quantizer(bits=8)
    scheme = qj.Scheme(weights=weights, activations=activations)
    plan = models.planned(case, qj.Policy([qj.rule(qj.weighted(), scheme)]))
    qstate = qj.calibrate(plan, {}, case.params)
    y = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    whole = qj.activation_quantizer(bits=4, range=qj.RangeMode.LIVE)
    scheme = qj.Scheme(weights=weights, activations=whole)
    other = models.planned(case, qj.Policy([qj.rule(qj.weighted(), scheme)]))
    z = jax.jit(qj.fake_quantize(case.f, other))(qstate, case.params, case.x)
    assert np.isfinite(y).all()
    assert not np.array_equal(y, z)


def test_a_quantizer_holds_numbers_and_no_arrays():
    rule = ranges.percentile(0.99)
    kept: Quantizer = qj.activation_quantizer(bits=8, rule=rule)
    assert hash(kept) == hash(qj.activation_quantizer(bits=8, rule=ranges.percentile(0.99)))
    for make in (qj.activation_quantizer, qj.weight_quantizer):
        with refused(errors.QuantizerError, "an array for a parameter", "activation_rule"):
            make(bits=8, rule=ranges.percentile(jnp.float32(0.99)))


def test_rules_of_one_family_are_one_branch_and_give_what_each_gives_alone():
    """A function that is traced for each of its rules would be compiled as often."""
    traced = []

    def own(seen, target, share, shift):
        del target
        traced.append(share)
        return Range(share * seen.extremes.low, share * seen.extremes.high + shift, True)

    numbers = [(1.0, 0), (0.5, 1), (0.25, 3), (0.5, 0.5)]
    members = [RangeRule("own", own, True, given) for given in numbers]
    mixed = [*members[:2], ranges.MSE, ranges.MIN_MAX, *members[2:], ranges.percentile(0.9)]
    mixed += [ranges.KL_MODELOPT, ranges.percentile(0.5), ranges.KL_TENSORRT, ranges.SQNR]
    seen, target = observed(drawn("laplacian", 3)), ASYMMETRIC
    want = [derive(rule, seen, target) for rule in mixed]
    del traced[:]
    stack = ranges.stack(mixed)
    found = jax.jit(lambda index: derive(stack[index], seen, target))
    for index, alone in enumerate(want):
        models.assert_same_bits(jax.device_get(found(index)), jax.device_get(alone))
    assert len(traced) == 2, "whole numbers and real ones are traced unlike"


def test_numbers_that_are_not_traced_reach_a_rule_of_all_groups_as_they_are():
    def own(seen, target, count):
        del target
        reach = sum([seen.extremes.high] * count)  # no array could be a number of repetitions
        return Range(-reach, reach, seen.batches > 0)

    stack = ranges.stack([RangeRule(f"own({n})", own, parameters=(n,)) for n in (1, 2, 3)])
    seen = observed(drawn("gaussian"))
    found = [derive(stack[jnp.int32(i)], seen, SYMMETRIC).high for i in range(3)]
    assert_allclose(found, [n * seen.extremes.high for n in (1, 2, 3)], rtol=1e-6)


@pytest.mark.parametrize("rule", [*RULES, *FITS], ids=lambda rule: rule.name)
def test_rules_that_were_pickled_are_equal_to_themselves(rule):
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    assert hash(again) == hash(rule)
    kept = qj.weight_quantizer(
        bits=8, rule=rule, symmetric=not getattr(rule, "needs_zero_point", 0)
    )
    assert pickle.loads(pickle.dumps(kept)) == kept


@pytest.mark.parametrize(
    "rule",
    [
        ranges.percentile(0.9999),
        ranges.sigma(2.5),
        ranges.constant(-1, 6),
        ranges.l_p(3),
        ranges.SQNR,
    ],
    ids=lambda rule: rule.name,
)
def test_rules_with_numbers_come_back_from_a_file(rule):
    data = encode(rule)
    assert data["range_rule"] == rule.name.partition("(")[0]
    back = decode(data)
    assert back.range is rule.range
    assert back.parameters == tuple(map(float, rule.parameters))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"range_rule": "quantile", "parameters": [0.9]}, "'quantile' is not known"),
        ({"range_rule": "percentile", "parameters": [99.0]}, "a share of 99"),
        ({"range_rule": "percentile", "parameters": "0.9"}, "no parameters of a rule"),
        ({"range_rule": "constant", "parameters": [0.9]}, "1 numbers do not make a rule constant"),
    ],
)
def test_rules_with_numbers_that_cannot_be_read(data, problem):
    with refused(errors.StorageError, problem):
        decode(data)


def test_traced_numbers_are_not_written():
    def trace(p):
        with refused(errors.StorageError, "percentile", "traced"):
            encode(ranges.percentile(p))
        return p

    jax.jit(trace)(0.5)
