"""Batch-norm statistics of a quantized model, estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from quantjax import errors
from quantjax._compat import concrete
from quantjax.interpreter import leaves_by_path

Update = Callable[[PyTree, Any], PyTree]
"""``(running statistics, batch) -> running statistics`` after one forward pass in training mode."""


def reestimate(update: Update, statistics: PyTree, batches: Iterable[Any]) -> PyTree:
    """Running statistics as the exact mean of those of the batches, with the weights as they are.

    A training-mode pass moves each running statistic by ``r' = m r + (1 - m) b``, with ``b`` that
    of the batch. Its momentum ``m`` need not be told: ``a = update(0)`` is ``(1 - m) b``, and
    ``update(P) = m P + a`` at a large power of two ``P`` gives ``m``. The result is
    ``Σ a_i / (n (1 - m))``; of the running statistics given, only structure and dtypes are used.

    Quantization-aware training leaves running statistics behind that no longer fit: codes at the
    edge of two bins change from step to step, and the moving average has seen many versions. Do
    this after training, and before ``qj.freeze`` or :func:`quantjax.training.fold_batch_norm`:

        simulated = jax.jit(qj.fake_quantize(train_f, plan))
        update = lambda stats, x: simulated(qstate, {**variables, "batch_stats": stats}, x)[1]
        variables["batch_stats"] = reestimate(update, variables["batch_stats"], batches)

    Args:
      update: one pass of the user's model, best jitted; called once a batch and once more.
      statistics: a tree of floating-point arrays; leaves of other dtypes stay as they are. Those
        narrower than float32 are handed to ``update`` in float32, and come back in their dtype.
      batches: batches of the training data; each counts the same.

    Raises:
      TrainingError: no batch; a tree of another structure from ``update``; a concrete statistic
        that ``update`` does not move (``m = 1``), as in evaluation mode (under a trace that is
        NaN), or that it returns in less than float32.

    Sharp edges: the mean of variances within batches, as batch norm has it, not the variance of all
    data. The same momentum in all steps is taken for granted: averages that correct their start, as
    cumulative ones, need another way. Of a momentum near 1, float32 leaves few digits of ``1 - m``:
    the result is off by up to 2e-5 of itself at 0.999, 2e-4 at 0.9999. A program of
    ``folded_training`` makes kernels of these statistics: there it takes :class:`Held`, without
    which they are nonsense.

    >>> update = lambda r, x: {"mean": 0.75 * r["mean"] + 0.25 * jnp.mean(x, axis=0)}
    >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[4.0], [5.0]])]
    >>> reestimate(update, {"mean": jnp.array([7.0])}, batches)["mean"].tolist()
    [3.0]

    Source: Nagel et al., Overcoming oscillations in quantization-aware training, 2022, section
    2.3.1 (batch-norm re-estimation); Wu and Johnson, Rethinking "batch" in batchnorm, 2021,
    section 3.
    """
    structure = jax.tree.structure(statistics)
    zeros = jax.tree.map(lambda leaf: _filled(leaf, 0.0), statistics)
    rest: PyTree | None = None
    total: PyTree | None = None
    count = 0
    for batch in batches:
        of_batch = update(zeros, batch)
        _check_structure(structure, jax.tree.structure(of_batch))
        _check_wide(of_batch)
        if rest is None:
            probes = jax.tree.map(lambda leaf: _filled(leaf, _probe(leaf)), statistics)
            rest = jax.tree.map(_rest, probes, update(probes, batch))
            _check_moving(statistics, rest)
        widened = jax.tree.map(_wide, of_batch)
        total = widened if total is None else jax.tree.map(jnp.add, total, widened)
        count += 1
    if count == 0:
        raise errors.TrainingError(
            "no batch to estimate statistics from",
            where="qj.training.reestimate",
            why="batches is empty; a generator that was used before is, too",
            fix="batches=[...], a list or a fresh generator",
        )

    def mean(leaf: Any, rest: jax.Array, total: jax.Array) -> Any:
        if not _is_floating(leaf):
            return leaf
        # Where nothing moves, 0 / 0.
        return (total / (rest * float(count))).astype(jnp.result_type(leaf))

    return jax.tree.map(mean, statistics, rest, total)


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _filled(leaf: Any, value: float) -> jax.Array:
    """A float in float32 or wider: in bfloat16 a momentum and what it leaves are not 1 together."""
    return jnp.full_like(_wide(leaf), value) if _is_floating(leaf) else jnp.asarray(leaf)


def _wide(leaf: Any) -> jax.Array:
    """In float32 or wider, for sums."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float32) if _is_floating(leaf) and leaf.dtype.itemsize < 4 else leaf


def _probe(leaf: Any) -> float:
    """A power of two beside which statistics vanish, so that what comes back is ``m`` times it."""
    if not _is_floating(leaf):
        return 0.0
    return float(2.0 ** (int(np.log2(float(jnp.finfo(_wide(leaf).dtype).max))) - 1))


def _rest(probe: jax.Array, moved: Any) -> jax.Array:
    """``1 - m``, exact: the quotient by a power of two is ``m`` as the model has it."""
    moved = jnp.asarray(moved)
    if not _is_floating(moved):
        return jnp.ones((), jnp.float32)
    return 1.0 - _wide(moved / probe)


def _check_structure(expected: Any, found: Any) -> None:
    if expected != found:
        raise errors.TrainingError(
            "update returns another tree than the running statistics",
            where="qj.training.reestimate",
            why=f"{found} for {expected}",
            fix='update=lambda stats, x: f({**v, "batch_stats": stats}, x)[1]["batch_stats"]',
        )


def _check_wide(of_batch: PyTree) -> None:
    for path, leaf in leaves_by_path(of_batch).items():
        if _is_floating(leaf) and jnp.result_type(leaf).itemsize < 4:
            raise errors.TrainingError(
                f"update rounds the running statistic {path} to {jnp.result_type(leaf)}",
                where="qj.training.reestimate",
                why="what a rounded momentum leaves to a batch is off by percents",
                fix="let update return it in float32, which it is given it in",
            )


def _check_moving(statistics: PyTree, rest: PyTree) -> None:
    shares = leaves_by_path(rest)
    for path, leaf in leaves_by_path(statistics).items():
        known = concrete(shares[path])
        if _is_floating(leaf) and known is not None and np.any(known == 0.0):
            raise errors.TrainingError(
                f"the running statistic {path} does not move",
                where="qj.training.reestimate",
                why="the model runs in evaluation mode, or its momentum is 1",
                fix="a training-mode pass that returns the new statistics",
            )
