"""``qj.prune_mask`` and ``qj.apply_mask``."""

from __future__ import annotations

import enum
import numbers
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from quantjax import errors
from quantjax._compat import concrete
from quantjax.arguments import expect
from quantjax.interpreter import leaves_by_path
from quantjax.kernels import as_site, kernels_in
from quantjax.meshes import automatic, spec_of
from quantjax.printing import shape_text
from quantjax.pruning.criteria import Criterion, magnitude
from quantjax.pruning.structures import ELEMENTS, Scope, Structure, kept
from quantjax.qtensor import is_quantized
from quantjax.selectors import Selector, everything


class MaskGradient(enum.Enum):
    """What a pruned weight gets: nothing, or the gradient of what stands in its place.

    ``MASKED``: the derivative of the product with the mask, 0. ``STRAIGHT_THROUGH``: 1, so that it
    may grow and come back when the mask is made anew.
    """

    MASKED = "masked"
    STRAIGHT_THROUGH = "straight_through"


def prune_mask(
    params: PyTree,
    sparsity: float | Float[Array, ""],
    *,
    criterion: Criterion | None = None,
    structure: Structure = ELEMENTS,
    scope: Scope = Scope.LOCAL,
    select: Selector | None = None,
) -> PyTree:
    """True for the weights that stay; the lowest scores go, by rank, so that the number is exact.

    Kernels are floating-point leaves of rank 2 or more whose name does not end in ``bias``,
    ``scale``, ``offset``, ``beta``, ``gamma``, ``mean`` or ``var``, and none of Haiku's running
    averages, as for ``qj.quantize_params``. For all else the mask is the scalar True.

    Args:
      params: the tree.
      sparsity: the share that goes, from 0 to 1; may be traced. ``round(sparsity · n)`` of each
        kernel (``Scope.LOCAL``), or of all of them together.
      criterion: what ranks them; magnitude unless told otherwise.
      structure: single weights, or ``qj.pruning.NOfM(4)``.
      scope: who competes.
      select: which kernels, by path: ``qj.path("*Dense*kernel")``. Default: all.

    Returns:
      A tree of booleans. Works under ``jit`` and ``vmap``: a grid of sparsities is one program.

    Raises:
      ArgumentError: text, say, where one of these is needed.
      PruningError: a concrete sparsity outside [0, 1] or that the structure cannot have; a global
        scope for a structure of groups; a selector that matches nothing; a tree without kernels.

    Sharp edges: a traced sparsity is cut to [0, 1], and NaN keeps all; above 2^24 weights in one
    ranking a traced one counts to float32's last place alone. A bias of rank 2 under
    another name, as the ``b`` of layers stacked by Haiku, is a kernel unless ``select`` leaves it
    out. Ranks are found by sorting, 0.2 s for a million weights on a CPU. Layers stacked in one
    leaf compete with each other. Scores below the smallest normal number are equal on a CPU.

    >>> mask = prune_mask({"w": jnp.array([[1.0, -4.0], [2.0, 3.0]]), "b": jnp.zeros(2)}, 0.5)
    >>> mask["w"].tolist(), bool(mask["b"])
    ([[False, True], [False, True]], True)

    Source: Zhu and Gupta, To prune, or not to prune, 2017, section 3, for masks by magnitude.
    """
    criterion = magnitude() if criterion is None else criterion
    select = everything() if select is None else select
    fix = "sparsity=0.5, or an array of rank 0"
    kinds = numbers.Real, jax.Array, np.ndarray
    expect(sparsity, kinds, argument="sparsity", where="qj.prune_mask", fix=fix)
    for name, value, kind, example in (
        ("scope", scope, Scope, "qj.pruning.Scope.GLOBAL"),
        ("structure", structure, Structure, "qj.pruning.NOfM(4)"),
        ("criterion", criterion, Criterion, "qj.pruning.magnitude()"),
        ("select", select, Selector, "qj.path('*kernel')"),
    ):
        expect(value, kind, argument=name, where="qj.prune_mask", fix=f"{name}={example}")
    if jnp.ndim(sparsity):
        raise errors.PruningError(
            f"sparsities of shape {jnp.shape(sparsity)}, where one is needed",
            where="qj.prune_mask",
            fix="jax.vmap(lambda s: qj.prune_mask(params, s))(sparsities)",
        )
    known = concrete(sparsity)
    if known is not None and not 0.0 <= float(known) <= 1.0:
        raise errors.PruningError(
            f"a sparsity of {float(known):g}",
            where="qj.prune_mask",
            why="it is the share of weights that go",
            fix=f"sparsity={float(known) / 100:g}" if 2 <= known <= 100 else "sparsity=0.5",
        )
    structure.check(sparsity)
    if scope is Scope.GLOBAL and not structure.has_scope:
        raise errors.PruningError(
            f"a global scope for {structure}",
            where="qj.prune_mask",
            why="each of its groups loses as many weights as every other",
            fix="scope=qj.pruning.Scope.LOCAL",
        )
    named = leaves_by_path(params, is_leaf=is_quantized)
    kernels = _selected(named, select)
    scores = criterion.scores(kernels)
    _check_scores(scores, kernels, criterion)
    if scope is Scope.GLOBAL:
        specs = lambda _: jax.tree.map(spec_of, scores)  # noqa: E731
        masks = automatic(_together, scores, sparsity, specs=specs)
    else:
        masks = {name: _alone(structure, name, score, sparsity) for name, score in scores.items()}
    # NumPy's, known inside a trace too: what has no mask of its own may be no array.
    leaves = [masks.get(name, np.ones((), bool)) for name in named]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), leaves)


