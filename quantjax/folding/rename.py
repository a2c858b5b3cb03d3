"""A qstate of one plan as that of another, or of other running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from quantjax import errors
from quantjax.affine import QParams
from quantjax.arguments import expect
from quantjax.folding.fold import check_leaves, factor, foldable, is_gone
from quantjax.folding.norms import BatchNorm
from quantjax.interpreter import leaves_by_path
from quantjax.planning import Plan
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.transforms.calibrate import QState
from quantjax.transforms.qstate import checked_qstate


def renamed(qstate: QState, plan: Plan, other: Plan) -> QState:
    """The qstate of a plan for another plan of the same program, site for site in program order.

    A program with folding calls its kernels ``f(...)``, and the deployed one by their paths; all
    else is the same, and the QParams are. One thing may not be: where the product has a bias,
    :func:`folded_training` divides ahead of it, so that the range of an output, and a bias, are not
    those of the deployed model, and cannot be planned in both.

    Args:
      qstate: of ``plan``.
      plan, other: of programs with the same products, under the same scheme.

    Raises:
      PlanMismatchError: planned products that differ in number, operation, operands, shapes or
        quantizers; planned outputs or biases of which one plan alone has a bias.
      CalibrationError: a planned operand without QParams.
    """
    qstate = checked_qstate(plan, qstate)
    expect(other, Plan, argument="other", where="qj.training.renamed", fix="renamed(qstate, a, b)")
    pairs = list(zip(plan.quantized, other.quantized, strict=False))
    different = [
        f"{old.site.name} and {new.site.name}"
        for old, new in pairs
        if old.site.op is not new.site.op
        or old.site.steps != new.site.steps
        or [(o.key, o.quantizer, o.scale_shape) for o in old.operands]
        != [(o.key, o.quantizer, o.scale_shape) for o in new.operands]
    ]
    if different or len(plan.quantized) != len(other.quantized):
        numbers = f"{len(plan.quantized)} planned products and {len(other.quantized)}"
        raise errors.PlanMismatchError(
            "the plans are not of one program under one scheme",
            where="qj.training.renamed",
            why=f"they differ in {different[0]}" if different else numbers,
            fix="plan both with the same policy, for the same model",
        )
    for old, new in pairs:
        if _behind(old) != _behind(new):
            raise errors.PlanMismatchError(
                "an output or bias is not the same one in both plans",
                where=f"qj.training.renamed, {old.site.name} and {new.site.name}",
                why="one of the two has a bias ahead of its output, or another quantizer there",
                fix="outputs=None, biases=None in the scheme of that site, in both plans",
            )
    return {new.site.name: dict(qstate[old.site.name]) for old, new in pairs}


def _behind(entry: SitePlan) -> tuple[Any, ...]:
    """What is planned for output and bias, and whether there is a bias ahead of the output."""
    planned = [(o.key, o.quantizer, o.scale_shape) for o in entry.after]
    if not planned and entry.bias is None:
        return ()
    return planned, entry.bias, entry.site.bias is None


def refolded(
    qstate: QState, plan: Plan, norms: Sequence[BatchNorm], before: PyTree, after: PyTree
) -> QState:
    """The qstate of folded kernels whose batch norms have other statistics now.

    A kernel ``W k`` in steps of ``s`` is, with another factor ``k'``, the kernel ``W k'`` in steps
    of ``s |k' / k|`` for each channel: the codes are the same. Do this where the running statistics
    moved after training, as by :func:`quantjax.training.reestimate`. Where a product reads its
    kernel in bfloat16, ``W k`` and ``W k'`` are rounded to it apart, and codes of 8 bits that lie
    next to a tie differ by one.

        state = refolded(renamed(qstate, plan, own), own, norms, variables, moved)
        folded = qj.fold_batch_norm(moved, norms)

    Args:
      qstate: of ``plan``, which names kernels by their paths.
      plan: of the model in evaluation mode; sites that it does not quantize are left out.
      norms: of :func:`batch_norms`.
      before, after: the trees that kernels were and will be folded with.

    Raises:
      TrainingError: a scale that several channels share, or an estimator with parameters of its
        own, or a planned output or bias, which cannot follow; parameters that are not there.
      PlanMismatchError: a kernel that is no site of the plan, as in that of the folded function.
      CalibrationError: a planned operand without QParams.
    """
    where = "qj.training.refolded"
    qstate = checked_qstate(plan, qstate)
    rows = {norm.site: norm for norm in foldable(norms, where)}
    leaves = [leaves_by_path(tree) for tree in (before, after)]
    for each in leaves:
        check_leaves(list(rows.values()), each, where)
    known = {entry.site.name for entry in plan.sites}
    for name in rows:
        if name not in known:
            raise errors.PlanMismatchError(
                f"no site of the plan is {name}",
                where=where,
                why=f"it is the kernel of a batch norm; there are {', '.join(sorted(known)[:6])}",
                fix="qj.training.renamed(qstate, plan, own) first, own of the model in evaluation",
            )
    moved = {name: dict(operands) for name, operands in qstate.items()}
    for entry in plan.quantized:
        norm = rows.get(entry.site.name)
        if norm is not None and (entry.after or entry.bias is not None):
            raise _cannot_follow(norm, "output and bias", "they are scaled by the factors as well")
        for operand in entry.quantized if norm is not None else ():
            if operand.is_weight and norm is not None:
                old, new = (factor(norm, each) for each in leaves)
                # A channel that is 0 before or after has codes of 0 under any scale.
                ratio = jnp.where(is_gone(old) | is_gone(new), 1.0, jnp.abs(new / old))
                qparams = moved[entry.site.name][operand.key]
                moved[entry.site.name][operand.key] = _rescaled(qparams, ratio, operand, norm)
    return moved


def _cannot_follow(norm: BatchNorm, operand: str, why: str) -> errors.TrainingError:
    return errors.TrainingError(
        "a scale cannot follow its batch norm",
        where=f"qj.training.refolded, site {norm.site}, {operand}",
        why=why,
        fix="granularity=qj.PerChannel() for weights alone, or calibrate the folded model anew",
    )


def _rescaled(qparams: QParams, ratio: jax.Array, operand: OperandPlan, norm: BatchNorm) -> QParams:
    """Of a weight: its scale times a ratio for each channel."""
    shape, free = operand.operand.shape, operand.operand.free
    own = [n if axis in free else 1 for axis, n in enumerate(shape)]
    scale = operand.scale_shape
    if scale is None or any(scale[axis] != shape[axis] for axis in free) or qparams.theta:
        theta = f"theta {sorted(qparams.theta)}" if qparams.theta else f"scales of {scale}"
        why = f"it has {theta}, and the factors are one for each of {norm.channels} channels"
        raise _cannot_follow(norm, operand.key, why)
    # Statistics of a float64 model have ratios of their dtype, and scales are float32.
    ratio = ratio.reshape((*norm.steps, *own)).astype(jnp.float32)
    return qparams._replace(scale=qparams.scale * ratio)
