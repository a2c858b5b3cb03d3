"""Training with folded kernels and the statistics of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from quantjax import errors
from quantjax.folding.channels import channel_shape, out_axes
from quantjax.folding.fold import check_leaves, factor, foldable, folded_kernel, is_gone, wide
from quantjax.folding.norms import BatchNorm, Place
from quantjax.interpreter import (
    Carried,
    Outcome,
    Product,
    Program,
    ProgramCache,
    Role,
    Site,
    Visit,
    evaluate,
    evaluate_origin,
    leaves_by_path,
)
from quantjax.interpreter.trace import Function
from quantjax.printing import shape_text

WHERE = "qj.training.folded_training"


class Held(NamedTuple):
    """Parameters of :func:`folded_training` whose factors ``k`` are those of another tree.

    For :func:`quantjax.training.reestimate`, which replaces the running statistics by others while
    the quantized kernels have to stay what they are:

        held = Held(variables, variables)
        plan_held = qj.plan(policy, qj.sites(g, held, x))
        passes = jax.jit(qj.fake_quantize(g, plan_held))
        qstate_held = renamed(qstate, plan, plan_held)
        def update(stats, x):
            moved = Held({**variables, "batch_stats": stats}, variables)
            return passes(qstate_held, moved, x)[1]["batch_stats"]

    Attributes:
      params: the parameters.
      at: a tree of the same structure, whose γ and σ² the factors are made of.
    """

    params: PyTree
    at: PyTree


def folded_training(f: Function, norms: Sequence[BatchNorm]) -> Callable[..., Any]:
    """``folded_training(f, norms)(params, *inputs)``: a training-mode ``f``, its kernels as folded.

    Each product of a kernel ahead of a batch norm is computed as ``z = (x ⋆ (W k)) / k`` with
    ``k = γ / sqrt(σ² + ε)`` of the **running** variance, for each channel; the batch norm behind it
    is left as it is, with the statistics of the batch. Without quantization that is ``f`` to
    rounding, in value, new statistics and gradients. With it, what is quantized is ``W k``, the
    kernel that :func:`fold_batch_norm` makes and an integer program holds: ``qj.sites`` of the
    result shows it as ``f(...)``. After training, :func:`renamed` hands the qstate over to the plan
    of the folded model in evaluation mode, whose codes are the same.

    Where the running statistics are taken anew at the end, see :class:`Held` and :func:`refolded`.

        norms = qj.batch_norms(evaluate, params, x)
        g = qj.training.folded_training(train, norms)
        plan = qj.plan(policy, qj.sites(g, params, x))       # and then as without folding

    Args:
      f: the model in training mode, a function of ``(params, *inputs)``; its tree has the
        parameters of ``norms`` at the same paths.
      norms: of :func:`batch_norms`, found in evaluation mode. Those that cannot be folded stay.

    Raises (of the returned function):
      TrainingError: a product or parameter that ``norms`` names is not there or has another shape;
        no row can be folded.

    Sharp edges: where ``|k|`` is below 1e-12, as with γ = 0, the channel's product could not be had
    back, and is not scaled: its codes are then those of ``W``. A range that was calibrated there
    does not fit once γ has grown: give weights a live range, or calibrate when it has. Gradients
    flow through ``k`` to γ; those to σ² are 0 in float.

    >>> from quantjax.folding import batch_norms
    >>> def train(p, x):
    ...     z = x @ p["w"]
    ...     z = (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True) + 1e-3)
    ...     return z + p["shift"][None]
    >>> def test(p, x):
    ...     return (x @ p["w"] - p["mean"][None]) / jnp.sqrt(p["var"][None]) + p["shift"][None]
    >>> params = {"w": jnp.ones((2, 1)), "mean": jnp.ones(1), "var": jnp.full(1, 4.0),
    ...     "shift": jnp.ones(1)}
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> g = folded_training(train, batch_norms(test, params, x))
    >>> import quantjax as qj
    >>> [site.name for site in qj.sites(g, params, x)]
    ['f(var,w)']

    Source: Jacob et al., Quantization and training of neural networks for efficient
    integer-arithmetic-only inference, 2018, section 3.2, figure C.8; Krishnamoorthi, Quantizing
    deep convolutional networks for efficient inference, 2018, section 3.2.2; the division by the
    same factor as in PyTorch, torch.ao.nn.intrinsic.qat.ConvBn2d.
    """
    rows = foldable(norms, WHERE)
    programs = ProgramCache(f)

    def training(params: Any, *inputs: Any) -> Any:
        params, at = params if isinstance(params, Held) else (params, params)
        leaves, own = leaves_by_path(at), leaves_by_path(params)
        check_leaves(rows, leaves, WHERE)
        program = programs(params, *inputs)
        values = {}
        for norm in rows:
            assert norm.kernel is not None
            k = factor(norm, leaves)
            k = jnp.where(is_gone(k), 1.0, k)
            kernel = folded_kernel(norm, own, k)
            for name in _products_of(norm, program):
                weight = evaluate_origin(program.weights[name], {**own, norm.kernel.path: kernel})
                values[name] = _Scaled(weight, k.reshape((*norm.steps, norm.channels)))
        carried = Carried(values, {})
        return evaluate(program, _product, frozenset(values), carried, params, *inputs).result

    return training


class _Scaled(NamedTuple):
    """``W k`` as it enters the product, and ``k``, behind an axis for each loop."""

    kernel: jax.Array
    k: jax.Array


def _product(visit: Visit) -> Outcome:
    """``(x ⋆ (W k)) / k``."""
    weight = visit.site.weight
    assert weight is not None
    pair = [visit.lhs, visit.rhs]
    pair[weight.side], k = visit.value
    out = visit.product.bind(*pair)
    dtype = wide(k.dtype, out.dtype)
    divided = out.astype(dtype) / _along_result(k, visit.product, weight.side).astype(dtype)
    return Outcome(divided.astype(out.dtype))


def _along_result(k: jax.Array, product: Product, side: int) -> jax.Array:
    """Entries of channels along the axes of the result."""
    axes, shape = out_axes(product, side), channel_shape(product, side)
    order = tuple(int(axis) for axis in np.argsort(axes, kind="stable"))
    result = [1] * product.out.ndim
    for axis, n in zip(axes, shape, strict=True):
        result[axis] = n
    return k.reshape(shape).transpose(order).reshape(result)


def _products_of(norm: BatchNorm, program: Program) -> list[str]:
    """All products of the kernel with data: the one behind which the batch norm was found, and
    those of a further pass."""
    assert norm.kernel is not None
    found = {site.name: site for site in program.sites.values() if _has_kernel(site, norm.kernel)}
    for site in [found.get(norm.site), *found.values()]:
        weight = None if site is None else site.weight
        channels = 0
        if site is not None and weight is not None:
            channels = math.prod(weight.shape[axis] for axis in weight.free)
        if site is None or (site.op, site.steps, channels) != (norm.op, norm.steps, norm.channels):
            what = "no such product" if site is None else f"{site.op.value} of {channels} channels"
            raise errors.TrainingError(
                "the program in training mode is another one",
                where=f"{WHERE}, product {norm.site if site is None else site.name}",
                why=f"found {what}, with layers {shape_text(() if site is None else site.steps)}; "
                f"in evaluation mode {norm.channels} channels, layers {shape_text(norm.steps)}",
                fix="norms=qj.batch_norms(f, params, x) of the same model in evaluation mode",
            )
    return list(found)


def _has_kernel(site: Site, kernel: Place) -> bool:
    """Whether it multiplies data by this parameter, moved or cast."""
    weights = [operand for operand in site.operands if operand.role is Role.WEIGHT]
    return len(weights) == 1 and weights[0].storable and weights[0].paths == (kernel.path,)
