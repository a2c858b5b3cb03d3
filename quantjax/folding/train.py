"""Training with folded kernels and the statistics of the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from quantjax import errors
from quantjax.folding.channels import channel_shape, kernel_place, out_axes
from quantjax.folding.fold import check_leaves, factor, foldable, folded_kernel, is_gone
from quantjax.folding.norms import BatchNorm
from quantjax.interpreter import (
    Carried,
    Origin,
    Outcome,
    Product,
    Program,
    ProgramCache,
    Role,
    Site,
    SiteStatus,
    Visit,
    evaluate,
    evaluate_origin,
    leaves_by_path,
)
from quantjax.interpreter.trace import Function
from quantjax.lean import wide
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
        scaled: dict[str, _Scaled] = {}
        for norm in rows:
            assert norm.kernel is not None
            k = factor(norm, leaves)
            k = jnp.where(is_gone(k), 1.0, k)
            layers = k.reshape((*norm.steps, norm.channels))
            for name in _passes_of(norm, program, own):
                recipe, is_stopped = _passed(program.weights[name])
                kernel = jnp.asarray(own[norm.kernel.path])
                kernel = lax.stop_gradient(kernel) if is_stopped else kernel
                product = folded_kernel(norm, {norm.kernel.path: kernel}, k)
                weight = evaluate_origin(recipe, {**own, norm.kernel.path: product})
                scaled[name] = _Scaled(weight, layers)
        carried = Carried(scaled, {})
        return evaluate(program, _product, frozenset(scaled), carried, params, *inputs).result

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


def _passed(origin: Origin) -> tuple[Origin, bool]:
    """The way of a kernel into its product without a ``stop_gradient``, and whether there was one:
    it stops the kernel, and not the factor."""
    if not origin.operands:
        return origin, False
    first, is_stopped = _passed(origin.operands[0])
    if origin.eqn is not None and origin.eqn.primitive.name == "stop_gradient":
        return first, True
    rest = origin.operands[1:]
    return dataclasses.replace(origin, operands=(first, *rest)), is_stopped


def _along_result(k: jax.Array, product: Product, side: int) -> jax.Array:
    """Entries of channels along the axes of the result."""
    axes, shape = out_axes(product, side), channel_shape(product, side)
    order = tuple(int(axis) for axis in np.argsort(axes, kind="stable"))
    result = [1] * product.out.ndim
    for axis, n in zip(axes, shape, strict=True):
        result[axis] = n
    return k.reshape(shape).transpose(order).reshape(result)


def _passes_of(norm: BatchNorm, program: Program, leaves: Mapping[str, Any]) -> list[str]:
    """The products of the kernel whose channels lie in the parameter where the batch norm's do.

    One, or as many as the model passes through the layer. Along other axes (a tied decoder, a
    backward pass) it is another product.
    """
    kernel = norm.kernel
    assert kernel is not None
    sites = {at: site for at, site in program.sites.items() if _has_kernel(site, kernel.path)}
    shape, found = jnp.shape(leaves[kernel.path]), []
    for at, site in sites.items():
        if site.status is SiteStatus.OPAQUE:
            continue
        if (site.op, site.steps) != (norm.op, norm.steps) or site.weight is None:
            continue
        product, origin = program.product_at(at), program.weights[site.name]
        if kernel_place(kernel.path, shape, origin, product, site.weight.side) == kernel:
            found.append(site.name)
    if not found:
        others = ", ".join(
            f"{site.op.value} {shape_text(site.out_shape)}, layers {shape_text(site.steps)}"
            f"{site.reason and f' ({site.reason})'}"
            for site in sites.values()
        )
        raise errors.TrainingError(
            "the program in training mode is another one",
            where=f"{WHERE}, product {norm.site}",
            why=f"no product of {kernel.path} has its {norm.channels} channels where the one in "
            f"evaluation mode has them, layers {shape_text(norm.steps)}; found {others or 'none'}",
            fix="folded_training(f, norms) inside of what is not rewritten, shard_map(folded, ...)"
            if any(site.status is SiteStatus.OPAQUE for site in sites.values())
            else "norms=qj.batch_norms(f, params, x) of the same model in evaluation mode",
        )
    return found


def _has_kernel(site: Site, path: str) -> bool:
    """Whether it multiplies data by this parameter, moved or cast."""
    weights = [operand for operand in site.operands if operand.role is Role.WEIGHT]
    return len(weights) == 1 and weights[0].storable and weights[0].paths == (path,)
