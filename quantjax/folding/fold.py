"""``qj.fold_batch_norm``: kernels that do what the batch norms behind them did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from quantjax import errors
from quantjax.arguments import expect
from quantjax.folding.norms import BatchNorm, FoldStatus, Place
from quantjax.interpreter import leaves_by_path
from quantjax.lean import wide
from quantjax.printing import shape_text
from quantjax.qtensor import first_quantized

FOLD = "qj.fold_batch_norm"


def fold_batch_norm(params: PyTree, norms: Sequence[BatchNorm]) -> PyTree:
    """The same tree, with each batch norm that can be folded into the kernel ahead of it.

    With ``k = γ / sqrt(σ² + ε)`` for each channel: ``W' = W k`` along the kernel's channels,
    ``b' = b k`` for a bias between the two, ``β' = β - μ k``; and ``γ' = 1``, ``μ' = 0``,
    ``σ²' = 1 - ε``, at which the batch norm adds ``β'`` and does nothing else. Without β, the bias
    takes the shift: ``b' = (b - μ) k``. The function returns what it did, to rounding.

    Pure and differentiable. **Training with folding**: quantize the folded function, whose kernels
    are what an integer program will hold,

        f = lambda params, x: model(fold_batch_norm(params, norms), x)

    and differentiate in ``params``; kernels are then functions of parameters, which simulation
    quantizes (their sites are called ``f(...)``); with statistics of the batch, see
    :func:`folded_training`. **Deployment**: fold once, plan ``model`` on the folded tree, hand the
    qstate over by :func:`renamed`, and ``qj.freeze``.

    Args:
      params: the tree that the batch norms were found in, or another of the same structure.
      norms: of :func:`batch_norms`; those that cannot be folded stay as they are.

    Returns:
      A tree of the same structure, shapes and dtypes, so that the same function takes it, with the
      same sites; leaves that do not change are the same arrays.

    Raises:
      TrainingError: parameters that are not there, or have other shapes than those found; two batch
        norms that change one parameter; rows of which none can be folded.

    Sharp edges: for evaluation mode: in training mode a batch norm takes the statistics of the
    batch, and folding has no effect on its output. Arithmetic is in float32 at least, results are
    rounded to each parameter's dtype: with bfloat16 kernels the function changes by as much.
    A folded tree may be folded again, which changes nothing.

    >>> from quantjax.folding import batch_norms
    >>> def f(p, x):
    ...     z = x @ p["w"]
    ...     return (z - p["mean"][None]) / jnp.sqrt(p["var"][None]) + p["shift"][None]
    >>> params = {"w": jnp.ones((2, 1)), "mean": jnp.full(1, 3.0), "var": jnp.full(1, 4.0),
    ...     "shift": jnp.ones(1)}
    >>> folded = fold_batch_norm(params, batch_norms(f, params, jnp.ones((1, 2))))
    >>> {name: folded[name].tolist() for name in params}
    {'w': [[0.5], [0.5]], 'mean': [0.0], 'var': [1.0], 'shift': [-0.5]}

    Source: Jacob et al., Quantization and training of neural networks for efficient
    integer-arithmetic-only inference, 2018, section 3.2, equation 14; Krishnamoorthi, Quantizing
    deep convolutional networks for efficient inference, 2018, section 3.2.
    """
    rows = foldable(norms, FOLD)
    quantized = first_quantized(params)
    if quantized is not None:
        raise errors.TrainingError(
            f"{quantized} is quantized",
            where=FOLD,
            why="codes have the scales of the kernel that is not folded",
            fix="fold first, qj.freeze(plan, qstate, qj.fold_batch_norm(params, norms)) then",
        )
    leaves = leaves_by_path(params)
    check_leaves(rows, leaves, FOLD)
    for norm in rows:
        leaves.update(_folded(norm, leaves))
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def foldable(norms: Sequence[BatchNorm], where: str) -> list[BatchNorm]:
    """The rows that can be folded; an error where there are rows and none of them can."""
    again = "norms = qj.batch_norms(f, params, x)"
    expect(norms, Sequence, argument="norms", where=where, fix=again)
    for norm in norms:
        expect(norm, BatchNorm, argument="one of the norms", where=where, fix=again)
    rows = [norm for norm in norms if norm.foldable]
    if norms and not rows:
        in_training = norms[0].status is FoldStatus.BATCH_STATISTICS
        raise errors.TrainingError(
            "none of the batch norms can be folded",
            where=f"{where}, {norms[0].site or 'the first of them'}",
            why=norms[0].reason,
            fix="qj.batch_norms(f, params, x) of f in evaluation mode"
            if in_training
            else "print(qj.batch_norms(f, params, x)), which says why of each",
        )
    return rows


def check_leaves(norms: Sequence[BatchNorm], leaves: Mapping[str, Any], where: str) -> None:
    """Raise unless the parameters are those that the batch norms were found in."""
    changed: dict[str, str] = {}
    for norm in norms:
        for place in norm.places:
            at = f"{where}, the batch norm behind {norm.site}"
            if place.path in changed:
                raise errors.TrainingError(
                    f"{place.path} belongs to two batch norms",
                    where=at,
                    why=f"the other is behind {changed[place.path]}: the first changes it already",
                    fix="each row of qj.batch_norms(f, params, x) once",
                )
            changed[place.path] = norm.site
            _check_leaf(place, leaves, at)


def _check_leaf(place: Place, leaves: Mapping[str, Any], where: str) -> None:
    again = "find them again: qj.batch_norms(f, params, x)"
    if place.path not in leaves:
        last = place.path.split("/")[-1]
        close = [path for path in leaves if path.split("/")[-1] == last]
        raise errors.TrainingError(
            f"there is no {place.path}",
            where=where,
            why=f"of that name: {', '.join(close[:6]) or 'none'}",
            fix=again,
        )
    shape = jnp.shape(leaves[place.path])
    fits = len(shape) == len(place.shape) and all(
        own in (1, n) for own, n in zip(place.shape, shape, strict=True)
    )
    if not fits or (place.entries and shape != place.shape):
        raise errors.TrainingError(
            f"{place.path} has the shape {shape_text(shape)}",
            where=where,
            why=f"its channels were found in {shape_text(place.shape)}",
            fix=again,
        )


def factor(norm: BatchNorm, leaves: Mapping[str, Any]) -> Float[Array, " channels"]:
    """``γ / sqrt(σ² + ε)`` of each channel, layers first, in float32 at least."""
    assert norm.variance is not None
    k = 1.0 / jnp.sqrt(of_channels(norm.variance, leaves) + norm.epsilon)
    return k if norm.scale is None else k * of_channels(norm.scale, leaves).astype(k.dtype)


_SMALLEST = 2.0**-40


def is_gone(k: Float[Array, " channels"]) -> Bool[Array, " channels"]:
    """Where a factor is so small that no product can be had back by it.

    That is the case at 0, and where ``1 / k²``, the derivative of dividing by it, would overflow.
    """
    return jnp.abs(k) < _SMALLEST


def folded_kernel(
    norm: BatchNorm, leaves: Mapping[str, Any], k: Float[Array, " channels"]
) -> Float[Array, "..."]:
    """``W k``, in the parameter's own dtype."""
    assert norm.kernel is not None
    kernel = jnp.asarray(leaves[norm.kernel.path])
    dtype = wide(k.dtype, kernel.dtype)
    along = in_parameter(norm.kernel, k).astype(dtype)
    return (kernel.astype(dtype) * along).astype(kernel.dtype)


