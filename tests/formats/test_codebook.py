"""Codebooks: listed, learned and NormalFloat, against comparing with all levels in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.formats import NF4, Law, codebook, learned_codebook, normal_float
from quantjax.formats.codebook import CodebookFormat, NormalFloatFormat
from quantjax.rounding import FLOOR, HALF_AWAY, HALF_EVEN
from tests.oracles import codebooks as oracle
from tests.refused import refused

ZERO, SIZE, MAX_BITS = jnp.float32(0), 48, 3
LEARNED, NORMAL = learned_codebook(max_bits=MAX_BITS), normal_float(max_bits=8)

# QLoRA, appendix E.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


@functools.cache
def learned(rounding):
    """Level, code and level of the code, for any theta and width."""

    def run(x, levels, bits):
        theta = {"levels": levels}
        level = LEARNED.snap(x, ZERO, bits, rounding, theta).level
        codes = LEARNED.encode(level, bits, theta)
        return level, codes, LEARNED.decode(codes, bits, theta), LEARNED.levels(bits, theta)

    return jax.jit(run)


@jax.jit
def gradient(levels, x, bits, weight):
    """Of a weighted sum of quantized values, in the levels."""

    def total(levels):
        y = qj.fake_quant(x, 0.5, format=LEARNED, bits=bits, theta={"levels": levels})
        return jnp.vdot(weight, y)

    return jax.grad(total)(levels)


@st.composite
def drawn(draw):
    """Distinct levels in any order, values near and far, and a width."""
    eighths = draw(st.lists(st.integers(-64, 64), min_size=8, max_size=8, unique=True))
    levels = np.float32(eighths) / 8
    x = draw(st.lists(st.integers(-160, 160), min_size=SIZE, max_size=SIZE))
    return levels, np.float32(x) / 16, draw(st.integers(1, MAX_BITS))  # ties among them


@pytest.mark.parametrize("rounding", [HALF_EVEN, HALF_AWAY, FLOOR], ids=lambda r: r.name)
@given(case=drawn())
def test_learned_levels_in_any_order_equal_comparing_with_all(rounding, case):
    levels, x, bits = case
    level, codes, decoded, used = learned(rounding)(x, levels, jnp.float32(bits))
    ranked = np.sort(levels[: 2**bits])  # entries beyond the width are ignored
    index = oracle.snap(x, ranked, rounding.name)
    assert_array_equal(used, np.pad(ranked, (0, 8 - len(ranked)), mode="edge"))
    assert_array_equal(level, ranked[index])
    assert_array_equal(codes, index)
    assert_array_equal(decoded, level)


@given(case=drawn(), seed=st.integers(0, 999))
def test_the_order_in_theta_does_not_matter(case, seed):
    levels, x, _ = case
    order = np.random.default_rng(seed).permutation(8)
    run = learned(HALF_EVEN)
    for one, other in zip(run(x, levels, ZERO + 3), run(x, levels[order], ZERO + 3), strict=True):
        assert_array_equal(one, other)


@given(case=drawn(), seed=st.integers(0, 999))
def test_the_gradient_of_a_level_is_the_sum_over_the_entries_that_have_it(case, seed):
    levels, x, bits = case
    weight = np.random.default_rng(seed).integers(-9, 9, SIZE).astype(np.float32)
    got = gradient(levels, x * np.float32(0.5), jnp.float32(bits), weight)
    order = np.argsort(levels[: 2**bits])
    home = order[oracle.snap(x, levels[order], "half_even")]  # the entry of theta, not the rank
    want = np.zeros(8)
    np.add.at(want, home, weight * 0.5)
    assert_array_equal(got, want)


def test_levels_that_have_crossed_are_trained_on():
    """Down the gradient, the second level being above the third."""
    x = jnp.repeat(jnp.float32([-1.0, -0.25, 0.5, 1.0]), 12)
    format, bits = learned_codebook(max_bits=2), jnp.float32(2)

    @jax.jit
    def step(levels):
        def loss(levels):
            y = qj.fake_quant(x, 1.0, format=format, bits=bits, theta={"levels": levels})
            return jnp.mean((x - y) ** 2)

        value, slope = jax.value_and_grad(loss)(levels)
        return levels - slope, value

    levels, losses = jnp.float32([-0.9, 0.7, -0.5, 1.25]), []
    for _ in range(40):
        levels, loss = step(levels)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6
    assert_allclose(levels, [-1.0, 0.5, -0.25, 1.0], atol=1e-3)


def test_codes_of_before_a_crossing_stand_for_ranks():
    format, bits = learned_codebook(max_bits=1), jnp.float32(1)
    before, after = {"levels": jnp.float32([-1.0, 1.0])}, {"levels": jnp.float32([3.0, 1.0])}
    codes = format.encode(jnp.float32([-1.0, 1.0]), bits, before)
    assert codes.tolist() == [0, 1]
    assert format.decode(codes, bits, after).tolist() == [1.0, 3.0]


def test_trained_repetitions_are_set_aside_at_a_smaller_width():
    levels = jnp.float32([0.0, 1.0, -1.0, 9.0, 9.0, 9.0, -9.0, 9.0])
    assert LEARNED.levels(ZERO + 2, {"levels": levels}).tolist() == [-1, 0, 1, 9, 9, 9, 9, 9]
    assert LEARNED.levels(ZERO + 1, {"levels": levels}).tolist() == [0] + [1] * 7


def test_stacked_layers_have_levels_of_their_own():
    levels = jnp.float32(np.random.default_rng(0).normal(size=(3, 8)))
    x = jnp.float32(np.random.default_rng(1).normal(size=(3, SIZE)))
    bits = jnp.float32([1, 2, 3])
    stacked = jax.jit(jax.vmap(learned(HALF_EVEN)))(x, levels, bits)
    for layer in range(3):
        alone = learned(HALF_EVEN)(x[layer], levels[layer], bits[layer])
        for one, other in zip(stacked, alone, strict=True):
            assert_array_equal(one[layer], other)


LISTED = [(-1.0, 0.0, 1.0), (2.0, -3.0, 0.5, 0.25, 7.0), (0.0, 1.0), tuple(range(-40, 60))]


@pytest.mark.parametrize("levels", LISTED, ids=lambda row: str(len(row)))
def test_listed_levels_in_any_order(levels):
    format = codebook(levels, name="own")
    ascending = np.float32(sorted(levels))
    assert 2 ** (format.max_bits - 1) < len(levels) <= 2**format.max_bits
    assert format.signed == (ascending[0] < 0)
    assert format.label(format.max_bits) == f"own{format.max_bits}"
    x = np.random.default_rng(2).normal(size=SIZE).astype(np.float32) * 9
    index = oracle.snap(x, ascending, "half_even")
    assert_array_equal(qj.fake_quant(jnp.asarray(x), 1.0, format=format), ascending[index])
    assert (Law.ZERO in format.laws) == (0.0 in levels)
    assert (Law.ROUND_TRIP in format.laws) == (len(levels) == 2**format.max_bits)
    widths = jnp.arange(10.0)
    assert np.flatnonzero(format.valid_bits(widths)).tolist() == [0, format.max_bits]


def test_levels_in_theta_replace_listed_ones():
    format, theta = codebook((-1.0, 0.0, 1.0)), {"levels": jnp.float32([-2.0, 0.0, 0.5, 2.0])}
    x = jnp.float32([-5.0, 0.4, 1.1])
    assert qj.fake_quant(x, 1.0, format=format, theta=theta).tolist() == [-2.0, 0.5, 0.5]
    assert format.valid_bits(jnp.arange(4.0), theta).tolist() == [True, True, True, False]
    other = {"momentum": jnp.zeros(4)}  # an estimator's, not levels
    assert format.levels(ZERO + 2, other).tolist() == [-1.0, 0.0, 1.0, 1.0]


def test_nf4_is_the_published_table_and_the_formula():
    assert NF4.codebook == tuple(PUBLISHED)
    assert NF4.max_bits == 4
    assert_array_equal(NF4.levels(ZERO + 4), np.float32(PUBLISHED))
    assert_allclose(PUBLISHED, oracle.normal_float(4), atol=1e-6)
    assert_array_equal(normal_float().levels(ZERO + 4), np.float32(PUBLISHED))
    assert {Law.ZERO, Law.ROUND_TRIP} <= NF4.laws & normal_float().laws


@pytest.fixture(scope="module")
def normal_tables():
    run = jax.jit(jax.vmap(lambda bits: (NORMAL.levels(bits), *NORMAL.level_range(bits))))
    return [np.asarray(out) for out in run(jnp.arange(2.0, 9.0))]


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_is_the_quantiles_at_every_width(normal_tables, bits):
    tables, low, high = normal_tables
    row = tables[bits - 2]
    assert_allclose(row[: 2**bits], oracle.normal_float(bits), rtol=0, atol=1e-6)
    assert_array_equal(row[2**bits :], np.ones(256 - 2**bits))
    assert (np.diff(row[: 2**bits]) > 0).all()
    assert row[2 ** (bits - 1) - 1] == 0.0
    assert (low[bits - 2], high[bits - 2]) == (-1.0, 1.0)
    assert_array_equal(normal_float(max_bits=bits).levels(ZERO + bits), row[: 2**bits])


def test_normal_float_under_traced_widths(normal_tables):
    x = np.random.default_rng(0).normal(size=256).astype(np.float32)
    x = np.float32(x / np.abs(x).max())
    run = jax.jit(jax.vmap(lambda b: qj.fake_quant(jnp.asarray(x), 2.0, format=NORMAL, bits=b)))
    bypass, invalid, *rest = run(jnp.arange(9.0))
    assert_array_equal(bypass, x)
    assert np.isnan(invalid).all()
    for bits, row in enumerate(rest, 2):
        levels = normal_tables[0][bits - 2][: 2**bits]
        index = oracle.snap(x / 2, levels, "half_even")
        assert_array_equal(row, levels[index] * 2)


BAD = {
    (1.0,): "2 to 256 levels",
    tuple(range(257)): "2 to 256 levels",
    (0.0, float("nan")): "not finite",
    (0.0, float("inf")): "not finite",
    (0.0, 2.0**-130): "2^-126",
    (0.0, 2.0**127): "2^126",
    (1.0, 1.0 + 2.0**-30): "equal in float32",
    (0.0, -0.0): "equal in float32",
}


@pytest.mark.parametrize("levels", BAD, ids=lambda row: f"{BAD[row]}-{len(row)}")
def test_levels_that_are_refused(levels):
    with refused(errors.FormatError, BAD[levels]):
        codebook(levels)


def test_formats_that_are_refused():
    with refused(errors.FormatError, "ascending order"):
        CodebookFormat(codebook=(1.0, 0.0), max_bits=1)
    with refused(errors.FormatError, "5 levels do not fit into 2 bits", "max_bits=3"):
        CodebookFormat(codebook=(0.0, 1.0, 2.0, 3.0, 4.0), max_bits=2)
    for max_bits in (0, 9):
        with refused(errors.FormatError, f"got {max_bits}"):
            learned_codebook(max_bits=max_bits)
    for wrong in ({"max_bits": 1}, {"max_bits": 9}, {"max_bits": 4, "signed": False}):
        with refused(errors.FormatError):
            NormalFloatFormat(**wrong)


def test_learned_levels_that_are_missing_or_too_few():
    with refused(errors.FormatError, "no levels yet", "K_MEANS", "linspace(-1, 1, 8)"):
        qj.fake_quant(jnp.ones(3), 1.0, format=LEARNED)
    with refused(errors.FormatError, "shape (4,)", "8 levels"):
        qj.fake_quant(jnp.ones(3), 1.0, format=LEARNED, theta={"levels": jnp.zeros(4)})