def _check_scores(scores: Any, kernels: dict[str, jax.Array], criterion: Criterion) -> None:
    """Raise unless there is a score for each weight: a kernel without would not be pruned."""
    found = {name: jnp.shape(score) for name, score in scores.items()}
    wanted = {name: kernel.shape for name, kernel in kernels.items()}
    if found == wanted:
        return
    odd = next(n for n in (*wanted, *found) if found.get(n) != wanted.get(n))
    raise errors.PruningError(
        f"scores of {shape_text(found[odd])}" if odd in found else "no scores",
        where=f"parameter {odd}, criterion {criterion!r:.60}",
        why=f"it is {shape_text(wanted[odd])}" if odd in wanted else "it is no kernel at hand",
        fix="{name: score of the kernel's shape for name, kernel in kernels.items()}",
    )


def _selected(named: Any, select: Selector) -> dict[str, jax.Array]:
    kernels = kernels_in(named)
    rows = {name: as_site(name, leaf) for name, leaf in kernels.items()}
    chosen = select.resolved(tuple(rows.values()))
    found = {name: jnp.asarray(kernels[name]) for name in rows if chosen.matches(rows[name])}
    if not found:
        raise errors.PruningError(
            f"'{select}' selects no kernel",
            where=f"kernels: {', '.join(list(kernels)[:8]) or 'none'}",
            why="a kernel is a floating-point array of rank 2 or more, no bias, no norm's scale, "
            "and not quantized yet",
            fix="qj.path('*kernel'), or leave select out",
        )
    return found


def _alone(
    structure: Structure, name: str, score: jax.Array, sparsity: float | jax.Array
) -> jax.Array:
    def mask(score: jax.Array, sparsity: float | jax.Array) -> jax.Array:
        return structure.mask(score, sparsity, f"parameter {name}")

    return cast(jax.Array, automatic(mask, score, sparsity, specs=lambda _: spec_of(score)))


def _together(scores: Any, sparsity: float | jax.Array) -> dict[str, jax.Array]:
    flat = jnp.concatenate([score.reshape(-1) for score in scores.values()])
    stays, start, masks = kept(flat, sparsity), 0, {}
    for name, score in scores.items():
        masks[name] = stays[start : start + score.size].reshape(score.shape)
        start += score.size
    return masks


