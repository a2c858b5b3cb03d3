"""Weights that jump to and fro between two codes are found, and held."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from quantjax import errors
from quantjax.affine import QParams, is_bypassed
from quantjax.arguments import NUMBERS, expect, first_wrong
from quantjax.granularity import expand
from quantjax.interpreter import leaves_by_path
from quantjax.layout import casts, scale_in_parameter
from quantjax.meshes import REPLICATED, automatic, mesh_of, placed, spec_of
from quantjax.planning import Plan
from quantjax.rounding import HALF_EVEN
from quantjax.selectors import Selector
from quantjax.simulation import centered_codes
from quantjax.training.dampening import nearest
from quantjax.training.followed import followed_weights, places_in
from quantjax.transforms.calibrate import QState
from quantjax.transforms.qstate import checked_qstate
from quantjax.transforms.stored import StoredWeight, parameter_qparams

Threshold = float | Float[Array, ""] | Callable[[Int[Array, ""]], Any]


class Followed(NamedTuple):
    """What is known of one parameter's codes; arrays of its shape but for ``bits``.

    Attributes:
      level: the integer that each weight had last; of a frozen one, the integer that it keeps.
      average: of its integers, moving.
      direction: of its last change: -1, 1, or 0 before the first (int8).
      frequency: of oscillations, moving; from 0 to 1.
      frozen: whether it is held.
      bits: the width that all this is about; NaN before the first update.
    """

    level: Float[Array, "..."]
    average: Float[Array, "..."]
    direction: Int[Array, "..."]
    frequency: Float[Array, "..."]
    frozen: Bool[Array, "..."]
    bits: Float[Array, "..."]


class OscillationState(NamedTuple):
    """State of :func:`freeze_oscillations`: the number of updates, and by path what is followed."""

    step: Int[Array, ""]
    weights: dict[str, Followed]


def freeze_oscillations(
    plan: Plan,
    threshold: Threshold,
    *,
    momentum: float | Float[Array, ""] = 0.01,
    select: Selector | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Find weights whose integers oscillate, and hold each at the integer that it has on average.

    With ``q`` the integer of a weight: it oscillates in a step in which it changes in the direction
    opposite to that of its last change, ``o = 1``, else ``o = 0``. ``f ← m o + (1 - m) f``,
    ``q̄ ← m q + (1 - m) q̄``. Where ``f > threshold``, the weight becomes ``s · (round(q̄) - z)`` and
    stays there, whatever its gradient; where ``s`` is learned, it follows ``s``.

    For the **end** of a chain, with the qstate as an extra argument:

        optimizer = optax.chain(optax.sgd(0.01), freeze_oscillations(plan, 0.02))
        updates, state = optimizer.update(gradient, state, params, qstate=qstate)

    The tree may be the one that was planned for, a part of it (``variables["params"]``) or one that
    holds it (``(params, qstate)``), as long as all followed weights are in it.

    Args:
      plan: whose weights.
      threshold: of the frequency; a number, which may be traced, or a schedule. The authors anneal
        it by a cosine, from 0.1 to 0.01. Below ``m``, one oscillation is enough.
      momentum: ``m``, the weight of the newest; may be traced.
      select: which sites. Default: every quantized weight that can be followed, which is one
        parameter, moved or cast but not computed with, in integer codes, with a fixed range,
        rounded as it is. ``state.weights`` says which those are.

    Raises:
      TrainingError: nothing to follow; a selected weight that cannot be followed; one parameter in
        two sites; a concrete momentum outside (0, 1] or a threshold that is NaN, of which updates
        are NaN where traced; on ``init``, a tree without the weights; on ``update``, no ``params``
        or no ``qstate``.

    Sharp edges: integers are those of ``params`` under the ``qstate`` given, before the update.
    Where a width changes, and at 0 bits, everything starts anew and nothing is held. Random
    roundings are taken to the nearest. A scale that moves by more than half a step of the largest
    code in one update shifts frozen integers for that step. Memory: four floats or so a weight.

    >>> import quantjax as qj
    >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[0.4], [-2.0]])}
    >>> policy = qj.uniform_policy(weight_bits=2, activation_bits=None)
    >>> plan = qj.plan(policy, qj.sites(f, params, jnp.ones((1, 2))))
    >>> qstate = qj.calibrate(plan, {}, params)  # scale 1
    >>> tx = freeze_oscillations(plan, 0.2, momentum=0.25)
    >>> state = tx.init(params)
    >>> for step in (0.2, -0.2, 0.2, -0.2):  # 0.4 and 0.6 by turns: codes 0 and 1
    ...     updates = {"w": jnp.array([[step], [0.0]])}
    ...     updates, state = tx.update(updates, state, params, qstate=qstate)
    ...     params = optax.apply_updates(params, updates)
    >>> state.weights["w"].frozen.ravel().tolist(), round(float(params["w"][0, 0]), 6)
    ([True, False], 0.0)

    Source: Nagel et al., Overcoming oscillations in quantization-aware training, 2022, sections 4.1
    and 4.3, algorithm 1.
    """
    where = "qj.training.freeze_oscillations"
    expect(momentum, NUMBERS, argument="momentum", where=where, fix="momentum=0.01")
    if not callable(threshold):
        expect(threshold, NUMBERS, argument="threshold", where=where, fix="threshold=0.02")
        if first_wrong(threshold, lambda n: ~np.isnan(n)) is not None:
            raise errors.TrainingError(
                "a threshold that is NaN",
                where=where,
                why="a weight whose frequency is above it is frozen, and none would be",
                fix="threshold=0.02",
            )
    if select is not None:
        expect(select, Selector, argument="select", where=where, fix="select=qj.path('*kernel')")
    wrong = first_wrong(momentum, lambda n: (n > 0.0) & (n <= 1.0))
    if wrong is not None:
        raise errors.TrainingError(
            f"a momentum of {wrong:g}",
            where=where,
            why="it is the weight of the newest step in moving averages",
            fix="momentum=0.01",
        )
    followed = {weight.path: weight for weight in followed_weights(plan, select)}

    def init(params: PyTree) -> OscillationState:
        leaves = leaves_by_path(params)
        places = places_in(list(followed), leaves)
        state = {path: _start(w, leaves[places[path]]) for path, w in followed.items()}
        return OscillationState(jnp.zeros((), jnp.int32), state)

    def update(
        updates: PyTree,
        state: OscillationState,
        params: PyTree | None = None,
        *,
        qstate: QState | None = None,
        **extra: Any,
    ) -> tuple[PyTree, OscillationState]:
        del extra
        if params is None or qstate is None:
            raise errors.TrainingError(
                f"an update without {'params' if params is None else 'qstate'}",
                where="qj.training.freeze_oscillations",
                why="codes are those of the parameters under the qstate",
                fix="optimizer.update(gradient, state, params, qstate=qstate)",
            )
        qstate = checked_qstate(plan, qstate)
        limit = threshold(state.step) if callable(threshold) else threshold
        limits = jnp.asarray(limit, jnp.float32), jnp.asarray(momentum, jnp.float32)
        leaves, values = leaves_by_path(updates), leaves_by_path(params)
        places, weights = places_in(list(followed), values), {}
        for path, weight in followed.items():
            place = places[path]
            qparams = parameter_qparams(weight, qstate)
            given = state.weights[path], values[place], leaves[place], qparams, limits
            weights[path], leaves[place] = automatic(
                partial(_step, weight), *given, specs=partial(_specs, values[place])
            )
        updates = jax.tree.unflatten(jax.tree.structure(updates), list(leaves.values()))
        return updates, OscillationState(state.step + 1, weights)

    return optax.GradientTransformationExtraArgs(init, update)


