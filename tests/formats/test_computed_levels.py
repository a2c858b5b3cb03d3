"""Levels that are computed, and are not the same in every program to the last place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import quantjax as qj
from quantjax.contract import check_format
from quantjax.formats.base import Law
from quantjax.formats.levels import LevelFormat
from tests.formats.test_levels import Given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(LevelFormat):
    """Levels that come out unlike where a compiler contracts ``i · 0.77 + 0.01``."""

    name = "affine"

    def levels(self, bits, theta=()):
        highest = jnp.exp2(bits) - 1.0
        place = jnp.minimum(jnp.arange(1 << self.max_bits, dtype=jnp.float32), highest)
        return (place / jnp.maximum(highest, 1.0) * 2.0 - 1.0) * 0.77 + 0.01

    def valid_bits(self, bits, theta=()):
        return super().valid_bits(bits, theta) & (bits != 1.0)


@pytest.mark.parametrize("max_bits", [4, 6])
def test_codes_are_those_of_levels_that_another_program_computed(max_bits):
    format = Affine(max_bits=max_bits)
    assert Law.ROUND_TRIP in check_format(format)
    x = jnp.asarray(np.random.default_rng(0).normal(size=2000).astype(np.float32))
    for bits in range(2, max_bits + 1):
        qparams = qj.QParams(jnp.float32(1), jnp.float32(0), jnp.float32(bits))
        want = qj.fake_quant(x, 1.0, format=format, bits=bits)
        for encode in (qj.encode, jax.jit(qj.encode, static_argnums=2)):
            found = encode(x, qparams, format)
            assert found.codes.max() < 1 << bits
            assert_allclose(found.dequantize(), want, rtol=1e-5, atol=1e-6)


def test_a_level_a_little_off_has_the_code_of_the_nearest():
    levels = np.float32([-3.0, -1.0, -1.0, 0.0, 2.0**-126, 1.0, 1.0 + 2.0**-23, 4.0])
    off = np.nextafter(levels, np.float32(9)), np.nextafter(levels, np.float32(-9))
    format, bits = Given(max_bits=3), jnp.float32(3)
    encode = jax.jit(lambda x: format.encode(x, bits, {"levels": jnp.asarray(levels)}))
    want = [0, 1, 1, 3, 4, 5, 6, 7]
    assert encode(levels).tolist() == want
    for moved in off:
        apart = [0, 1, 2, 7]  # neighbours of the others are levels themselves, or no numbers
        assert encode(moved)[jnp.asarray(apart)].tolist() == [want[i] for i in apart]
    assert encode(np.float32([-np.inf, np.inf, np.nan])).tolist() == [0, 7, 0]
