"""What happens where: quantizers, schemes, rules and policies; all static and hashable."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

import jax

from quantjax import errors
from quantjax.affine import QParams, qparams_from_range
from quantjax.estimators import CLIPPED, Estimator
from quantjax.fake_quant import Arithmetic
from quantjax.formats import Format, integer
from quantjax.granularity import Granularity, PerChannel, PerTensor, PerToken
from quantjax.interpreter import Site
from quantjax.ranges import MIN_MAX, IndexedRule, RangeRule
from quantjax.rounding import HALF_EVEN, Rounding
from quantjax.selectors import Selector, weighted
from quantjax.statistics import Statistics


class RangeMode(enum.Enum):
    """When a range is determined.

    ``FIXED``: by ``qj.calibrate``, once; a fixed range that the user's optimizer moves is a learned
    one. ``LIVE``: from each tensor as it comes (dynamic quantization).
    """

    FIXED = "fixed"
    LIVE = "live"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
    """How one tensor is quantized.

    Attributes:
      format: which codes; its ``max_bits`` bounds every width of a sweep.
      bits: the width unless ``qj.calibrate`` is told another.
      symmetric: zero point 0, or one that fits the range.
      granularity: who shares a scale.
      rule: statistics to range, unless ``qj.calibrate`` is told another.
      range: fixed or live.
      rounding, estimator: forward and backward of a code.
    """

    format: Format
    bits: int
    symmetric: bool
    granularity: Granularity
    rule: RangeRule = MIN_MAX
    range: RangeMode = RangeMode.FIXED
    rounding: Rounding = HALF_EVEN
    estimator: Estimator = CLIPPED

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= self.format.max_bits:
            raise errors.BitsError(
                f"{self.bits} bits do not fit a container of {self.format.max_bits}",
                fix=f"format=qj.integer(max_bits={max(self.bits, 1)}), or fewer bits",
            )
        if isinstance(self.granularity, PerToken) and self.range is RangeMode.FIXED:
            raise errors.QuantizerError(
                "scales per token cannot be fixed beforehand",
                why="the number of tokens changes from call to call",
                fix="range=qj.RangeMode.LIVE",
            )

    @property
    def arithmetic(self) -> Arithmetic:
        """The part that the arithmetic of one tensor needs."""
        return Arithmetic(self.format, self.rounding, self.estimator)

    def qparams(
        self, stats: Statistics, bits: jax.Array, rule: RangeRule | IndexedRule | None = None
    ) -> QParams:
        """QParams from statistics at a width, by another rule than the quantizer's own if given."""
        low, high, calibrated = (rule or self.rule).range(stats, self.format, bits)
        return qparams_from_range(
            low,
            high,
            bits,
            format=self.format,
            symmetric=self.symmetric,
            calibrated=calibrated,
        )

    def __str__(self) -> str:
        """``int4/channel``, ``uint8/tensor``, ``int8/token/live``."""
        parts = [f"{self.format.name}{self.bits}", self.granularity.name]
        if self.range is not RangeMode.FIXED:
            parts.append(self.range.value)
        return "/".join(parts)


def weight_quantizer(
    *,
    bits: int = 8,
    format: Format | None = None,
    symmetric: bool = True,
    granularity: Granularity | None = None,
    rule: RangeRule = MIN_MAX,
    rounding: Rounding = HALF_EVEN,
    estimator: Estimator = CLIPPED,
) -> Quantizer:
    """Signed symmetric full-range codes, one scale an output channel, unless told otherwise.

    Raises:
      QuantizerError: an unsigned format with a symmetric range, which has no negative codes.

    >>> str(weight_quantizer(bits=4))
    'int4/channel'
    """
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
        granularity=granularity or PerChannel(),
        rule=rule,
        rounding=rounding,
        estimator=estimator,
    )


def activation_quantizer(
    *,
    bits: int = 8,
    format: Format | None = None,
    symmetric: bool = False,
    granularity: Granularity | None = None,
    rule: RangeRule = MIN_MAX,
    range: RangeMode = RangeMode.FIXED,
    rounding: Rounding = HALF_EVEN,
    estimator: Estimator = CLIPPED,
) -> Quantizer:
    """Unsigned asymmetric codes, one scale a tensor, unless told otherwise.

    >>> str(activation_quantizer(bits=8))
    'uint8/tensor'
    """
    return Quantizer(
        format=format or integer(max_bits=max(bits, 8), signed=symmetric),
        bits=bits,
        symmetric=symmetric,
        granularity=granularity or PerTensor(),
        rule=rule,
        range=range,
        rounding=rounding,
        estimator=estimator,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """What happens at one site; None leaves the operand in float."""

    weights: Quantizer | None = None
    activations: Quantizer | None = None

    def __str__(self) -> str:
        """``w=int4/channel a=uint8/tensor``."""
        parts = [f"w={self.weights}"] if self.weights else []
        parts += [f"a={self.activations}"] if self.activations else []
        return " ".join(parts) or "float"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A scheme for the sites that a selector matches."""

    selector: Selector
    scheme: Scheme
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.selector}: {self.scheme}" + (" (optional)" if self.optional else "")


def rule(selector: Selector, scheme: Scheme, *, optional: bool = False) -> Rule:
    """One rule of a policy.

    Args:
      selector: which sites.
      scheme: what happens there; ``qj.Scheme()`` keeps them in float.
      optional: do not raise where nothing matches.
    """
    return Rule(selector, scheme, optional)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Ordered rules; the first that matches a site decides. ``Policy([])`` is the identity.

    >>> print(Policy([rule(weighted(), Scheme(weights=weight_quantizer(bits=4)))]))
    weighted: w=int4/channel
    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: Iterable[Rule]) -> None:
        object.__setattr__(self, "rules", tuple(rules))

    def first_match(self, site: Site) -> Rule | None:
        """The rule that decides on ``site``."""
        return next((rule for rule in self.rules if rule.selector.matches(site)), None)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rules)) or "identity"


def uniform_policy(
    *,
    weight_bits: int | None = 8,
    activation_bits: int | None = 8,
    weight_granularity: Granularity | None = None,
    activation_granularity: Granularity | None = None,
) -> Policy:
    """The same scheme at every site that has a weight.

    Weights are signed and symmetric with one scale a channel, activations unsigned and asymmetric
    with one scale a tensor. Containers hold 8 bits, or as many as asked for, so that one plan
    serves a sweep over widths.

    Args:
      weight_bits, activation_bits: None leaves them in float (and 16 is 16-bit *integers*).
      weight_granularity, activation_granularity: other than the defaults.

    >>> print(uniform_policy(weight_bits=4, activation_bits=8))
    weighted: w=int4/channel a=uint8/tensor
    """
    weights = activations = None
    if weight_bits is not None:
        weights = weight_quantizer(bits=weight_bits, granularity=weight_granularity)
    if activation_bits is not None:
        live = isinstance(activation_granularity, PerToken)
        activations = activation_quantizer(
            bits=activation_bits,
            granularity=activation_granularity,
            range=RangeMode.LIVE if live else RangeMode.FIXED,
        )
    if weights is None and activations is None:
        return Policy([])
    return Policy([rule(weighted(), Scheme(weights=weights, activations=activations))])
