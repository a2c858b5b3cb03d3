"""Integer formats: code ranges, step counts, containers, rounding into range."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantjax
from quantjax import errors, integer
from quantjax.rounding import HALF_AWAY, HALF_EVEN
from tests.oracles import affine as oracle
from tests.oracles.integers import Integers, bounds, levels

FAMILIES = tuple(itertools.product((True, False), (False, True)))
ALL = pytest.mark.parametrize(("signed", "narrow"), FAMILIES)
WIDTHS = np.arange(1, 17, dtype=np.float32)


@ALL
@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
def test_code_ranges(signed, narrow, transform):
    low, high = transform(integer(max_bits=16, signed=signed, narrow=narrow).level_range)(WIDTHS)
    want = [bounds(Integers(bits, signed, narrow)) for bits in range(1, 17)]
    assert low.dtype == high.dtype == jnp.float32
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == want


def test_code_ranges_by_hand():
    table = {
        (True, False): [(-1, 1), (-2, 1), (-128, 127), (-32768, 32767)],
        (True, True): [(-1, 1), (-1, 1), (-127, 127), (-32767, 32767)],
        (False, False): [(0, 1), (0, 3), (0, 255), (0, 65535)],
        (False, True): [(0, 1), (1, 3), (1, 255), (1, 65535)],
    }
    for (signed, narrow), rows in table.items():
        low, high = integer(max_bits=16, signed=signed, narrow=narrow).level_range(
            jnp.array([1.0, 2.0, 8.0, 16.0])
        )
        assert list(zip(low.tolist(), high.tolist(), strict=True)) == rows


@ALL
@pytest.mark.parametrize("symmetric", [True, False])
def test_step_counts(signed, narrow, symmetric):
    format = integer(max_bits=16, signed=signed, narrow=narrow)
    for bits in range(1, 17):
        want = oracle.step_count(Integers(bits, signed, narrow), symmetric=symmetric)
        assert float(format.steps(jnp.float32(bits), symmetric=symmetric)) == want


@pytest.mark.parametrize(
    ("max_bits", "signed", "dtype"),
    [
        (1, True, jnp.int8),
        (8, True, jnp.int8),
        (8, False, jnp.uint8),
        (9, True, jnp.int16),
        (9, False, jnp.uint16),
        (16, True, jnp.int16),
        (16, False, jnp.uint16),
    ],
)
@pytest.mark.parametrize("narrow", [True, False])
def test_the_storage_type_holds_every_code(max_bits, signed, dtype, narrow):
    format = integer(max_bits=max_bits, signed=signed, narrow=narrow)
    assert format.storage_dtype == dtype
    for bits in range(1, max_bits + 1):
        low, high = bounds(Integers(bits, signed, narrow))
        assert jnp.iinfo(dtype).min <= low <= high <= jnp.iinfo(dtype).max


@ALL
@pytest.mark.parametrize("max_bits", [1, 2, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_bound_of_centered_codes_holds_and_is_reached(signed, narrow, max_bits, symmetric):
    format = integer(max_bits=max_bits, signed=signed, narrow=narrow)
    bound = format.largest_centered_code(symmetric=symmetric)
    low, high = bounds(Integers(max_bits, signed, narrow))
    # A symmetric zero point is 0, an asymmetric one any code.
    zeros = (0,) if symmetric else (low, high)
    largest = max(abs(code - zero) for code in (low, high) for zero in zeros)
    assert largest <= bound
    if not narrow and (signed or max_bits > 1):
        assert bound == largest


@ALL
@pytest.mark.parametrize("rounding", [HALF_EVEN, HALF_AWAY], ids=lambda r: r.name)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_snap_gives_the_nearest_code(signed, narrow, rounding, bits):
    format, codes = integer(signed=signed, narrow=narrow), levels(Integers(bits, signed, narrow))
    zero_point = 1.0
    # Off the ties, where both roundings agree; far below and above too.
    scaled = np.arange(-300, 300, dtype=np.float32) + np.float32(0.3)
    snapped = format.snap(jnp.asarray(scaled), zero_point, jnp.float32(bits), rounding)
    got = np.asarray(snapped.level)
    distance = np.abs(scaled[:, None] + zero_point - np.array(codes, np.float64))
    assert_array_equal(got, np.array(codes)[distance.argmin(1)])


def test_snap_follows_its_rounding_on_ties():
    ties, zero, bits = jnp.array([-2.5, -0.5, 0.5, 1.5, 2.5]), jnp.float32(1), jnp.float32(8)
    assert integer().snap(ties, zero, bits, HALF_EVEN).level.tolist() == [-1, 1, 1, 3, 3]
    assert integer().snap(ties, zero, bits, HALF_AWAY).level.tolist() == [-2, 0, 2, 3, 4]


def test_one_signed_bit_is_a_sign_and_zero_is_plus_one():
    x = jnp.array([-jnp.inf, -5.0, -1e-30, -0.0, 0.0, 1e-30, 0.4, jnp.inf, jnp.nan])
    for narrow in (True, False):
        format = integer(signed=True, narrow=narrow)
        got = format.snap(x, jnp.float32(0), jnp.float32(1), HALF_EVEN).level
        assert_array_equal(got, [-1, -1, -1, 1, 1, 1, 1, 1, np.nan])


@pytest.mark.parametrize("max_bits", [1, 8, 16])
def test_valid_widths(max_bits):
    format = integer(max_bits=max_bits)
    whole = np.arange(-2, 20, dtype=np.float32)
    assert_array_equal(format.valid_bits(whole), (whole >= 0) & (whole <= max_bits))
    assert not format.valid_bits(jnp.array([0.5, 1.0001, -0.5, jnp.nan, jnp.inf, -jnp.inf])).any()


@pytest.mark.parametrize("max_bits", [-1, 0, 17, 32])
def test_a_container_that_cannot_exist(max_bits):
    with pytest.raises(errors.FormatError, match=rf"got {max_bits}\n") as caught:
        integer(max_bits=max_bits)
    # The suggested edit works.
    assert eval(caught.value.fix, {"qj": quantjax}) == integer(max_bits=1 if max_bits < 1 else 16)


def test_formats_are_values():
    assert integer(max_bits=4) == integer(max_bits=4)
    assert hash(integer(max_bits=4)) == hash(integer(max_bits=4))
    assert len({integer(signed=signed, narrow=narrow) for signed, narrow in FAMILIES}) == 4
    names = [integer(signed=signed, narrow=narrow).name for signed, narrow in FAMILIES]
    assert names == ["int", "int-narrow", "uint", "uint-narrow"]
    with pytest.raises(AttributeError):
        integer().max_bits = 4
