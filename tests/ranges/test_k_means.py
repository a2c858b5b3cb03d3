"""k-means: against Lloyd's algorithm and the optimum by dynamic programming, both in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors, formats
from quantjax.affine import SMALLEST_SCALE
from quantjax.arithmetic import Arithmetic
from quantjax.formats import UNIT, learned_codebook
from quantjax.ranges import K_MEANS, k_means
from quantjax.simulation import apply
from tests import models
from tests.oracles import codebooks as oracle
from tests.refused import refused

pytestmark = pytest.mark.thinned(5)

SHAPE, WHOLE, MAX_BITS = (12, 16), (1, 1), 4
FORMAT = learned_codebook(max_bits=MAX_BITS)
WIDTHS = pytest.mark.parametrize("bits", [1, 2, 3, 4])
DRAWS = {
    "normal": lambda g, n: g.normal(size=n),
    "laplace": lambda g, n: g.laplace(size=n),
    "uniform": lambda g, n: g.uniform(-1, 1, size=n),
    "student": lambda g, n: g.standard_t(3, size=n),
    "pruned": lambda g, n: g.normal(size=n) * (g.uniform(size=n) < 0.3),
    "positive": lambda g, n: np.abs(g.normal(size=n)),
}
ANY = pytest.mark.parametrize("kind", DRAWS)


@functools.cache
def program(groups=WHOLE, iterations=100, format=FORMAT):
    """Parameters and quantized entries for any width: one program for a grouping."""

    def run(x, bits):
        qparams = k_means(iterations=iterations).fit(x, groups, format, bits)
        return qparams, apply(x, qparams, Arithmetic(format))

    return jax.jit(run)


def fitted(x, bits, groups=WHOLE, iterations=100):
    return program(groups, iterations)(x, jnp.float32(bits))


def drawn(kind: str, seed: int = 0, shape=SHAPE) -> np.ndarray:
    return np.float32(DRAWS[kind](np.random.default_rng(seed), shape))


def over_scale(x, qparams) -> np.ndarray:
    """NumPy's quotient: what XLA makes of a division by a scalar may be off by a rounding."""
    return np.float32(x) / np.asarray(qparams.scale)


def error(x, y) -> float:
    return float(((np.float64(x) - np.float64(y)) ** 2).mean())


@ANY
def test_the_error_is_near_the_least_possible(kind):
    """Lloyd's algorithm stops in a local minimum; with 50 entries a level it is a few percent."""
    draws = [drawn(kind, seed, (12, 64)) for seed in range(5)]
    ratios = np.array([[over_least(x, bits) for bits in (1, 2, 3, 4)] for x in draws])
    assert ratios.min() > 1 - 1e-6
    assert (ratios.mean(0) < [1.06, 1.03, 1.06, 1.13]).all()
    assert ratios.max() < 1.3


@pytest.mark.parametrize("outlier", [10.0, 1000.0, -1000.0])
def test_outliers_take_one_level_each(outlier):
    """Not all of those that fit into the gaps beside them."""
    x = drawn("normal", 1, (12, 64))
    x[0, 0], x[3, 3] = outlier, outlier * 0.7
    for bits in (2, 3, 4):
        assert over_least(x, bits) < 1.2
        assert len(np.unique(fitted(x, bits)[0].theta["levels"])) == 2**bits


def over_least(x: np.ndarray, bits: int) -> float:
    """The error of the quantized tensor over the smallest that it can have."""
    qparams, y = fitted(x, bits)
    return error(x / qparams.scale.item(), y / qparams.scale) / least(x.tobytes())[2**bits - 1]


@functools.cache
def least(x: bytes) -> np.ndarray:
    entries = np.frombuffer(x, np.float32)
    return oracle.least_squared_errors(entries / np.abs(entries).max(), 2**MAX_BITS)


@ANY
def test_the_start_is_better_than_even_spacing_and_than_quantiles(kind):
    """At the largest width, where the start matters most."""
    ours, evenly, quantiles = 0.0, 0.0, 0.0
    for seed in range(2):
        x = drawn(kind, seed, (12, 64))
        even = np.linspace(x.min(), x.max(), 16)
        ours += error(x, fitted(x, 4)[1])
        evenly += oracle.squared_error(x, oracle.lloyd(x, even, 100))
        quantile = np.quantile(x, (np.arange(16) + 0.5) / 16)
        quantiles += oracle.squared_error(x, oracle.lloyd(x, quantile, 100))
    assert ours < 1.05 * min(evenly, quantiles)


@ANY
@WIDTHS
def test_it_is_lloyds_algorithm_from_its_own_start(kind, bits):
    x = drawn(kind)
    start, _ = fitted(x, bits, iterations=0)
    scaled = over_scale(x, start)
    centers = np.asarray(start.theta["levels"])[: 2**bits]
    assert np.isin(centers, scaled).all()
    for iterations in (1, 5):
        got = fitted(x, bits, iterations=iterations)[0].theta["levels"][: 2**bits]
        assert_allclose(got, oracle.lloyd(scaled, centers, iterations), rtol=0, atol=2e-6)


