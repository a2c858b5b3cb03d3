"""Batch norm folded into the kernel ahead of it, as a function of the variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from quantjax import errors
from quantjax.interpreter import leaves_by_path
from quantjax.planning import Plan
from quantjax.printing import shape_text
from quantjax.transforms.calibrate import QState
from quantjax.transforms.fake_quantize import check_qstate


class NormPair(NamedTuple):
    """A kernel, and the batch norm that its product goes into, with nothing between them.

    Attributes:
      kernel: path inside ``params``: ``Conv_0/kernel``; the output channels are its last axis.
      batch_norm: scope inside ``params`` and ``batch_stats``: ``BatchNorm_0``.
      epsilon: the batch norm's own, which no variable holds.
    """

    kernel: str
    batch_norm: str
    epsilon: float = 1e-5


def fold_batch_norm(variables: PyTree, pairs: Sequence[NormPair]) -> PyTree:
    """The same tree, with the batch norm of each pair folded into its kernel.

    With ``k = γ / sqrt(σ² + ε)``: ``W' = W k`` along the last axis, ``b' = b k`` for the bias
    beside the kernel, ``β' = β - μ k``; and ``γ' = 1``, ``μ' = 0``, ``σ²' = 1 - ε``, at which the
    batch norm adds ``β'`` and does nothing else. A model in evaluation mode returns what it did, to
    rounding.

    Pure and differentiable. **Training with folding**: quantize the folded function, whose kernels
    are what an integer program will hold,

        f = lambda v, x: model.apply(fold_batch_norm(v, pairs), x)

    and differentiate in ``v["params"]``; kernels are then functions of parameters, which simulation
    quantizes (their sites are called ``f(...)``). **Deployment**: fold once, plan ``model.apply``
    on the folded tree, hand the qstate over by :func:`renamed`, and ``qj.freeze``.

    Args:
      variables: ``{"params": ..., "batch_stats": ...}`` as of flax.linen; any mappings. γ or β may
        be missing. Stacked layers (kernels and statistics with equal leading axes) are folded each.
      pairs: explicit, because no tree says which product goes into which batch norm.

    Returns:
      A tree of the same structure, shapes and dtypes; other leaves are the same arrays.

    Raises:
      TrainingError: a path that is not there; channels that do not fit; a batch norm or kernel in
        two pairs; neither β nor a bias that could take ``β'``.

    Sharp edges: meant for evaluation mode: in training mode a batch norm takes the statistics of
    the batch, and folding has no effect on its output. Statistics get gradients if asked for. A
    folded tree may be folded again, which changes nothing.

    >>> norm = {"scale": jnp.full(1, 3.0), "bias": jnp.ones(1)}
    >>> params = {"Dense_0": {"kernel": jnp.ones((2, 1))}, "BatchNorm_0": norm}
    >>> stats = {"BatchNorm_0": {"mean": jnp.full(1, 2.0), "var": jnp.full(1, 4.0)}}
    >>> folded = fold_batch_norm({"params": params, "batch_stats": stats},
    ...     [NormPair("Dense_0/kernel", "BatchNorm_0", epsilon=0.0)])
    >>> folded["params"]["Dense_0"]["kernel"].tolist(), folded["params"]["BatchNorm_0"]["bias"]
    ([[1.5], [1.5]], Array([-2.], dtype=float32))

    Source: Jacob et al., Quantization and training of neural networks for efficient
    integer-arithmetic-only inference, 2018, section 3.2, equation 14; Krishnamoorthi, Quantizing
    deep convolutional networks for efficient inference, 2018, section 3.2.
    """
    leaves = dict(leaves_by_path(variables))
    _check_once(pairs)
    for pair in pairs:
        leaves.update(_folded(pair, leaves))
    return jax.tree.unflatten(jax.tree.structure(variables), list(leaves.values()))


def _folded(pair: NormPair, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The leaves that change."""
    scope, stats = f"params/{pair.batch_norm}", f"batch_stats/{pair.batch_norm}"
    kernel_path = f"params/{pair.kernel}"
    paths = kernel_path, f"{stats}/mean", f"{stats}/var"
    missing = [path for path in paths if path not in leaves]
    if missing:
        close = [path for path in leaves if path.split("/")[-1] == missing[0].split("/")[-1]]
        raise errors.TrainingError(
            f"there is no {missing[0]}",
            where=f"qj.training.fold_batch_norm, {pair}",
            why=f"of that name: {', '.join(close[:6]) or 'none'}",
            fix="paths inside the collections, as NormPair('Conv_0/kernel', 'BatchNorm_0')",
        )
    kernel, mean, variance = (jnp.asarray(leaves[path]) for path in paths)
    _check_channels(pair, kernel, variance)
    gamma, beta = leaves.get(f"{scope}/scale"), leaves.get(f"{scope}/bias")
    bias_path = "/".join([*kernel_path.split("/")[:-1], "bias"])
    bias = leaves.get(bias_path)
    wide = jnp.promote_types(jnp.float32, variance.dtype)
    factor = 1.0 / jnp.sqrt(variance.astype(wide) + pair.epsilon)
    factor = factor if gamma is None else factor * jnp.asarray(gamma).astype(wide)
    shift = -mean.astype(wide) * factor
    changed: dict[str, tuple[jax.Array, Any]] = {
        kernel_path: (kernel.astype(wide) * _along_last(factor, kernel.ndim), kernel),
        f"{stats}/mean": (jnp.zeros_like(factor), mean),
        f"{stats}/var": (jnp.ones_like(factor) - pair.epsilon, variance),
    }
    if gamma is not None:
        changed[f"{scope}/scale"] = jnp.ones_like(factor), gamma
    if bias is not None:
        changed[bias_path] = jnp.asarray(bias).astype(wide) * factor, bias
    if beta is not None:
        changed[f"{scope}/bias"] = jnp.asarray(beta).astype(wide) + shift, beta
    elif bias is not None:
        changed[bias_path] = changed[bias_path][0] + shift, bias
    else:
        raise errors.TrainingError(
            "nothing can take the shift of a batch norm",
            where=f"qj.training.fold_batch_norm, {pair}",
            why=f"neither {scope}/bias nor {bias_path} is there",
            fix="nn.BatchNorm(use_bias=True)",
        )
    return {path: new.astype(jnp.result_type(old)) for path, (new, old) in changed.items()}


