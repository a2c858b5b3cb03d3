"""How one tensor is quantized: format, granularity, range rule, rounding; static and hashable."""

from __future__ import annotations

import dataclasses
import enum
import numbers
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors, statistics
from quantjax.affine import DIVIDED, QParams, Scaling, mark_faults, qparams_from_range
from quantjax.arguments import expect, expect_declared
from quantjax.arithmetic import Arithmetic
from quantjax.estimators import CLIPPED, Estimator, check_needs
from quantjax.formats import Format, Theta, integer, known_overflow, levels_overflow
from quantjax.formats.levels import check_levels
from quantjax.formats.widths import check_bits
from quantjax.granularity import Granularity, PerChannel, PerTensor, PerToken, reduce_to
from quantjax.printing import shape_text
from quantjax.ranges import (
    MIN_MAX,
    FitRule,
    IndexedRule,
    Range,
    RangeRule,
    Target,
    apply_fit,
    check_symmetry,
    checked_rule,
    derive,
    holding_negatives,
)
from quantjax.rounding import HALF_EVEN, STOCHASTIC, Rounding, expect_whole
from quantjax.statistics import Statistics


class RangeMode(enum.Enum):
    """When a range is determined.

    ``FIXED``: by ``qj.calibrate``, once; a fixed range that the user's optimizer moves is a learned
    one. ``LIVE``: from each tensor as it comes (dynamic quantization).
    """

    FIXED = "fixed"
    LIVE = "live"