@ANY
@WIDTHS
def test_the_error_never_rises_with_iterations(kind, bits):
    x = drawn(kind, 3)
    found = [fitted(x, bits, iterations=n)[1] for n in (0, 1, 5, 100)]
    losses = [error(x, y) for y in found]
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-5)
    assert losses[-1] < losses[0]


@ANY
def test_the_means_are_fixed_points_after_a_hundred(kind):
    x = drawn(kind, 4)
    qparams, _ = fitted(x, 3)
    scaled, levels = over_scale(x, qparams), np.asarray(qparams.theta["levels"])[:8]
    assert (np.diff(levels) > 0).all()
    assert_allclose(oracle.lloyd(scaled, levels, 1), levels, rtol=0, atol=2e-6)
    # Beyond the width, the highest is repeated.
    assert_array_equal(qparams.theta["levels"][8:], np.full(8, levels[-1]))


@WIDTHS
@given(data=st.data())
@example(data=None)
def test_few_distinct_values_are_exact(bits, data):
    if data is None:
        values, seed = [0.0, 0.0], 0
    else:
        number = st.floats(-(2.0**20), 2.0**20, width=32).map(lambda v: v if abs(v) > 1e-6 else 0.0)
        values = data.draw(st.lists(number, min_size=1, max_size=2**bits))
        seed = data.draw(st.integers(0, 99))
    x = np.random.default_rng(seed).choice(np.float32(values), size=SHAPE)
    qparams, y = fitted(x, bits)
    scaled = over_scale(x, qparams)
    assert set(np.unique(qparams.theta["levels"])) == set(np.unique(scaled))
    assert_allclose(y, x, rtol=3e-7, atol=0)  # a quotient and a product


def test_sums_over_a_large_tensor_are_exact():
    """A float32 sum would lose the small cluster; int32 would overflow if digits were larger."""
    x = np.random.default_rng(16).uniform(0.999, 1.0, size=(2, 600_000)).astype(np.float32)
    x[1, -3:] = -1.0, -0.75, -0.5
    qparams, _ = fitted(x, 1)
    means = [-0.75, x[x > 0].mean(dtype=np.float64)]
    assert_allclose(qparams.theta["levels"][:2], means, rtol=0, atol=2.0**-22)


@ANY
def test_the_order_of_entries_does_not_matter(kind):
    x = drawn(kind, 5)
    draw = np.random.default_rng(6)
    one, y = fitted(x, 3)
    for _ in range(3):
        order = draw.permutation(x.size)
        other, moved = fitted(x.ravel()[order].reshape(SHAPE), 3)
        models.assert_same_bits(jax.device_get(other), jax.device_get(one))
        assert_array_equal(moved.ravel(), y.ravel()[order])


@given(exponent=st.integers(-40, 40))
def test_powers_of_two_in_the_tensor_go_into_the_scale(exponent):
    x = drawn("normal", 7)
    one, other = fitted(x, 3)[0], fitted(x * np.float32(2.0**exponent), 3)[0]
    assert_array_equal(one.theta["levels"], other.theta["levels"])
    assert_array_equal(one.scale * np.float32(2.0**exponent), other.scale)


@pytest.mark.parametrize("groups", [WHOLE, (3, 2)])
def test_widths_under_vmap_equal_one_by_one(groups):
    x, widths = drawn("normal", 9), jnp.float32([1, 2, 3, 4])
    together = jax.jit(jax.vmap(program(groups), in_axes=(None, 0)))(x, widths)
    for place in range(4):
        alone = program(groups)(x, widths[place])
        models.assert_same_bits(
            jax.device_get(jax.tree.map(lambda leaf, i=place: leaf[i], together)),
            jax.device_get(alone),
        )
    errors_ = [error(x, y) for y in together[1]]
    assert errors_ == sorted(errors_, reverse=True)


def test_a_width_has_the_same_levels_in_every_container():
    x, bits = drawn("laplace", 10), jnp.float32(2)
    small = program(format=learned_codebook(max_bits=2))(x, bits)[0].theta["levels"]
    assert_array_equal(small, fitted(x, 2)[0].theta["levels"][:4])


