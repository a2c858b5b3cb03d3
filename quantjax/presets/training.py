"""Published combinations of quantizers for training, as schemes.

A scheme says what becomes of the weights and activations of one product. The papers leave the first
and the last layer at 8 bits::

    policy = qj.presets.first_last_8bit(qj.presets.lsq(weight_bits=4))

Activations are unsigned where a paper has them behind a ReLU, which the range then shows; those of
``asymmetric`` presets may be anything.
"""

from __future__ import annotations

from quantjax import errors, ranges
from quantjax.estimators import (
    CLIPPED,
    DIFFERENTIABLE_QUANTIZATION,
    DOREFA_ACTIVATIONS,
    DOREFA_WEIGHTS,
    DSQ,
    EWGS,
    LSQ,
    LSQ_FEATURES,
    LSQ_PLUS,
    PACT,
    QIL,
    QUANT_NOISE,
    ROUNDED_WIDTH,
    SAWB,
    STRAIGHT_THROUGH,
    TQT,
    Estimator,
    Need,
)
from quantjax.formats import Format, integer, midrise
from quantjax.formats.widths import check_bits
from quantjax.granularity import Granularity, PerChannel, PerTensor
from quantjax.policy import Scheme
from quantjax.quantizer import Quantizer, RangeMode, activation_quantizer, weight_quantizer
from quantjax.ranges import MIN_MAX, MSE, FitRule, RangeRule

NARROW = integer(max_bits=8, narrow=True)


def _weights(
    bits: int,
    estimator: Estimator,
    *,
    rule: RangeRule | FitRule = MSE,
    range: RangeMode = RangeMode.FIXED,
    granularity: Granularity | None = None,
    format: Format | None = None,
) -> Quantizer:
    format = format or integer(max_bits=8)
    _check(bits, format, "weight_bits")
    if bits == 1 and Need.MORE_THAN_ONE_BIT in estimator.needs:
        raise errors.EstimatorError(
            f"{estimator.name} needs {Need.MORE_THAN_ONE_BIT.value}",
            where="weight_bits of a preset",
            fix="weight_bits=2: levels -1, 0, 1 need as many",
        )
    return weight_quantizer(
        bits=bits,
        estimator=estimator,
        rule=rule,
        range=range,
        granularity=granularity or PerTensor(),
        format=format,
    )


def _activations(bits: int, estimator: Estimator, rule: RangeRule = MSE) -> Quantizer:
    """Behind a ReLU: unsigned codes from 0."""
    format = integer(max_bits=8, signed=False)
    _check(bits, format, "activation_bits")
    return activation_quantizer(
        bits=bits, estimator=estimator, rule=rule, format=format, symmetric=True
    )


def _check(bits: int, format: Format, argument: str) -> None:
    """Refused by the argument of the preset, which has none for the format."""
    check_bits(format, bits, argument=argument, where="a preset", is_fixed=True)


