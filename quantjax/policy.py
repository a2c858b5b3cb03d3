"""What happens where: schemes, rules and policies; all static and hashable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from quantjax.arguments import expect, expect_declared
from quantjax.biases import AccumulatorBias
from quantjax.formats import integer
from quantjax.formats.widths import check_bits
from quantjax.granularity import Granularity, PerToken
from quantjax.interpreter import Role, Site
from quantjax.quantizer import (
    Quantizer,
    RangeMode,
    activation_quantizer,
    gradient_quantizer,
    weight_quantizer,
)
from quantjax.selectors import Selector, weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """What happens at one site, by the role of the operand; None leaves it in float.

    Gradients are operands of a backward pass: of ``qj.fake_quantize(jax.grad(f), plan)``. Outputs
    are what a site returns, behind its bias where it has one; ``biases`` speaks of sites that do,
    and of no others.
    """

    weights: Quantizer | None = None
    activations: Quantizer | None = None
    gradients: Quantizer | None = None
    outputs: Quantizer | None = None
    biases: Quantizer | AccumulatorBias | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kinds = Quantizer, AccumulatorBias, type(None)
            expect(
                getattr(self, field.name),
                kinds if field.name == "biases" else (Quantizer, type(None)),
                argument=field.name,
                where="qj.Scheme",
                fix="qj.weight_quantizer(bits=4), qj.activation_quantizer() or another Quantizer",
            )

    def quantizer(self, role: Role) -> Quantizer | None:
        """Of operands of one role."""
        by_role = {
            Role.WEIGHT: self.weights,
            Role.GRADIENT: self.gradients,
            Role.OUTPUT: self.outputs,
            Role.BIAS: self.biases if isinstance(self.biases, Quantizer) else None,
        }
        return by_role.get(role, self.activations)

    def __str__(self) -> str:
        """``w=int4/channel a=uint8/tensor g=int8/tensor/live o=uint8/tensor b=int32/sums``."""
        parts = [f"w={self.weights}"] if self.weights else []
        parts += [f"a={self.activations}"] if self.activations else []
        parts += [f"g={self.gradients}"] if self.gradients else []
        parts += [f"o={self.outputs}"] if self.outputs else []
        parts += [f"b={self.biases}"] if self.biases else []
        return " ".join(parts) or "float"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A scheme for the sites that a selector matches."""

    selector: Selector
    scheme: Scheme
    optional: bool = False

    def __post_init__(self) -> None:
        example = 'qj.rule(qj.path("*/Dense_0/*"), qj.Scheme(weights=...))'
        expect(self.selector, Selector, argument="selector", where="qj.rule", fix=example)
        expect(self.scheme, Scheme, argument="scheme", where="qj.rule", fix=example)
        expect_declared(self.selector, where="qj.rule")

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
        example = "qj.Policy([qj.rule(qj.weighted(), scheme)])"
        expect(rules, Iterable, argument="rules", where="qj.Policy", fix=example)
        object.__setattr__(self, "rules", tuple(rules))
        for each in self.rules:
            expect(each, Rule, argument="one of the rules", where="qj.Policy", fix=example)

    def resolved(self, sites: Sequence[Site]) -> list[Selector]:
        """The selectors of all rules, for one table."""
        return [rule.selector.resolved(sites) for rule in self.rules]

    def choices(self, sites: Sequence[Site]) -> dict[str, Rule | None]:
        """The rule that decides on each site, by its name."""
        pairs = list(zip(self.rules, self.resolved(sites), strict=True))
        return {
            site.name: next((rule for rule, selector in pairs if selector.matches(site)), None)
            for site in sites
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.rules)) or "identity"


def uniform_policy(
    *,
    weight_bits: int | None = 8,
    activation_bits: int | None = 8,
    gradient_bits: int | None = None,
    weight_granularity: Granularity | None = None,
    activation_granularity: Granularity | None = None,
) -> Policy:
    """The same scheme at every site that has a weight.

    Weights are signed and symmetric with one scale a channel, activations unsigned and asymmetric
    with one scale a tensor. Containers hold 8 bits, or as many as asked for, so that one plan
    serves a sweep over widths.

    Args:
      weight_bits, activation_bits: None leaves them in float (and 16 is 16-bit *integers*).
      gradient_bits: of backward products with a weight, in ``jax.grad`` of a model or in a model
        that differentiates; stochastic, so that a key is needed.
      weight_granularity, activation_granularity: other than the defaults. Of ``PerToken()`` ranges
        are live, those of each tensor: a range for each token cannot be known beforehand.

    >>> print(uniform_policy(weight_bits=4, activation_bits=8))
    weighted: w=int4/channel a=uint8/tensor
    """
    for name, bits in (
        ("weight_bits", weight_bits),
        ("activation_bits", activation_bits),
        ("gradient_bits", gradient_bits),
    ):
        if bits is not None:
            widest = integer(max_bits=16)
            check_bits(widest, bits, argument=name, where="qj.uniform_policy", is_fixed=True)
    for name, granularity in (
        ("weight_granularity", weight_granularity),
        ("activation_granularity", activation_granularity),
    ):
        expect(
            granularity,
            (Granularity, type(None)),
            argument=name,
            where="qj.uniform_policy",
            fix=f"{name}=qj.PerTensor()",
        )
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
    gradients = None if gradient_bits is None else gradient_quantizer(bits=gradient_bits)
    scheme = Scheme(weights=weights, activations=activations, gradients=gradients)
    return Policy([]) if scheme == Scheme() else Policy([rule(weighted(), scheme)])
