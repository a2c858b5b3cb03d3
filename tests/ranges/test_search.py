"""Searched ranges: never worse than the whole range, about as good as brute force."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantjax as qj
from quantjax import errors, formats, ranges
from quantjax.ranges import COSINE, MIN_MAX, MSE, SQNR, Target
from quantjax.ranges.search import search
from tests import models
from tests.ranges import cases
from tests.ranges.cases import ASYMMETRIC, SYMMETRIC, at_hand, derived, drawn, losses, observed
from tests.refused import refused

pytestmark = pytest.mark.thinned(3)

KINDS = st.sampled_from(sorted(cases.DRAWS))
TARGETS = pytest.mark.parametrize(
    "target", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"]
)


@TARGETS
@settings(max_examples=30)
@given(kind=KINDS, seed=st.integers(0, 9999), bits=st.integers(2, 8))
def test_mse_is_never_worse_than_min_max_on_the_tensor_itself(target, kind, seed, bits):
    x = drawn(kind, seed, 1024)
    seen = at_hand(x)
    found, whole = (derived(rule, seen, target, bits) for rule in (MSE, MIN_MAX))
    mine, theirs = losses(x, target, bits, *map(np.array, zip(found, whole, strict=True)))
    assert mine <= theirs * (1 + 1e-5)


@TARGETS
@settings(max_examples=20)
@given(kind=KINDS, seed=st.integers(0, 9999), bits=st.integers(2, 8))
def test_mse_from_a_histogram_is_at_most_a_percent_worse_than_min_max(target, kind, seed, bits):
    x = drawn(kind, seed)
    seen = observed(*x.reshape(4, -1))
    found, whole = (derived(rule, seen, target, bits) for rule in (MSE, MIN_MAX))
    mine, theirs = losses(x, target, bits, *map(np.array, zip(found, whole, strict=True)))
    assert mine <= theirs * 1.01


@TARGETS
@pytest.mark.parametrize("kind", cases.DRAWS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mse_is_about_the_best_of_brute_force(target, kind, bits):
    x = drawn(kind, 1, 2048)
    mine = losses(x, target, bits, *derived(MSE, at_hand(x), target, bits)).item()
    assert mine <= cases.least(x, target, bits) * 1.02


@TARGETS
@pytest.mark.parametrize("together", [1, 2, 5])
def test_a_large_tensor_is_searched_a_few_ranges_at_a_time(target, together, monkeypatch):
    x = drawn("laplacian", 3, 512)
    search = importlib.import_module("quantjax.ranges.search")
    rule = MSE._replace(range=lambda *a: MSE.range(*a))  # no program of the rule is at hand
    at_once = derived(MSE, at_hand(x), target, 4)
    monkeypatch.setattr(search, "TRIED_AT_ONCE", together * x.size)
    np.testing.assert_allclose(derived(rule, at_hand(x), target, 4), at_once, rtol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.4, 4.0])
def test_each_norm_has_the_smallest_error_in_its_own(p):
    x = drawn("laplacian", 2, 2048)
    powers = (1.0, 2.4, 4.0)
    each = [derived(ranges.l_p(q), at_hand(x), SYMMETRIC, 4) for q in powers]
    found = losses(x, SYMMETRIC, 4, *map(np.array, zip(*each, strict=True)), p=p)
    assert found.argmin() == powers.index(p)
    highs = [high for _, high in each]
    assert highs == sorted(highs)  # the larger the power, the less is clipped


def test_the_second_power_is_mse():
    x = drawn("student", 3)
    for target in (SYMMETRIC, ASYMMETRIC):
        for bits in (2, 4):
            want = derived(MSE, at_hand(x), target, bits)
            assert derived(ranges.l_p(2.0), at_hand(x), target, bits) == pytest.approx(
                want, rel=0.02
            )
            assert derived(ranges.sqnr(1.0), at_hand(x), target, bits) == pytest.approx(
                want, rel=0.02
            )


def test_clipping_that_counts_more_is_less():
    seen = at_hand(drawn("laplacian", 4))
    highs = [
        derived(ranges.sqnr(weight), seen, SYMMETRIC, 4)[1] for weight in (0.3, 1.0, 3.0, 30.0)
    ]
    assert highs == sorted(highs)
    assert highs[0] < highs[-1]
    assert ranges.sqnr(3.0).name == SQNR.name == "sqnr(3)"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["gaussian", "laplacian", "student"])
def test_cosine_has_the_smallest_angle_of_all_clips(kind, bits):
    x = drawn(kind, 5, 2048)
    reach = np.abs(x).max() * np.linspace(0.01, 1, 300)
    run = jax.vmap(lambda r: SYMMETRIC._replace(bits=jnp.float32(bits)).quantize(x, -r, r)[0])

    def angles(reach):
        y = np.float64(run(jnp.float32(reach)))
        norms = np.linalg.norm(y, axis=1) * np.linalg.norm(np.float64(x))
        return 1 - (y @ np.float64(x)) / np.maximum(norms, 1e-30)

    mine = angles([derived(COSINE, at_hand(x), SYMMETRIC, bits)[1]]).item()
    assert mine <= angles(reach).min() * 1.03


@pytest.mark.parametrize("rule", cases.SEARCHED, ids=lambda rule: rule.name)
def test_powers_of_two_go_into_the_range(rule):
    x = drawn("laplacian", 6)
    for factor in (2.0**-60, 2.0**60):
        low, high = derived(rule, at_hand(x), ASYMMETRIC, 3)
        assert derived(rule, at_hand(x * np.float32(factor)), ASYMMETRIC, 3) == pytest.approx(
            (low * factor, high * factor), rel=1e-6
        )


@pytest.mark.parametrize("rule", cases.SEARCHED, ids=lambda rule: rule.name)
def test_a_histogram_gives_about_the_range_of_the_values(rule):
    """By what counts, the error of the range that comes out."""
    x = drawn("gaussian", 7, 40_000)
    for target, bits in ((SYMMETRIC, 4), (ASYMMETRIC, 4), (SYMMETRIC, 8)):
        ends = [derived(rule, seen, target, bits) for seen in (observed(x), at_hand(x))]
        mine, theirs = losses(x, target, bits, *map(np.array, zip(*ends, strict=True)))
        assert mine <= theirs * 1.05  # at 8 bits steps are as wide as some bins


@pytest.mark.parametrize(
    "format", [formats.E2M1, formats.NF4, formats.TERNARY, formats.lognet()], ids=lambda f: f.name
)
def test_any_format_is_searched_at_its_own_levels(format):
    x, bits = drawn("gaussian", 8, 2048), format.max_bits
    target = Target(format, True, jnp.float32(bits))
    ends = [derived(rule, at_hand(x), target, bits) for rule in (MSE, MIN_MAX)]
    mine, theirs = losses(x, target, bits, *map(np.array, zip(*ends, strict=True)))
    assert mine <= theirs * (1 + 1e-5)
    assert mine <= cases.least(x, target, bits) * 1.03


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: ranges.l_p(0.0), "to the power of 0"),
        (lambda: ranges.l_p(float("inf")), "to the power of inf"),
        (lambda: ranges.sqnr(-1.0), "count -1 times"),
    ],
)
def test_parameters_without_a_meaning_are_refused(make, problem):
    with refused(errors.QuantizerError, problem):
        make()


def test_traced_parameters_without_a_meaning_are_nan():
    seen = at_hand(drawn("gaussian", 9))
    for family in (ranges.l_p, ranges.sqnr):
        found = jax.jit(lambda p, make=family: ranges.derive(make(p), seen, SYMMETRIC))(-1.0)
        assert np.isnan(found.low).all()
        assert np.isnan(found.high).all()


LEFT_EARLY = [
    (cases.SIGNED, True),
    (cases.SIGNED, False),
    (cases.UNSIGNED, False),
    (formats.integer(scale_rule=formats.POWER_OF_TWO), True),
    (formats.integer(scale_rule=formats.POWER_OF_TWO, signed=False), False),
    (formats.E4M3FN, True),
    (formats.NF4, True),
    (formats.lognet(), True),
]


@pytest.mark.parametrize(
    ("format", "symmetric"), LEFT_EARLY, ids=lambda it: it.name if hasattr(it, "name") else str(it)
)
@pytest.mark.parametrize("rule", [MSE, ranges.l_p(2.4), SQNR], ids=lambda rule: rule.name)
@pytest.mark.thinned(23)
def test_factors_that_are_left_could_not_have_been_better(format, symmetric, rule, monkeypatch):
    """The range is the one of all factors, at all widths and for all kinds of data."""
    widths = jnp.float32([bits for bits in range(2, 9) if format.known_valid(bits)])
    samples = [at_hand(drawn(kind, 5, 1024)) for kind in cases.DRAWS]
    samples.append(at_hand(np.zeros(1024, np.float32)))
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *samples)

    def cost(place, low, high) -> float:
        """What a range costs in float64."""
        kind, width = place[:2]
        x, target = many.sample.values[kind].ravel(), Target(format, symmetric, widths[width])
        q, clipped = target.quantize(x, low[place], high[place])
        error = np.abs(np.float64(q) - np.float64(x))
        weight = np.where(np.asarray(clipped) & (rule == SQNR), 3.0, 1.0)
        return (weight * error ** (2.4 if rule.name.startswith("l_p") else 2.0)).sum()

    def found() -> tuple[jax.Array, ...]:
        def one(seen, bits):
            target = Target(format, symmetric, bits)
            low, high, _ = ranges.derive(rule, seen, target)
            return *target.qparams(low, high)[:2], low, high

        return jax.vmap(lambda seen: jax.lax.map(lambda bits: one(seen, bits), widths))(many)

    left = found()
    all_of_them = functools.partial(search, is_sum=False)
    for module in ("norms", "similarity"):
        place = importlib.import_module(f"quantjax.ranges.{module}")
        monkeypatch.setattr(place, "search", lambda *args, **_: all_of_them(*args))
    jax.clear_caches()
    everything = found()
    alike = [np.isclose(got, want, rtol=1e-6) for got, want in zip(left, everything, strict=True)]
    # Factors are computed a few at a time, so that of two as good as each other either may be best.
    others = np.argwhere(~(alike[0] & alike[1]))
    assert len(others) <= 2
    for place in map(tuple, others):
        assert cost(place, *left[2:]) == pytest.approx(cost(place, *everything[2:]), rel=1e-6)
    jax.clear_caches()


def test_a_scale_that_stays_while_the_zero_point_moves_covers_more_under_a_smaller_factor():
    """Powers of two: no factor may be left for what the one before it clips."""
    x = np.full(4096, 5.0, np.float32)
    x[:2] = -9.0, 10.0
    format = formats.integer(signed=False, scale_rule=formats.POWER_OF_TWO)
    target = Target(format, False, jnp.float32(3))
    found, whole = (derived(rule, at_hand(x), target, 3) for rule in (MSE, MIN_MAX))
    mine, theirs = losses(x, target, 3, *map(np.array, zip(found, whole, strict=True)))
    assert mine < 0.1 * theirs


@pytest.mark.parametrize("sign", [1, -1])
def test_an_end_that_is_zero_stays(sign):
    low, high = derived(MSE, observed(sign * np.abs(drawn("laplacian", 9))), ASYMMETRIC, 3)
    assert (low == 0.0 < high) if sign > 0 else (low < 0.0 == high)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("bits", [2, 4, 8])
@TARGETS
def test_whole_numbers_have_a_range_of_their_own(target, bits):
    """The range that is zero alone has an arbitrary scale, 1, which is exact for whole numbers."""
    x = np.float32(np.random.default_rng(0).integers(0, 17, 2048))
    for rule in (MSE, SQNR, ranges.l_p(2.4), COSINE):
        low, high = derived(rule, at_hand(x), target, bits)
        assert high > low
        half = derived(rule, at_hand(x * np.float32(0.5)), target, bits)
        assert np.float32(half) == pytest.approx(np.float32((low, high)) / 2)
    assert derived(MSE, at_hand(np.zeros(64, np.float32)), target, bits) == (0.0, 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_cosine_that_all_ranges_share_keeps_the_widest(bits):
    """What saturates has the same codes under any narrower range."""
    x = np.tanh(20.0 * drawn("gaussian"))
    low, high = derived(COSINE, at_hand(np.sign(x)), ASYMMETRIC, bits)
    assert (low, high) == (-1.0, 1.0)
    low, high = derived(COSINE, at_hand(x), ASYMMETRIC, bits)
    assert min(-low, high) > 0.25


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("size", [0.05, 1.0, 3e-5])
def test_a_cosine_is_that_of_the_levels_themselves(size, bits):
    """Of weights that are ±α any range has the direction: their error had too few digits to tell,
    and the scale came out a thousandth as large."""
    x = np.float32(size) * np.sign(drawn("gaussian", 5, 256))
    low, high = derived(COSINE, at_hand(x), SYMMETRIC, bits)
    assert (low, high) == (-np.float32(size), np.float32(size))


@TARGETS
@pytest.mark.parametrize("kind", ["gaussian", "relu", "student"])
def test_the_cosine_decides_alike_in_every_program(target, kind):
    """Its range moves by no step where sums are taken in another order."""
    x = drawn(kind, 3, 2048)
    widths = jnp.arange(2.0, 9.0)
    at = lambda bits: ranges.derive(COSINE, at_hand(x), target._replace(bits=bits))  # noqa: E731
    mapped = jax.jit(lambda widths: jax.lax.map(at, widths))(widths)
    for index, bits in enumerate(widths):
        for other in (
            at(bits),
            ranges.derive(COSINE, at_hand(x[::-1]), target._replace(bits=bits)),
        ):
            assert np.asarray(mapped.low)[index] == pytest.approx(np.asarray(other.low), rel=1e-5)
            assert np.asarray(mapped.high)[index] == pytest.approx(np.asarray(other.high), rel=1e-5)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("rule", [*cases.SEARCHED, ranges.ADMM, ranges.LEAST_SQUARES])
def test_ranges_that_were_searched_for_are_constant_to_a_gradient(rule):
    """Calibrating inside of a loss: the straight-through gradient, with the range as it is."""
    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy(weight_bits=4, activation_bits=None))
    f = qj.fake_quantize(case.f, plan)

    def loss(params, fixed):
        qstate = qj.calibrate(plan, {}, fixed if fixed is not None else params, weight_rule=rule)
        return jnp.sum(f(qstate, params, case.x) ** 2)

    found = jax.jit(jax.grad(loss))(case.params, None)
    want = jax.jit(jax.grad(loss))(case.params, case.params)
    models.assert_same_bits(jax.device_get(found), jax.device_get(want))