@pytest.mark.parametrize("groups", [(12, 1), (3, 2)])
def test_scales_are_the_largest_magnitude_of_each_group(groups):
    x = drawn("normal", 11) * np.float32(2.0) ** np.arange(-6, 6, dtype=np.float32)[:, None]
    qparams, _ = fitted(x, 4, groups)
    blocks = x.reshape(groups[0], 12 // groups[0], groups[1], 16 // groups[1])
    assert_array_equal(qparams.scale, np.abs(blocks).max((1, 3)))
    assert_array_equal(qparams.zero_point, np.zeros(groups))
    # All groups share the levels, and count alike: those of the entries over their scales.
    scaled = np.float32(blocks / np.asarray(qparams.scale)[:, None, :, None])
    got = oracle.squared_error(scaled, qparams.theta["levels"])
    assert got < 1.25 * oracle.least_squared_errors(scaled, 16)[-1]


def test_constant_and_zero_tensors_and_those_that_are_mostly_zero():
    zero, y = fitted(np.zeros(SHAPE, np.float32), 4)
    assert_array_equal(y, np.zeros(SHAPE))
    assert zero.scale.item() == SMALLEST_SCALE
    for value in (3.7, -1e-3, 1e30):
        x = np.full(SHAPE, value, np.float32)
        qparams, y = fitted(x, 2)
        assert_array_equal(y, x)
        assert_array_equal(qparams.theta["levels"], np.full(16, np.sign(value)))
    pruned = drawn("pruned", 12)
    qparams, y = fitted(pruned, 3)
    # Zeros share their level with what is close to them, whose mean is not 0.
    assert np.abs(np.asarray(y)[pruned == 0.0]).max() < 0.01 * qparams.scale.item()
    assert len(np.unique(qparams.theta["levels"])) == 8
    one = np.zeros(SHAPE, np.float32)
    one[3, 4] = -5.0
    assert_array_equal(fitted(one, 1)[1], one)


def test_a_group_of_zeros_beside_others():
    x = drawn("normal", 13)
    x[2] = 0.0
    qparams, y = fitted(x, 4, (12, 1))
    assert qparams.scale[2, 0] == SMALLEST_SCALE
    assert np.isfinite(y).all()
    assert np.abs(y[2]).max() <= SMALLEST_SCALE


@pytest.mark.parametrize("factor", [2.0**-24, 1.0, 100.0, 1e4, 3e30])
def test_levels_without_a_scale_follow_the_tensor(factor):
    """Where the scale is always 1, levels are the values themselves, however large."""
    format = learned_codebook(max_bits=3, scale_rule=UNIT)
    x = drawn("normal", 15) * np.float32(factor)
    qparams = K_MEANS.fit(jnp.asarray(x), (1, 1), format, jnp.float32(3))
    assert qparams.scale.item() == 1.0
    unit = np.float64(x.std())
    y = np.float64(qj.encode(jnp.asarray(x), qparams, format).dequantize())
    least = oracle.least_squared_errors(x / unit, 8)[-1]
    assert np.mean(((y - x) / unit) ** 2) < 1.2 * least


def test_an_empty_tensor_and_low_precision():
    empty = K_MEANS.fit(jnp.zeros((0, 4)), (1, 1), FORMAT, jnp.float32(2))
    assert_array_equal(empty.theta["levels"], np.zeros(16))
    x = jnp.asarray(drawn("normal", 14), jnp.bfloat16)
    qparams, _ = fitted(x, 3)
    models.assert_same_bits(
        jax.device_get(qparams), jax.device_get(fitted(x.astype(jnp.float32), 3)[0])
    )


def test_power_of_two_scales_may_leave_entries_beyond_one():
    nearest = learned_codebook(max_bits=MAX_BITS, scale_rule=formats.POWER_OF_TWO_NEAREST)
    x = np.float32(drawn("uniform", 15) * 1.4)
    qparams, y = program(format=nearest)(x, jnp.float32(4))
    assert qparams.scale.item() == 1.0
    assert np.abs(qparams.theta["levels"]).max() > 1.2
    assert error(x, y) < 1.25 * oracle.least_squared_errors(x, 16)[-1]


@pytest.mark.parametrize("format", [formats.integer(max_bits=4), formats.TERNARY, formats.NF4])
def test_other_formats_are_refused(format):
    with refused(errors.FormatError, "k-means fits levels", format.name, "learned_codebook"):
        K_MEANS.fit(jnp.ones((2, 2)), WHOLE, format, jnp.float32(4))


def test_rules_are_named_and_made_once():
    assert k_means() is K_MEANS
    assert k_means(iterations=7) is k_means(iterations=7)
    assert (K_MEANS.name, k_means(iterations=7).name) == ("k_means", "k_means-7")


def test_a_model_runs_with_it():
    """Plan, calibrate, simulate, freeze, execute."""
    case = models.mlp()
    weights = qj.weight_quantizer(format=learned_codebook(max_bits=4), rule=qj.ranges.K_MEANS)
    plan = models.planned(case, qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))]))
    qstate = jax.jit(lambda params: qj.calibrate(plan, {}, params))(case.params)
    simulated = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    frozen = jax.jit(functools.partial(qj.freeze, plan))(qstate, case.params)
    executed = jax.jit(qj.execute(case.f, plan))(qstate, frozen, case.x)
    assert_array_equal(executed, simulated)
    is_tensor = lambda leaf: isinstance(leaf, qj.QTensor)  # noqa: E731
    tensors = [
        (leaf, weight)
        for leaf, weight in zip(
            jax.tree.leaves(frozen, is_leaf=is_tensor), jax.tree.leaves(case.params), strict=True
        )
        if is_tensor(leaf)
    ]
    assert tensors
    for tensor, weight in tensors:
        levels = np.asarray(tensor.qparams.theta["levels"])
        scaled = over_scale(weight, tensor.qparams)
        assert_array_equal(tensor.codes, oracle.snap(scaled, np.unique(levels), "half_even"))
        alone = K_MEANS.fit(weight, tensor.qparams.scale.shape, tensor.format, jnp.float32(4))
        assert_array_equal(levels, alone.theta["levels"])