def straight_through(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Fixed ranges of least squared error, gradients passed beyond them too (Bengio et al., 2013).

    >>> print(straight_through())
    w=int4/tensor/straight_through a=uint4/tensor/straight_through
    """
    return Scheme(
        weights=_weights(weight_bits, STRAIGHT_THROUGH),
        activations=_activations(activation_bits, STRAIGHT_THROUGH),
    )


def clipped(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Fixed ranges of least squared error, no gradient beyond them (Jacob et al., 2018)."""
    return Scheme(
        weights=_weights(weight_bits, CLIPPED), activations=_activations(activation_bits, CLIPPED)
    )


def lsq(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Learned scales, started from ``2 E|x| / sqrt(Q_P)`` (Esser et al., 2020)."""
    return Scheme(
        weights=_weights(weight_bits, LSQ, rule=ranges.LSQ),
        activations=_activations(activation_bits, LSQ_FEATURES, ranges.LSQ),
    )


def lsq_plus(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Learned scales, and zero points of activations that may have any sign (Bhalgat et al., 2020).

    Weights start from ``max(|μ - 3σ|, |μ + 3σ|)``, each side no further than what was seen (of
    weights that were drawn uniformly, the largest), activations from the least squared error.
    """
    format = integer(max_bits=8, signed=False)
    _check(activation_bits, format, "activation_bits")
    return Scheme(
        weights=_weights(weight_bits, LSQ, rule=ranges.sigma(3.0)),
        activations=activation_quantizer(
            bits=activation_bits, estimator=LSQ_PLUS, rule=MSE, format=format
        ),
    )


def pact_sawb(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """A learned clip of activations, weight scales by their moments (Choi et al., 2019).

    Weights have ``2^b`` levels about zero and none at it, those that the coefficients are for.
    """
    return Scheme(
        weights=_weights(
            weight_bits,
            SAWB,
            rule=ranges.SAWB,
            range=RangeMode.LIVE,
            format=midrise(max_bits=8),
        ),
        activations=_activations(activation_bits, PACT, MIN_MAX),
    )


def pact_dorefa(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """A learned clip of activations, DoReFa's weights (Choi et al., 2018)."""
    return Scheme(
        weights=_weights(weight_bits, DOREFA_WEIGHTS, rule=MIN_MAX, format=midrise(max_bits=8)),
        activations=_activations(activation_bits, PACT, MIN_MAX),
    )


def dorefa(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Squashed weights without a zero level, activations in 0..1 (Zhou et al., 2016).

    The weights keep the range that they had, where the paper has -1..1.
    """
    return Scheme(
        weights=_weights(weight_bits, DOREFA_WEIGHTS, rule=MIN_MAX, format=midrise(max_bits=8)),
        activations=_activations(activation_bits, DOREFA_ACTIVATIONS, ranges.constant(0.0, 1.0)),
    )


def ewgs(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Gradients scaled element by element, learned ranges (Lee, Kim, Ham, 2021)."""
    return Scheme(
        weights=_weights(weight_bits, EWGS), activations=_activations(activation_bits, EWGS)
    )


def dsq(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """A smooth staircase in the backward pass, its sharpness learned (Gong et al., 2019)."""
    return Scheme(
        weights=_weights(weight_bits, DSQ), activations=_activations(activation_bits, DSQ)
    )


def tqt(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Learned thresholds, scales that are powers of two (Jain et al., 2020)."""
    return Scheme(
        weights=_weights(weight_bits, TQT), activations=_activations(activation_bits, TQT)
    )


def qil(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """A learned interval, below which values are pruned (Jung et al., 2019)."""
    return Scheme(
        weights=_weights(weight_bits, QIL, rule=MIN_MAX, format=NARROW),
        activations=_activations(activation_bits, QIL, MIN_MAX),
    )


def quant_noise(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Some of the weights quantized in each step, scales of activations learned (Fan et al., 2021).

    Needs a key; ``qj.training.with_parameter(qstate, "rate", 1.0)`` for evaluation.
    """
    return Scheme(
        weights=_weights(weight_bits, QUANT_NOISE, granularity=PerChannel()),
        activations=_activations(activation_bits, LSQ_FEATURES, ranges.LSQ),
    )


def differentiable_quantization(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Scale and clip are learned, and with them the width (Uhlich et al., 2020)."""
    return Scheme(
        weights=_weights(weight_bits, DIFFERENTIABLE_QUANTIZATION, rule=MIN_MAX),
        activations=_activations(activation_bits, DIFFERENTIABLE_QUANTIZATION, MIN_MAX),
    )


def rounded_width(*, weight_bits: int = 4, activation_bits: int = 4) -> Scheme:
    """Clip and width are learned, the width rounded straight through; it starts as told."""
    return Scheme(
        weights=_weights(weight_bits, ROUNDED_WIDTH),
        activations=_activations(activation_bits, ROUNDED_WIDTH),
    )
