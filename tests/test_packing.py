"""Packed codes: exact, laid out as stated, and blind to every axis but the last."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from jax import lax
from numpy.testing import assert_array_equal

from quantjax import errors
from quantjax.packing import Packing, can_pack, pack, unpack

pytestmark = pytest.mark.thinned(3)

KINDS = tuple(itertools.product((1, 2, 4), (True, False)))
EACH = pytest.mark.parametrize(("bits", "signed"), KINDS)
# Some fill bytes, and words of two and of four bytes, at each size.
LENGTHS = (*range(1, 18), 31, 32, 33, 64)
SHAPES = ((3,), (1,), (5, 1), (2, 3, 8), (0, 4), (2, 0), (3, 0, 5))


def levels(bits: int, signed: bool) -> np.ndarray:
    """All codes of a size."""
    if not signed:
        return np.arange(2**bits, dtype=np.uint8)
    return (
        np.array([-1, 1], np.int8)
        if bits == 1
        else np.arange(-(2**bits) // 2, 2**bits // 2, dtype=np.int8)
    )


def as_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The model: a row is a string of bits, each code written lowest bit first."""
    ranks = (codes > 0) * 1 if bits == 1 else np.int64(codes) % 2**bits
    string = (ranks[..., None] >> np.arange(bits)) % 2
    return np.packbits(
        string.reshape(*codes.shape[:-1], codes.shape[-1] * bits).astype(np.uint8),
        axis=-1,
        bitorder="little",
    )


def as_codes(packed: np.ndarray, bits: int, signed: bool, length: int) -> np.ndarray:
    """Back from the string of bits, by place values; the highest is negative where signed."""
    string = np.unpackbits(packed, axis=-1, bitorder="little", count=length * bits)
    string = string.reshape(*packed.shape[:-1], length, bits).astype(np.int64)
    if signed and bits == 1:
        return 2 * string[..., 0] - 1
    values = 2 ** np.arange(bits)
    return string @ np.where(signed & (values == values.max()), -values, values)


def some_codes(shape: tuple[int, ...], bits: int, signed: bool, seed: int = 0) -> np.ndarray:
    """Codes at random, in their storage type."""
    return np.random.default_rng(seed).choice(levels(bits, signed), shape)


@EACH
def test_every_code_at_every_place_of_every_length(bits, signed):
    codes = levels(bits, signed)
    # Row r has code r + 3k at place k: over the rows, each place sees each code.
    turns = [np.arange(len(codes))[:, None] + 3 * np.arange(length) for length in LENGTHS]
    rows = [codes[turn % len(codes)] for turn in turns]

    @jax.jit
    def there_and_back(rows):
        packed = [pack(row, bits, signed=signed) for row in rows]
        return packed, [unpack(*one) for one in packed]

    packed, unpacked = there_and_back(rows)
    for row, (got, packing), back in zip(rows, packed, unpacked, strict=True):
        assert got.dtype == jnp.uint8
        assert back.dtype == row.dtype == packing.dtype
        assert packing == Packing(bits, row.shape[-1], signed)
        assert_array_equal(got, as_bytes(row, bits))
        assert_array_equal(back, row)