def frozen_share(state: OscillationState) -> Float[Array, ""]:
    """The share of the weights that are followed which are frozen, from 0 to 1.

    >>> float(frozen_share(OscillationState(jnp.int32(0), {})))
    0.0
    """
    flags = [weight.frozen for weight in state.weights.values()]
    held = sum((jnp.sum(flag.astype(jnp.float32)) for flag in flags), start=jnp.zeros(()))
    return held / max(sum(flag.size for flag in flags), 1)


def _start(weight: StoredWeight, value: jax.Array) -> Followed:
    steps, rank = weight.entry.site.steps, len(weight.operand.operand.shape)
    bits = scale_in_parameter(
        jnp.full((*steps, *(1,) * rank), jnp.nan, jnp.float32), weight.moves, len(steps)
    )
    zeros = partial(jnp.zeros_like, value)  # split as it is, along the axes of a mesh
    return Followed(
        zeros(jnp.float32),
        zeros(jnp.float32),
        zeros(jnp.int8),
        zeros(jnp.float32),
        zeros(bool),
        placed(bits, mesh_of(value)),
    )


def _specs(value: jax.Array, found: Any) -> tuple[Followed, Any]:
    """How what :func:`_step` returns is split: as the parameter is, but for the width."""
    del found
    like = spec_of(value)
    return Followed(like, like, like, like, like, bits=REPLICATED), like


def _step(
    weight: StoredWeight,
    last: Followed,
    value: jax.Array,
    update: jax.Array,
    qparams: QParams,
    limits: tuple[jax.Array, jax.Array],
) -> tuple[Followed, jax.Array]:
    """One update of one parameter; QParams at the parameter."""
    threshold, m = limits
    quantizer = weight.operand.quantizer
    assert quantizer is not None
    shape = value.shape
    scale, zero, bits = (expand(array, shape) for array in qparams[:3])
    zero, asleep = jnp.round(zero), is_bypassed(bits)
    # As the product sees it: rounded to the dtypes on its way.
    seen = value
    for dtype in casts(weight.moves):
        seen = seen.astype(dtype)
    now = centered_codes(seen, qparams._replace(bits=bits), nearest(quantizer.arithmetic)) + zero
    anew = bits != expand(last.bits, shape)  # NaN, before the first, equals nothing
    level = jnp.where(anew, now, jnp.where(last.frozen, last.level, now))
    change = jnp.sign(level - jnp.where(anew, now, last.level)).astype(jnp.int8)
    direction = jnp.where(anew, jnp.zeros_like(change), last.direction)
    oscillates = (change * direction == -1).astype(jnp.float32)
    frozen = last.frozen & ~anew
    moving = lambda old, new: jnp.where(frozen, old, m * new + (1.0 - m) * old)  # noqa: E731
    frequency = moving(jnp.where(anew, 0.0, last.frequency), oscillates)
    average = moving(jnp.where(anew, now, last.average), level)
    caught = ~frozen & ~asleep & (frequency > threshold)
    held = quantizer.format.snap(average, jnp.zeros_like(average), bits, HALF_EVEN).level
    level, frozen = jnp.where(caught, held, level), frozen | caught
    direction = jnp.where(change == 0, direction, change)
    middle = (scale * (level - zero)).astype(value.dtype)
    update = jnp.where(frozen, (middle - value).astype(update.dtype), update)
    known = (m > 0.0) & (m <= 1.0) & ~jnp.isnan(threshold)  # those that are traced
    update = jnp.where(known, update, jnp.nan)
    return Followed(level, average, direction, frequency, frozen, qparams.bits), update