def apply_mask(
    params: PyTree, mask: PyTree, *, gradient: MaskGradient = MaskGradient.MASKED
) -> PyTree:
    """The parameters with 0 where the mask is False; differentiable, in the user's own loss.

    Args:
      mask: from :func:`prune_mask`: booleans of the leaves' shapes, or scalars.
      gradient: what pruned weights get.

    Raises:
      ArgumentError: a gradient that is no :class:`MaskGradient`.
      PruningError: a mask of another structure, shape or dtype; a quantized leaf that it would
        change.

    Sharp edges: a quantizer of which 0 is no level (one bit, midrise, some codebooks) makes ±scale
    of a pruned weight; where all of its group are pruned, next to nothing.

    >>> params, mask = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[True, False]])}
    >>> apply_mask(params, mask)["w"].tolist()
    [[1.0, 0.0]]

    Source: Bengio, Léonard and Courville, Estimating or propagating gradients through stochastic
    neurons for conditional computation, 2013, for the straight-through form.
    """
    fix = "gradient=qj.pruning.MaskGradient.STRAIGHT_THROUGH"
    expect(gradient, MaskGradient, argument="gradient", where="qj.apply_mask", fix=fix)
    leaves, masks = (leaves_by_path(tree, is_leaf=is_quantized) for tree in (params, mask))
    if list(leaves) != list(masks):
        odd = sorted(set(leaves) ^ set(masks))
        raise errors.PruningError(
            "the mask has another structure than the parameters",
            where=f"qj.apply_mask, {odd[0] if odd else 'order of leaves'}",
            fix="mask = qj.prune_mask(params, sparsity), of these parameters",
        )
    done = [_masked(name, leaf, masks[name], gradient) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), done)


def _masked(name: str, leaf: Any, mask: Any, gradient: MaskGradient) -> Any:
    known = concrete(mask)
    if known is not None and known.ndim == 0 and bool(known):
        return leaf
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_ or mask.shape not in ((), jnp.shape(leaf)) or is_quantized(leaf):
        raise errors.PruningError(
            f"a mask of {mask.dtype}, {shape_text(mask.shape)}",
            where=f"parameter {name} of {shape_text(jnp.shape(leaf))}",
            why="what is quantized has no gradient and no zero of its own"
            if is_quantized(leaf)
            else "a boolean for each weight says whether it stays",
            fix="prune before qj.freeze, or mask = qj.prune_mask(params, sparsity)",
        )
    zeroed = _straight_through if gradient is MaskGradient.STRAIGHT_THROUGH else _zeroed
    return zeroed(jnp.asarray(leaf), mask)


def _zeroed(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


@jax.custom_jvp
def _straight_through(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    return _zeroed(leaf, mask)


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _straight_through(*primals), tangents[0]


def sparsity_of(mask: PyTree) -> Float[Array, ""]:
    """The share of weights that go, of all that have a mask of their own.

    Raises:
      PruningError: a tree of something else than masks.

    >>> float(sparsity_of({"w": jnp.array([[True, False]]), "b": jnp.ones((), bool)}))
    0.5
    """
    for path, leaf in leaves_by_path(mask).items():
        if jnp.result_type(leaf) != jnp.bool_:
            raise errors.PruningError(
                f"{path or 'the tree'} is {jnp.result_type(leaf)}, and masks are True and False",
                where="qj.pruning.sparsity_of",
                fix="sparsity_of(qj.prune_mask(params, 0.5))",
            )
    own = [jnp.asarray(leaf) for leaf in jax.tree.leaves(mask) if jnp.ndim(leaf) > 0]
    total = sum(leaf.size for leaf in own)
    gone = sum((jnp.sum(~leaf).astype(jnp.float32) for leaf in own), start=jnp.zeros(()))
    return gone / max(total, 1)
