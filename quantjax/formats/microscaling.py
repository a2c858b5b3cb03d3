"""Microscaling: small elements in blocks that share a power of two, and NVFP4's two-level scales.

Nothing here is a new kind of format. A microscaled tensor is an element format with another scale
rule, in groups of a fixed size: ``format=MXFP4, granularity=qj.PerGroup(MX_BLOCK)``.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from quantjax import errors
from quantjax.formats.base import Format
from quantjax.formats.division import divide_by_scale
from quantjax.formats.integer import integer
from quantjax.formats.minifloat import E2M1, E2M3, E3M2, E4M3FN, E5M2
from quantjax.formats.scales import MX_FLOOR, ScaleRule, Span, exponent_of
from quantjax.rounding import HALF_EVEN

Element = TypeVar("Element", bound=Format)

MX_BLOCK = 32
"""How many elements share a scale in every MX format of the specification."""

NVFP4_BLOCK = 16
"""How many elements share a scale in NVFP4."""

_E8M0_BIAS, _E8M0_NAN = 127, 255
_FRACTION_BITS, _QUIET_NAN = 23, 0x7FC00000  # of float32
_LARGEST_BLOCK_SCALE = 448.0  # of e4m3fn
_SMALLEST_BLOCK_SCALE = 2.0**-9
_SMALLEST_NORMAL = float(jnp.finfo(jnp.float32).smallest_normal)


def mx(element: Element, *, scale_rule: ScaleRule = MX_FLOOR) -> Element:
    """The element format with scales that are powers of two.

    ``x ≈ 2^k level``, one ``k`` for each block.

    Args:
      element: what each element is stored as.
      scale_rule: which power of two. ``MX_FLOOR`` is the specification's, under which the largest
        elements of a block may saturate; toolkits also have ``MX_EVEN``, ``MX_CEIL`` and, as
        "RCEIL", ``POWER_OF_TWO``.

    Raises:
      FormatError: the rule has other scales than powers of two.

    >>> mx(E2M1).name, mx(integer(max_bits=8)).name
    ('e2m1-mx-floor', 'int-mx-floor')

    Source: Open Compute Project, OCP Microscaling Formats (MX) Specification v1.0, 2023,
    sections 5 and 6.
    """
    if not scale_rule.is_power_of_two:
        raise errors.FormatError(
            f"the scale rule {scale_rule.name or 'REAL'} has scales that are no powers of two",
            where=f"mx({element.name})",
            why="the scale of an MX block is stored as an exponent alone (e8m0)",
            fix="scale_rule=MX_FLOOR, or the element format itself, without mx",
        )
    return dataclasses.replace(element, scale_rule=scale_rule)


MXFP8_E4M3, MXFP8_E5M2 = mx(E4M3FN), mx(E5M2)
MXFP6_E2M3, MXFP6_E3M2 = mx(E2M3), mx(E3M2)
MXFP4 = mx(E2M1)

MXINT8 = mx(integer(max_bits=8))
"""Two's complement with ``2^k``.

The specification's elements are ``code · 2^-6``. Here levels are the codes, and the ``2^-6``
belongs to the scale: what a file of the specification stores is ``64 scale``.
"""


def _two_levels(span: Span) -> jax.Array:
    largest = jnp.max(span.largest, initial=0.0)
    # Of a quotient, XLA would divide once by the product: hence the barrier.
    largest, quotient = lax.optimization_barrier((largest, span.quotient))
    whole = divide_by_scale(largest, span.top * _LARGEST_BLOCK_SCALE)
    whole = jnp.maximum(whole, _SMALLEST_NORMAL)  # a tensor of zeros
    whole = jnp.where(jnp.isfinite(largest), whole, jnp.nan)  # no block has a scale any more
    ratio = divide_by_scale(quotient, whole)
    bits = jnp.float32(E4M3FN.max_bits)
    block = E4M3FN.snap(ratio, jnp.float32(0.0), bits, HALF_EVEN).level
    return jnp.maximum(block, _SMALLEST_BLOCK_SCALE) * whole


NVFP4_SCALE = ScaleRule("nvfp4", _two_levels)
"""A scale for each block in e4m3fn, times one float32 scale for the tensor.

``t = max over all blocks of span / (448 top)``, ``s = e4m3fn(span / top / t) t``, where e4m3fn
rounds half to even and is at least ``2^-9``, its smallest positive number. ``top`` is 6 for e2m1.

The rule takes the spans of one call for one tensor; under ``jax.vmap`` each has a ``t`` of its own.
Where a scale was rounded down, the block saturates by 6 % at most. Below ``2^-15`` of the largest
span, scales are subnormal e4m3fn numbers, and coarse.

>>> spans = jnp.array([2688.0, 6.1, 0.0])
>>> NVFP4_SCALE.scale(Span(spans, spans / 6.0, jnp.float32(6.0), jnp.float32(2.0))).tolist()
[448.0, 1.0, 0.001953125]

Source: NVIDIA, Pretraining large language models with NVFP4, 2025, the appendix on quantization.
"""

NVFP4 = dataclasses.replace(E2M1, scale_rule=NVFP4_SCALE)
"""e2m1 elements with :data:`NVFP4_SCALE`, in groups of :data:`NVFP4_BLOCK`."""


def e8m0_codes(scale: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """The exponent bytes of scales: ``log2 scale + 127``; NaN is 255.

    A scale that is no power of two becomes the one below.

    >>> e8m0_codes(jnp.array([0.5, 1.0, 2.0, jnp.nan])).tolist()
    [126, 127, 128, 255]

    Source: Open Compute Project, OCP Microscaling Formats (MX) Specification v1.0, 2023,
    section 5.4.1.
    """
    return (exponent_of(scale) + _E8M0_BIAS).astype(jnp.uint8)


def e8m0_scales(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """``2^(code - 127)``, float32; 255 is NaN.

    Sharp edges: code 0 stands for ``2^-127``, a subnormal float32 number. It comes out right, and
    whatever XLA on CPU computes with it takes it for 0. No scale rule gives it.

    >>> e8m0_scales(jnp.array([126, 127, 255], jnp.uint8)).tolist()
    [0.5, 1.0, nan]
    """
    pattern = codes.astype(jnp.int32) << _FRACTION_BITS
    pattern = jnp.where(codes == 0, 1 << (_FRACTION_BITS - 1), pattern)
    pattern = jnp.where(codes == _E8M0_NAN, _QUIET_NAN, pattern)
    return lax.bitcast_convert_type(pattern, jnp.float32)
