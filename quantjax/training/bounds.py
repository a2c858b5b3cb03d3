"""Updates that keep scales positive and an estimator's parameters between bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import SMALLEST_SCALE
from quantjax.arguments import NUMBERS, expect, first_wrong
from quantjax.training.parts import is_qparams, theta_names

Number = float | Float[Array, ""]
_Bound = Callable[[jax.Array, jax.Array], jax.Array]


def keep_positive(
    fraction: Number = 0.5, *, names: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Limit each update of a scale, so that one step never takes it below ``fraction`` of itself.

    ``u' = max(u, (fraction - 1) · s)``, hence ``s + u' >= fraction · s > 0``, and never below the
    smallest normal float32 number. For the end of a chain; all else in the tree passes as it is.

    Args:
      fraction: between 0 and 1; may be traced.
      names: entries of ``theta`` that are kept positive likewise, for instance ``("clip",)``.

    Raises:
      ArgumentError: no number.
      TrainingError: a concrete fraction outside (0, 1), where a traced one makes updates NaN; on
        ``init``, a tree without a scale and without any of the names; on ``update``, no ``params``.

    Sharp edges: a scale that is negative or NaN already stays as it is.

    >>> from quantjax.affine import QParams
    >>> qparams = QParams(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(4.0))
    >>> update, tx = qparams._replace(scale=jnp.float32(-3.0)), keep_positive(0.25)
    >>> float(tx.update(update, tx.init(qparams), qparams)[0].scale)
    -0.75
    """
    where = "qj.training.keep_positive"
    expect(fraction, NUMBERS, argument="fraction", where=where, fix="fraction=0.5")
    wrong = first_wrong(fraction, lambda n: (n > 0.0) & (n < 1.0))
    if wrong is not None:
        raise errors.TrainingError(
            f"a fraction of {wrong:g}",
            where=where,
            why="of a scale, this much is left after the largest step",
            fix="fraction=0.5",
        )

    def bound(update: jax.Array, value: jax.Array) -> jax.Array:
        share = jnp.asarray(fraction, value.dtype)
        share = jnp.where((share > 0.0) & (share < 1.0), share, jnp.nan)  # one that is traced
        floor = jnp.maximum(share * value, jnp.asarray(SMALLEST_SCALE, value.dtype))
        limited = _limited(update, value, floor, jnp.full_like(value, jnp.inf))
        return jnp.where(value > 0.0, limited, update)

    return _bounded(bound, names, "qj.training.keep_positive", with_scales=True)


def keep_between(
    low: Number, high: Number, *, names: Sequence[str]
) -> optax.GradientTransformation:
    """Limit updates, so that entries of ``theta`` stay in ``[low, high]``.

    ``p + u' = clip(p + u, low, high)``. For the end of a chain; all else passes as it is. DSQ's
    ``alpha`` belongs into ``keep_between(0.02, 0.5, names=("alpha",))``.

    Args:
      low, high: may be traced; infinity for no bound.
      names: which entries.

    Raises:
      ArgumentError: no number.
      TrainingError: concrete bounds of which the lower is above the higher, or NaN, where traced
        ones make updates NaN; on ``init``, a tree in which no ``theta`` has any of the names; on
        ``update``, no ``params``.

    >>> from quantjax.affine import QParams
    >>> qparams = QParams(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(4.0))
    >>> qparams = qparams._replace(theta={"alpha": jnp.float32(0.25)})
    >>> tx = keep_between(0.125, 0.5, names=("alpha",))
    >>> float(tx.update(qparams, tx.init(qparams), qparams)[0].theta["alpha"])
    0.25
    >>> update = qparams._replace(theta={"alpha": jnp.float32(-0.25)})
    >>> float(tx.update(update, tx.init(qparams), qparams)[0].theta["alpha"])
    -0.125
    """
    where = "qj.training.keep_between"
    for name, number in (("low", low), ("high", high)):
        expect(number, NUMBERS, argument=name, where=where, fix=f"{name}=0.5")
    least, most = concrete(low), concrete(high)
    if least is not None and most is not None and not np.all(least <= most):
        pairs = np.stack(np.broadcast_arrays(least, most)).reshape(2, -1)
        first, last = pairs[:, ~(pairs[0] <= pairs[1])][:, 0].tolist()
        turned = f"{last:g}, {first:g}" if first > last else "0.02, 0.5"
        raise errors.TrainingError(
            f"bounds from {first:g} to {last:g}",
            where=where,
            fix=f"keep_between({turned}, names=...)",
        )

    def bound(update: jax.Array, value: jax.Array) -> jax.Array:
        low_here, high_here = (jnp.asarray(number, value.dtype) for number in (low, high))
        return _limited(update, value, low_here, high_here)

    return _bounded(bound, names, "qj.training.keep_between", with_scales=False)


def _limited(update: jax.Array, value: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The update after which ``low <= value + update <= high`` holds in floating point."""
    moved = value + update
    limited = jnp.where(moved < low, low - value, jnp.where(moved > high, high - value, update))
    limited = jnp.where(low <= high, limited, jnp.nan)  # bounds that are traced, and none
    # The difference was rounded, and the sum may miss the bound by the last place of it.
    reached = value + limited
    inward = jnp.where(reached < low, jnp.inf, -jnp.inf).astype(value.dtype)
    outside = (reached < low) | (reached > high)
    return jnp.where(outside, jnp.nextafter(limited, inward), limited)


def _bounded(
    bound: _Bound, names: Sequence[str], where: str, *, with_scales: bool
) -> optax.GradientTransformation:
    """A stateless transformation of the scales and the named entries of ``theta`` of a tree."""

    def of_node(update: Any, value: Any) -> Any:
        if not is_qparams(update):
            return update
        # Trees, not arrays: what optax.masked leaves out is a tree without leaves.
        if with_scales:
            update = update._replace(scale=jax.tree.map(bound, update.scale, value.scale))
        if not isinstance(update.theta, Mapping):
            return update
        theta = {
            name: jax.tree.map(bound, array, value.theta[name]) if name in names else array
            for name, array in update.theta.items()
        }
        return update._replace(theta=theta)

    def init(params: PyTree) -> optax.EmptyState:
        nodes = [n for n in jax.tree.leaves(params, is_leaf=is_qparams) if is_qparams(n)]
        has_scale = any(jax.tree.leaves(node.scale) for node in nodes)
        found = theta_names(params)
        missing = [name for name in names if name not in found]
        if missing or not (names or (with_scales and has_scale)):
            raise errors.TrainingError(
                f"there is no {missing[0] if missing else 'scale'} to bound",
                where=where,
                why=f"entries of theta: {', '.join(sorted(found)) or 'none'}",
                fix="init with the qstate, or with names= that its estimators have",
            )
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        if params is None:
            raise errors.TrainingError(
                "an update without params",
                where=where,
                why="the bound depends on where the parameters are",
                fix="optimizer.update(gradient, state, qstate)",
            )
        return jax.tree.map(of_node, updates, params, is_leaf=is_qparams), state

    return optax.GradientTransformation(init, update)


__all__ = ["Number", "keep_between", "keep_positive"]
