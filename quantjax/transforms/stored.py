"""Weights that are stored as codes: their QParams at the parameter and at the site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import QParams
from quantjax.formats import Format
from quantjax.interpreter import Program, leaves_by_path
from quantjax.layout import Move, moves_of, scale_in_parameter, scale_in_product
from quantjax.planning import Plan
from quantjax.printing import shape_text
from quantjax.qtensor import QTensor, is_quantized
from quantjax.quantizer import Quantizer, RangeMode
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.transforms.calibrate import QState
from quantjax.transforms.steps import over_steps


class StoredWeight(NamedTuple):
    """A quantized weight that is one parameter: the site that uses it, and how it gets there."""

    entry: SitePlan
    operand: OperandPlan
    path: str
    moves: list[Move]

    @property
    def where(self) -> str:
        """For errors."""
        shape = shape_text(self.operand.operand.shape)
        return f"site {self.entry.site.name} ({self.entry.site.op.value}), weight {shape}"


def stored_weights(plan: Plan) -> list[StoredWeight]:
    """All weights of a plan that ``freeze`` stores, in program order."""
    found = []
    for entry in plan.quantized:
        for operand in entry.quantized:
            live = operand.quantizer is not None and operand.quantizer.range is RangeMode.LIVE
            if operand.is_weight and operand.operand.storable and not live:
                moves = moves_of(plan.weights[entry.site.name])
                found.append(StoredWeight(entry, operand, operand.operand.paths[0], moves))
    return found


def parameter_qparams(weight: StoredWeight, qstate: Mapping[str, Mapping[str, QParams]]) -> QParams:
    """The site's QParams in use at the parameter; ``bits`` of the scale's rank.

    What the estimator learned is in scale, zero point and width, and no longer in ``theta``.
    """
    qparams = resolved_qparams(weight, qstate)
    layers = len(weight.entry.site.steps)
    rank = len(weight.operand.operand.shape)
    bits = jnp.asarray(qparams.bits, jnp.float32)
    bits = bits.reshape(bits.shape + (1,) * rank)
    scale, zero_point, bits = (
        scale_in_parameter(array, weight.moves, layers)
        for array in (qparams.scale, qparams.zero_point, bits)
    )
    quantizer = weight.operand.quantizer
    assert quantizer is not None
    move = lambda array: scale_in_parameter(array, weight.moves, layers)  # noqa: E731
    theta = quantizer.format.map_groups(quantizer.estimator.rest(qparams.theta), move)
    return QParams(scale, zero_point, bits, theta)


def resolved_qparams(weight: StoredWeight, qstate: Mapping[str, Mapping[str, QParams]]) -> QParams:
    """Those of the site, as the estimator has them."""
    quantizer, entry = weight.operand.quantizer, weight.entry
    assert quantizer is not None
    resolve = partial(quantizer.arithmetic.resolved, shape=weight.operand.operand.shape)
    found = over_steps(resolve, entry.site.steps)(qstate[entry.site.name][weight.operand.key])
    return cast(QParams, found)


def same_qparams(first: QParams, other: QParams) -> bool:
    """Equal where both are known; under a trace, of equal shapes."""
    return same_arrays(first, other)


def same_arrays(first: Any, other: Any) -> bool:
    """The same of two trees."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (first, other)]
    if structures[0] != structures[1]:
        return False
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        if left.shape != right.shape:
            return False
        values = concrete(left), concrete(right)
        if values[0] is None or values[1] is None:
            continue
        if not np.array_equal(values[0], values[1], equal_nan=True):
            return False
    return True


def agreement(first: Any, other: Any) -> jax.Array | None:
    """Whether trees of equal shapes are equal, where a trace hides it; None where it is known.

    Up to what another program makes of the same numbers.
    """
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    hidden = [pair for pair in pairs if any(concrete(side) is None for side in pair)]
    if not hidden:
        return None
    each = [jnp.all(jnp.isclose(a, b, rtol=1e-5, atol=0.0, equal_nan=True)) for a, b in hidden]
    return jnp.all(jnp.stack(each))


def unless(agrees: jax.Array | None, scale: jax.Array) -> jax.Array:
    """The scale; NaN where what has to agree turns out not to."""
    return scale if agrees is None else jnp.where(agrees, scale, jnp.nan)


def frozen_leaves(qparams: Any) -> dict[str, QTensor]:
    """The quantized leaves of a tree, by path."""
    named = leaves_by_path(qparams, is_leaf=is_quantized)
    return {path: leaf for path, leaf in named.items() if is_quantized(leaf)}


def check_uses(
    plan: Plan, program: Program, stored: Mapping[str, StoredWeight], frozen: Mapping[str, QTensor]
) -> None:
    """Raise ``FreezeError`` where a program uses a frozen weight in float, and the planned one,
    which is all that ``freeze`` knows, does not."""
    for weight in stored.values():
        use = program.others.get(weight.path)
        if weight.path in frozen and use is not None and weight.path not in plan.others:
            raise errors.FreezeError(
                f"the parameter {weight.path} is used in float as well",
                where=f"{weight.where}; also used by {use}, in this program alone",
                why="it is frozen, and was planned with inputs of which nothing else used it",
                fix="plan and freeze with inputs of these shapes: qj.sites(f, params, x)",
            )


