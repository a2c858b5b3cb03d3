"""Formats whose levels are a table, on one whose levels are an argument: any table is tested."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from quantjax import errors
from quantjax.formats.base import Law
from quantjax.formats.levels import ANY_LEVELS, LevelFormat, laws_of, row_of, width_table
from quantjax.rounding import CEIL, FLOOR, HALF_AWAY, HALF_EVEN, ROUNDINGS, STOCHASTIC
from tests.oracles import codebooks as oracle

pytestmark = pytest.mark.thinned(2)

ZERO = jnp.float32(0)
ALL = pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda r: r.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(LevelFormat):
    """The levels that ``theta`` holds: any table runs the same program."""

    name = "given"

    def levels(self, bits, theta=()):
        return theta["levels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squares(LevelFormat):
    """A user's format: 0, 1, 4, 9, ..."""

    signed: bool = False

    @property
    def name(self):
        return "squares"

    def levels(self, bits, theta=()):
        highest = jnp.left_shift(1, bits.astype(jnp.int32)) - 1
        return jnp.minimum(jnp.arange(1 << self.max_bits), highest).astype(jnp.float32) ** 2


SIZE = 24


@functools.cache
def _program(max_bits: int, rounding):
    """Level, unclipped level and code: one program for a container and a rounding."""
    format = Given(max_bits=max_bits)

    def run(x, levels, noise):
        theta, bits = {"levels": levels}, jnp.float32(max_bits)
        snapped = format.snap(x, ZERO, bits, rounding.given(noise), theta)
        codes = format.encode(snapped.level, bits, theta)
        return *snapped, codes, format.decode(codes, bits, theta)

    return jax.jit(run)


def run(levels, x, rounding, max_bits, noise=None):
    """Levels are padded to the container, values to ``SIZE``."""
    x = np.asarray(x, np.float32)
    padded = np.resize(x, SIZE)
    noise = np.full(SIZE, 0.5, np.float32) if noise is None else noise
    table = np.float32([*levels, *[levels[-1]] * ((1 << max_bits) - len(levels))])
    return tuple(
        np.asarray(out)[: x.size] for out in _program(max_bits, rounding)(padded, table, noise)
    )


def numbers() -> st.SearchStrategy[float]:
    """Any scale, nothing subnormal, differences exact in float64."""
    plain = st.one_of(
        st.integers(-64, 64).map(lambda n: n / 8),
        st.floats(-9.0, 9.0, width=32),
        st.floats(-(2.0**20), 2.0**20, width=32),
    )
    return plain.map(lambda v: v if abs(v) >= 2.0**-28 else 0.0)


@st.composite
def tables(draw, most: int):
    values = draw(st.lists(numbers(), min_size=2, max_size=most, unique=True))
    return np.sort(np.float32(values))


@st.composite
def values_near(draw, levels):
    """Levels, float32 neighbours of levels and of midpoints, and anything else."""
    i = draw(st.integers(0, len(levels) - 2))
    low, high = np.float64(levels[i]), np.float64(levels[i + 1])
    middle = np.float32((low + high) / 2)
    anchors = np.float32([low, middle, low + (high - low) / 4])
    near = [np.nextafter(a, np.float32(s)) for a in anchors for s in (-np.inf, np.inf)]
    rest = draw(st.lists(numbers(), min_size=SIZE - 9, max_size=SIZE - 9))
    x = np.float32([*anchors, *near, *rest])
    return np.where(np.abs(x) < 2.0**-28, np.float32(0), x)


@pytest.mark.parametrize("max_bits", [1, 3, 5])
@ALL
@given(data=st.data())
def test_every_rounding_equals_comparing_with_all_levels(rounding, max_bits, data):
    levels = data.draw(tables(1 << max_bits))
    x = data.draw(values_near(levels))
    noise = np.float32(data.draw(st.integers(0, 255))) / np.float32(256)
    level, unclipped, codes, decoded = run(levels, x, rounding, max_bits, np.full(SIZE, noise))
    want = oracle.snap(x, levels, rounding.name, noise)
    if rounding.is_random:  # a fraction is known to 2^-22
        clear = np.abs(oracle.fraction(x, levels) - noise) > 2.0**-22
        clear |= oracle.fraction(x, levels) == 0.0
        level, want, codes, unclipped, decoded, x = (
            array[clear] for array in (level, want, codes, unclipped, decoded, x)
        )
    assert_array_equal(level, levels[want])
    assert_array_equal(codes, want)
    assert_array_equal(decoded, level)
    outside = (x < levels[0]) | (x > levels[-1])
    assert_array_equal(unclipped, np.where(outside, x, level))


