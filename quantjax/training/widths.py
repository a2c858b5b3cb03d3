"""``with_bits``: a qstate at other widths, with the ranges that it has."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantjax.affine import LARGEST_SCALE, SMALLEST_SCALE, Fault, QParams, is_bypassed
from quantjax.formats import REAL, Format, Span, Theta, divide_by_scale, levels_overflow
from quantjax.formats.scales import significand
from quantjax.planning import Plan
from quantjax.quantizer import Quantizer, RangeMode
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.transforms.calibrate import QState
from quantjax.transforms.operands import Bits, by_role, check_used, width_of
from quantjax.transforms.qstate import checked_qstate
from quantjax.transforms.steps import over_steps


def with_bits(
    plan: Plan,
    qstate: QState,
    *,
    weight_bits: Bits | None = None,
    activation_bits: Bits | None = None,
    gradient_bits: Bits | None = None,
    output_bits: Bits | None = None,
    bias_bits: Bits | None = None,
) -> QState:
    """The qstate at other widths; each operand keeps the range that its codes cover.

    ``s' = s · steps(b) / steps(b')`` with the format's ``steps``, in asymmetric ranges also
    ``z' = low(b') - (low(b) - z) · s / s'``, not rounded, so that the lowest code stands for the
    same number. ``theta`` stays. Differentiable in ``qstate``; works under ``jit`` and ``vmap``,
    and layers stacked in a scan take a width each.

    **Schedules.** Calibrate at the final width, keep and train *that* qstate, and derive the one of
    each step inside the loss: ``with_bits(plan, qstate, weight_bits=schedule(step))``. Gradients
    reach the scales through it, nothing drifts, and no width is lost on the way.

    Going to 0 bits changes the width alone, so that delayed quantization finds its scales again.
    Coming from 0 also keeps the scale, as that of the new width: at 0 bits nothing says which width
    it belonged to, and ``qj.calibrate`` at 0 bits has none.

    Args:
      plan: what the qstate was calibrated for.
      qstate: the one at hand, learned or calibrated.
      weight_bits, activation_bits, gradient_bits, output_bits, bias_bits: as for
        ``qj.calibrate``: one width, or ``{site: width}`` for some, or ``qj.FloatBits``; may be
        traced. Default: what is not named keeps its own.

    Returns:
      A new qstate; where a width stays, its QParams are the same bit for bit. Traced widths that
      the format lacks give NaN scales, which ``qj.check`` explains.

    Raises:
      BitsError: a concrete width that the container does not hold, or one of another shape.
      EstimatorError: a concrete width that the estimator does not go with.
      PolicyError: a width for operands that are not quantized.
      CalibrationError: a planned operand without QParams.

    Sharp edges: what an estimator learns instead of the scale decides still: a clip (PACT), a
    threshold (TQT) or a width of its own (``ROUNDED_WIDTH``, of which only 0 is overridden;
    ``DIFFERENTIABLE_QUANTIZATION``, whose clip stays while the scale moves, which downwards is a
    bit more than asked for).
    ``calibrate`` at the new width may find another, better range; this one keeps the old. The
    levels of a learned codebook belong to the width that they were fitted at.

    >>> import quantjax as qj
    >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
    >>> policy = qj.uniform_policy(weight_bits=8, activation_bits=None)
    >>> plan = qj.plan(policy, qj.sites(f, params, jnp.ones((1, 4))))
    >>> qstate = with_bits(plan, qj.calibrate(plan, {}, params), weight_bits=2)
    >>> float(qstate["w"]["weight"].bits), float(qstate["w"]["weight"].scale[0, 0])
    (2.0, 0.5)
    """
    qstate = checked_qstate(plan, qstate)
    asked = by_role(weight_bits, activation_bits, gradient_bits, output_bits, bias_bits)
    check_used(plan, asked)
    changed: QState = {name: dict(operands) for name, operands in qstate.items()}
    for entry in plan.quantized:
        name = entry.site.name
        for operand in entry.quantized:
            chosen = asked[operand.operand.role]
            if chosen is None or (isinstance(chosen, Mapping) and name not in chosen):
                continue
            changed[name][operand.key] = _changed(
                entry, operand, qstate[name][operand.key], *width_of(entry, operand, chosen)
            )
    return changed


def _changed(
    entry: SitePlan, operand: OperandPlan, qparams: QParams, bits: jax.Array, theta: Theta
) -> QParams:
    assert operand.quantizer is not None
    one = over_steps(partial(_at_width, operand.quantizer), entry.site.steps)
    found: QParams = one(qparams, bits, theta)
    return found


def _at_width(quantizer: Quantizer, qparams: QParams, bits: jax.Array, theta: Theta) -> QParams:
    """One layer's QParams at a width; ``theta`` holds what of the format changes with it."""
    merged = {**(qparams.theta or {}), **theta} if theta else qparams.theta
    own = quantizer.estimator.rest
    # At bypass a format has no steps: there, widths between which nothing changes.
    asleep = is_bypassed(qparams.bits), is_bypassed(bits)
    any_width = jnp.where(asleep[1], float(quantizer.format.max_bits), bits)
    before = jnp.where(asleep[0], any_width, qparams.bits)
    after = jnp.where(asleep[1], before, bits)
    old, new = (
        _codes(quantizer, width, own(held))
        for width, held in ((before, qparams.theta), (after, merged))
    )
    scale, zero_point = _moved(quantizer, qparams, old, new)
    kept = asleep[0]
    if not theta:  # with which equal widths may have other levels
        kept |= after == before
    if quantizer.range is RangeMode.LIVE:
        kept |= True
    kept = kept | jnp.isnan(qparams.scale)  # of which the zero point is the fault
    scale = jnp.where(kept, qparams.scale, scale)
    zero_point = jnp.where(kept, qparams.zero_point, zero_point)
    valid = _is_valid(quantizer.format, bits, own(merged), symmetric=quantizer.symmetric)
    outside = float(Fault.BITS_OUTSIDE_FORMAT)
    return QParams(
        jnp.where(valid, scale, jnp.nan), jnp.where(valid, zero_point, outside), bits, merged
    )


