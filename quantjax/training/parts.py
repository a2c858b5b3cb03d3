"""Which arrays of a qstate an optimizer moves: scales, zero points, an estimator's parameters."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from quantjax import errors
from quantjax.affine import QParams
from quantjax.arguments import expect

FROZEN = "frozen"
WEIGHTS = "weights"


class Part(enum.Enum):
    """What an array of a qstate is; a parameter is one outside of it."""

    SCALE = "scale"
    ZERO_POINT = "zero_point"
    BITS = "bits"
    THETA = "theta"
    PARAMETER = "parameter"


def is_qparams(node: Any) -> bool:
    """Whether a node is a :class:`QParams`; for the ``is_leaf`` of tree functions."""
    return isinstance(node, QParams)


def parts_of(tree: PyTree) -> PyTree:
    """The :class:`Part` of each array of a qstate, ``PARAMETER`` for arrays that are not in one.

    The tree may hold parameters too, for instance ``(params, qstate)``. A mask for ``optax.masked``
    is ``jax.tree.map(lambda part: part is Part.SCALE, parts_of(tree))``.

    >>> import jax.numpy as jnp
    >>> qparams = QParams(jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.float32(4.0))
    >>> parts_of({"w": {"weight": qparams}})["w"]["weight"].scale
    <Part.SCALE: 'scale'>
    """

    def named(node: Any) -> Any:
        if not is_qparams(node):
            return Part.PARAMETER
        parts = {part.value: part for part in Part}
        fields = {
            name: jax.tree.map(lambda _, part=parts[name]: part, field)
            for name, field in node._asdict().items()
        }
        return QParams(**fields)

    return jax.tree.map(named, tree, is_leaf=is_qparams)


def theta_names(tree: PyTree) -> frozenset[str]:
    """The names of all entries of ``theta`` in a tree with QParams.

    Masked entries (``optax.MaskedNode``) are not there.
    """
    nodes = (node for node in jax.tree.leaves(tree, is_leaf=is_qparams) if is_qparams(node))
    return frozenset(
        name
        for node in nodes
        if isinstance(node.theta, Mapping)
        for name, array in node.theta.items()
        if jax.tree.leaves(array)
    )


def by_part(
    *,
    scale: optax.GradientTransformation | None = None,
    zero_point: optax.GradientTransformation | None = None,
    theta: optax.GradientTransformation | Mapping[str, optax.GradientTransformation] | None = None,
    weights: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of a qstate with a transformation for each part; what is not named stays fixed.

    Widths (``bits``) never move; learned ones are entries of ``theta``. Each part has a learning
    rate, a schedule and a weight decay of its own: ``optax.chain(optax.add_decayed_weights(2e-4),
    optax.sgd(1e-2))`` for ``theta={"clip": ...}`` is PACT with its penalty.

    Args:
      scale, zero_point: for all scales, for all zero points.
      theta: for all entries of ``theta``, or by name: ``{"clip": optax.sgd(1e-2)}``; names that are
        not given stay fixed. Entries that are no weights of a loss (IR-Net's ``sharpness``, a
        minifloat's ``exponent_bits``) are better left out.
      weights: for all arrays outside of QParams: the parameters, where the tree is
        ``(params, qstate)``.

    Raises (of ``init`` and ``update``):
      TrainingError: a tree without QParams; a name that no ``theta`` has.

    Sharp edges: a range that is live has no scale to learn; its gradient is zero.

    >>> import jax.numpy as jnp
    >>> qparams = QParams(jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.float32(4.0))
    >>> optimizer = by_part(scale=optax.sgd(0.1))
    >>> gradient = QParams(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.float32(0.0))
    >>> updates, _ = optimizer.update(gradient, optimizer.init(qparams), qparams)
    >>> round(float(updates.scale[0, 0]), 3), float(updates.zero_point[0, 0])
    (-0.1, 0.0)
    """
    by_name = theta if isinstance(theta, Mapping) else None
    # Strings, because they are the keys of optax's state: sorted by JAX, written by checkpoints.
    groups: dict[str, optax.GradientTransformation] = {FROZEN: optax.set_to_zero()}
    given: dict[str, Any] = {
        Part.SCALE.value: scale,
        Part.ZERO_POINT.value: zero_point,
        Part.THETA.value: None if by_name is not None else theta,
        WEIGHTS: weights,
    }
    groups.update({name: tx for name, tx in given.items() if tx is not None})
    groups.update({_entry(name): tx for name, tx in (by_name or {}).items()})
    for name, tx in groups.items():
        if not all(callable(getattr(tx, method, None)) for method in ("init", "update")):
            kind, where = optax.GradientTransformation, "qj.training.by_part"
            expect(tx, kind, argument=name, where=where, fix="by_part(scale=optax.sgd(1e-3))")

    def known(label: str) -> str:
        return label if label in groups else FROZEN

    def labels(tree: PyTree) -> PyTree:
        _check(tree, by_name or {})

        def of_node(node: Any) -> Any:
            if not is_qparams(node):
                return known(WEIGHTS)
            # Fields that an outer optax.masked left out are trees without leaves, and stay so.
            fill = lambda field, label: jax.tree.map(lambda _: known(label), field)  # noqa: E731
            own: Any = fill(node.theta, Part.THETA.value)
            if by_name is not None and isinstance(node.theta, Mapping):
                own = {name: fill(array, _entry(name)) for name, array in node.theta.items()}
            scale, zero_point = (
                fill(getattr(node, part.value), part.value)
                for part in (Part.SCALE, Part.ZERO_POINT)
            )
            return QParams(scale, zero_point, fill(node.bits, FROZEN), own)

        return jax.tree.map(of_node, tree, is_leaf=is_qparams)

    return optax.partition(groups, labels)


def _entry(name: str) -> str:
    return f"{Part.THETA.value}/{name}"


def _check(tree: PyTree, by_name: Mapping[str, Any]) -> None:
    if not any(map(is_qparams, jax.tree.leaves(tree, is_leaf=is_qparams))):
        raise errors.TrainingError(
            "there are no QParams in the tree",
            where="qj.training.by_part",
            why="it moves the parts of a qstate, alone or beside parameters",
            fix="optimizer.init(qstate), or optimizer.init((params, qstate))",
        )
    names = theta_names(tree)
    for name in by_name:
        if name not in names:
            raise errors.TrainingError(
                f"no theta has an entry {name}",
                where="qj.training.by_part(theta=...)",
                why=f"there are {', '.join(sorted(names)) or 'none'}",
                fix="a name of the quantizers' estimator, or leave it out",
            )