@ALL
@pytest.mark.parametrize("max_bits", [3, 5, 8])
def test_a_level_stays_itself(rounding, max_bits):
    rng = np.random.default_rng(max_bits)
    levels = np.unique(rng.normal(size=1 << max_bits).astype(np.float32))
    for part in np.array_split(levels, -(-len(levels) // SIZE)):
        for noise in (0.0, 0.999):
            level, unclipped, codes, _ = run(
                levels, part, rounding, max_bits, np.full(SIZE, noise, np.float32)
            )
            assert_array_equal(level, part)
            assert_array_equal(unclipped, part)
            assert_array_equal(codes, np.searchsorted(levels, part))


@pytest.mark.parametrize("max_bits", [3, 8])
def test_monotone_and_nearest(max_bits):
    rng = np.random.default_rng(0)
    levels = np.unique(rng.standard_t(2, size=1 << max_bits).astype(np.float32))
    x = np.sort(rng.standard_t(2, size=2000).astype(np.float32) * 2)
    format, theta = Given(max_bits=max_bits), {"levels": jnp.asarray(levels)}
    bits = jnp.float32(max_bits)
    for rounding in (HALF_EVEN, HALF_AWAY, FLOOR, CEIL):
        snap = jax.jit(functools.partial(format.snap, rounding=rounding))
        y = np.asarray(snap(x, ZERO, bits, theta=theta).level)
        assert (np.diff(y) >= 0).all()
        if rounding.is_nearest:
            closest = np.abs(np.float64(x)[:, None] - np.float64(levels)).min(1)
            assert_array_equal(np.abs(np.float64(x) - np.float64(y)), closest)


def test_ties_by_hand():
    levels, x = (-4.0, -2.0, 0.0, 1.0), [-3.0, -1.0, 0.5]
    assert run(levels, x, HALF_EVEN, 2)[0].tolist() == [-4, 0, 0]
    assert run(levels, x, HALF_AWAY, 2)[0].tolist() == [-4, -2, 1]
    assert run((-1.0, 1.0), [0.0, -0.0], HALF_AWAY, 1)[0].tolist() == [1, 1]


def test_a_midpoint_that_is_no_float32_is_not_a_tie():
    # The middle of 0.1 and 1 lies between two float32; rounded differences call the lower a tie.
    low, high = np.float32(0.1), np.float32(1.0)
    middle = (np.float64(low) + np.float64(high)) / 2
    below = np.float32(middle)
    below = below if below <= middle else np.nextafter(below, np.float32(0))
    above = np.nextafter(below, np.float32(2))
    assert below < middle < above
    for rounding in (HALF_EVEN, HALF_AWAY):
        assert run((low, high), [below, above], rounding, 1)[0].tolist() == [low, high]


def test_the_fraction_is_not_rounded_into_the_index():
    # At index 201, 201 + t would lose all but 16 bits of t.
    levels = np.arange(256, dtype=np.float32)
    tiny = np.float32(201) + np.float32(2.0**-16)
    assert run(levels, [tiny], CEIL, 8)[0].tolist() == [202]
    assert run(levels, [np.float32(202) - np.float32(2.0**-16)], FLOOR, 8)[0].tolist() == [201]


@example(levels=np.float32([-3, -1]), share=0.3)
@given(levels=tables(4), share=st.floats(0.05, 0.95))
def test_stochastic_rounding_is_unbiased(levels, share):
    low, high = np.float64(levels[0]), np.float64(levels[1])
    x = np.float32(low + share * (high - low))
    table = np.float32([*levels, *[levels[-1]] * (4 - len(levels))])
    y = np.asarray(_sampled(x, table), np.float64)
    # Six standard deviations of a mean of 4096 numbers, each low or high.
    assert abs(y.mean() - x) <= 6 * (high - low) / 2 / 64 + 1e-6 * abs(x)
    assert set(y) <= {low, high}


@jax.jit
def _sampled(x, table):
    draws, key = 4096, jax.random.key(3)
    rounding = STOCHASTIC.given(STOCHASTIC.noise(key, (draws,)))
    format, theta = Given(max_bits=2), {"levels": table}
    return format.snap(jnp.full(draws, x), ZERO, jnp.float32(2), rounding, theta).level


@pytest.mark.parametrize("max_bits", [2, 5])
def test_nan_stays_and_infinities_saturate(max_bits):
    levels = (-2.0, -1.0, 3.0)
    x = [np.nan, np.inf, -np.inf, 5.0, -7.0]
    for rounding in ROUNDINGS:
        level, unclipped, _, _ = run(levels, x, rounding, max_bits)
        assert_array_equal(level, [np.nan, 3, -2, 3, -2])
        assert_array_equal(unclipped, [np.nan, np.inf, -np.inf, 5, -7])


def test_equal_levels_do_no_harm():
    for levels in ((1.0, 1.0), (-1.0, 0.0, 0.0, 0.0, 2.0)):
        level, _, codes, decoded = run(levels, [-2.0, -0.3, 0.0, 0.4, 9.0], HALF_EVEN, 3)
        assert np.isfinite(level).all()
        assert set(level) <= set(levels)
        assert_array_equal(decoded, level)
        assert_array_equal(codes, [levels.index(v) for v in level])  # the first of equal ones


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_every_code_comes_back(bits):
    format, width = Squares(max_bits=8), jnp.float32(bits)
    codes = jnp.arange(1 << bits, dtype=jnp.uint8)
    levels = format.decode(codes, width)
    assert levels.dtype == jnp.float32
    assert_array_equal(levels, np.arange(1 << bits) ** 2)
    back = format.encode(levels, width)
    assert back.dtype == format.storage_dtype == jnp.uint8
    assert_array_equal(back, codes)
    # Codes beyond the width stand for the highest level.
    beyond = format.decode(jnp.arange(256, dtype=jnp.uint8), width)
    assert_array_equal(beyond[1 << bits :], np.full(256 - (1 << bits), ((1 << bits) - 1) ** 2))


@pytest.mark.parametrize("max_bits", [4, 8])
def test_traced_widths_equal_static_ones_in_one_compilation(max_bits):
    format, x = Squares(max_bits=max_bits), jnp.linspace(-3.0, 300.0, 64)
    traces = []

    def run(bits):
        traces.append(bits)
        snapped = format.snap(x, ZERO, bits, HALF_EVEN)
        codes = format.encode(snapped.level, bits)
        return *snapped, codes, format.decode(codes, bits), *format.level_range(bits)

    widths = jnp.arange(1.0, max_bits + 1)
    jitted = jax.jit(run)
    cells = [jitted(width) for width in widths]
    assert len(traces) == 1
    mapped = jax.jit(jax.vmap(run))(widths)
    looped = jax.jit(lambda w: jax.lax.map(run, w))(widths)
    for cell, width in enumerate(range(1, max_bits + 1)):
        static = run(jnp.float32(width))
        for got in (cells[cell], [m[cell] for m in mapped], [m[cell] for m in looped]):
            for one, other in zip(got, static, strict=True):
                assert_array_equal(one, other)
        if width in (1, 3):  # a container, and a compilation, each
            narrow = Squares(max_bits=width).snap(x, ZERO, jnp.float32(width), HALF_EVEN)
            assert_array_equal(static[0], narrow.level)


@pytest.mark.parametrize("max_bits", [3, 5])
def test_stacked_layers_have_a_width_and_a_table_each(max_bits):
    rng = np.random.default_rng(1)
    format, widths = Given(max_bits=max_bits), jnp.array([1.0, 2.0, 3.0])
    theta = {"levels": jnp.sort(jnp.asarray(rng.normal(size=(3, 1 << max_bits)), jnp.float32))}
    x = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)

    @jax.jit
    def run(x, bits, theta):
        level, unclipped = format.snap(x, ZERO, bits, HALF_EVEN, theta)
        codes = format.encode(level, bits, theta)
        back = format.decode(codes, bits, theta)
        return level, unclipped, codes, back, *format.level_range(bits, theta)

    together = level, _, _, back, low, high = run(x, widths, theta)
    for layer in range(3):
        alone = run(x[layer], widths[layer], {"levels": theta["levels"][layer]})
        for stacked, own in zip(together, alone, strict=True):
            assert_array_equal(stacked[layer], own)
    assert_array_equal(back, level)
    assert_array_equal(low, theta["levels"][:, 0])
    assert_array_equal(high, theta["levels"][:, -1])


@pytest.mark.parametrize("max_bits", [2, 5])
def test_the_gradient_of_a_level_is_the_sum_over_its_entries(max_bits):
    rng = np.random.default_rng(2)
    size = 1 << max_bits
    theta = {"levels": jnp.sort(jnp.asarray(rng.normal(size=size), jnp.float32))}
    x = jnp.asarray(rng.normal(size=200), jnp.float32)
    cotangent = rng.normal(size=200).astype(np.float32)
    format, bits = Given(max_bits=max_bits), jnp.float32(max_bits)

    def snap(theta):
        return format.snap(x, ZERO, bits, HALF_EVEN, theta).level

    @jax.jit
    def gradients(theta):
        codes = format.encode(snap(theta), bits, theta)
        decoded = jax.grad(lambda t: jnp.vdot(format.decode(codes, bits, t), cotangent))(theta)
        return codes, decoded, jax.grad(lambda t: jnp.vdot(snap(t), cotangent))(theta)

    codes, decoded, snapped = gradients(theta)
    want = np.bincount(np.asarray(codes), np.float64(cotangent), size)
    np.testing.assert_allclose(decoded["levels"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(snapped["levels"], want, rtol=1e-5, atol=1e-5)


def test_a_format_of_ones_own():
    format, bits = Squares(max_bits=3), jnp.float32(2)
    assert format.label(2) == "squares2"
    assert [float(v) for v in format.level_range(bits)] == [0.0, 9.0]
    assert format.snap(jnp.array([2.6, 8.0, 99.0]), ZERO, bits, HALF_EVEN).level.tolist() == [
        4,
        9,
        9,
    ]
    assert float(format.unit(bits)) == 5.0
    assert [float(format.steps(bits, symmetric=s)) for s in (True, False)] == [9.0, 9.0]
    assert format.laws == ANY_LEVELS
    assert not format.has_zero_point
    assert format.largest_centered_code(symmetric=True) is None
    assert format.map_groups((), jnp.negative) == ()
    assert format == Squares(max_bits=3)
    assert hash(format) == hash(Squares(max_bits=3))


def test_steps_and_unit():
    format, bits = Given(max_bits=2), jnp.float32(2)
    theta = {"levels": jnp.array([-4.0, 0.5, 2.0, 2.0])}
    assert float(format.steps(bits, symmetric=True, theta=theta)) == 4.0
    assert float(format.steps(bits, symmetric=False, theta=theta)) == 6.0
    assert float(format.unit(bits, theta)) == 1.5
    assert float(format.unit(bits, {"levels": jnp.ones(4)})) == 1.0
    assert_array_equal(Squares(max_bits=4).unit(jnp.array([1.0, 2.0, 3.0])), [1, 5, 13])


def test_tables_of_widths():
    table = width_table({2: (-1, 0, 1), 3: (0, 1, 2, 3, 4)}, 3)
    assert table.dtype == np.float32
    assert table[:3].tolist() == [[-1, 0, 1, 1, 1, 1, 1, 1]] * 3
    assert table[3].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    rows = jax.jit(jax.vmap(lambda bits: row_of(table, bits)))(jnp.array([-1.0, 2.0, 3.0, 99.0]))
    assert_array_equal(rows, table[[0, 2, 3, 3]])


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        ({1: (0.0, 1.0), 2: (0.0, 1.0, 2.0, 4.0)}, {Law.ZERO, Law.ROUND_TRIP}),
        ({2: (-1.0, 0.0, 1.0)}, {Law.ZERO, Law.ODD}),
        ({2: (-2.0, -1.0, 1.0, 2.0)}, {Law.ROUND_TRIP}),
        ({1: (-1.0, 1.0), 2: (-1.0, 0.0, 1.0)}, set()),
        ({2: (-1.0, 0.0, 2.0)}, {Law.ZERO}),
    ],
)
def test_laws_follow_from_the_levels(rows, more):
    assert laws_of(rows) - ANY_LEVELS == more


def test_an_even_number_of_symmetric_levels_is_not_odd_on_ties():
    # The counterexample that keeps Law.ODD from formats like this one.
    levels = (-2.0, -1.0, 1.0, 2.0)
    got = run(levels, [-1.5, 1.5], HALF_EVEN, 2)[0]
    assert got[0] != -got[1]
    odd = run((-2.0, -1.0, 0.0, 1.0, 2.0), [-1.5, -0.5, 0.5, 1.5], HALF_EVEN, 3)[0]
    assert_array_equal(odd, -odd[::-1])


@pytest.mark.parametrize("max_bits", [-1, 0, 9, 16])
def test_a_container_that_cannot_exist(max_bits):
    with pytest.raises(errors.FormatError, match=f"got {max_bits}\n"):
        Squares(max_bits=max_bits)


def test_levels_that_do_not_fill_the_container():
    theta = {"levels": jnp.zeros(3)}
    with pytest.raises(errors.FormatError, match=r"\(3,\) do not fill 2 bits"):
        Given(max_bits=2).level_range(jnp.float32(2), theta)


def test_valid_widths():
    whole = jnp.arange(-2.0, 12.0)
    assert_array_equal(Squares(max_bits=5).valid_bits(whole), (whole >= 0) & (whole <= 5))
    assert not Squares().valid_bits(jnp.array([0.5, jnp.nan, jnp.inf])).any()