class _Codes(NamedTuple):
    """What of a width matters to a range."""

    low: jax.Array
    high: jax.Array
    steps: jax.Array
    unit: jax.Array


def _codes(quantizer: Quantizer, bits: jax.Array, theta: Theta) -> _Codes:
    format = quantizer.format
    low, high = format.level_range(bits, theta)
    steps = format.steps(bits, symmetric=quantizer.symmetric, theta=theta)
    return _Codes(low, high, steps, format.unit(bits, theta))


def _moved(
    quantizer: Quantizer, qparams: QParams, old: _Codes, new: _Codes
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point with which ``new`` codes cover the range that ``old`` ones did."""
    # The ratio first: the span of wide minifloats would be infinite.
    scale = qparams.scale * divide_by_scale(old.steps, new.steps)
    rule = quantizer.format.scale_rule
    if rule != REAL:
        by_rule = rule.scale(Span(qparams.scale * old.steps, scale, new.high, new.unit))
        # Full integers have a step more than their highest code, which may be a binade more.
        stays = rule.is_power_of_two & (significand(scale) == 1.0)
        scale = jnp.where(stays, scale, by_rule)
    scale = jnp.clip(scale, SMALLEST_SCALE, LARGEST_SCALE)
    if quantizer.symmetric:
        return scale, qparams.zero_point
    lowest = (old.low - qparams.zero_point) * qparams.scale
    return scale, new.low - divide_by_scale(lowest, jnp.broadcast_to(scale, lowest.shape))


def _is_valid(format: Format, bits: jax.Array, theta: Theta, *, symmetric: bool) -> jax.Array:
    """As calibration has it."""
    valid = format.valid_bits(bits, theta)
    if format.largest_centered_code(symmetric=symmetric) is None:
        valid &= ~levels_overflow(format, bits, theta)
    return valid