_KINDS: Mapping[str, tuple[type, str]] = {
    "format": (Format, "qj.integer(max_bits=8), qj.formats.E4M3FN or another of qj.formats"),
    "bits": (numbers.Real, "8; widths that vary, traced ones too, are qj.calibrate's"),
    "granularity": (Granularity, "qj.PerChannel(), qj.PerGroup(32)"),
    "range": (RangeMode, "qj.RangeMode.FIXED"),
    "rounding": (Rounding, "qj.rounding.HALF_EVEN"),
    "estimator": (Estimator, "qj.estimators.LSQ"),
    "scaling": (Scaling, "qj.affine.DIVIDED"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
    """How one tensor is quantized.

    Attributes:
      format: which codes; its ``max_bits`` bounds every width of a sweep.
      bits: the width unless ``qj.calibrate`` is told another.
      symmetric: zero point 0, or one that fits the range; only integers have one.
      granularity: who shares a scale.
      rule: statistics to range, or a fit to the tensor itself, unless ``qj.calibrate`` is told
        another.
      range: fixed or live.
      rounding, estimator: forward and backward of a code; an estimator may learn parameters of its
        own, which calibration starts.
      scaling: how a real is divided by the scale.
    """

    format: Format
    bits: int
    symmetric: bool
    granularity: Granularity
    rule: RangeRule | FitRule = MIN_MAX
    range: RangeMode = RangeMode.FIXED
    rounding: Rounding = HALF_EVEN
    estimator: Estimator = CLIPPED
    scaling: Scaling = DIVIDED

    def __post_init__(self) -> None:
        for name, (kind, example) in _KINDS.items():
            expect(
                getattr(self, name),
                kind,
                argument=name,
                where="a quantizer",
                fix=f"{name}={example}",
            )
        expect_declared(self, where="a quantizer")
        if not self.symmetric and not self.format.has_zero_point:
            raise errors.QuantizerError(
                f"{self.format.name} has no zero point, so its range cannot be asymmetric",
                why="its levels are no integers that could be moved",
                fix="symmetric=True, or an integer format",
            )
        check_bits(self.format, self.bits, argument="bits", where="a quantizer")
        check_levels(self.format, self.bits)
        expect_whole(self.rounding, where="a quantizer")
        if known_overflow(self.format, self.bits):
            raise errors.QuantizerError(
                f"the levels of {self.format.label(self.bits)} are too large for sums of products",
                why="products multiply levels, in float32, and scale what they give",
                fix="scale_rule=qj.formats.UNIT, which makes it a cast, or fewer exponent bits",
            )
        rule = checked_rule(self.rule, "a quantizer")
        if isinstance(rule, IndexedRule):
            raise errors.PolicyError(
                f"a quantizer has one rule, and this is {rule.name}",
                why="a quantizer is static, and the index an array",
                fix="qj.calibrate(..., rule=stack[i])",
            )
        if isinstance(self.rule, FitRule):
            check_symmetry(self.rule, symmetric=self.symmetric)
        numbers = self.rule.parameters if isinstance(self.rule, RangeRule) else ()
        if any(isinstance(number, jax.Array | np.ndarray) for number in numbers):
            raise errors.QuantizerError(
                f"the rule {self.rule.name} has an array for a parameter",
                why="a quantizer is static: programs are compared by it",
                fix="qj.calibrate(..., activation_rule=rule), which takes arrays, or float(number)",
            )
        self.check_width(self.bits)
        if isinstance(self.granularity, PerToken) and self.range is RangeMode.FIXED:
            raise errors.QuantizerError(
                "scales per token cannot be fixed beforehand",
                why="the number of tokens changes from call to call",
                fix="range=qj.RangeMode.LIVE",
            )

    def check_width(self, bits: int, *, where: str = "") -> None:
        """Raise ``EstimatorError`` where the estimator does not go with a known width."""
        is_fixed = self.range is RangeMode.FIXED
        check_needs(
            self.estimator,
            self.format,
            bits,
            symmetric=self.symmetric,
            is_fixed=is_fixed,
            where=where,
        )

    @property
    def arithmetic(self) -> Arithmetic:
        """The part that the arithmetic of one tensor needs."""
        return Arithmetic(
            self.format, self.rounding, self.estimator, self.scaling, symmetric=self.symmetric
        )

    def target(self, bits: jax.Array, theta: Theta = ()) -> Target:
        """What a range has to serve, for range rules."""
        return Target(self.format, self.symmetric, bits, theta)

    def qparams(
        self,
        stats: Statistics,
        bits: jax.Array,
        theta: Theta = (),
        *,
        rule: RangeRule | IndexedRule | None = None,
    ) -> QParams:
        """QParams from statistics at a width, by another rule than the quantizer's own if given."""
        chosen = rule or self.rule
        assert not isinstance(chosen, FitRule)
        return self.qparams_from(derive(chosen, stats, self.target(bits, theta)), bits, theta)

    def qparams_from(self, found: Range, bits: jax.Array, theta: Theta = ()) -> QParams:
        """QParams that cover a range at a width."""
        qparams = qparams_from_range(
            found.low,
            found.high,
            bits,
            format=self.format,
            symmetric=self.symmetric,
            calibrated=found.calibrated,
            theta=theta,
        )
        return qparams if self._is_bounded else self._marked(qparams)

    def qparams_of(
        self,
        tensor: jax.Array,
        bits: jax.Array,
        theta: Theta = (),
        *,
        scale_shape: tuple[int, ...],
        rule: RangeRule | IndexedRule | FitRule | None = None,
    ) -> QParams:
        """QParams of the tensor at hand at a width: by its statistics, or fitted to it.

        Raises:
          CalibrationError: the format's parameters are given, and the rule would find its own.
          QuantizerError: the rule finds a zero point, and the quantizer is symmetric.
        """
        chosen = self.rule if rule is None else rule
        if isinstance(chosen, IndexedRule) and chosen.fits:
            of_rule = partial(self.qparams_of, tensor, bits, theta, scale_shape=scale_shape)
            return chosen.qparams(lambda one: of_rule(rule=one))
        if not isinstance(chosen, FitRule):
            stats = statistics.of_tensor(tensor, scale_shape, with_values=chosen.reads_distribution)
            found = self.qparams(stats, bits, theta, rule=chosen)
            clips = self.symmetric and not self.format.signed
            return holding_negatives(found, tensor, scale_shape) if clips else found
        if theta:
            raise errors.CalibrationError(
                f"exponent bits for the rule {chosen.name}, which is told the width alone",
                where=f"{self.format.name}, tensor {shape_text(tensor.shape)}",
                fix="a range rule such as qj.ranges.MIN_MAX, or a plan for each exponent width",
            )
        x = jnp.asarray(tensor, jnp.float32)
        finite = reduce_to(jnp.isfinite(x), scale_shape, jnp.all)
        x = jnp.where(jnp.isfinite(x), x, 0.0)
        qparams = apply_fit(chosen, x, scale_shape, self.format, bits, symmetric=self.symmetric)
        return self._marked(qparams, finite=finite)

    def width(self, bits: jax.Array, theta: Theta = ()) -> QParams:
        """The width alone, for a range that is not known yet: scale 1, or its fault."""
        one = jnp.ones_like(bits)
        return self._marked(QParams(one, jnp.zeros_like(one), bits, theta))

    def started(self, qparams: QParams) -> QParams:
        """With the estimator's own parameters, as calibration starts them."""
        return self.estimator.started(qparams, self.format)

    @property
    def _is_bounded(self) -> bool:
        """Whether levels are integers of a container, whose sums float32 always holds."""
        return self.format.largest_centered_code(symmetric=self.symmetric) is not None

    def _marked(self, qparams: QParams, *, finite: jax.Array | None = None) -> QParams:
        """With the faults of widths, where there are such."""
        bits, theta, yes = qparams.bits, qparams.theta, jnp.ones((), bool)
        valid = self.format.valid_bits(bits, theta)
        if not self._is_bounded:
            valid &= ~levels_overflow(self.format, bits, theta)
        return mark_faults(
            qparams, calibrated=yes, finite=yes if finite is None else finite, valid=valid
        )

    def __str__(self) -> str:
        """``int4/channel``, ``uint8/tensor``, ``int8/token/live``, ``int4/tensor/lsq``."""
        parts = [self.format.label(self.bits), self.granularity.name]
        if self.range is not RangeMode.FIXED:
            parts.append(self.range.value)
        if self.estimator != CLIPPED:
            parts.append(self.estimator.name)
        return "/".join(parts)


def weight_quantizer(
    *,
    bits: int | None = None,
    format: Format | None = None,
    symmetric: bool = True,
    granularity: Granularity | None = None,
    rule: RangeRule | FitRule = MIN_MAX,
    range: RangeMode = RangeMode.FIXED,
    rounding: Rounding = HALF_EVEN,
    estimator: Estimator = CLIPPED,
    scaling: Scaling = DIVIDED,
) -> Quantizer:
    """Signed symmetric full-range codes, one scale an output channel, unless told otherwise.

    Without ``bits``, 8, or the width of a format's container that has no 8.

    Raises:
      QuantizerError: an unsigned format with a symmetric range, which has no negative codes.

    >>> str(weight_quantizer(bits=4))
    'int4/channel'
    """
    bits = _width(bits, format)
    format = format or integer(max_bits=max(bits, 8))
    if symmetric and not format.signed:
        raise errors.QuantizerError(
            "unsigned codes about zero would clip every negative weight to 0",
            where=f"format {format.name}",
            fix="a signed format, or symmetric=False",
        )
    return Quantizer(
        format=format,
        bits=bits,
        symmetric=symmetric,
        granularity=PerChannel() if granularity is None else granularity,
        rule=rule,
        range=range,
        rounding=rounding,
        estimator=estimator,
        scaling=scaling,
    )


def activation_quantizer(
    *,
    bits: int | None = None,
    format: Format | None = None,
    symmetric: bool | None = None,
    granularity: Granularity | None = None,
    rule: RangeRule | FitRule = MIN_MAX,
    range: RangeMode = RangeMode.FIXED,
    rounding: Rounding = HALF_EVEN,
    estimator: Estimator = CLIPPED,
    scaling: Scaling = DIVIDED,
) -> Quantizer:
    """Unsigned asymmetric codes, one scale a tensor, unless told otherwise.

    Without ``bits``, 8, or the width of a format's container that has no 8. A format without a zero
    point is symmetric.

    Sharp edges: symmetric codes are -128 to 127, so that a largest value that is positive has no
    level, nor a gradient by :data:`CLIPPED`: in a live range, one of every token or group.
    ``format=integer(max_bits=8, narrow=True)`` has both ends; at two bits three levels, not four.

    Raises:
      QuantizerError: a fixed range by a rule that needs the tensor itself; parts that contradict
        one another.

    >>> str(activation_quantizer(bits=8))
    'uint8/tensor'
    """
    bits = _width(bits, format)
    if symmetric is None:
        symmetric = format is not None and not format.has_zero_point
    if isinstance(rule, FitRule) and range is RangeMode.FIXED:
        raise errors.QuantizerError(
            f"the rule {rule.name} needs the tensor itself, which calibration does not keep",
            where="activations with a fixed range",
            fix="range=qj.RangeMode.LIVE, or a range rule such as qj.ranges.MIN_MAX",
        )
    return Quantizer(
        format=format or integer(max_bits=max(bits, 8), signed=symmetric),
        bits=bits,
        symmetric=symmetric,
        granularity=PerTensor() if granularity is None else granularity,
        rule=rule,
        range=range,
        rounding=rounding,
        estimator=estimator,
        scaling=scaling,
    )


def gradient_quantizer(
    *,
    bits: int | None = None,
    format: Format | None = None,
    granularity: Granularity | None = None,
    rule: RangeRule | FitRule = MIN_MAX,
    range: RangeMode = RangeMode.LIVE,
    rounding: Rounding = STOCHASTIC,
    scaling: Scaling = DIVIDED,
) -> Quantizer:
    """Signed symmetric codes of a live range, rounded stochastically: for backward products.

    A gradient that is rounded at random has the right mean; its size changes over training, so the
    range is that of each tensor. The quantized program needs a key. What clips the largest value
    has another mean: integers have as many codes above zero as below here (``narrow``), and of MX
    formats, whose :data:`MX_FLOOR` clips, take ``dataclasses.replace(MXFP4, scale_rule=MX_CEIL)``.

    >>> from quantjax.formats import E5M2
    >>> str(gradient_quantizer()), str(gradient_quantizer(format=E5M2))
    ('int-narrow8/tensor/live', 'e5m2/tensor/live')

    Source: Gupta et al., Deep learning with limited numerical precision, 2015, section 3;
    Micikevicius et al., FP8 formats for deep learning, 2022, section 3 (E5M2 for gradients).
    """
    bits = _width(bits, format)
    return activation_quantizer(
        bits=bits,
        format=format or integer(max_bits=max(bits, 8), narrow=True),
        symmetric=True,
        granularity=granularity,
        rule=rule,
        range=range,
        rounding=rounding,
        scaling=scaling,
    )


def _width(bits: int | None, format: Format | None) -> int:
    for name, value in (("format", format), ("bits", bits)):
        if value is not None:
            kind, example = _KINDS[name]
            expect(value, kind, argument=name, where="a quantizer", fix=f"{name}={example}")
    if bits is not None:
        if format is None:  # the one that is made holds any width that integers have
            check_bits(integer(max_bits=16), bits, argument="bits", where="a quantizer")
        return bits
    if format is None or format.known_valid(8):
        return 8
    return format.max_bits
