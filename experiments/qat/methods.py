"""Which methods are compared, and what each of them learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from quantjax import RangeMode, Scheme, estimators, presets, ranges, weight_quantizer


class Method(NamedTuple):
    """One row of a table.

    Attributes:
      name: what it prints as.
      scheme: ``(weight_bits=, activation_bits=) -> Scheme``; the widths only bound the container.
      learned: entries of ``theta`` that the optimizer moves; scales are moved everywhere.
      learns_scale: whether scales and zero points are learned.
    """

    name: str
    scheme: Callable[..., Scheme]
    learned: tuple[str, ...] = ()
    learns_scale: bool = False


def _binary(estimator: estimators.Estimator) -> Callable[..., Scheme]:
    """One-bit weights with the mean magnitude of a channel for a scale, activations by LSQ."""

    def scheme(*, weight_bits: int = 1, activation_bits: int = 4) -> Scheme:
        activations = presets.lsq(activation_bits=activation_bits).activations
        weights = weight_quantizer(
            bits=1, estimator=estimator, rule=ranges.XNOR, range=RangeMode.LIVE
        )
        return Scheme(weights=weights, activations=activations)

    return scheme


METHODS: tuple[Method, ...] = (
    Method("straight through", presets.straight_through),
    Method("clipped", presets.clipped),
    Method("LSQ", presets.lsq, learns_scale=True),
    Method("LSQ+", presets.lsq_plus, learns_scale=True),
    Method("PACT + SAWB", presets.pact_sawb, ("clip",)),
    Method("PACT + DoReFa", presets.pact_dorefa, ("clip",)),
    Method("DoReFa", presets.dorefa),
    Method("EWGS", presets.ewgs, learns_scale=True),
    Method("DSQ", presets.dsq, ("alpha",), learns_scale=True),
    Method("TQT", presets.tqt, ("log2_threshold",)),
    Method("QIL", presets.qil, ("center", "distance"), learns_scale=True),
    Method("Quant-Noise", presets.quant_noise, learns_scale=True),
)
"""At one width for all: ``theta`` and scales are learned, widths are not."""

WHOLE: tuple[Method, ...] = tuple(method for method in METHODS if method.name == "LSQ")
"""Also trained with the first and the last layer at the same width, and from more seeds."""

LEARNED_WIDTHS: tuple[Method, ...] = (
    Method("differentiable quantization", presets.differentiable_quantization, ("clip",), True),
    Method("rounded width", presets.rounded_width, ("clip", "width")),
)
"""Widths are learned, under a penalty on the bits of the weights."""

BINARY: tuple[Method, ...] = (
    Method("straight through", _binary(estimators.STRAIGHT_THROUGH), learns_scale=True),
    Method("clipped", _binary(estimators.CLIPPED), learns_scale=True),
    Method("ApproxSign", _binary(estimators.APPROX_SIGN), learns_scale=True),
    Method("SwishSign", _binary(estimators.SWISH_SIGN), learns_scale=True),
    Method("magnitude-aware", _binary(estimators.MAGNITUDE_AWARE), learns_scale=True),
    Method("error decay", _binary(estimators.ERROR_DECAY), learns_scale=True),
)
"""Surrogates of the sign's derivative, for weights of one bit."""
