"""What calibration knows of each planned operand: its width, its weight, its statistics."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax import errors, statistics
from quantjax._compat import concrete
from quantjax.affine import QParams, mark_negatives
from quantjax.arguments import expect
from quantjax.formats import FloatBits, MinifloatFormat, Theta, known_overflow
from quantjax.interpreter import Role, evaluate_origin, unbroadcast
from quantjax.meshes import automatic
from quantjax.planning import Plan
from quantjax.ranges import Range, Target
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.statistics import Statistics
from quantjax.transforms.observe import State, statistics_of
from quantjax.transforms.steps import over_steps
from quantjax.transforms.whole import settled

Bits = Float[Array, ""] | int | float | FloatBits | Mapping[str, Any]


def weight_at_hand(
    plan: Plan, entry: SitePlan, operand: OperandPlan, leaves: Mapping[str, Any]
) -> jax.Array | None:
    """The weight or bias, where parameters (``leaves`` by path) determine it; None for what is
    observed."""
    origin = plan.weights[entry.site.name] if operand.is_weight else None
    if operand.operand.role is Role.BIAS:
        origin = unbroadcast(plan.biases[entry.site.name])
    return evaluate_origin(origin, leaves) if origin is not None and origin.derivable else None


def statistics_for(
    entry: SitePlan,
    operand: OperandPlan,
    state: State,
    weight: jax.Array | None,
    bits: jax.Array,
    *,
    histogram_for: str | None,
) -> Statistics:
    """Of the weight at hand, or what was observed.

    Args:
      histogram_for: what reads the distribution, for the message; None where nothing does, and
        the values of a weight are then left out.

    Raises:
      CalibrationError: the operand was never observed, or its histogram was left out.
    """
    if weight is not None:
        shape, values = operand.scale_shape or (), histogram_for is not None
        seen = partial(statistics.of_tensor, scale_shape=shape, with_values=values)
        return cast(Statistics, automatic(over_steps(seen, entry.site.steps), weight))
    stats = _observed(entry, operand, state, bits)
    if histogram_for is not None and stats.distribution is None:
        raise errors.CalibrationError(
            f"{histogram_for} reads a histogram, and none was kept",
            where=f"site {entry.site.name}, {operand.key}",
            why="qj.init(plan, histogram_bins=None) leaves it out",
            fix="qj.init(plan), and observe again",
        )
    return stats


def _observed(entry: SitePlan, operand: OperandPlan, state: State, bits: jax.Array) -> Statistics:
    stats = statistics_of(entry, operand, state)
    batches, width = concrete(stats.batches), concrete(bits)
    is_bypassed = width is not None and (width == 0).all()
    came = np.any if is_a_choice(entry) else np.all  # some layers may never take the branch
    if batches is not None and not came(batches) and not is_bypassed:
        raise errors.CalibrationError(
            "calibration was never run",
            where=f"site {entry.site.name}, {operand.key}",
            why=""
            if not is_a_choice(entry)
            else "the site lies in "
            f"{' in '.join(entry.site.loops)}, and no calibration batch came there",
            fix="run y, state = qj.observe(f, plan)(state, params, x) on calibration data first",
        )
    return stats


def is_a_choice(entry: SitePlan) -> bool:
    """Whether data decide if the site is reached."""
    return bool({"cond", "while"} & {*entry.site.loops})


def by_role(
    weight: Bits | None,
    activation: Bits | None,
    gradient: Bits | None,
    output: Bits | None,
    bias: Bits | None,
) -> dict[Role, Bits | None]:
    """The widths that a verb is asked for."""
    roles = (Role.WEIGHT, Role.ACTIVATION, Role.GRADIENT, Role.OUTPUT, Role.BIAS)
    asked = map(settled, (weight, activation, gradient, output, bias))
    return dict(zip(roles, asked, strict=True))


def check_used(plan: Plan, asked: Mapping[Role, Bits | None]) -> None:
    """Raise ``PolicyError`` for widths of operands that no quantizer touches."""
    for role, bits in asked.items():
        if bits is not None:
            _check_role(plan, bits, role)


def _check_role(plan: Plan, bits: Bits, role: Role) -> None:
    known = {
        entry.site.name: None
        for entry in plan.quantized
        if any(operand.operand.role is role for operand in entry.quantized)
    }
    asked = list(bits) if isinstance(bits, Mapping) else ["all"] * (not known)
    unknown = [name for name in asked if name not in known]
    if not unknown:
        return
    argument, what = f"{role.value}_bits", f"a width is given where no {role.value} is quantized"
    if not known:
        raise errors.PolicyError(
            f"{what}, at no site of the plan",
            where=f"{argument}, site {unknown[0]}",
            fix=f"leave {argument} out, or plan with a quantizer for it",
        )
    few = f"{', '.join(list(known)[:6])}{', ...' if len(known) > 6 else ''}"
    alike = difflib.get_close_matches(str(unknown[0]), known, n=1) or list(known)
    raise errors.PolicyError(
        f"{what}: site {unknown[0]}; it is at {few}",
        where=argument,
        fix=f"{argument}={{{alike[0]!r}: 4}}, or no width for {unknown[0]!r}",
    )


def width_of(entry: SitePlan, operand: OperandPlan, chosen: Bits | None) -> tuple[jax.Array, Theta]:
    """The width of one operand and the format's parameters, of the shape of the site's steps.

    Raises:
      BitsError: a width that the container does not hold, or of another shape.
      EstimatorError: a known width that the estimator does not go with.
    """
    assert operand.quantizer is not None
    name, steps = entry.site.name, entry.site.steps
    if isinstance(chosen, Mapping):
        chosen = chosen.get(name)
    value: Any = operand.quantizer.bits if chosen is None else chosen
    format, where = operand.quantizer.format, f"site {name}, {operand.key}"
    theta: Theta = ()
    example = "a number, an array of rank 0, qj.FloatBits, or {site: width}"
    for leaf in jax.tree.leaves(value):
        kinds = numbers.Real, jax.Array, np.ndarray
        expect(leaf, kinds, argument="a width", where=where, fix=example)
        if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jnp.number):
            raise errors.ArgumentError(
                f"a width is an array of {leaf.dtype}, and a number of bits is needed",
                where=where,
                fix=example,
            )
    if isinstance(value, FloatBits):
        if not isinstance(format, MinifloatFormat):
            raise errors.BitsError(
                f"exponent and mantissa bits for {format.name}, which is no minifloat",
                where=where,
                fix="a single width, or plan with qj.formats.E4M3FN",
            )
        value, theta = value.bits, value.theta
    expect(
        value,
        (numbers.Real, jax.Array, np.ndarray, list, tuple),
        argument="a width",
        where=where,
        fix=example,
    )
    if isinstance(value, list | tuple):
        value = (
            np.asarray(value)
            if all(concrete(width) is not None for width in value)
            else jnp.stack(list(map(jnp.float32, value)))
        )
    if any(np.shape(array) not in ((), steps) for array in (value, *jax.tree.leaves(theta))):
        needed = f"one of {steps}, a width for each layer, or a scalar" if steps else "a scalar"
        raise errors.BitsError(
            f"a width of shape {np.shape(value)} where {needed} is needed",
            where=where,
            fix="jax.vmap or jax.lax.map over the widths of a sweep",
        )
    # Copies: sites that share an array could not donate it, nor could the caller keep it.
    arrays = jax.tree.map(lambda array: jnp.array(array, jnp.float32), (value, theta))
    bits, theta = jax.tree.map(lambda array: jnp.broadcast_to(array, steps), arrays)
    known = concrete(value)
    if known is not None and format.known_valid(value, theta) is False:
        shown = ", ".join(f"{width:g}" for width in np.unique(known))
        every = [b for b in range(1, format.max_bits + 1) if format.known_valid(b, theta)]
        held = f"whole widths from {every[0]} up to {every[-1]}" if every else "no width"
        # What a wider container does not hold either, NaN among it, is not helped by one.
        helps = not theta and bool(
            np.all((known >= 0) & (known == np.floor(known)) & (known <= 16))
        )
        wider = ", or plan with qj.integer(max_bits=16)" if helps else ""
        if theta:
            held += f" with {np.unique(np.asarray(theta['exponent_bits']))} exponent bits"
        raise errors.BitsError(
            f"{shown} bits are outside the format {format.name}",
            where=where,
            why=f"its container holds {held}, and 0 for bypass",
            fix=f"{every[-1] if every else 0} bits{wider}",
        )
    for width in () if known is None else np.unique(known):
        operand.quantizer.check_width(int(width), where=where)
    if known_overflow(format, value, theta):
        raise errors.BitsError(
            "so many exponent bits have levels that are too large for sums of products",
            where=where,
            why="products multiply levels, in float32, and scale what they give",
            fix="6 exponent bits at most, or a format with scale_rule=qj.formats.UNIT",
        )
    return bits, theta


def covering(entry: SitePlan, operand: OperandPlan, found: Range, target: Target) -> QParams:
    """The QParams that cover a range, layer by layer."""
    assert operand.quantizer is not None
    shape, calibrated = found.low.shape, found.calibrated
    trailing = calibrated.reshape(calibrated.shape + (1,) * (len(shape) - calibrated.ndim))
    found = found._replace(calibrated=jnp.broadcast_to(trailing, shape))
    covered = over_steps(operand.quantizer.qparams_from, entry.site.steps)
    return cast(QParams, covered(found, target.bits, target.theta))


def holding_what_was_seen(
    entry: SitePlan, operand: OperandPlan, qparams: QParams, stats: Statistics
) -> QParams:
    """QParams, NaN where unsigned codes about zero would clip to 0 what was seen far below it."""
    quantizer = operand.quantizer
    assert quantizer is not None
    if quantizer.format.signed or not quantizer.symmetric:
        return qparams
    marked = over_steps(mark_negatives, entry.site.steps)
    return cast(QParams, marked(qparams, *stats.extremes))
