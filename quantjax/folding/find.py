"""``qj.batch_norms``: the batch norms of a model, and the products that they come after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from quantjax.folding.chains import Chain, Root
from quantjax.folding.channels import kernel_place
from quantjax.folding.flow import RETURNED, Found, follow
from quantjax.folding.match import Norm, norm_in
from quantjax.folding.norms import BatchNorm, BatchNorms, FoldStatus, Place
from quantjax.folding.roles import Part, Played
from quantjax.interpreter import Program, leaves_by_path, trace
from quantjax.interpreter.sites import Location
from quantjax.interpreter.trace import Function
from quantjax.qtensor import floats_expected


def batch_norms(f: Function, params: Any, *inputs: Any) -> BatchNorms:
    """Trace ``f(params, *inputs)`` in evaluation mode and find its batch norms, by dataflow.

    A batch norm is ``y = γ (x - μ) / sqrt(σ² + ε) + β`` with an entry of each parameter for each
    channel, in whatever order and form the program computes it; each parameter is told by what it
    does to the result. One that comes right after a product with a kernel, or after the product's
    bias, can be folded into both by :func:`fold_batch_norm`. Those that cannot are rows with the
    reason. Works with any framework, since it reads the program, and inside ``jit``, ``remat``,
    ``cond`` and scans over stacked layers.

    Args:
      f: any JAX function of ``(params, *inputs)``, in evaluation mode. In training mode batch norms
        have the statistics of the batch; they are listed as such.
      params: the tree that holds kernels **and** running statistics.
      inputs: arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      Rows in program order; prints as a table.

    Raises:
      ArgumentError: parameters that are frozen.

    Sharp edges: a scale and shift without a variance, as of a frozen batch norm that was folded
    into two vectors, is no batch norm here; nor is one over another axis than the channels of the
    product, or behind a reshape or transposition that moves them. ``f`` may return its statistics
    as they are; what else it does with a parameter of a batch norm, or with its kernel, forbids
    folding.

    >>> import jax.numpy as jnp
    >>> def f(p, x):
    ...     z = x @ p["w"]
    ...     return (z - p["mean"][None]) / jnp.sqrt(p["var"][None] + 1e-3) + p["shift"][None]
    >>> params = {"w": jnp.ones((3, 2)), "mean": jnp.zeros(2), "var": jnp.ones(2)}
    >>> print(batch_norms(f, params | {"shift": jnp.zeros(2)}, jnp.ones((4, 3))))
    product  channels  kernel axis  epsilon  folds
    w        2         1            0.001    yes: mean mean, variance var, offset shift

    Source: Jacob et al., Quantization and training of neural networks for efficient
    integer-arithmetic-only inference, 2018, section 3.2.
    """
    with floats_expected(params, where="qj.batch_norms"):
        program = trace(f, params, *inputs)
    shapes = {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items()}
    found = follow(program, list(shapes))
    model = _Model(program, found, shapes)
    parents = {id(chain.parent) for chain in found.chains}
    rows: dict[tuple[Location, Location], BatchNorm] = {}
    for tip in found.chains:
        chain: Chain | None = None if id(tip) in parents else tip
        while chain is not None:
            norm = norm_in(shapes, chain)
            if norm is None:
                break
            where = chain.root.location, chain.steps[norm.first].location
            rows.setdefault(where, _row(model, chain, norm))
            chain = _rest(chain, norm)
    for root, location in found.batch.items():
        rows.setdefault((root.location, location), _of_the_batch(root))
    return BatchNorms(tuple(rows[where] for where in sorted(rows)))


class _Model(NamedTuple):
    program: Program
    found: Found
    shapes: Mapping[str, tuple[int, ...]]


def _rest(chain: Chain, norm: Norm) -> Chain:
    """What comes after a batch norm, which no longer belongs to the product."""
    behind = "" if chain.root.site is None else chain.root.site.name
    root = Root(
        chain.root.location, chain.root.channels, behind=behind, made_by="another batch norm"
    )
    return Chain(root, chain.numbers, chain.steps[norm.length :])


def _of_the_batch(root: Root) -> BatchNorm:
    assert root.site is not None
    return BatchNorm(
        site=root.site.name,
        op=root.site.op,
        channels=root.channels,
        status=FoldStatus.BATCH_STATISTICS,
        reason="its statistics are those of the batch: the function is in training mode",
    )


def _row(model: _Model, chain: Chain, norm: Norm) -> BatchNorm:
    """What is known of it, and what forbids folding."""
    root = chain.root
    places = {p.part: _place(path, model.shapes[path], p) for path, p in norm.parts.items()}
    row = BatchNorm(
        site="" if root.site is None else root.site.name,
        op=None if root.site is None else root.site.op,
        mean=places.get(Part.MEAN),
        variance=places.get(Part.VARIANCE),
        scale=places.get(Part.SCALE),
        offset=places.get(Part.OFFSET),
        bias=places.get(Part.BIAS),
        epsilon=next(p.epsilon for p in norm.parts.values() if p.part is Part.VARIANCE),
        steps=tuple(loop.length or 0 for loop in norm.loops),
        channels=root.channels,
    )
    if root.site is None:
        return _without_product(model, row, root)
    if norm.fault:
        return _refused(row, FoldStatus.OTHER_FORM, norm.fault)
    if any(step.shared for step in chain.steps[: norm.length]):
        reason = "what the product returns is used elsewhere as well"
        return _refused(row, FoldStatus.OUTPUT_USED, reason)
    return _checked(model, row, chain, norm)


def _checked(model: _Model, row: BatchNorm, chain: Chain, norm: Norm) -> BatchNorm:
    """With its kernel; refused where a parameter has another use, or none can take the shift."""
    root = chain.root
    assert root.site is not None
    assert root.product is not None
    kernel, origin = root.site.weight, root.weight
    assert kernel is not None
    assert origin is not None
    if not kernel.storable:
        reason = "its kernel is not one parameter, moved or cast, but computed"
        return _refused(row, FoldStatus.KERNEL_COMPUTED, reason)
    path, sinks = kernel.paths[0], model.found.sinks
    others = [s.name for s in model.program.sites.values() if s.weight and s is not root.site]
    sharing = [name for name in others if path in _paths(model, name)]
    if sharing or sinks[path] - {root.location}:
        reason = (
            f"its kernel is that of {sharing[0]} too" if sharing else f"{path} is read elsewhere"
        )
        return _refused(row, FoldStatus.KERNEL_SHARED, reason)
    if set(norm.loops) - set(origin.loops):
        reason = "its kernel is that of several steps, which have batch norms of their own"
        return _refused(row, FoldStatus.KERNEL_SHARED, reason)
    place = kernel_place(path, model.shapes[path], origin, root.product, root.side)
    row = dataclasses.replace(row, kernel=place)
    used = {step.location for step in chain.steps[: norm.length]}
    for other in row.places[1:]:
        is_statistic = other in (row.mean, row.variance)
        if sinks[other.path] - used - ({RETURNED} if is_statistic else set()):
            reason = f"{other.path} is read elsewhere as well"
            return _refused(row, FoldStatus.NORM_SHARED, reason)
        if len(set(other.entries)) < int(np.prod(model.shapes[other.path])):
            reason = f"{other.path} has entries of other channels too"
            return _refused(row, FoldStatus.NORM_SHARED, reason)
    return _with_shift(row, norm.ends_at)


def _paths(model: _Model, name: str) -> tuple[str, ...]:
    return model.program.weights[name].paths if name in model.program.weights else ()


def _with_shift(row: BatchNorm, ends_at: str) -> BatchNorm:
    """Refused where what is added to a channel has no entry for it."""
    factor = [row.variance, row.scale]
    if row.bias is not None and not _as_fine(row.bias, factor):
        reason = f"an entry of {row.bias.path} belongs to channels with several factors"
        return _refused(row, FoldStatus.NO_SHIFT, reason)
    takers = [place for place in (row.offset, row.bias) if place is not None]
    if row.mean is None or any(_as_fine(place, [*factor, row.mean]) for place in takers[:1]):
        return row
    reason = f"{takers[0].path} has too few entries" if takers else "it has no offset or bias"
    reason += f" up to where {ends_at}" if ends_at and not takers else ""
    return _refused(row, FoldStatus.NO_SHIFT, f"nothing can take its shift: {reason}")


def _as_fine(place: Place, others: Sequence[Place | None]) -> bool:
    """Whether channels that share an entry of ``place`` share those of the others."""
    entries = [place.entries, *(other.entries for other in others if other is not None)]
    return len(set(zip(*entries, strict=True))) == len(set(place.entries))


def _without_product(model: _Model, row: BatchNorm, root: Root) -> BatchNorm:
    """What comes before and after it instead."""
    if root.behind:
        reason = f"{root.made_by} lies between it and {root.behind}"
        return dataclasses.replace(_refused(row, FoldStatus.BETWEEN, reason), site=root.behind)
    precedes = model.found.precedes.get(root)
    if precedes is not None:
        reason = f"it precedes {precedes}, and comes after {root.made_by}"
        return _refused(row, FoldStatus.PRECEDES, reason)
    return _refused(row, FoldStatus.NO_PRODUCT, f"it comes after {root.made_by}, not a product")


def _refused(row: BatchNorm, status: FoldStatus, reason: str) -> BatchNorm:
    return dataclasses.replace(row, status=status, reason=reason)


def _place(path: str, shape: tuple[int, ...], played: Played) -> Place:
    """Where the channels lie in a parameter of a batch norm."""
    entries = played.entries.ravel()
    channels = np.zeros(int(np.prod(shape)), np.int64)
    channels[entries[::-1]] = np.arange(entries.size)[::-1]  # the first channel that has it
    numbers = tuple(int(entry) for entry in entries)
    return Place(path, shape, tuple(int(c) for c in channels), numbers)
