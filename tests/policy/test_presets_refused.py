"""What presets and quantizers refuse, and that the edit to try works for the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.formats import widths
from tests.refused import refused

TRAINING = [
    qj.presets.straight_through,
    qj.presets.clipped,
    qj.presets.lsq,
    qj.presets.lsq_plus,
    qj.presets.pact_sawb,
    qj.presets.pact_dorefa,
    qj.presets.dorefa,
    qj.presets.ewgs,
    qj.presets.dsq,
    qj.presets.tqt,
    qj.presets.qil,
    qj.presets.quant_noise,
    qj.presets.differentiable_quantization,
    qj.presets.rounded_width,
]
QUANTIZERS = [qj.weight_quantizer, qj.activation_quantizer, qj.gradient_quantizer]
OFF = [-1, 17, float("nan"), float("inf"), float("-inf"), 0.5, 1.5, 2.5, 16.5]
NO_NUMBERS = [True, np.True_, "4"]


def fixed(call: Callable[..., object], argument: str, bits: Any) -> None:
    """The width is refused by name, and the first edit to try is accepted."""
    of_value = errors.ArgumentError if bits is None or bits in NO_NUMBERS else errors.BitsError
    with pytest.raises(of_value) as caught:
        call(**{argument: bits})
    if of_value is errors.ArgumentError:
        assert caught.value.what.startswith(f"{argument} is")
    else:
        assert caught.value.what.startswith(f"{bits} bits")
    edit = caught.value.fix.split(",")[0].split(";")[0]
    name, value = edit.split("=")
    assert name == argument
    call(**{argument: int(value)})


@pytest.mark.parametrize("argument", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("preset", TRAINING, ids=lambda preset: preset.__name__)
def test_a_width_of_a_preset_is_refused_with_one_that_it_has(preset, argument):
    for bits in [9, None, *OFF, *NO_NUMBERS]:
        fixed(preset, argument, bits)


@pytest.mark.parametrize("argument", ["weight_bits", "activation_bits", "gradient_bits"])
def test_a_width_of_a_uniform_policy_is_refused_with_one_that_it_has(argument):
    for bits in [*OFF, *NO_NUMBERS]:
        fixed(qj.uniform_policy, argument, bits)


@pytest.mark.parametrize("make", QUANTIZERS, ids=lambda make: make.__name__)
def test_a_width_of_a_quantizer_is_refused_with_one_that_it_has(make):
    for bits in [*OFF, *NO_NUMBERS]:
        fixed(make, "bits", bits)
        if bits != 0.5:
            fixed(lambda **given: make(format=qj.formats.E4M3FN, **given), "bits", bits)


@pytest.mark.parametrize("preset", TRAINING, ids=lambda preset: preset.__name__)
def test_one_bit_and_bypass_are_taken_or_refused_by_name(preset):
    preset(weight_bits=0, activation_bits=0)
    if preset not in (qj.presets.qil, qj.presets.differentiable_quantization):
        preset(weight_bits=1, activation_bits=1)
        return
    with pytest.raises(errors.EstimatorError, match="more than one bit") as caught:
        preset(weight_bits=1)
    assert caught.value.fix.startswith("weight_bits=2:")
    preset(weight_bits=2, activation_bits=1)


def test_a_wider_container_is_named_where_one_holds_the_width():
    for format in (qj.integer(), qj.integer(signed=False)):
        with pytest.raises(errors.BitsError) as caught:
            qj.activation_quantizer(bits=9, format=format)
        wider = caught.value.fix.split(", or format=")[1]
        found = qj.activation_quantizer(bits=9, format=eval(wider, {"qj": qj}))
        assert found.format.signed == format.signed
    for bits in (17, 9.5):
        with refused(errors.BitsError, "container of 8"):
            widths.check_bits(qj.integer(), bits, argument="n", where="here")
        with pytest.raises(errors.BitsError) as caught:
            qj.activation_quantizer(bits=bits, format=qj.integer())
        assert "format=" not in caught.value.fix


@pytest.mark.parametrize(
    "given",
    [qj.presets.w8a8, qj.presets.lsq, None, 3, "w8a8", [qj.presets.w4a8()], qj.Policy, dict],
)
def test_first_and_last_take_a_policy_or_a_scheme(given):
    with refused(errors.ArgumentError, "policy is", "Policy or Scheme is needed"):
        qj.presets.first_last_8bit(given)
    with pytest.raises(errors.ArgumentError) as caught:
        qj.presets.first_last_8bit(given)
    policy = eval(caught.value.fix, {"qj": qj})
    if getattr(given, "__module__", "").startswith("quantjax.presets"):
        assert policy == qj.presets.first_last_8bit(given())


@pytest.mark.parametrize("argument", ["weight_granularity", "activation_granularity"])
def test_a_granularity_of_a_uniform_policy_is_refused_by_name(argument):
    for given in ("channel", 0, qj.PerChannel):
        with refused(errors.ArgumentError, f"{argument} is", "Granularity is needed"):
            qj.uniform_policy(**{argument: given})
    for make in QUANTIZERS:
        with refused(errors.ArgumentError, "granularity is a"):
            make(granularity=0)


CONTAINERS = [
    qj.integer,
    qj.formats.midrise,
    qj.formats.apot,
    qj.formats.normal_float,
    qj.formats.learned_codebook,
    qj.formats.lognet,
    qj.formats.inq,
]


@pytest.mark.parametrize("make", CONTAINERS, ids=lambda make: make.__name__)
def test_a_container_has_a_whole_number_of_bits(make):
    for bits in (True, np.True_, float("nan"), 2.5, "8", None):
        with refused(errors.ArgumentError, "max_bits is", "whole number is needed"):
            make(max_bits=bits)
    for bits in (-1, 0, 17):
        with pytest.raises(errors.FormatError) as caught:
            make(max_bits=bits)
        if caught.value.fix.startswith("max_bits="):
            make(max_bits=int(caught.value.fix.removeprefix("max_bits=")))
    assert make(max_bits=np.int64(4)) == make(max_bits=4)


@pytest.mark.parametrize("bits", [True, np.True_, float("nan"), 2.5, "4", None])
def test_bits_of_a_minifloat_are_whole_numbers(bits):
    with refused(errors.ArgumentError, "exponent_bits is"):
        qj.minifloat(bits, 3)
    with refused(errors.ArgumentError, "mantissa_bits is"):
        qj.minifloat(4, bits)