def with_frozen(
    plan: Plan,
    stored: Mapping[str, StoredWeight],
    qstate: Mapping[str, Mapping[str, QParams]],
    frozen: Mapping[str, QTensor],
) -> QState:
    """The qstate with the QParams of frozen weights; those that it has must be the same."""
    merged: QState = {name: dict(operands) for name, operands in qstate.items()}
    for name, weight in stored.items():
        tensor = frozen.get(weight.path)
        quantizer, key = weight.operand.quantizer, weight.operand.key
        if tensor is None or quantizer is None:
            continue
        _check_format(weight, tensor.format, quantizer.format)
        agrees = None
        if key in merged.get(name, {}):
            agrees = _check_same(weight, parameter_qparams(weight, merged), tensor.qparams)
        given = merged.setdefault(name, {}).get(key)
        widths = jnp.max(tensor.qparams.bits) if given is None else given.bits

        def moved(array: jax.Array, weight: StoredWeight = weight) -> jax.Array:
            steps, shape = weight.entry.site.steps, weight.operand.scale_shape or ()
            fitted = _fitted(weight, array, (*steps, *shape))
            return scale_in_product(fitted, weight.moves, shape)

        scale, zero_point = moved(tensor.qparams.scale), moved(tensor.qparams.zero_point)
        scale = unless(agrees, scale)
        bits = jnp.broadcast_to(widths, weight.entry.site.steps)
        theta = tensor.format.map_groups(tensor.qparams.theta, moved)
        merged[name][key] = QParams(scale, zero_point, bits, theta)
    return {entry.site.name: merged.get(entry.site.name, {}) for entry in plan.quantized}


def not_frozen(
    plan: Plan, stored: Mapping[str, StoredWeight], frozen: Mapping[str, QTensor]
) -> Plan:
    """The plan without the quantizers of weights that are codes already: they need no key."""

    def left(entry: SitePlan) -> SitePlan:
        name = entry.site.name
        ready = name in stored and stored[name].path in frozen
        operands = []
        for operand in entry.operands:
            quantizer = operand.quantizer
            if quantizer is not None:
                gone = ready and operand.is_weight
                quantizer = None if gone else for_every_entry(quantizer)
            operands.append(dataclasses.replace(operand, quantizer=quantizer))
        return dataclasses.replace(entry, operands=tuple(operands))

    return dataclasses.replace(plan, sites=tuple(map(left, plan.sites)))


def for_every_entry(quantizer: Quantizer) -> Quantizer:
    """Without the draws of an estimator, which are for training."""
    if not quantizer.estimator.is_random:
        return quantizer
    return dataclasses.replace(quantizer, estimator=quantizer.estimator._replace(chosen=None))


def _fitted(weight: StoredWeight, array: jax.Array, planned: tuple[int, ...]) -> jax.Array:
    """A scale at the parameter, as fine there as the planned one is."""
    layers = len(weight.entry.site.steps)
    fine = scale_in_parameter(jnp.zeros(planned), weight.moves, layers).shape
    coarse = array.shape
    if len(fine) != len(coarse) or any(n % m for n, m in zip(fine, coarse, strict=True)):
        raise errors.FreezeError(
            f"a weight frozen with scales of shape {shape_text(coarse)}",
            where=weight.where,
            why=f"the plan has {shape_text(fine)} at that parameter",
            fix="freeze with the plan that is executed: qj.freeze(plan, qstate, params)",
        )
    for axis, (n, m) in enumerate(zip(fine, coarse, strict=True)):
        array = array if n == m else jnp.repeat(array, n // m, axis=axis)
    return array


def _check_format(weight: StoredWeight, found: Format, planned: Format) -> None:
    narrower = found.max_bits <= planned.max_bits  # packed after freezing
    if not narrower or dataclasses.replace(found, max_bits=planned.max_bits) != planned:
        raise errors.FreezeError(
            f"a weight frozen as {found.name}{found.max_bits}",
            where=weight.where,
            why=f"the plan has {planned.name}{planned.max_bits}",
            fix="freeze with the plan that is executed",
        )


def _check_same(weight: StoredWeight, stated: QParams, stored: QParams) -> jax.Array | None:
    shape = stated.zero_point.shape
    if stored.zero_point.shape != shape and stored.zero_point.ndim == len(shape):
        # One zero point for all that share it; symmetric weights are frozen so.
        stored = stored._replace(zero_point=jnp.broadcast_to(stored.zero_point, shape))
    stated = stated._replace(bits=stored.bits)
    if not same_qparams(stated, stored):
        raise errors.FreezeError(
            "the weight was frozen with other QParams than those of the qstate",
            where=weight.where,
            why="codes have no meaning but by the QParams that made them",
            fix="qparams = qj.freeze(plan, qstate, params) with this qstate",
        )
    return agreement(stated, stored)
