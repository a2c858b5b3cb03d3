"""Reports against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.transforms.energy import added_up, decibels, energy
from tests.models import assert_same_bits, dense, mlp, normal, policy, ready


def sqnr(reference, quantized):
    reference, quantized = np.float64(reference), np.float64(quantized)
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - quantized) ** 2))


@pytest.fixture(scope="module")
def case():
    return dense(rows=32)


@pytest.fixture(scope="module")
def prepared(case):
    return ready(case, qj.uniform_policy(weight_bits=3, activation_bits=4))


@pytest.fixture(scope="module")
def report(case, prepared):
    return qj.compare(case.f, prepared.plan)(prepared.qstate, case.params, case.x)


def test_the_output_figures_are_those_of_numpy(case, prepared, report):
    exact = np.float64(case.f(case.params, case.x))
    y = np.float64(qj.fake_quantize(case.f, prepared.plan)(prepared.qstate, case.params, case.x))
    assert float(report["w"].sqnr) == pytest.approx(sqnr(exact, y), abs=1e-3)
    cosine = np.sum(exact * y) / np.linalg.norm(exact) / np.linalg.norm(y)
    assert float(report["w"].cosine) == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize(("key", "low", "high"), [("weight", -4, 3), ("activation", 0, 15)])
def test_the_operand_figures_are_those_of_numpy(case, prepared, report, key, low, high):
    x = np.asarray(case.params["w"] if key == "weight" else case.x)
    qparams = prepared.qstate["w"][key]
    scale, zero = np.asarray(qparams.scale), np.asarray(qparams.zero_point)
    unclipped = np.rint(x / scale) + zero
    y = (np.clip(unclipped, low, high) - zero) * scale
    operand = report["w"].operands[key]
    assert float(operand.sqnr) == pytest.approx(sqnr(x, y), abs=1e-3)
    clipped = np.mean((unclipped < low) | (unclipped > high))
    assert float(operand.saturation) == pytest.approx(clipped, abs=1e-6)


def test_saturation_is_seen(case, prepared):
    qstate = {"w": dict(prepared.qstate["w"])}
    activation = qstate["w"]["activation"]
    qstate["w"]["activation"] = activation._replace(scale=activation.scale / 4)
    tight = qj.compare(case.f, prepared.plan)(qstate, case.params, case.x)
    assert float(tight["w"].operands["activation"].saturation) > 0.1
    assert float(tight["w"].sqnr) < 10


def test_bypass_loses_nothing(case, prepared):
    qstate = qj.calibrate(
        prepared.plan, prepared.state, case.params, weight_bits=0, activation_bits=0
    )
    report = qj.compare(case.f, prepared.plan)(qstate, case.params, case.x)
    assert np.isposinf(report["w"].sqnr)
    assert float(report["w"].cosine) == pytest.approx(1.0, abs=1e-6)
    for operand in report["w"].operands.values():
        assert np.isposinf(operand.sqnr)
        assert float(operand.saturation) == 0.0


def test_more_bits_are_better_at_every_site():
    case = mlp()
    prepared = ready(case, qj.uniform_policy())

    def report(bits):
        qstate = qj.calibrate(
            prepared.plan, prepared.state, case.params, weight_bits=bits, activation_bits=bits
        )
        return qj.compare(case.f, prepared.plan)(qstate, case.params, case.x)

    reports = jax.jit(jax.vmap(report))(jnp.array([3.0, 5.0, 8.0]))
    for site in reports.sites.values():
        assert np.all(np.diff(np.asarray(site.sqnr)) > 6)
    assert "params/Dense_1/kernel[2]" in str(reports)  # a row for each lane


def test_under_jit_it_is_the_same_within_rounding(case, prepared, report):
    jitted = jax.jit(qj.compare(case.f, prepared.plan))(prepared.qstate, case.params, case.x)
    assert list(jitted.sites) == list(report.sites)
    for left, right in zip(jax.tree.leaves(jitted), jax.tree.leaves(report), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4)


def test_it_prints_a_row_a_site_in_program_order():
    case = mlp()
    prepared = ready(case, qj.uniform_policy(weight_bits=4))
    report = qj.compare(case.f, prepared.plan)(prepared.qstate, case.params, case.x)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == [
        "site",
        "params/Dense_0/kernel",
        "params/Dense_1/kernel",
    ]
    assert "%" in lines[1]
    assert max(map(len, lines)) <= 120
    jax.tree.map(lambda leaf: leaf, report)


def test_live_ranges_are_those_of_each_row():
    case = dense(rows=5)
    live = qj.activation_quantizer(bits=8, granularity=qj.PerToken(), range=qj.RangeMode.LIVE)
    prepared = ready(case, policy(None, live))
    assert prepared.state == {}
    quantized = qj.fake_quantize(case.f, prepared.plan)
    y = quantized(prepared.qstate, case.params, case.x)
    scaled = case.x * jnp.array([1e-4, 1.0, 1e3, 7.0, 0.5])[:, None]
    rows = [quantized(prepared.qstate, case.params, row[None])[0] for row in scaled]
    together = quantized(prepared.qstate, case.params, scaled)
    for row, one in zip(together, rows, strict=True):
        np.testing.assert_allclose(row, one, rtol=1e-5)
        assert np.all(np.isfinite(row))
    exact = case.f(case.params, case.x)
    assert float(jnp.max(jnp.abs(y - exact))) < 0.05 * float(jnp.max(jnp.abs(exact)))
    assert_same_bits(y.shape, exact.shape)
    assert quantized(prepared.qstate, case.params, normal(8, 9, 6)).shape == (9, 5)


def test_what_is_nan_is_not_perfect():
    """In a sweep that looks for the best ratio, a broken cell must not win."""
    case = dense()
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(case.f, case.params, case.x))

    def of(bits):
        qstate = qj.calibrate(plan, {}, case.params, weight_bits=bits)
        return qj.compare(case.f, plan)(qstate, case.params, case.x)

    swept = jax.jit(jax.vmap(of))(jnp.array([4.0, 9.0]))["w"]  # the container holds 8
    for figure in (swept.sqnr, swept.cosine, swept.operands["weight"].sqnr):
        assert np.isfinite(figure[0])
        assert np.isnan(figure[1])
    qstate = qj.calibrate(plan, {}, case.params)
    weight = qstate["w"]["weight"]
    broken = {"w": {"weight": weight._replace(scale=weight.scale.at[0, 0].set(jnp.nan))}}
    found = qj.compare(case.f, plan)(broken, case.params, case.x)["w"]
    assert np.isnan([found.sqnr, found.cosine, found.operands["weight"].sqnr]).all()


def test_zeros_have_no_direction_and_no_noise():
    case = dense()
    nothing = jax.tree.map(jnp.zeros_like, case.params)
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(case.f, nothing, case.x))
    found = qj.compare(case.f, plan)(qj.calibrate(plan, {}, nothing), nothing, case.x)["w"]
    assert float(found.cosine) == 1.0
    assert np.isposinf(float(found.sqnr))


def test_what_became_all_zeros_has_not_the_direction_of_what_it_was():
    case = dense()
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(case.f, case.params, case.x))
    weight = qj.calibrate(plan, {}, case.params)["w"]["weight"]
    dead = {"w": {"weight": weight._replace(scale=weight.scale * 1e6)}}
    found = qj.compare(case.f, plan)(dead, case.params, case.x)["w"]
    assert float(found.cosine) == 0.0
    assert float(found.sqnr) == 0.0


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100])
def test_the_size_of_numbers_does_not_count(size):
    """Nor do squares that float32 does not hold; the scale is a power of two, so all else is."""
    case = dense()
    table = qj.sites(case.f, case.params, case.x)
    plan = qj.plan(qj.uniform_policy(weight_bits=3, activation_bits=None), table)

    def of(params):
        return qj.compare(case.f, plan)(qj.calibrate(plan, {}, params), params, case.x)["w"]

    found = of(jax.tree.map(lambda leaf: leaf * size, case.params))
    want = of(case.params)
    assert float(want.sqnr) < 40.0
    for got, of_one in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, of_one, rtol=1e-6)


def test_steps_of_other_sizes_are_added_up_as_numpy_does():
    x = np.float32(np.random.default_rng(0).normal(size=(5, 7)))
    x *= np.float32([[1e-30], [1e-25], [0.0], [3e-26], [1e-38]])
    parts = jax.vmap(energy)(jnp.asarray(x))
    total, exponent = added_up(parts)
    want = np.log2(np.sum(np.square(np.float64(x))))
    np.testing.assert_allclose(np.log2(np.float64(total)) + 2 * float(exponent), want, rtol=1e-6)
    nothing = added_up(jax.vmap(energy)(jnp.zeros((2, 3))))
    assert float(nothing.total) == 0.0
    assert np.isposinf(float(decibels(energy(jnp.asarray(x)), nothing)))
