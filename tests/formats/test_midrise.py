"""Odd integers against DoReFa-Net's own formula, and through a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors
from quantjax.formats import POWER_OF_TWO, Law, midrise
from quantjax.rounding import FLOOR, HALF_AWAY, HALF_EVEN, STOCHASTIC
from tests.refused import refused

X = np.random.default_rng(0).uniform(-1.3, 1.3, 20_000).astype(np.float32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_values_are_the_formula_of_the_paper(bits):
    n = 2**bits - 1
    t = np.clip(np.float64(X), -1, 1)
    want = 2 * np.rint(n * (t / 2 + 0.5)) / n - 1
    got = qj.fake_quant(jnp.asarray(X), 1 / n, bits=bits, format=midrise())
    tie = np.abs(n * (t / 2 + 0.5) % 1 - 0.5) < 1e-4  # where float32 may see the other side
    assert tie.mean() < 0.01
    np.testing.assert_allclose(got[~tie], want[~tie], rtol=1e-6)
    assert np.unique(got).size == 2**bits


TIES = {HALF_EVEN: np.rint, HALF_AWAY: lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x)}


@pytest.mark.parametrize("rounding", TIES, ids=lambda rounding: rounding.name)
@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_ties_go_where_the_formula_has_them(bits, rounding):
    x = np.arange(-(2 ** (bits + 1)), 2 ** (bits + 1) + 0.25, 0.25, dtype=np.float32)
    rounded = 2.0 * TIES[rounding]((np.float64(x) - 1.0) / 2.0) + 1.0
    got = qj.fake_quant(jnp.asarray(x), 1.0, bits=bits, format=midrise(), rounding=rounding)
    assert_array_equal(got, np.clip(rounded, 1 - 2**bits, 2**bits - 1))
    if rounding == HALF_EVEN and bits > 1:  # without bias: each tie with the next one
        inside = np.abs(x) < 2**bits
        assert abs(np.sum((np.asarray(got) - x)[inside])) <= 1.0  # of an odd number of ties


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_two_complement_and_come_back(bits):
    format, width = midrise(), jnp.float32(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = jnp.arange(low, high + 1).astype(jnp.int8)
    levels = format.decode(codes, width)
    assert_array_equal(levels, np.arange(-(2**bits) + 1, 2**bits, 2))
    assert_array_equal(format.encode(levels, width), codes)
    assert tuple(map(float, format.level_range(width))) == (levels[0], levels[-1])


def test_declared_laws_are_those_that_hold():
    assert qj.check_format(midrise()) == midrise().laws
    assert midrise().laws >= {Law.NEAREST, Law.MONOTONE, Law.INTEGER}
    assert not midrise().laws & {Law.ZERO, Law.ODD}


def test_other_roundings_and_scale_rules():
    x = jnp.array([-0.9, 0.9, 1.9, 2.9])
    floored = qj.fake_quant(x, 1.0, bits=3, format=midrise(), rounding=FLOOR)
    assert_array_equal(floored, [-1, -1, 1, 1])
    many = qj.fake_quant(
        jnp.full(4000, 1.5), 1.0, bits=3, format=midrise(), rounding=STOCHASTIC,
        key=jax.random.key(0),
    )  # fmt: skip
    assert set(np.unique(many)) == {1.0, 3.0}
    assert abs(float(many.mean()) - 1.5) < 4 * 0.87 / np.sqrt(4000)
    assert midrise(scale_rule=POWER_OF_TWO).name == "midrise-pow2"


def test_it_is_simulated_frozen_and_executed():
    f = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)).astype(np.float32))}
    x = jnp.asarray(rng.normal(size=(5, 6)).astype(np.float32))
    scheme = qj.Scheme(weights=qj.weight_quantizer(bits=2, format=midrise(max_bits=2)))
    plan = qj.plan(qj.Policy([qj.rule(qj.weighted(), scheme)]), qj.sites(f, params, x))
    qstate = qj.calibrate(plan, {}, params)
    frozen = qj.freeze(plan, qstate, params)
    assert frozen["w"].packing is not None  # four codes a byte
    levels = np.asarray(frozen["w"].levels())
    assert set(np.unique(levels)) <= {-3.0, -1.0, 1.0, 3.0}
    simulated = jax.jit(qj.fake_quantize(f, plan))(qstate, params, x)
    assert_array_equal(jax.jit(qj.execute(f, plan))(qstate, frozen, x), simulated)


def test_what_it_cannot_be_is_refused():
    for options in ({"max_bits": 9}, {"max_bits": 0}):
        with refused(errors.FormatError, "midrise"):
            midrise(**options)
    with refused(errors.FormatError, "midrise"):
        qj.formats.MidriseFormat(signed=False)
