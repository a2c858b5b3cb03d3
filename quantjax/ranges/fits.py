"""Applying a fit, and checking what it returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import Fault, QParams, mark_negatives
from quantjax.formats import Format
from quantjax.granularity import reduce_to
from quantjax.printing import shape_text
from quantjax.ranges.base import FitRule, holds_for


def apply_fit(
    rule: FitRule,
    x: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    *,
    symmetric: bool,
) -> QParams:
    """The QParams that a rule finds for a tensor, checked.

    Args:
      symmetric: whether the zero point has to be 0. One that is traced and is not makes the scale
        NaN, with :attr:`Fault.ZERO_POINT` for ``qj.check``; so does a zero point of 0 for unsigned
        codes of negative values, with :attr:`Fault.NEGATIVE`.

    Raises:
      PolicyError: it returned something else than QParams of the scale's shape, or another width.
      QuantizerError: a zero point for a symmetric quantizer.
    """
    check_symmetry(rule, symmetric=symmetric)
    found = rule.fit(x, scale_shape, format, bits, *rule.parameters)
    if not isinstance(found, QParams):
        raise errors.PolicyError(
            f"the rule {rule.name} returned no QParams",
            where=f"{format.name}, tensor {shape_text(x.shape)}",
            why=f"it returned {type(found).__name__}",
            fix="qj.QParams(scale, zero_point, bits)",
        )
    if found.bits is not bits:
        found = _at_the_width(rule, found, bits)
    found = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), found)
    for array in (found.scale, found.zero_point):
        if not holds_for(jnp.shape(array), scale_shape):
            raise errors.PolicyError(
                f"the rule {rule.name} returned a scale or zero point of shape {jnp.shape(array)}",
                where=f"{format.name}, tensor {shape_text(x.shape)}",
                why=f"scales have the shape {scale_shape}",
                fix="jnp.broadcast_to(scale, scale_shape)",
            )
    if not format.signed:
        found = holding_negatives(found, x, scale_shape)
    return _without_zero_point(rule, found) if symmetric else found


def _at_the_width(rule: FitRule, found: QParams, bits: jax.Array) -> QParams:
    """Refused, or NaN under a trace, where the rule made another width of the one asked for."""
    is_other = jnp.asarray(found.bits, jnp.float32) != bits
    known = concrete(is_other)
    if known is None:
        return found._replace(scale=jnp.where(is_other, jnp.nan, found.scale), bits=bits)
    if known.any():
        raise errors.PolicyError(
            f"the rule {rule.name} returned another width than it was asked for",
            why=f"{concrete(found.bits)} bits in place of {concrete(bits)}",
            fix="qj.QParams(scale, zero_point, bits), with the bits that it is called with",
        )
    return found._replace(bits=bits)


def holding_negatives(found: QParams, x: jax.Array, scale_shape: tuple[int, ...]) -> QParams:
    """QParams of unsigned codes, NaN where they would clip the negative values of a tensor to 0."""
    return mark_negatives(found, *(reduce_to(x, scale_shape, f) for f in (jnp.min, jnp.max)))


def check_symmetry(rule: FitRule, *, symmetric: bool) -> None:
    """Raise ``QuantizerError`` where a rule finds zero points, and the quantizer has none."""
    if symmetric and rule.needs_zero_point:
        raise _refused(rule)


def _without_zero_point(rule: FitRule, found: QParams) -> QParams:
    # Where the scale is NaN, the zero point says which fault it has.
    moved = (found.zero_point != 0.0) & ~jnp.isnan(found.scale)
    known = concrete(moved)
    if known is not None:
        if known.any():
            raise _refused(rule)
        return found
    return found._replace(
        scale=jnp.where(moved, jnp.nan, found.scale),
        zero_point=jnp.where(moved, float(Fault.ZERO_POINT), found.zero_point),
    )


def _refused(rule: FitRule) -> errors.QuantizerError:
    return errors.QuantizerError(
        f"the rule {rule.name} finds zero points, and the quantizer is symmetric",
        why="its zero point is 0, and scales that were fitted with another do not go with it",
        fix="symmetric=False, as in qj.weight_quantizer(symmetric=False, rule=...)",
    )
