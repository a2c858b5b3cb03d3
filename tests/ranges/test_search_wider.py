"""Ranges that are wider than what was seen, where the levels of that would not reach its ends."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantjax as qj
from quantjax import formats, ranges, statistics
from quantjax.formats import LevelFormat
from quantjax.ranges import COSINE, MIN_MAX, MSE, SQNR, Target
from tests.ranges import cases
from tests.ranges.cases import SYMMETRIC, at_hand, derived, drawn, losses

KINDS = st.sampled_from(sorted(cases.DRAWS))
MXFP4 = Target(formats.MXFP4, True, jnp.float32(4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lopsided(LevelFormat):
    """What is below 0 reaches half as far."""

    max_bits: int = 2
    name = "lopsided"

    def levels(self, bits, theta=()):
        return jnp.asarray([-1.0, 0.0, 1.0, 2.0], jnp.float32)


SHORT = {
    "two's complement": (SYMMETRIC, (2, 3, 4)),
    "floor of powers": (MXFP4, (4,)),
    "even powers": (Target(formats.mx(formats.E2M1, scale_rule=formats.MX_EVEN), True, 4.0), (4,)),
    "nearest powers": (
        Target(qj.integer(narrow=True, scale_rule=formats.POWER_OF_TWO_NEAREST), True, 4.0),
        (3, 4),
    ),
    "floats": (Target(formats.E2M1, True, jnp.float32(4)), (4,)),
    "levels of one side": (Target(Lopsided(), True, jnp.float32(2)), (2,)),
}


def brute_force(x: np.ndarray, target: Target, bits: int) -> float:
    """The smallest error of all symmetric ranges up to twice as wide as what was seen."""
    reach = np.abs(x).max() * np.linspace(0.02, 2.0, 800)
    return losses(x, target, bits, -reach, reach).min()


@pytest.mark.parametrize("name", SHORT)
@settings(max_examples=12)
@given(kind=KINDS, seed=st.integers(0, 9999), mirrored=st.booleans(), data=st.data())
def test_it_is_about_the_best_of_brute_force(name, kind, seed, mirrored, data):
    target, widths = SHORT[name]
    bits = data.draw(st.sampled_from(widths))
    x = drawn(kind, seed, 512) * np.float32(-1.0 if mirrored else 1.0)
    found, whole = (derived(rule, at_hand(x), target, bits) for rule in (MSE, MIN_MAX))
    mine, theirs = losses(x, target, bits, *map(np.array, zip(found, whole, strict=True)))
    assert mine <= theirs * (1 + 1e-5)
    assert mine <= brute_force(x, target, bits) * 1.06
    assert found[1] <= 2.0 * np.abs(x).max() * (1 + 1e-6)


@pytest.mark.parametrize("rule", [MSE, SQNR, ranges.l_p(2.4)], ids=lambda rule: rule.name)
def test_zeros_and_ones_have_two_bits_without_error(rule):
    x = np.float32(np.arange(64) % 2)
    assert derived(MIN_MAX, at_hand(x), SYMMETRIC, 2) == (0.0, 1.0)  # with levels to one half
    assert derived(rule, at_hand(x), SYMMETRIC, 2) == (-2.0, 2.0)
    assert derived(rule, at_hand(-x), SYMMETRIC, 2) == (-1.0, 1.0)  # there is a level at -1
    x = np.float32(7.9) * np.float32(1 - 2 * (np.arange(32) % 2))
    mine, theirs = losses(x, MXFP4, 4, *np.array([(-15.8, 15.8), (-7.9, 7.9)]).T)
    assert mine < theirs / 100
    assert derived(rule, at_hand(x), MXFP4, 4)[1] > 8.0


@pytest.mark.parametrize("rule", [MSE, COSINE], ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", [*SHORT, "nf4"])
def test_no_group_is_worse_than_without(name, rule, monkeypatch):
    """Where a wider range was better by a hair, the search went on there and not where it was best.

    Of 1000 groups of 16 normal numbers in E2M1 the worst had 1.6 times the error.
    """
    target, bits = (NF4, [4]) if name == "nf4" else SHORT[name]
    x = jnp.asarray(np.random.default_rng(27).normal(size=(16, 200)), jnp.float32)
    seen = jax.jit(lambda x: statistics.of_tensor(x, (1, 200), with_values=True))(x)
    target = target._replace(bits=jnp.float32(bits[-1]))

    def error(rule):
        found = ranges.derive(rule, seen, target)
        run = jax.vmap(lambda x, low, high: target.quantize(x, low, high)[0], (1, 0, 0), 1)
        y = np.float64(run(x, found.low[0], found.high[0]))
        if rule.name == "cosine":
            dots = (y * x).sum(0) / np.sqrt((y * y).sum(0) * np.square(np.float64(x)).sum(0))
            return 1.0 - dots
        return np.square(y - x).sum(0)

    mine = error(rule)
    search = importlib.import_module("quantjax.ranges.search")
    monkeypatch.setattr(search, "_widest", lambda *given: None)
    without = error(rule._replace(range=lambda *a: rule.range(*a)))
    assert (mine <= without * (1 + 1e-4) + 1e-6).all()
    assert mine.sum() < without.sum() or name == "even powers"  # of which none was better


NF4 = Target(formats.NF4, True, jnp.float32(4))
NARROW = Target(qj.integer(narrow=True), True, jnp.float32(4))


@pytest.mark.parametrize("kind", cases.DRAWS)
def test_even_levels_that_reach_both_ends_leave_little_to_gain(kind):
    x = drawn(kind, 3, 512)
    found = derived(MSE, at_hand(x), NARROW, 4)
    assert found[1] <= np.abs(x).max()
    mine = losses(x, NARROW, 4, *map(np.array, zip(found, strict=True))).item()
    assert mine <= brute_force(x, NARROW, 4) * 1.05


def test_one_bit_has_levels_at_both_ends():
    for x in (drawn("gaussian", 2, 128), np.abs(drawn("gaussian", 2, 128))):
        for rule in (MSE, COSINE):
            low, high = derived(rule, at_hand(x), SYMMETRIC, 1)
            assert -low == high <= np.abs(x).max()


@pytest.mark.parametrize("name", ["floats", "nf4"])
def test_ranges_only_just_wider_are_tried_as_well(name):
    """Those up to a twelfth wider were not, unless a sixth was the best: 7 and 4 % more error."""
    target, bits = (NF4, 4) if name == "nf4" else (SHORT[name][0], 4)
    over = []
    for seed in range(24):
        x = drawn("gaussian", seed, 32)
        found = derived(MSE, at_hand(x), target, bits)
        mine = losses(x, target, bits, *map(np.array, zip(found, strict=True))).item()
        over.append(mine / brute_force(x, target, bits))
    assert np.mean(over) <= 1.015
    assert max(over) <= 1.08


LARGE = {
    "narrow": (Target(qj.integer(narrow=True), True, jnp.float32(2)), 2),
    "two's complement": (SYMMETRIC, 2),
    "additive powers": (Target(formats.apot(), True, jnp.float32(3)), 3),
    "powers": (Target(formats.mx(formats.E2M1), True, jnp.float32(4)), 4),
    "zero points": (cases.ASYMMETRIC, 2),
}


@pytest.mark.parametrize("rule", cases.SEARCHED, ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", LARGE)
def test_scales_beyond_2_to_the_126_are_those_of_smaller_numbers(name, rule):
    """Their reciprocals are no normal numbers: a processor took them for 0, all codes with them."""
    target, bits = LARGE[name]
    x = drawn("gaussian", 4, 256) / np.float32(64.0)
    x[7] = 1.25
    found, less = (derived(rule, at_hand(x * np.float32(2.0**k)), target, bits) for k in (126, 99))
    assert found == tuple(bound * 2.0**27 for bound in less)


def test_the_largest_numbers_are_not_left_for_infinity():
    x = np.float32([3e38, 1.0, -2e38, 3e38])
    for target, bits in ((SYMMETRIC, 2), (MXFP4, 4)):
        low, high = derived(MSE, at_hand(x), target, bits)
        assert np.isfinite([low, high]).all()


def test_weights_of_a_layer_get_wider_scales_in_jit_and_vmap():
    params = {"w": jnp.asarray(np.arange(64).reshape(16, 4) % 2, jnp.float32)}
    quantizer = qj.weight_quantizer(bits=2)
    f = lambda params, x: x @ params["w"]  # noqa: E731
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=quantizer))])
    plan = qj.plan(policy, qj.sites(f, params, jnp.ones((1, 16))))
    widths = jnp.arange(2.0, 9.0)
    run = lambda bits: qj.calibrate(plan, {}, params, weight_rule=MSE, weight_bits=bits)  # noqa: E731
    many = jax.jit(jax.vmap(run))(widths)["w"]["weight"]
    errors = jax.vmap(lambda q: qj.fake_quant(params["w"], q.scale, bits=q.bits) - params["w"])(
        many
    )
    np.testing.assert_allclose(errors, 0.0, atol=1e-6)
