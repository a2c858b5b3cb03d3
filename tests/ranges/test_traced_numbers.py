"""Numbers of fits and of KL as arrays: one program for all of them, each as it is alone."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, ranges
from quantjax.formats.ternary import ternary
from quantjax.ranges import Solved
from quantjax.ranges.kl_tensorrt import MODELOPT, kl_tensorrt
from tests.models import dense, planned, policy, ready

CASE = dense(rows=6)
CHANNELS = qj.PerChannel(axis=-1)


class Number(NamedTuple):
    """How a rule is made of it, for which weights, good values and bad ones."""

    rule: Callable[[Any], Any]
    weights: dict[str, Any]
    good: tuple[float, ...]
    bad: tuple[float, ...]


NUMBERS = {
    "hqo, p": Number(lambda p: ranges.hqo(solved=Solved.SCALE, p=p), {}, (0.5, 1.0), (0.0, 1.5)),
    "hqo, beta": Number(
        lambda beta: ranges.hqo(solved=Solved.ZERO_POINT, beta=beta),
        {"symmetric": False},
        (1.0, 10.0),
        (0.0, np.inf),
    ),
    "hqo, kappa": Number(
        lambda kappa: ranges.hqo(solved=Solved.SCALE, kappa=kappa), {}, (1.0, 1.2), (0.5, np.nan)
    ),
    "admm": Number(lambda rho: ranges.admm(rho=rho), {}, (0.1, 0.5), (0.0, -1.0)),
    "ttq": Number(
        lambda t: ranges.ttq(threshold=t),
        {"format": ternary(learned=True), "bits": 2},
        (0.0, 0.2),
        (1.0, -0.1),
    ),
}


def calibrated(number: Number, value: Any) -> Any:
    """The QParams of the one weight, by a rule of this number."""
    options = {"bits": 3, "granularity": CHANNELS, **number.weights}
    weights = qj.weight_quantizer(rule=number.rule(value), **options)
    plan = planned(CASE, policy(weights))
    return qj.calibrate(plan, qj.init(plan), CASE.params)


def scales(qstate: Any) -> list[np.ndarray]:
    """Those of all operands."""
    is_qparams = lambda leaf: isinstance(leaf, qj.QParams)  # noqa: E731
    return [np.asarray(q.scale) for q in jax.tree.leaves(qstate, is_leaf=is_qparams)]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_traced_number_is_that_number(name):
    number = NUMBERS[name]
    traces = []

    @jax.jit
    def by(value):
        traces.append(value)
        return calibrated(number, value)

    for value in number.good:
        alone = calibrated(number, value)
        jax.tree.map(np.testing.assert_array_equal, by(value), alone)
    assert len(traces) == 1


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_an_axis_and_bad_ones_are_nan(name):
    number = NUMBERS[name]
    values = jnp.asarray([*number.good, *number.bad], jnp.float32)
    found = jax.vmap(lambda value: calibrated(number, value))(values)
    (scale,) = scales(found)
    is_nan = np.isnan(scale).reshape(len(values), -1)
    assert not is_nan[: len(number.good)].any()
    assert is_nan[len(number.good) :].all()


@pytest.mark.parametrize("name", NUMBERS)
def test_bad_numbers_that_are_known_are_refused(name):
    number = NUMBERS[name]
    for value in number.bad:
        with pytest.raises(errors.QuantizerError, match="try"):
            number.rule(value)
    with pytest.raises(errors.QuantizerError, match="is no number"):
        number.rule("a half")
    with pytest.raises(errors.QuantizerError, match="is no number"):
        number.rule(jnp.ones(2))


def strided(stride: Any) -> Any:
    return kl_tensorrt(dataclasses.replace(MODELOPT, stride=stride))


def test_strides_of_a_histogram_are_an_axis():
    plan, state, _ = ready(CASE, policy(activations=qj.activation_quantizer(bits=4)))

    def by(stride: Any) -> Any:
        rule = strided(stride)
        return qj.calibrate(plan, state, CASE.params, activation_rule=rule)

    strides = jnp.asarray([1, 8, 100, 0], jnp.int32)
    found = jax.vmap(by)(strides)
    for place, stride in enumerate((1, 8, 100)):
        alone = by(stride)
        jax.tree.map(lambda a, b, n=place: np.testing.assert_array_equal(a[n], b), found, alone)
    assert all(np.isnan(q[-1]).all() for q in scales(found))
    with pytest.raises(errors.QuantizerError, match="a stride of 0"):
        strided(0)


def test_fits_of_a_users_own_have_parameters():
    """``fit`` is called with them behind the width, and they may be traced."""

    def fit(tensor, scale_shape, format, bits, factor):
        largest = jnp.max(jnp.abs(tensor), axis=0, keepdims=True)
        scale = (factor * largest / (2.0 ** (bits - 1.0) - 1.0)).reshape(scale_shape)
        return qj.QParams(scale, jnp.zeros(scale_shape), bits)

    def by(factor: Any) -> Any:
        rule = qj.FitRule("shrunk", fit, parameters=(factor,))
        weights = qj.weight_quantizer(bits=3, granularity=CHANNELS, rule=rule)
        plan = planned(CASE, policy(weights))
        return qj.calibrate(plan, qj.init(plan), CASE.params)

    found = jax.jit(jax.vmap(by))(jnp.asarray([0.5, 1.0]))
    (both,) = scales(found)
    np.testing.assert_allclose(both[0] * 2.0, both[1], rtol=1e-6)
    np.testing.assert_allclose(scales(by(0.5))[0], both[0], rtol=1e-6)
