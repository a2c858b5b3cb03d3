"""Policies that the field has names for: what becomes of every site that has a weight.

Weights are signed and symmetric; where a name has an ``a16``, activations stay in float. Each is
data: print it, take it apart (``policy.rules``), put rules of your own ahead of it.
"""

from __future__ import annotations

import dataclasses

from quantjax.arguments import expect
from quantjax.formats import E4M3FN, MXFP4, NVFP4, Format, integer
from quantjax.granularity import PerChannel, PerGroup, PerTensor, PerToken, Remainder
from quantjax.interpreter import Op
from quantjax.policy import Policy, Scheme, rule, uniform_policy
from quantjax.quantizer import RangeMode, activation_quantizer, weight_quantizer
from quantjax.relative_selectors import every_use, first, first_use, last
from quantjax.selectors import op, weighted


def w8a8() -> Policy:
    """int8 weights by output channel, uint8 activations by tensor with a zero point, static ranges.

    >>> print(w8a8())
    weighted: w=int8/channel a=uint8/tensor

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018,
    section 3.1.
    """
    return uniform_policy()


def w8a8_dynamic() -> Policy:
    """int8 weights by output channel, int8 activations by token, each range that of the token.

    Activations have the codes -127 to 127: in two's complement the largest value of every token
    would have no level, and no gradient where the program is trained.

    >>> print(w8a8_dynamic())
    weighted: w=int8/channel a=int-narrow8/token/live

    Source: Dettmers et al., LLM.int8(), 2022, section 2 (vector-wise quantization).
    """
    activations = activation_quantizer(
        format=integer(max_bits=8, narrow=True),
        symmetric=True,
        granularity=PerToken(),
        range=RangeMode.LIVE,
    )
    return _everywhere(Scheme(weights=weight_quantizer(bits=8), activations=activations))


def w4a16_group128() -> Policy:
    """int4 weights in groups of at most 128 along the sum, activations in float.

    Where 128 does not divide an axis, its groups are equally long and shorter.

    >>> print(w4a16_group128())
    weighted: w=int4/group128

    Source: Frantar et al., GPTQ, 2023, section 4 (the grouping); the range is the weights' own.
    """
    return _everywhere(Scheme(weights=weight_quantizer(bits=4, granularity=_groups(128))))


def w4a8() -> Policy:
    """int4 weights by output channel, uint8 activations by tensor, static ranges.

    >>> print(w4a8())
    weighted: w=int4/channel a=uint8/tensor
    """
    return uniform_policy(weight_bits=4)


def fp8() -> Policy:
    """E4M3 for weights, by channel, and activations, by tensor with static ranges.

    >>> print(fp8())
    weighted: w=e4m3fn/channel a=e4m3fn/tensor

    Source: Micikevicius et al., FP8 formats for deep learning, 2022, section 3.
    """
    weights = weight_quantizer(format=E4M3FN, granularity=PerChannel())
    activations = activation_quantizer(format=E4M3FN, granularity=PerTensor())
    return _everywhere(Scheme(weights=weights, activations=activations))


def mxfp4() -> Policy:
    """MXFP4 on both sides: E2M1 in blocks of 32 along the sum, scales that are powers of two.

    Activations take the scales of each tensor as it comes; rows of tables are blocks of weights. A
    block of a convolution is 32 channels at all places of the window.

    >>> print(mxfp4())
    weighted: w=e2m1-mx-floor/group32 a=e2m1-mx-floor/group32/live

    Source: Rouhani et al., OCP Microscaling Formats (MX) Specification 1.0, 2023, section 5.
    """
    return _blocks(MXFP4, 32)


def nvfp4() -> Policy:
    """NVFP4 on both sides: E2M1 in blocks of 16 along the sum, scales in E4M3.

    A block of a convolution is 16 channels at all places of the window.

    >>> print(nvfp4())
    weighted: w=e2m1-nvfp4/group16 a=e2m1-nvfp4/group16/live

    Source: NVIDIA, Pretraining large language models with NVFP4, 2025, section 2.
    """
    return _blocks(NVFP4, 16)


def first_last_8bit(policy: Policy | Scheme) -> Policy:
    """The first and the last product with a weight in 8 bits, all else as ``policy`` says.

    Lookups are not counted: the first product of a language model is the one behind its table. A
    weight has one width: a table tied to the last product takes its 8 bits, and in the program of
    ``jax.grad`` so do the backward products of both, whose gradients stay in float. Layers stacked
    in a scan are one site.

    >>> print(first_last_8bit(w4a8()))
    every use of (first 1 of first use of (weighted & ~op gather|dynamic_slice) | last 1 of first \
use of (weighted & ~op gather|dynamic_slice)): w=int8/channel a=uint8/tensor
    weighted: w=int4/channel a=uint8/tensor (optional)

    Args:
      policy: a policy, or a scheme for every site with a weight: ``qj.presets.lsq()``.

    Raises:
      ArgumentError: neither a policy nor a scheme, such as a preset that was not called.

    Source: Esser et al., Learned step size quantization, 2020, section 3 (the common practice).
    """
    expect(
        policy,
        (Policy, Scheme),
        argument="policy",
        where="qj.presets.first_last_8bit",
        fix=f"qj.presets.first_last_8bit(qj.presets.{_called(policy)}())",
    )
    new = first_use(weighted() & ~op(Op.GATHER, Op.SLICE))
    edges = every_use(first(new) | last(new))
    rest = (rule(weighted(), policy),) if isinstance(policy, Scheme) else policy.rules
    # Of a model of two layers nothing is left for them.
    inner = [dataclasses.replace(each, optional=True) for each in rest]
    return Policy([rule(edges, uniform_policy().rules[0].scheme), *inner])


def _called(value: object) -> str:
    """The preset that was meant, where one was named and not called."""
    name = getattr(value, "__name__", "")
    return name if getattr(value, "__module__", "").startswith("quantjax.presets.") else "w8a8"


def _everywhere(scheme: Scheme) -> Policy:
    return Policy([rule(weighted(), scheme)])


def _groups(size: int) -> PerGroup:
    return PerGroup(size, remainder=Remainder.SHORTER)


def _blocks(format: Format, size: int) -> Policy:
    weights = weight_quantizer(format=format, granularity=_groups(size))
    activations = activation_quantizer(
        format=format, granularity=_groups(size), range=RangeMode.LIVE
    )
    return _everywhere(Scheme(weights=weights, activations=activations))
