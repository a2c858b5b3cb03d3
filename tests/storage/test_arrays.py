"""Numbers in text: every float32 comes back with its bits, and nothing that is none comes in."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from quantjax import errors
from quantjax.storage.arrays import decode_array, encode_array, known_array
from tests import models
from tests.refused import refused
from tests.storage import cases


def of_bits(*bits: int) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


def trip(array):
    """Through text, as a file would."""
    return decode_array(json.loads(json.dumps(encode_array(array, "x"), allow_nan=False)), "x")


@given(cases.float32_arrays())
def test_every_array_comes_back_with_its_bits(array):
    back = trip(array)
    assert isinstance(back, jax.Array)
    models.assert_same_bits(back, array)


@pytest.mark.parametrize("bits", cases.SPECIAL_BITS, ids=hex)
def test_special_numbers(bits):
    models.assert_same_bits(trip(of_bits(bits)), of_bits(bits))
    models.assert_same_bits(trip(of_bits(bits).reshape(())), of_bits(bits).reshape(()))


def test_ten_thousand_random_numbers():
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32)
    array = bits.view(np.float32).reshape(100, 100)
    models.assert_same_bits(trip(array), array)


def test_neighbours_of_powers_of_ten():
    """Where the shortest decimal text is shortest, and nearest to half-way between two numbers."""
    powers = np.array([10.0**n for n in range(-44, 39)], np.float32)
    up, down = np.nextafter(powers, np.float32(np.inf)), np.nextafter(powers, np.float32(0))
    array = np.concatenate([powers, up, down, -powers])
    models.assert_same_bits(trip(array), array)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (of_bits(0x3DCCCCCD), "0.1"),
        (of_bits(0x80000000), "-0.0"),
        (of_bits(0x7F800000), '"inf"'),
        (of_bits(0xFF800000), '"-inf"'),
        (of_bits(0x7FC00000), '"nan"'),
        (of_bits(0xFFC00000), '"nan:ffc00000"'),
        (of_bits(0x7F800001), '"nan:7f800001"'),
        (np.float32([16777216.0]), "16777216.0"),
        (np.float32([1e-45]), "1e-45"),
    ],
)
def test_the_text_is_the_shortest(value, text):
    assert json.dumps(encode_array(value, "x")["values"]) == f"[{text}]"


def test_values_are_in_row_major_order():
    array = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    assert encode_array(array.T, "x") == {"shape": [2, 2], "values": [1.0, 3.0, 2.0, 4.0]}
    assert encode_array(np.asfortranarray(array), "x")["values"] == [1.0, 2.0, 3.0, 4.0]


def test_numbers_that_somebody_typed():
    data = {"shape": [4], "values": [8, 0.1, 0.30000000000000004, 1e-60]}
    expected = np.array([8, 0.1, 0.3, 0], np.float32)
    models.assert_same_bits(decode_array(data, "x"), jnp.asarray(expected))


@pytest.mark.parametrize(
    "value",
    [None, True, "0.5", "NaN", "nan:", [1.0], {"float": "inf"}, 1e39, -(10**400)],
)
def test_values_that_are_no_float32(value):
    with refused(errors.StorageError, "is no float32 number", "where: scale"):
        decode_array({"shape": [1], "values": [value]}, "scale")


@pytest.mark.parametrize(
    "digits",
    [
        "7fc0000",
        "7fc000000",
        "3f800000",
        "7f800000",
        "ff800000",
        "zzzzzzzz",
        "-0000001",
        " 7fc0001",
    ],
)
def test_digits_that_are_no_nan(digits):
    with refused(errors.StorageError, f"'nan:{digits}' is no float32 number", "eight"):
        decode_array({"shape": [1], "values": [f"nan:{digits}"]}, "scale")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"shape": [2**32, 2**32], "values": []}, "0 values for an array"),
        ({"shape": [2], "values": [1.0]}, "1 values for an array of shape 2"),
        ({"shape": [], "values": []}, "0 values for an array of shape scalar"),
        ({"shape": [-1], "values": []}, "shape and values are lists"),
        ({"shape": [1.0], "values": [1.0]}, "shape and values are lists"),
        ({"shape": 1, "values": [1.0]}, "shape and values are lists"),
        ({"shape": [], "values": 1.0}, "shape and values are lists"),
        ({"shape": [2**40, 2**40], "values": [1.0]}, "1 values for an array"),
        ({"values": [1.0]}, "keys shape, values"),
        ({"shape": [], "values": [1.0], "dtype": "int8"}, "found dtype, shape, values"),
        ([1.0], "keys shape, values"),
        (1.0, "keys shape, values"),
    ],
)
def test_data_that_is_no_array(data, reason):
    with refused(errors.StorageError, reason, "where: scale"):
        decode_array(data, "scale")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8", "bool"])
def test_other_dtypes_are_refused(dtype):
    with refused(errors.StorageError, f"{dtype} numbers where QParams hold float32", "where: x"):
        encode_array(np.ones(2, dtype), "x")


@pytest.mark.parametrize("leaf", [1.0, True, "x", object(), np.array("x"), np.array([None])])
def test_leaves_that_are_no_arrays(leaf):
    with refused(errors.StorageError, "is no array of numbers", "where: here"):
        known_array(leaf, "here")


def test_random_keys_are_refused_with_the_way_to_their_numbers():
    key = jax.random.key(0)
    with refused(errors.StorageError, "no dtype of numbers", "jax.random.key_data"):
        known_array(key, "here")
    assert known_array(jax.random.key_data(key), "here").dtype == np.uint32


def test_traced_arrays_are_refused():
    def save(x):
        return known_array(x, "here")

    with refused(errors.StorageError, "traced", "outside of jax.jit"):
        jax.jit(save)(jnp.ones(2))
    with refused(errors.StorageError, "traced"):
        jax.vmap(save)(jnp.ones(2))


@pytest.mark.parametrize("leaf", [np.float32(1.0), np.ones(2, "int4"), jnp.ones(2), np.True_])
def test_arrays_stay_as_they_are(leaf):
    models.assert_same_bits(known_array(leaf, "here"), np.asarray(leaf))