@EACH
@pytest.mark.parametrize("places", [1, 2, 4])
def test_bytes_and_rows_of_codes_are_the_same_thing(bits, signed, places):
    # Each byte at each place of a row, its neighbours others.
    every_byte = (np.arange(256)[:, None] + 85 * np.arange(places)).astype(np.uint8)
    packing = Packing(bits, places * 8 // bits, signed)
    codes = unpack(every_byte, packing)
    assert_array_equal(codes, as_codes(every_byte, bits, signed, packing.length))
    assert len({tuple(row) for row in codes.tolist()}) == 256
    assert set(codes.ravel().tolist()) == set(levels(bits, signed).tolist())
    assert_array_equal(pack(codes, bits, signed=signed)[0], every_byte)


def test_the_first_code_is_lowest():
    def packed(codes, bits, signed):
        array = jnp.array(codes, jnp.int8 if signed else jnp.uint8)
        return pack(array, bits, signed=signed)[0].tolist()

    assert packed([1, 2, 15], 4, signed=False) == [0x21, 0x0F]
    assert packed([1, -2, -8], 4, signed=True) == [0xE1, 0x08]
    assert packed([3, 0, 1, 2, 1], 2, signed=False) == [0b10_01_00_11, 0b01]
    assert packed([-1, 1, -2, 0], 2, signed=True) == [0b00_10_01_11]
    assert packed([1, 0, 0, 0, 0, 0, 0, 1, 1], 1, signed=False) == [0b1000_0001, 1]
    assert packed([1, -1, -1, 1], 1, signed=True) == [0b1001]


@EACH
@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 1), (8, 8), (9, 16), (1000, 1000)])
def test_sizes(bits, signed, length, size):
    packing = Packing(bits, length, signed)
    assert packing.codes_per_byte * bits == 8
    assert packing.packed_length == -(-length * bits // 8)
    assert packing.packed_length <= size * bits // 8 + 1
    shape = jax.eval_shape(
        lambda c: pack(c, bits, signed=signed)[0], np.zeros((7, length), packing.dtype)
    )
    assert shape.shape == (7, packing.packed_length)
    assert shape.dtype == jnp.uint8


@EACH
def test_shapes_and_types(bits, signed):
    arrays = [some_codes(shape, bits, signed) for shape in SHAPES]

    @jax.jit
    def there_and_back(arrays):
        packed = [pack(codes, bits, signed=signed) for codes in arrays]
        return packed, [unpack(*one) for one in packed]

    for codes, (packed, packing), back in zip(arrays, *there_and_back(arrays), strict=True):
        assert packed.shape == (*codes.shape[:-1], packing.packed_length)
        assert back.shape == codes.shape
        assert back.dtype == codes.dtype
        assert_array_equal(back, codes)


@EACH
def test_filling_is_zero_bits(bits, signed):
    highest = levels(bits, signed)[[-1]]  # all of its bits set, but for two's complement the sign
    packed, packing = pack(highest, bits, signed=signed)
    assert packing.packed_length == 1
    assert int(packed[0]) >> bits == 0
    # What lies in the filling is never read.
    assert_array_equal(unpack(packed | jnp.uint8(0xFF << bits & 0xFF), packing), highest)


@EACH
def test_codes_out_of_range_leave_their_neighbours_alone(bits, signed):
    dtype = np.int8 if signed else np.uint8
    every = np.arange(256).astype(np.uint8).view(dtype)
    left, right = levels(bits, signed)[[0, -1]]
    rows = np.stack([np.full(256, left), every, np.full(256, right)], -1)
    got = np.asarray(unpack(*pack(rows, bits, signed=signed)))
    assert_array_equal(got[:, 0], np.full(256, left))
    assert_array_equal(got[:, 2], np.full(256, right))
    inside = np.isin(every, levels(bits, signed))
    assert_array_equal(got[inside], rows[inside])
    assert not (got[~inside, 1] == every[~inside]).any()


INDICES = (
    (0,),
    (-1,),
    (slice(None, 1),),
    (slice(None, None, -1),),
    (slice(None), 1),
    (slice(None), slice(1, None)),
    (slice(None), np.array([2, 0, 0])),
    (np.array([True, False]),),
    (slice(None), None),
)


def commutes(operations, codes: list[np.ndarray], bits: int, signed: bool) -> None:
    """Each operation on bytes does to codes what it does on codes; both ways, in one program."""
    pack_all = jax.jit(lambda arrays: [pack(array, bits, signed=signed) for array in arrays])
    both = [(np.asarray(packed), packing) for packed, packing in pack_all(codes)]
    (packed, others), packing = [packed for packed, _ in both], both[0][1]
    on_codes = [operation(*codes) for operation in operations]
    on_bytes = [operation(packed, others) for operation in operations]
    unpack_all = jax.jit(lambda arrays: [unpack(array, packing) for array in arrays])
    for got, want in zip(unpack_all(on_bytes), on_codes, strict=True):
        assert_array_equal(got, want)
    for (got, _), want in zip(pack_all(on_codes), on_bytes, strict=True):
        assert_array_equal(got, want)


@EACH
def test_slicing_commutes_with_packing(bits, signed):
    codes = [some_codes((2, 3, 11), bits, signed, seed) for seed in (1, 2)]
    # As defaults: a closure would see the last index only.
    commutes([lambda a, _, index=index: a[index] for index in INDICES], codes, bits, signed)


@EACH
def test_joining_and_reordering_commute_with_packing(bits, signed):
    codes = [some_codes((2, 3, 5), bits, signed, seed) for seed in (1, 2)]
    operations = [
        lambda a, b: np.concatenate([a, b], 0),
        lambda a, b: np.concatenate([a, b], 1),
        lambda a, b: np.stack([a, b]),
        lambda a, _: np.swapaxes(a, 0, 1),
        lambda a, _: a.reshape(6, a.shape[-1]),
        lambda a, b: np.where(np.array([True, False])[:, None, None], a, b),
    ]
    commutes(operations, codes, bits, signed)


def test_joining_along_the_packed_axis_does_not_commute():
    codes = np.array([1, 2, 3], np.int8)  # an odd length: the second row starts at half a byte
    packed = np.asarray(pack(codes, 4, signed=True)[0])
    joined = pack(np.concatenate([codes, codes]), 4, signed=True)[0]
    assert np.concatenate([packed, packed]).tolist() != joined.tolist()


@EACH
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap(bits, signed, axis):
    codes = some_codes((2, 3, 5), bits, signed)
    packed, packing = pack(codes, bits, signed=signed)
    mapped, static = jax.vmap(lambda c: pack(c, bits, signed=signed), in_axes=axis, out_axes=axis)(
        codes
    )
    assert static == packing
    assert_array_equal(mapped, packed)
    back = jax.vmap(lambda p: unpack(p, packing), in_axes=axis, out_axes=axis)(packed)
    assert_array_equal(back, codes)


@EACH
def test_scan(bits, signed):
    codes = some_codes((4, 3, 5), bits, signed)
    packed, packing = pack(codes, bits, signed=signed)

    @jax.jit
    def stacked_layers(packed):
        def layer(total, layer_bytes):
            codes = unpack(layer_bytes, packing)
            return total + codes.astype(jnp.int32), pack(codes, bits, signed=signed)

        return lax.scan(layer, jnp.zeros((3, 5), jnp.int32), packed)

    total, (repacked, static) = stacked_layers(packed)
    assert static == packing
    assert_array_equal(total, codes.astype(np.int32).sum(0))
    assert_array_equal(repacked, packed)


@EACH
def test_donated_bytes_are_replaced(bits, signed):
    codes = some_codes((4, 16), bits, signed)
    packed, packing = pack(codes, bits, signed=signed)

    def turned(packed):
        return pack(unpack(packed, packing)[:, ::-1], bits, signed=signed)[0]

    got = jax.jit(turned, donate_argnums=0)(packed)
    assert packed.is_deleted()
    assert_array_equal(unpack(got, packing), codes[:, ::-1])


@EACH
def test_no_gather_and_no_loop(bits, signed):
    codes = some_codes((4, 17), bits, signed)
    packed, packing = pack(codes, bits, signed=signed)
    text = str(jax.make_jaxpr(lambda c: pack(c, bits, signed=signed)[0])(codes))
    text += str(jax.make_jaxpr(lambda p: unpack(p, packing))(packed))
    assert "shift_left" in text
    for slow in ("gather", "dynamic_slice", "scan", "while", "scatter"):
        assert slow not in text


@settings(max_examples=15)  # a shape is a program
@given(data=st.data())
def test_any_shape(data):
    bits, signed = data.draw(st.sampled_from(KINDS))
    shape = data.draw(npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9))
    codes = data.draw(
        npst.arrays(
            levels(bits, signed).dtype,
            shape,
            elements=st.sampled_from(levels(bits, signed).tolist()),
        )
    )
    there_and_back = jax.jit(
        lambda c: (pack(c, bits, signed=signed), unpack(*pack(c, bits, signed=signed)))
    )
    (packed, packing), back = there_and_back(codes)
    assert_array_equal(packed, as_bytes(codes, bits))
    assert_array_equal(back, as_codes(np.asarray(packed), bits, signed, packing.length))
    assert_array_equal(back, codes)


