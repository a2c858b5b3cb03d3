"""Groups of zeros in formats of which 0 is no level: they stay as small as there are numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import quantjax as qj
from quantjax import errors, ranges
from quantjax.affine import SMALLEST_SCALE
from quantjax.formats import codebook, learned_codebook, midrise
from quantjax.formats.ternary import ternary
from tests.refused import refused

DEAD = 1
W = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32) * 0.05
W[:, DEAD] = 0.0
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32)
BINARY = qj.integer(max_bits=1)
NO_ZERO = codebook([-1.0, -0.3, 0.4, 1.0])
RULES = (ranges.MIN_MAX, ranges.MSE, ranges.LEAST_SQUARES, ranges.ADMM, ranges.HQO_SCALE)
CASES = {
    **{f"{rule.name}, one bit": (rule, BINARY, 1) for rule in (*RULES, ranges.XNOR)},
    **{f"{rule.name}, midrise": (rule, midrise(), 2) for rule in RULES},
    "min_max, codebook": (ranges.MIN_MAX, NO_ZERO, 2),
    "k_means": (ranges.K_MEANS, learned_codebook(max_bits=2), 2),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("case", CASES)
def test_a_dead_channel_stays_dead(case):
    rule, format, bits = CASES[case]
    weights = qj.weight_quantizer(bits=bits, format=format, rule=rule)
    f, params = lambda p, x: x @ p["w"], {"w": jnp.asarray(W)}
    plan = qj.plan(
        qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))]), qj.sites(f, params, X)
    )
    qstate = qj.calibrate(plan, {}, params)
    scale = np.asarray(qstate["w"]["weight"].scale).ravel()
    assert scale[DEAD] <= SMALLEST_SCALE
    assert (np.delete(scale, DEAD) > 1e-3).all()
    y = jax.jit(qj.fake_quantize(f, plan))(qstate, params, X)
    assert np.abs(y[:, DEAD]).max() < 1e-30
    assert np.abs(np.delete(y, DEAD, axis=1)).max() > 0.01
    executed = jax.jit(qj.execute(f, plan))(qstate, qj.freeze(plan, qstate, params), X)
    assert_allclose(executed, y, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("format", "bits"), [(qj.integer(), 4), (qj.formats.E2M1, 4), (ternary(), 2)]
)
def test_where_zero_is_a_level_the_scale_is_one(format, bits):
    zero = qj.affine.qparams_from_range(
        *(jnp.zeros(()),) * 2, jnp.float32(bits), format=format, symmetric=True,
        calibrated=jnp.asarray(True), theta=(),
    )  # fmt: skip
    assert float(zero.scale) == 1.0
    assert bool(format.holds_zero(zero.scale, jnp.float32(bits)))


def test_the_width_in_use_decides():
    find = lambda bits: qj.affine.qparams_from_range(  # noqa: E731
        *(jnp.zeros((1, 2)),) * 2, bits, format=qj.integer(), symmetric=True,
        calibrated=jnp.asarray(True),
    ).scale  # fmt: skip
    found = jax.jit(jax.vmap(find))(jnp.array([0.0, 1.0, 2.0, 8.0]))
    assert found[:, 0, 0].tolist() == [1.0, float(SMALLEST_SCALE), 1.0, 1.0]


@pytest.mark.parametrize("name", ["XNOR", "TWN", "TTQ"])
def test_of_nothing_fits_find_a_finite_scale(name):
    format = BINARY if name == "XNOR" else ternary(learned=True)
    bits = jnp.float32(format.max_bits)
    found = getattr(ranges, name).fit(jnp.zeros((0, 4)), (1, 4), format, bits)
    assert np.isfinite(found.scale).all()
    policy = qj.Policy(
        [qj.rule(qj.everything(), qj.Scheme(weights=qj.weight_quantizer(
            format=format, bits=format.max_bits, rule=getattr(ranges, name),
            granularity=qj.PerChannel(axis=-1),
        )))]
    )  # fmt: skip
    with refused(errors.DataError, "a kernel without entries has no range", "w"):
        qj.quantize_params({"w": jnp.zeros((0, 4))}, policy)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
def test_integers_say_of_zero_what_rounding_it_says(signed, narrow):
    format, one = qj.integer(signed=signed, narrow=narrow), jnp.ones((2, 1))
    for bits in map(float, range(1, 9)):
        stated = format.holds_zero(one, jnp.float32(bits))
        rounded = qj.formats.Format.holds_zero(format, one, jnp.float32(bits))
        np.testing.assert_array_equal(stated, rounded)
