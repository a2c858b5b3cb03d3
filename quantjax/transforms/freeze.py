"""``qj.freeze``: weights as integer codes, in the tree that they came in."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import QParams, is_bypassed
from quantjax.formats import Format
from quantjax.interpreter import leaves_by_path
from quantjax.layout import STEP, casts
from quantjax.planning import Plan
from quantjax.qtensor import QTensor, encode
from quantjax.rounding import Rounding
from quantjax.transforms.calibrate import QState
from quantjax.transforms.fake_quantize import check_qstate
from quantjax.transforms.stored import (
    StoredWeight,
    parameter_qparams,
    same_qparams,
    stored_weights,
)

PARTS = 16
"""A parameter is encoded in at most so many parts, one after another."""


def freeze(plan: Plan, qstate: QState, params: Any) -> Any:
    """Replace each quantized weight by its codes: the same tree, with :class:`QTensor` leaves.

    ``qj.execute(f, plan)(qstate, qparams, x)`` runs it; ``qj.dequantize_params`` turns it back into
    floats, and ``f`` of those agrees with the simulation of the weights. Works under ``jit``.

    What the plan does not quantize stays as it is, and so does a weight that is computed from
    parameters (the plan's table says so): ``qj.execute`` encodes it when it runs.

    Args:
      plan: which weights.
      qstate: from ``qj.calibrate``; layers stacked in a scan have scales each.
      params: the tree that was planned for.

    Raises:
      FreezeError: a parameter that one site has in other codes than another, or that is used in
        float as well; a weight at width 0, which has no codes.
      PlanMismatchError, CalibrationError: as ``qj.fake_quantize``.
      DataError: a concrete weight with NaN.

    Memory: one parameter at a time is encoded, in parts; beyond input and output, a fraction of a
    leaf of floats.

    >>> import jax.numpy as jnp, quantjax as qj
    >>> f = lambda p, x: x @ p["w"]
    >>> params, x = {"w": jnp.eye(4), "unused": jnp.ones(2)}, jnp.ones((1, 4))
    >>> plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, x))
    >>> freeze(plan, qj.calibrate(plan, {}, params), params)["w"]
    QTensor(int8[4x4], scale[1x4], float32)
    """
    plan.check_params(params)
    check_qstate(plan, qstate)
    uses: dict[str, list[StoredWeight]] = {}
    for weight in stored_weights(plan):
        uses.setdefault(weight.path, []).append(weight)
    _check_uses(plan, uses)
    leaves = leaves_by_path(params)
    frozen: dict[str, QTensor] = {}
    for path, weights in uses.items():
        stated = [parameter_qparams(weight, qstate) for weight in weights]
        _check_agreement(weights, stated)
        frozen[path] = _encode(weights[0], leaves[path], stated[0])
    flat = [frozen.get(path, leaf) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


def _encode(weight: StoredWeight, leaf: Any, qparams: QParams) -> QTensor:
    quantizer = weight.operand.quantizer
    assert quantizer is not None
    widths = concrete(qparams.bits)
    if widths is not None and not widths.all():
        raise errors.FreezeError(
            "a weight at 0 bits (bypass) has no codes",
            where=weight.where,
            fix="calibrate with a width of 1 or more, or exempt the site: qj.Scheme()",
        )
    leaf = jnp.asarray(leaf)
    known = concrete(leaf)
    if known is not None and np.isnan(known).any():
        raise errors.DataError(
            "the weight holds NaN, for which no code stands",
            where=weight.where,
            fix="find its source with jax.config.update('jax_debug_nans', True)",
        )
    dtypes = tuple(map(jnp.dtype, casts(weight.moves)))
    codes = _codes(leaf, qparams, quantizer.format, quantizer.rounding, dtypes)
    stacked = 0  # leading axes of a stack of tensors, each of which has its width
    while stacked < len(weight.moves) and weight.moves[stacked].name == STEP:
        stacked += 1
    bits = qparams.bits.reshape(*qparams.bits.shape[:stacked], -1).max(axis=-1)
    scale = jnp.where(is_bypassed(qparams.bits), jnp.nan, qparams.scale)  # under a trace
    return QTensor(codes, qparams._replace(scale=scale, bits=bits), quantizer.format, leaf.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _codes(
    leaf: jax.Array, qparams: QParams, format: Format, rounding: Rounding, dtypes: tuple[Any, ...]
) -> jax.Array:
    """One compiled program a shape, some rows at a time: all at once would hold a leaf of floats,
    and operation by operation several."""

    def some(rows: jax.Array, qparams: QParams) -> jax.Array:
        for dtype in dtypes:
            rows = rows.astype(dtype)
        return encode(rows, qparams, format, rounding=rounding).codes

    if leaf.ndim == 0:
        return some(leaf, qparams)
    arrays = qparams.scale, qparams.zero_point, qparams.bits
    sizes = {leaf.shape[0], *(a.shape[0] for a in arrays if a.shape[0] != 1)}
    parts = max(n for n in range(1, PARTS + 1) if all(size % n == 0 for size in sizes))

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] == 1:
            return jnp.broadcast_to(x, (parts, *x.shape))
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    rows = split(leaf) if leaf.shape[0] != 1 else leaf[None]
    scale, zero_point, bits = map(split, arrays)
    codes = lax.map(lambda part: some(part[0], QParams(*part[1:])), (rows, scale, zero_point, bits))
    return codes.reshape(leaf.shape)


def _check_uses(plan: Plan, uses: Mapping[str, list[StoredWeight]]) -> None:
    """A parameter is stored once: what uses it in float would see other values."""
    elsewhere = dict(plan.others)
    stored = {weight.entry.site.name for weights in uses.values() for weight in weights}
    for entry in plan.sites:
        weight = entry.site.weight
        if entry.site.name not in stored and weight is not None:
            for path in weight.paths:
                elsewhere.setdefault(path, f"site {entry.site.name}")
    for path, weights in uses.items():
        if path in elsewhere:
            raise errors.FreezeError(
                f"the parameter {path} is used in float as well",
                where=f"{weights[0].where}; also used by {elsewhere[path]}",
                why="a frozen tree holds it once, and the simulation has it in two forms",
                fix=f"keep the site in float: qj.rule(qj.path('{weights[0].entry.site.name}'), "
                "qj.Scheme()), ahead of the other rules",
            )


def _check_agreement(weights: list[StoredWeight], stated: list[QParams]) -> None:
    first, *others = weights
    for weight, qparams in zip(others, stated[1:], strict=True):
        if not (_same_quantizer(first, weight) and same_qparams(stated[0], qparams)):
            raise errors.FreezeError(
                f"the parameter {weight.path} has two sets of QParams",
                where=f"{first.where} and {weight.where}",
                why="a frozen tree holds a tied weight once",
                fix="plan both sites with one quantizer, per tensor or along the same axis",
            )


def _same_quantizer(first: StoredWeight, other: StoredWeight) -> bool:
    quantizers = first.operand.quantizer, other.operand.quantizer
    assert quantizers[0] is not None
    assert quantizers[1] is not None
    rounding = quantizers[0].rounding == quantizers[1].rounding
    same_casts = casts(first.moves) == casts(other.moves)
    return quantizers[0].format == quantizers[1].format and rounding and same_casts