def _along_last(factor: jax.Array, rank: int) -> jax.Array:
    """Layers first, channels last, as the kernel's axes."""
    layers = factor.shape[:-1]
    return factor.reshape((*layers, *(1,) * (rank - factor.ndim), factor.shape[-1]))


def _check_channels(pair: NormPair, kernel: jax.Array, variance: jax.Array) -> None:
    layers = variance.ndim - 1
    fits = (
        0 <= layers < kernel.ndim
        and kernel.shape[:layers] == variance.shape[:-1]
        and kernel.shape[-1] == variance.shape[-1]
    )
    if not fits:
        raise errors.TrainingError(
            f"a kernel of {shape_text(kernel.shape)}, statistics of {shape_text(variance.shape)}",
            where=f"qj.training.fold_batch_norm, {pair}",
            why="the channels of a batch norm are the last axis of the kernel ahead of it",
            fix="the batch norm that this kernel's product goes into",
        )


def _check_once(pairs: Sequence[NormPair]) -> None:
    for name in ("kernel", "batch_norm"):
        named = [getattr(pair, name) for pair in pairs]
        twice = [path for path in named if named.count(path) > 1]
        if twice:
            raise errors.TrainingError(
                f"{twice[0]} is in two pairs",
                where="qj.training.fold_batch_norm",
                why="a second batch norm after the same product is no longer at its start",
                fix="one pair for each kernel and each batch norm",
            )


def renamed(qstate: QState, plan: Plan, other: Plan) -> QState:
    """The qstate of a plan for another plan of the same program, site for site in program order.

    A program with folding calls its kernels ``f(...)``, and the deployed one by their paths; all
    else is the same, and the QParams are.

    Args:
      qstate: of ``plan``.
      plan, other: of programs with the same products, under the same scheme.

    Raises:
      PlanMismatchError: planned products that differ in number, operation, operands, shapes or
        quantizers.
      CalibrationError: a planned operand without QParams.
    """
    check_qstate(plan, qstate)
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
    return {new.site.name: dict(qstate[old.site.name]) for old, new in pairs}
