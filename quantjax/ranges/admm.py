"""ADMM on scale and codes: alternating least squares that gets out of its local minimum."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantjax import errors
from quantjax._compat import varying_like
from quantjax.affine import QParams
from quantjax.formats import Format
from quantjax.ranges.base import (
    Configured,
    FitRule,
    checked_iterations,
    known_number,
    valid_where,
)
from quantjax.ranges.iterates import (
    Best,
    Bounds,
    better,
    bounds_of,
    fitted,
    fitted_scale,
    problem_of,
    quantized,
    whole_range,
    with_neighbours,
)
from quantjax.ranges.least_squares import (
    ITERATIONS as ALTERNATIONS,
)
from quantjax.ranges.least_squares import (
    descend,
    squares,
    tried,
)

RHO, ITERATIONS, INNER = 0.5, 20, 2


class _State(NamedTuple):
    feasible: Float[Array, "..."]
    dual: Float[Array, "..."]
    bounds: Bounds
    best: Best


def _fit(
    tensor: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    *,
    rho: float | jax.Array,
    iterations: int,
    inner: int,
) -> QParams:
    problem = problem_of(tensor, scale_shape, format, bits, symmetric=True)
    x, start = problem.x, whole_range(problem)

    def closer(bounds: Bounds, values: jax.Array) -> Bounds:
        scale, zero_point, centered, _ = quantized(problem, bounds, values)
        return bounds_of(problem, fitted_scale(problem, centered, values, scale), zero_point)

    def iterate(_: jax.Array, state: _State) -> _State:
        free = (x + rho * (state.feasible - state.dual)) / (1.0 + rho)
        values = free + state.dual
        bounds = lax.fori_loop(0, inner, lambda _, b: closer(b, values), state.bounds)
        dual = quantized(problem, bounds, values).residual
        best = better(state.best, *tried(problem, bounds))
        return _State(values - dual, dual, bounds, best)

    descended = descend(problem, start, ALTERNATIONS)
    feasible = x - quantized(problem, descended.bounds, x).residual
    first = _State(feasible, jnp.zeros_like(x), descended.bounds, descended)
    best = lax.fori_loop(
        0, iterations, iterate, varying_like(first, (problem.x, problem.bits))
    ).best
    best = better(best, *descend(problem, best.bounds, ALTERNATIONS))
    best = with_neighbours(problem, best, functools.partial(squares, problem))
    return fitted(problem, tried(problem, start), best, power=2.0)


def _fit_at(
    tensor: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    rho: jax.Array,
    *,
    iterations: int,
    inner: int,
) -> QParams:
    found = _fit(tensor, scale_shape, format, bits, rho=rho, iterations=iterations, inner=inner)
    return valid_where((rho > 0.0) & jnp.isfinite(rho), found)


def _rule(rho: float, iterations: int, inner: int) -> FitRule:
    given = (rho, iterations, inner)
    name = "admm" if given == (RHO, ITERATIONS, INNER) else "admm({:g},{},{})".format(*given)
    return FitRule(name, Configured.of(_fit, rho=rho, iterations=iterations, inner=inner))


def admm(
    *, rho: float | jax.Array = RHO, iterations: int = ITERATIONS, inner: int = INNER
) -> FitRule:
    """The scale of a small ``‖w - s q‖²`` by the alternating direction method of multipliers.

    ``min ½‖w - y‖²`` with ``y = g`` and ``g = s q``, whose scaled dual variable is ``λ``:

        ``y ← (w + ρ (g - λ)) / (1 + ρ)``
        ``g ← s q`` near ``y + λ``: ``inner`` times ``q ← snap((y + λ) / s)``,
        ``s ← ⟨y + λ, q⟩ / ⟨q, q⟩``
        ``λ ← λ + y - g``

    The start is the fixed point of :data:`quantjax.ranges.least_squares.LEAST_SQUARES`, with
    ``λ = 0``. Every scale on the way is tried on ``w`` itself; from the best one, least squares
    goes on to its fixed point. The error of each group is therefore never above that of
    ``LEAST_SQUARES``, nor of ``MIN_MAX`` with symmetric codes; the zero point is 0.

    Least squares alone stops at the first scale that its own codes confirm. ``λ`` adds up what the
    codes leave, until some of them change. At 2 to 4 bits and 128 entries a group, a quarter
    to three fifths of all groups end lower, and the mean error falls by 0.1 to 3 %, with 16 entries
    by 2 to 11 % (normal, Laplace, Student's t): as far as the best of a hundred starts.

    Args:
      rho: ``ρ``; an array may be traced. At 1 and above, ``y + λ`` does not overshoot ``w`` and
        nothing is gained; 0.3 to 0.5 gained most.
      iterations: how often ``y``, ``g`` and ``λ`` are updated; 0 leaves least squares.
      inner: how often codes and scale alternate in each, at least 1. Each takes as long as one
        quantization of the tensor, and two more go into every iteration.

    Returns:
      A rule that gives ``QParams(scale, 0, bits)``; deterministic, the same under ``jit`` and
      ``vmap``; ``bits`` may be traced. Formats, scale rules, all-zero groups and groups of one
      entry are as for :func:`quantjax.ranges.least_squares.least_squares`.

    Raises:
      QuantizerError: ``rho`` that is not positive and finite, NaN where it is traced; iterations
        that are no whole number.
      FormatError, on use: a codebook whose levels are to be learned.

    Sharp edges: the paper trains a network, with its loss in place of ``½‖w - y‖²``; here there are
    weights alone. The method has no guarantee for discrete sets, which is why the best is kept.

    >>> from quantjax.formats import integer
    >>> w, bits = jnp.array([0.0, -6.0, -5.0, 9.0, -9.0, 6.0]), jnp.float32(2)
    >>> rules = admm(iterations=0), ADMM  # squared errors 17 and 14
    >>> [rule.fit(w, (1,), integer(), bits).scale.item() for rule in rules]
    [5.5, 7.0]

    Source: Leng et al., Extremely low bit neural network: squeeze the last bit out with ADMM, 2018,
    section 3.
    """
    known = known_number(rho, "admm")
    if known is not None and not (known > 0.0 and math.isfinite(known)):
        raise errors.QuantizerError(
            f"a penalty rho of {known:g}",
            where="the range rule admm",
            why="y would have no minimum near g",
            fix=f"rho={RHO}",
        )
    if inner < 1:
        raise errors.QuantizerError(
            f"{inner} inner iterations",
            where="the range rule admm",
            why="the scale would never move",
            fix=f"inner={INNER}",
        )
    steps = checked_iterations(iterations, "admm"), checked_iterations(inner, "admm")
    if known is None:
        fit = Configured.of(_fit_at, iterations=steps[0], inner=steps[1])
        return FitRule("admm", fit, parameters=(rho,))
    return _rule(known, *steps)


ADMM = admm()
"""20 iterations of ADMM with ``ρ = 0.5``, from and to least squares; see :func:`admm`."""