def test_what_can_be_packed():
    assert [bits for bits in range(17) if can_pack(bits, ndim=1)] == [1, 2, 4]
    assert not can_pack(4, ndim=0)
    assert can_pack(1, ndim=5)


@pytest.mark.parametrize("bits", [0, 3, 8, 16])
def test_sizes_that_do_not_share_a_byte(bits):
    with pytest.raises(errors.FormatError, match=rf"codes of {bits} bits"):
        pack(np.zeros(3, np.int8), bits, signed=True)
    with pytest.raises(errors.FormatError):
        Packing(bits, 3, signed=True)


def test_what_pack_refuses():
    with pytest.raises(errors.FormatError, match="single code") as caught:
        pack(np.int8(1), 4, signed=True)
    assert isinstance(caught.value, ValueError)
    for dtype, signed in [(np.uint8, True), (np.int8, False), (np.int32, True), (np.float32, True)]:
        with pytest.raises(errors.FormatError, match=np.dtype(dtype).name):
            pack(np.zeros((2, 3), dtype), 4, signed=signed)


def test_what_unpack_refuses():
    packed, packing = pack(np.zeros((2, 9), np.int8), 4, signed=True)
    for wrong in (packed[:, :4], packed[:, :0], packed.astype(jnp.int8), packed[0, 0]):
        with pytest.raises(errors.FormatError, match="does not hold 9 codes"):
            unpack(wrong, packing)


def test_a_packing_is_static():
    packing = Packing(4, 9, signed=True)
    assert packing == Packing(4, 9, signed=True)
    assert hash(packing) == hash(Packing(4, 9, signed=True))
    assert packing != Packing(4, 9, signed=False)
    assert jax.tree.leaves(packing) == []
    with pytest.raises(AttributeError):
        packing.bits = 2