def of_channels(place: Place, leaves: Mapping[str, Any]) -> Float[Array, " channels"]:
    """The entry of a parameter that each channel has, in float32 at least."""
    leaf = jnp.asarray(leaves[place.path])
    flat = leaf.astype(wide(leaf.dtype)).ravel()
    if place.entries == tuple(range(flat.size)):
        return flat
    return flat[np.asarray(place.entries)]


def in_parameter(place: Place, values: Float[Array, " channels"]) -> Float[Array, "..."]:
    """Values of channels where a parameter has them, with size-1 axes where they do not change."""
    if place.channels != tuple(range(values.size)):
        values = values[np.asarray(place.channels)]
    return values.reshape(place.shape)


def _folded(norm: BatchNorm, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The leaves that change."""
    k = factor(norm, leaves)
    changed: dict[str, jax.Array] = {}

    def put(place: Place | None, values: jax.Array) -> None:
        if place is not None:
            dtype = jnp.result_type(leaves[place.path])
            changed[place.path] = in_parameter(place, values).astype(dtype)

    assert norm.kernel is not None
    changed[norm.kernel.path] = folded_kernel(norm, leaves, k)
    put(norm.variance, jnp.ones_like(k) - norm.epsilon)
    put(norm.scale, jnp.ones_like(k))
    shift: jax.Array = jnp.zeros_like(k)
    if norm.mean is not None:
        shift = -of_channels(norm.mean, leaves).astype(k.dtype) * k
        put(norm.mean, jnp.zeros_like(k))
    if norm.bias is not None:
        bias = of_channels(norm.bias, leaves).astype(k.dtype) * k
        put(norm.bias, bias if norm.offset is not None else bias + shift)
    if norm.offset is not None:
        put(norm.offset, of_channels(norm.offset, leaves).astype(k.dtype) + shift)
    return changed
