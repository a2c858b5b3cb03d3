"""Scales that make the squared error small: codes and scale in turn, until neither moves."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from quantjax._compat import varying_like
from quantjax.affine import QParams
from quantjax.formats import Format
from quantjax.ranges.base import Configured, FitRule, checked_iterations
from quantjax.ranges.iterates import (
    Best,
    Bounds,
    Problem,
    better,
    bounds_of,
    fitted,
    fitted_scale,
    group_sums,
    moved,
    nothing_yet,
    problem_of,
    quantized,
    whole_range,
    with_neighbours,
)

ITERATIONS = 100


class _State(NamedTuple):
    bounds: Bounds
    best: Best
    moves: Bool[Array, ""]
    step: Int[Array, ""]


def squares(problem: Problem, residual: jax.Array) -> Float[Array, "..."]:
    """``‖residual‖²`` of each group, in units of the problem."""
    return group_sums(problem, residual * residual)


def tried(problem: Problem, bounds: Bounds) -> Best:
    """Bounds and ``‖x - s q‖²`` of each group with them."""
    return Best(bounds, squares(problem, quantized(problem, bounds, problem.x).residual))


def descend(problem: Problem, start: Bounds, iterations: int) -> Best:
    """The best of ``start`` and of up to ``iterations`` alternations from there.

    It ends as soon as no bound moves. Groups do not wait for each other in any other sense: one
    that is at its fixed point stays there.
    """
    x = problem.x

    def goes_on(state: _State) -> jax.Array:
        return state.moves & (state.step <= iterations)

    def alternate(state: _State) -> _State:
        scale, zero_point, centered, residual = quantized(problem, state.bounds, x)
        best = better(state.best, state.bounds, squares(problem, residual))
        following = bounds_of(problem, fitted_scale(problem, centered, x, scale), zero_point)
        return _State(following, best, moved(state.bounds, following), state.step + 1)

    first = _State(start, nothing_yet(start), jnp.asarray(True), jnp.zeros((), jnp.int32))
    return lax.while_loop(goes_on, alternate, varying_like(first, (problem.x, problem.bits))).best


def _fit(
    tensor: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    *,
    iterations: int,
) -> QParams:
    problem = problem_of(tensor, scale_shape, format, bits, symmetric=True)
    start = whole_range(problem)
    found = descend(problem, start, iterations)
    found = with_neighbours(problem, found, functools.partial(squares, problem))
    return fitted(problem, tried(problem, start), found, power=2.0)


def _rule(iterations: int) -> FitRule:
    name = "least_squares" if iterations == ITERATIONS else f"least_squares-{iterations}"
    return FitRule(name, Configured.of(_fit, iterations=iterations))


def least_squares(*, iterations: int = ITERATIONS) -> FitRule:
    """The scale and codes of a local minimum of ``‖w - s q‖²``, for each group.

    ``q ← snap(w / s)`` and ``s ← ⟨w, q⟩ / ⟨q, q⟩``, in turn, from the scale of ``MIN_MAX`` with
    symmetric codes. Neither step raises the error where codes are the nearest ones; the scale with
    the smallest error is kept in any case, so that the error is never above that of the start. It
    ends where no scale moves. The zero point is 0.

    With one signed bit codes are signs, and the scale is ``mean |w|``, XNOR-Net's, after one
    iteration. An all-zero group has scale 1; a group of one entry is exact up to rounding where
    the entry's side has levels.

    Takes any format with levels of its own. The format's scale rule is applied to every scale, and
    errors are those after it. Where it has powers of two, it mostly takes the fitted scale back to
    that of the start; twice, half and a quarter of it are tried as well. Where scales depend on
    other groups (NVFP4), the error of the whole tensor is what never rises.

    Args:
      iterations: the most alternations; 0 leaves the start. Memory does not depend on it.

    Returns:
      A rule that gives ``QParams(scale, 0, bits)``; float32 arithmetic, deterministic, the same
      under ``jit`` and ``vmap``; ``bits`` may be traced.

    Raises:
      QuantizerError: iterations that are no whole number of 0 or more.
      FormatError, on use: a codebook whose levels are to be learned.

    Sharp edges: the minimum is local. At 2 to 4 bits and 128 entries a group, the best of a hundred
    starts is up to 3 % below it, which :func:`quantjax.ranges.admm.admm` finds most of; with a few
    entries a group it may be a fraction. Levels whose squares leave float32 keep the start.

    >>> from quantjax.formats import integer
    >>> w, bits = jnp.array([0.0, -6.0, -5.0, 9.0, -9.0, 6.0]), jnp.float32(2)
    >>> rules = least_squares(iterations=0), LEAST_SQUARES
    >>> [rule.fit(w, (1,), integer(), bits).scale.item() for rule in rules]
    [4.5, 5.5]

    Source: Lloyd, Least squares quantization in PCM, 1982, for levels a scale apart; in the form
    above: Leng et al., Extremely low bit neural network: squeeze the last bit out with ADMM, 2018,
    section 3.2.
    """
    return _rule(checked_iterations(iterations, "least_squares"))


LEAST_SQUARES = least_squares()
"""Codes and scale in turn until neither moves; see :func:`least_squares`."""
